"""Gemma 3 and Gemma 4: norms on both sides of attention and FFN, windows, and rotary settings per kind of layer."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from frankenmoe.checkpoint.tensors import Scale, Shift
from frankenmoe.families.rows import (
    ATTENTION,
    ATTENTION_BIAS,
    ENDS,
    FFN,
    HEAD_NORMS,
    LAYER,
    all_but_every,
    defaults,
    rows,
)
from frankenmoe.families.spec import FULL, ONE_FOR_BOTH, SLIDING, Config, Family, TensorSpec

# layers that take keys and values from an earlier layer of their kind
REUSING = {SLIDING: f"{SLIDING}, reusing", FULL: f"{FULL}, reusing"}
FOUR_NORMS = rows(
    LAYER,
    {
        "input_layernorm.weight": ("hidden",),
        "post_attention_layernorm.weight": ("hidden",),
        "pre_feedforward_layernorm.weight": ("hidden",),
        "post_feedforward_layernorm.weight": ("hidden",),
    },
)
COMMON = defaults(
    hidden_activation="gelu_pytorch_tanh",
    max_position_embeddings=131072,
    num_key_value_heads=4,
    head_dim=256,
    pad_token_id=0,
    bos_token_id=2,
    eos_token_id=1,
    tie_word_embeddings=True,
    attention_bias=False,
    final_logit_softcapping=None,
)


_types = all_but_every(SLIDING, "sliding_window_pattern", usual=6)


def _gemma4_types(config: Config) -> list[str]:
    """The kinds of its layers; the last one always has full attention."""
    return [*_types(config)[:-1], FULL]


def _gemma4_kinds(config: Config) -> list[str]:
    """The kinds of its layers, which also tell the layers that reuse keys and those with one matrix for both."""
    types, shared = _gemma4_types(config), config["num_kv_shared_layers"]
    full = ONE_FOR_BOTH if config["attention_k_eq_v"] else FULL
    own = [full if kind == FULL else kind for kind in types[: len(types) - shared]]
    return own + [REUSING[kind] for kind in types[len(own) :]]


def _common(config: Config) -> dict[str, int]:
    """The sizes that layers with full attention may have of their own, as all other layers have them."""
    heads = config["num_attention_heads"]
    return {
        "head_dim": config["head_dim"] or config["hidden_size"] // heads,
        "num_key_value_heads": config["num_key_value_heads"] or heads,
    }


def _of_full(config: Config) -> dict[str, int]:
    """These sizes in layers with full attention, in the spelling of the hub or in that of transformers 5.23."""
    own = {"head_dim": config["global_head_dim"], "num_key_value_heads": config.get("num_global_key_value_heads")}
    if "per_layer_config" in config:
        own = (config["per_layer_config"] or {}).get(str(_gemma4_types(config).index(FULL)), {})
    kept = own if config["attention_k_eq_v"] else {"head_dim": own.get("head_dim")}
    return {key: int(kept.get(key) or size) for key, size in _common(config).items()}


def _other_layers(config: Config) -> object:
    """A `per_layer_config` that says more than the sizes of layers with full attention; None if there is none."""
    same, full = _common(config), _of_full(config)
    wanted = {str(layer): full for layer, kind in enumerate(_gemma4_types(config)) if kind == FULL}
    found = {layer: same | own for layer, own in (config.get("per_layer_config") or wanted).items()}
    return None if found == wanted else found


def _gemma4_sizes(config: Config) -> Mapping[str, int]:
    (head, heads), (own_head, own_heads) = (tuple(each(config).values()) for each in (_of_full, _common))
    keys = {SLIDING: own_heads * own_head, FULL: heads * head, ONE_FOR_BOTH: heads * head}
    return {
        "full_head": head,
        "full_kv": heads * head,
        "full_query": config["num_attention_heads"] * head,
        "wide": config["intermediate_size"] * (2 if config["use_double_wide_mlp"] else 1),
        "layer_input": config["hidden_size_per_layer_input"],
        "layer_inputs": config["hidden_size_per_layer_input"] * config["num_hidden_layers"],
        "layer_vocab": config["vocab_size_per_layer_input"],
        "cached": sum(keys.get(kind, 0) for kind in _gemma4_kinds(config)),
    }


def _attention(own: tuple[str, ...], reusing: str, query: str, kv: str, head: str) -> tuple[TensorSpec, ...]:
    """Attention in the layers of some kinds, of which only `own` have keys; `query`, `kv` and `head` are its sizes."""
    every, with_values, here = (*own, reusing), own[:1], LAYER + "self_attn."
    always = {"q_proj.weight": (query, "hidden"), "q_norm.weight": (head,), "o_proj.weight": ("hidden", query)}
    return (
        *rows(here, always, kinds=every),
        *rows(here, {"k_proj.weight": (kv, "hidden"), "k_norm.weight": (head,)}, kinds=own),
        *rows(here, {"v_proj.weight": (kv, "hidden")}, kinds=with_values),
        *rows(here, {"q_proj.bias": (query,), "o_proj.bias": ("hidden",)}, "attention_bias", every),
        *rows(here, {"k_proj.bias": (kv,)}, "attention_bias", own),
        *rows(here, {"v_proj.bias": (kv,)}, "attention_bias", with_values),
    )


PER_LAYER = "hidden_size_per_layer_input"
GEMMA4_ROPES = {
    SLIDING: {"rope_type": "default", "rope_theta": 1e4},
    FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
}
GEMMA4 = Family(
    model_type="gemma4_text",
    plain_mlp="Gemma4TextMLP",
    backbone=(
        *ENDS,
        *FOUR_NORMS,
        TensorSpec(LAYER + "layer_scalar", ("1",)),
        *_attention((SLIDING,), REUSING[SLIDING], "query", "kv", "head_dim"),
        *_attention((FULL, ONE_FOR_BOTH), REUSING[FULL], "full_query", "full_kv", "full_head"),
        TensorSpec("model.embed_tokens_per_layer.weight", ("layer_vocab", "layer_inputs"), PER_LAYER),
        TensorSpec("model.per_layer_model_projection.weight", ("layer_inputs", "hidden"), PER_LAYER),
        TensorSpec("model.per_layer_projection_norm.weight", ("layer_input",), PER_LAYER),
        *rows(
            LAYER,
            {
                "per_layer_input_gate.weight": ("layer_input", "hidden"),
                "per_layer_projection.weight": ("hidden", "layer_input"),
                "post_per_layer_input_norm.weight": ("hidden",),
            },
            PER_LAYER,
        ),
    ),
    ffn=tuple(replace(row, kinds=(SLIDING, FULL, ONE_FOR_BOTH)) for row in FFN)
    + tuple(
        replace(row, kinds=tuple(REUSING.values()), shape=shape)
        for row, shape in zip(FFN, (("wide", "hidden"), ("wide", "hidden"), ("hidden", "wide")), strict=True)
    ),
    defaults={
        **COMMON,
        "sliding_window": 512,
        "global_head_dim": 512,
        "num_global_key_value_heads": None,
        "vocab_size_per_layer_input": 262144,
        "hidden_size_per_layer_input": 256,
        "attention_k_eq_v": False,
        "num_kv_shared_layers": 0,
        "use_double_wide_mlp": False,
        "enable_moe_block": False,
    },
    reads={
        "hidden_act": "hidden_activation",
        "layer_types": _gemma4_types,
        "kinds": _gemma4_kinds,
        "global_head_dim": lambda config: _of_full(config)["head_dim"],
        "num_global_key_value_heads": lambda config: _of_full(config)["num_key_value_heads"],
        "per_layer_config": _other_layers,
        "own_experts": "enable_moe_block",
        "use_double_wide_mlp": lambda config: bool(config["use_double_wide_mlp"] and config["num_kv_shared_layers"]),
        # what is seen in pictures alone
        "use_bidirectional_attention": lambda config: (
            None if config.get("use_bidirectional_attention") == "vision" else config.get("use_bidirectional_attention")
        ),
    },
    sizes=_gemma4_sizes,
    # of the experts that it does not have
    fields=frozenset({"num_experts", "top_k_experts", "moe_intermediate_size"}),
    rope_by_kind=lambda config: config.get("rope_parameters") or GEMMA4_ROPES,
)


# Gemma 4 has a norm on values, which Gemma 3 lacks: so far below its epsilon it only scales
FADED = 2.0**-24
NEAR = 0.05


def _raised(config: Config) -> float:
    """What makes up for faded values: a power of two if one is near, as for the published models.

    bfloat16 then keeps every weight, and the norm behind attention takes out the difference.
    """
    exact = config["rms_norm_eps"] ** 0.5 / FADED
    power = 2.0 ** round(math.log2(exact))
    return power if abs(power / exact - 1) < NEAR else exact


def _gemma3_ropes(config: Config) -> dict[str, dict[str, Any]]:
    """Rotary settings by kind of layer; in older configs `rope_scaling` is that of full attention alone."""
    given, scaling = config.get("rope_parameters") or {}, dict(config.get("rope_scaling") or {})
    if "type" in scaling:
        scaling.setdefault("rope_type", scaling.pop("type"))
    first = {"rope_type": "default"}
    return {
        SLIDING: first | {"rope_theta": config["rope_local_base_freq"]} | dict(given.get(SLIDING) or {}),
        FULL: first | {"rope_theta": config["rope_theta"]} | dict(given.get(FULL) or {}) | scaling,
    }


GEMMA3 = Family(
    model_type="gemma3_text",
    plain_mlp="Gemma3MLP",
    backbone=ENDS + ATTENTION + ATTENTION_BIAS + HEAD_NORMS + FOUR_NORMS,
    ffn=FFN,
    changes={
        # its norms multiply by 1 + weight
        **{row.name: (Shift(1.0),) for row in (*FOUR_NORMS, *HEAD_NORMS, ENDS[1])},
        HEAD_NORMS[0].name: (Shift(1.0), lambda config: Scale(config["query_pre_attn_scalar"] ** -0.5)),
        LAYER + "self_attn.v_proj.weight": (Scale(FADED),),
        LAYER + "self_attn.v_proj.bias": (Scale(FADED),),
        LAYER + "self_attn.o_proj.weight": (lambda config: Scale(_raised(config)),),
        LAYER + "self_attn.o_proj.bias": (
            lambda config: Scale(_raised(config) * FADED / config["rms_norm_eps"] ** 0.5),
        ),
    },
    wide_range=True,
    defaults={
        **COMMON,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "sliding_window": 4096,
        "query_pre_attn_scalar": 256,
    },
    reads={
        "hidden_act": "hidden_activation",
        "layer_types": _types,
        "global_head_dim": lambda config: _common(config)["head_dim"],
        "num_global_key_value_heads": lambda config: _common(config)["num_key_value_heads"],
        "attention_k_eq_v": lambda config: False,
        "num_kv_shared_layers": lambda config: 0,
        "hidden_size_per_layer_input": lambda config: 0,
        "vocab_size_per_layer_input": "vocab_size",
    },
    fields=frozenset({"sliding_window_pattern", "cache_implementation"}),
    rope_by_kind=_gemma3_ropes,
)
GEMMAS = (GEMMA3, GEMMA4)
