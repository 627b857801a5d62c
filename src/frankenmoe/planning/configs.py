"""Checks the config.json of a source: sizes, values, quantization."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from frankenmoe.errors import SourceError
from frankenmoe.families import FAMILIES, VIRTUAL
from frankenmoe.families.rotary import with_nested, written_rope
from frankenmoe.families.spec import Dims
from frankenmoe.families.values import MOST_LAYERS, odd_value
from frankenmoe.families.wrapped import WRAPPERS

# sizes that every config must have, those that families with a table need too, and optional ones
SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads")
FAMILY_SIZES = ("intermediate_size", "vocab_size")
OPTIONAL_SIZES = (
    "num_key_value_heads", "num_kv_heads", "multi_query_group_num", "head_dim", "max_position_embeddings",
)  # fmt: skip
# families whose config classes have multi_query on by default
MULTI_QUERY = ("falcon", "gpt_bigcode")
GROUPED = ("num_key_value_heads", "num_kv_heads", "multi_query_group_num")
# numbers that must be positive and finite, or every model computes NaN
POSITIVE = ("rope_theta", "rope_local_base_freq", "rms_norm_eps")
MOST = 1e30
# config fields of quantized weights
QUANTIZED = ("quantization_config", "compression_config")
# how transformers dequantizes while loading; other methods do it afterwards, if at all
DEQUANTIZE: Mapping[str, str] = {
    "fp8": "FineGrainedFP8Config(dequantize=True)",
    "mxfp4": "Mxfp4Config(dequantize=True)",
    "compressed-tensors": "CompressedTensorsConfig(dequantize=True)",
}
MOST_LABELS = 100_000
WRONG_FILE = "fetch config.json again: the one that save_pretrained wrote beside the weights"
WRONG_CONFIG = "config.json and weights are of two different models"


def check_config(name: object, folder: Path, config: Mapping[str, Any]) -> None:
    """Raises SourceError if the config of a source lacks a size or has an impossible one, or if it is quantized.

    `config` is in one spelling; `name` is what the recipe calls the source.
    """
    file, family = folder / "config.json", FAMILIES.get(str(config.get("model_type")))
    if not isinstance(config.get("model_type"), str):
        raise SourceError(f"{file} has no model_type, expected the name of a family", hint=WRONG_FILE)
    if isinstance(config.get("text_config"), Mapping) and config.get("hidden_size") is None:
        reason = VIRTUAL.get(config["model_type"])
        raise SourceError(
            f"{file} is that of {config['model_type']}, and inside such a model the language model is not read"
            + (f": {reason}" if reason else ""),
            hint=f"use a language model alone, or one inside {', '.join(WRAPPERS)}",
        )
    # what a family derives from other fields is checked with its sizes, below
    required = (*SIZES, *(key for key in FAMILY_SIZES if family and key not in family.reads))
    for key in (*required, *(key for key in OPTIONAL_SIZES if config.get(key) is not None)):
        value = config.get(key)
        most = MOST_LAYERS if key == "num_hidden_layers" else 2**31 - 1
        if type(value) is not int or not 1 <= value <= most:  # `true` is an int to Python and not to us
            said = f"{key} {value!r:.40}" if key in config else f"no {key}"
            raise SourceError(
                f"{file} has {said}, expected a whole number from 1 to {most}",
                hint=WRONG_FILE,
            )
    rotary = written_rope(config)
    if not isinstance(rotary, Mapping):
        raise SourceError(
            f"{file} has rotary settings {rotary!r:.40}, expected a mapping such as {{'rope_type': 'default'}}",
            hint="fetch config.json again, or delete the setting",
        )
    thetas = (("rope_theta", settings.get("rope_theta")) for settings in with_nested(rotary))
    for key, value in (*thetas, *((key, config.get(key)) for key in POSITIVE)):
        if isinstance(value, int | float) and not isinstance(value, bool):
            wrong = not 0 < value < MOST
        else:
            wrong = family is not None and key == "rms_norm_eps" and key in config
        if wrong:
            raise SourceError(f"{file} has {key} {value!r:.40}, expected a positive number", hint=WRONG_FILE)
    labels = config.get("num_labels", 0)
    if type(labels) is not int or not 0 <= labels <= MOST_LABELS:  # transformers makes a table of them
        raise SourceError(
            f"{file} has num_labels {labels!r:.40}, expected a whole number up to {MOST_LABELS}",
            hint="remove the setting: a language model has no labels",
        )
    window = config.get("sliding_window")
    if family and window is not None and type(window) is not int:
        raise SourceError(f"{file} has sliding_window {window!r:.40}, expected a whole number or null", hint=WRONG_FILE)
    _refuse_quantized(name, config)
    if family:
        odd = odd_value(family, config)
        if odd is not None:
            raise SourceError(f"{file} {odd}", hint=WRONG_FILE)
        dims = family.dims(config)
        if dims.ffn < 1:
            raise SourceError(f"{file} has FFNs of {dims.ffn} rows, expected at least one", hint=WRONG_FILE)
        _check_heads(file, dims)


def _refuse_quantized(name: object, config: Mapping[str, Any]) -> None:
    """Raises SourceError for quantized weights."""
    said = next((config[key] for key in QUANTIZED if config.get(key)), None)
    if said is not None:
        method = (said.get("quant_method") or said.get("quant_algo")) if isinstance(said, Mapping) else said
        raise SourceError(
            f"{name} is quantized: config.json has a quantization_config, method {method!s:.40}; expected "
            "weights in float32, float16 or bfloat16",
            hint=f"name the model it was quantized from, or dequantize it first: {dequantizing(str(method))}",
        )


def dequantizing(method: str) -> str:
    """How to make weights in a usual type of those that `method` quantized."""
    option = DEQUANTIZE.get(method)
    load = f"load it with from_pretrained(..., quantization_config={option})" if option else "load it with transformers"
    call = "" if option else " call model.dequantize() where its method has that,"
    return f"{load},{call} save_pretrained(folder) in bfloat16, and name that folder"


def _check_heads(file: Path, dims: Dims) -> None:
    if dims.heads % dims.kv_heads or not dims.head_dim:
        raise SourceError(
            f"{file} has {dims.heads} attention heads, {dims.kv_heads} key-value heads and hidden size {dims.hidden}, "
            "expected heads that share the others evenly",
            hint=WRONG_CONFIG,
        )


def odd_heads(config: Mapping[str, Any]) -> int:
    """Cached key-value heads of a family without a table: one in multi-query models, all in Falcon's second generation.

    There transformers repeats the grouped heads before it caches them.
    """
    heads = int(config["num_attention_heads"])
    if config.get("new_decoder_architecture"):
        return heads
    if config.get("multi_query", config.get("model_type") in MULTI_QUERY):
        return 1
    return next((int(config[key]) for key in GROUPED if config.get(key)), heads)
