"""Models that read pictures or sound around a language model: the language model in them is what experts are made of.

Its config is nested in theirs as `text_config`, and its tensors have a prefix.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from frankenmoe.families.dense import FAMILIES
from frankenmoe.families.rotary import written_rope
from frankenmoe.families.spec import Config, Inside
from frankenmoe.families.towers import QWEN3_VISION, Tower

# fields of the outer config that name tokens of pictures and videos -> the defaults of its class
QWEN3_TOKENS = {
    "image_token_id": 151655, "video_token_id": 151656, "vision_start_token_id": 151652, "vision_end_token_id": 151653,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Wrapper:
    """A model type around a language model of type `text`.

    `defaults` are those of the nested config's class where they differ from those of `text`. `positions` are settings
    of rotation that tell places in a picture apart; in text they change nothing. `alone`: AutoModelForCausalLM makes
    the language model alone of such a folder, and not the outer model. Where an MoE format has the outer model too,
    `tower` and `passed` say what passes through: the part that reads pictures, and outer fields with token ids and the
    defaults of their class.
    """

    text: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    positions: tuple[str, ...] = ()
    alone: bool = False
    tower: Tower | None = None
    passed: Mapping[str, Any] = field(default_factory=dict)


WRAPPERS: Mapping[str, Wrapper] = {
    # its published configs leave out what the class has anyway
    "gemma3": Wrapper(
        "gemma3_text",
        defaults={
            "vocab_size": 262208,
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "num_hidden_layers": 26,
            "num_attention_heads": 8,
        },
    ),
    "gemma4": Wrapper("gemma4_text"),
    "qwen3_5": Wrapper("qwen3_5_text", alone=True),
    # on text alone its language model computes what Qwen3 does
    "qwen3_vl": Wrapper(
        "qwen3",
        defaults={"rope_theta": 500000.0, "max_position_embeddings": 128000},
        positions=("mrope_section", "mrope_interleaved"),
        tower=QWEN3_VISION,
        passed=QWEN3_TOKENS,
    ),
}
# what a tensor's name begins with -> what the same tensor of a language model alone begins with
PREFIXES: Mapping[str, str] = {
    "model.language_model.": "model.",
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
}
PEFT = "base_model.model."
ROTARY = ("rope_scaling", "rope_parameters")
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
    for key in ROTARY:
        if isinstance(found.get(key), Mapping):
            found[key] = {name: value for name, value in found[key].items() if name not in wrapper.positions}
    return found


def outer_config(inside: Inside, moe: Config, base: Config) -> dict[str, Any]:
    """The config of an MoE inside an outer model: `moe` is what would be its own, `base` the outer dense model's."""
    wrapper = WRAPPERS[inside.wrapper]
    assert wrapper.tower is not None
    places = _places(wrapper, base)
    rotary = {key: {**(moe[key] or {"rope_type": "default"}), **places} for key in ROTARY if places}
    nested = {key: value for key, value in moe.items() if key != "architectures"}
    field_name = wrapper.tower.field
    return {
        "architectures": moe["architectures"],
        "model_type": moe["model_type"],
        "text_config": {**nested, **rotary, "model_type": inside.text},
        field_name: {**base[field_name], "model_type": inside.tower},
        **_passed(wrapper, base),
        **{key: moe[key] for key in ("tie_word_embeddings", "dtype", "torch_dtype")},
    }


def check_passed(wrapper: Wrapper, config: Config) -> None:
    """Raises TypeError for an outer field that passes through and is no token id."""
    for key, value in _passed(wrapper, config).items():
        if type(value) is not int or value < 0:
            raise TypeError(f"{key} {value!r:.40}, expected a token id")


def _passed(wrapper: Wrapper, config: Config) -> dict[str, Any]:
    """The outer fields that pass through."""
    return {key: config.get(key, default) for key, default in wrapper.passed.items()}


def _places(wrapper: Wrapper, config: Config) -> dict[str, Any]:
    """The settings that tell places in a picture apart, as an outer config has them."""
    written = written_rope(config["text_config"])
    return {key: written[key] for key in wrapper.positions if written.get(key) is not None}


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
