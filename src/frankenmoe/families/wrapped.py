"""Models that read pictures or sound around a language model: the language model in them is what experts are made of.

Its config is nested in theirs as `text_config`, and its tensors have a prefix.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from frankenmoe.families.dense import FAMILIES
from frankenmoe.families.spec import Config


@dataclass(frozen=True, slots=True)
class Wrapper:
    """A model type around a language model of type `text`.

    `defaults` are those of the nested config's class where they differ from those of `text`. `positions` are settings
    of rotation that tell places in a picture apart; in text they change nothing.
    """

    text: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    positions: tuple[str, ...] = ()


WRAPPERS: Mapping[str, Wrapper] = {
    "gemma3": Wrapper("gemma3_text"),
    "gemma4": Wrapper("gemma4_text"),
    "qwen3_5": Wrapper("qwen3_5_text"),
    # on text alone its language model computes what Qwen3 does
    "qwen3_vl": Wrapper(
        "qwen3",
        defaults={"rope_theta": 500000.0, "max_position_embeddings": 128000},
        positions=("mrope_section", "mrope_interleaved"),
    ),
}
# what a tensor's name begins with -> what the same tensor of a language model alone begins with
PREFIXES: Mapping[str, str] = {
    "model.language_model.": "model.",
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
}
PEFT = "base_model.model."
# fields of the outer config that count; where it lacks them, the nested ones
OUTER = ("tie_word_embeddings", "quantization_config", "compression_config")
# fields of the outer config that count where the nested one lacks them
ALSO_OUTER = ("bos_token_id", "eos_token_id", "pad_token_id", "dtype", "torch_dtype", "transformers_version")


def text_config(config: Config) -> dict[str, Any]:
    """The config of the language model; that of a language model alone is its own."""
    wrapper = wrapper_of(config)
    if wrapper is None:
        return dict(config)
    outer = {key: config[key] for key in OUTER if config.get(key) is not None}
    also = {key: config[key] for key in ALSO_OUTER if key in config}
    found = {**wrapper.defaults, **also, **config["text_config"], **outer, "model_type": wrapper.text}
    for key in ("rope_scaling", "rope_parameters"):
        if isinstance(found.get(key), Mapping):
            found[key] = {name: value for name, value in found[key].items() if name not in wrapper.positions}
    return found


def wrapper_of(config: Config) -> Wrapper | None:
    """What is around the language model of a config; None if nothing is."""
    return WRAPPERS.get(str(config.get("model_type"))) if isinstance(config.get("text_config"), Mapping) else None


def prefixes_of(config: Config) -> Mapping[str, str]:
    """What names in the files of a model begin with -> what they begin with in the class of its language model."""
    family = FAMILIES.get(str(config.get("model_type")))
    return PREFIXES if wrapper_of(config) else family.prefixes if family else {}


def text_name(name: str, prefixes: Mapping[str, str] = PREFIXES) -> str:
    """The name of a tensor as a language model alone has it; in an adapter, PEFT's words stand before the prefix."""
    before = PEFT if name.startswith(PEFT) else ""
    rest = name.removeprefix(before)
    found = next((prefix for prefix in prefixes if rest.startswith(prefix)), "")
    return before + prefixes.get(found, "") + rest.removeprefix(found)
