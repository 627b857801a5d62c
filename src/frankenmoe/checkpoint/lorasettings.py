"""The settings of a PEFT adapter: which of them are understood, and how its LoRA terms are scaled."""

from collections.abc import Iterator, Mapping
from typing import Any

from frankenmoe.checkpoint.patterns import MOST_STEPS, plain_pattern, steps
from frankenmoe.checkpoint.reader import Adapter
from frankenmoe.errors import SourceError

# settings that are computed here as PEFT does
COMPUTED = frozenset({"peft_type", "lora_alpha", "alpha_pattern", "use_rslora", "init_lora_weights"})
# settings that say how an adapter was trained, or that its tensors say again
TOLD_BY_TENSORS = frozenset({"r", "rank_pattern", "target_modules", "exclude_modules", "layers_to_transform"})
TOLD_BY_TENSORS |= {"layers_pattern", "bias", "modules_to_save", "trainable_token_indices", "ensure_weight_tying"}
TRAINING = frozenset({"task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode"})
TRAINING |= {"peft_version", "lora_dropout", "loftq_config", "eva_config", "corda_config", "lora_ga_config"}
# these mean nothing without another setting; the last two are those of ms-swift
TRAINING |= {"runtime_config", "megatron_core", "qalora_group_size", "lorap_lr_ratio", "lorap_emb_lr"}
UNDERSTOOD = COMPUTED | TOLD_BY_TENSORS | TRAINING
# initialisations that keep the base's weights; PiSSA, OLoRA and the like change them on loading
PLAIN_INIT = (None, True, False, "gaussian", "eva", "orthogonal")
USUAL_ALPHA = 8  # PEFT's, where a config has no lora_alpha
IN_MODULE = r"(.*\.)?({})$"  # how a pattern stands for the end of a module's name
MOST = 1e30


def check_settings(adapter: Adapter) -> None:
    """Raises SourceError for an adapter that may compute something other than W + scale * B A.

    A setting that is not in the table must be absent, null, false or empty: PEFT adds settings all the time.
    """
    config = adapter.config
    kind = config.get("peft_type", "LORA")
    asked = [] if kind == "LORA" else [f"peft_type {kind!r:.40}"]
    asked += [f"{key:.100} {value!r:.40}" for key, value in config.items() if key not in UNDERSTOOD and value]
    if config.get("init_lora_weights", True) not in PLAIN_INIT:
        asked.append(f"init_lora_weights {config['init_lora_weights']!r:.40}")
    if asked:
        raise SourceError(
            f"the adapter {adapter.folder} uses {', '.join(asked[:5])}, expected a plain LoRA",
            hint="merge it into its model with PEFT's merge_and_unload and name that model as the source; a setting "
            "that changes nothing may be removed from adapter_config.json",
        )


def lora_scale(adapter: Adapter, module: str, *, rank: int) -> float:
    """The factor of B A for one module: alpha / rank, or alpha / sqrt(rank) (rsLoRA, arXiv 2312.03732).

    Raises SourceError for an alpha that is no number, and for a pattern that is no plain one.
    """
    alpha = next(_own_alphas(adapter, module), adapter.config.get("lora_alpha", USUAL_ALPHA))
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not abs(alpha) < MOST:
        raise _odd_setting(adapter, f"lora_alpha {_short(alpha)} for {module}", expected="a finite number")
    return alpha / (rank**0.5 if adapter.config.get("use_rslora") else rank)


def _own_alphas(adapter: Adapter, module: str) -> Iterator[Any]:
    patterns = adapter.config.get("alpha_pattern") or {}
    if not isinstance(patterns, Mapping):
        raise _odd_setting(adapter, f"alpha_pattern {patterns!r:.40}", expected="a mapping from modules to numbers")
    found = [plain_pattern(pattern, IN_MODULE) for pattern in patterns]
    if None not in found and steps(patterns) > MOST_STEPS:
        raise _odd_setting(
            adapter,
            f"{len(patterns)} entries in alpha_pattern with many repetitions (* or +)",
            expected="names of modules, or a few regular expressions",
        )
    for (pattern, value), expression in zip(patterns.items(), found, strict=True):
        if expression is None:
            raise _odd_setting(
                adapter,
                f"an alpha_pattern {pattern!r:.80}",
                expected="names of modules, or plain regular expressions for them",
            )
        if expression.match(module):
            yield value


def _short(value: object) -> str:
    """A value for a message; the digits of huge numbers are not spelt out."""
    return f"{value!r:.40}" if not isinstance(value, int) or abs(value) < MOST else "of more than 30 digits"


def _odd_setting(adapter: Adapter, found: str, *, expected: str) -> SourceError:
    return SourceError(
        f"the adapter {adapter.folder} has {found}, expected {expected}", hint="fetch its adapter_config.json again"
    )
