"""Where llama.cpp keeps the plain tensors of a backbone: names, shapes and orders in a GGUF file.

Source: src/llama-arch.cpp and conversion/*.py of llama.cpp (MIT licence, the ggml authors; see NOTICE).
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from frankenmoe.checkpoint.tensors import Exp, Scale, Shift
from frankenmoe.families.rows import LAYER
from frankenmoe.families.spec import Dims

BLOCK = "blk.{layer}."


@dataclass(frozen=True, slots=True)
class Place:
    """A tensor of the file: its name, and the symbols of its shape where that is not the plain tensor's.

    Its numbers go through `steps` in float32. `order` gives the order of its rows; with `columns`, that of its columns.
    """

    name: str
    shape: tuple[str, ...] = ()
    steps: tuple[Exp | Scale | Shift, ...] = ()
    order: Callable[[Dims], tuple[int, ...]] | None = None
    columns: bool = False


Places = Mapping[str, Place]
"""Plain name, with `{layer}` -> place."""


def _inside(prefix: str, names: Mapping[str, str | Place], *, layer: str = LAYER) -> dict[str, Place]:
    """The places of tensors of a layer, from plain names without the prefix; a place may be its name alone."""
    return {layer + prefix + ours: _in_block(theirs) for ours, theirs in names.items()}


def _in_block(place: str | Place) -> Place:
    if isinstance(place, str):
        return Place(BLOCK + place)
    return Place(BLOCK + place.name, place.shape, place.steps, place.order, place.columns)


def generic_name(name: str) -> tuple[int, str]:
    """(3, "model.layers.{layer}.x") for model.layers.3.x; (-1, name) for a tensor outside the layers."""
    match = re.fullmatch(r"(model|backbone)\.layers\.(\d+)\.(.+)", name)
    return (int(match[2]), f"{match[1]}.layers.{{layer}}.{match[3]}") if match else (-1, name)


HEAD = {"model.embed_tokens.weight": Place("token_embd.weight"), "lm_head.weight": Place("output.weight")}
ENDS = {**HEAD, "model.norm.weight": Place("output_norm.weight")}
FFN_NORM = _inside("", {"post_attention_layernorm.weight": "ffn_norm.weight"})
NORM = _inside("", {"input_layernorm.weight": "attn_norm.weight"})
_ATTENTION: Mapping[str, str] = {
    "q_proj.weight": "attn_q.weight",
    "k_proj.weight": "attn_k.weight",
    "v_proj.weight": "attn_v.weight",
    "o_proj.weight": "attn_output.weight",
}
ATTENTION = _inside("self_attn.", _ATTENTION)
PLAIN = {**ENDS, **NORM, **FFN_NORM, **ATTENTION}
QKV_BIAS = _inside(
    "self_attn.", {"q_proj.bias": "attn_q.bias", "k_proj.bias": "attn_k.bias", "v_proj.bias": "attn_v.bias"}
)
O_BIAS = _inside("self_attn.", {"o_proj.bias": "attn_output.bias"})
QK_NORM = _inside("self_attn.", {"q_norm.weight": "attn_q_norm.weight", "k_norm.weight": "attn_k_norm.weight"})
GLM4 = {**PLAIN, **_inside("", {"post_attention_layernorm.weight": "post_attention_norm.weight"}), **QKV_BIAS}
COHERE2 = {**ENDS, **NORM, **ATTENTION}
LFM2 = {
    **HEAD,
    "model.embedding_norm.weight": Place("token_embd_norm.weight"),
    **_inside("", {"operator_norm.weight": "attn_norm.weight", "ffn_norm.weight": "ffn_norm.weight"}),
    **{name: place for name, place in ATTENTION.items() if "o_proj" not in name},
    **_inside(
        "self_attn.",
        {
            "out_proj.weight": "attn_output.weight",
            "q_layernorm.weight": "attn_q_norm.weight",
            "k_layernorm.weight": "attn_k_norm.weight",
        },
    ),
    **_inside(
        "conv.",
        {
            "conv.weight": Place("shortconv.conv.weight", shape=("hidden", "kernel")),
            "in_proj.weight": "shortconv.in_proj.weight",
            "out_proj.weight": "shortconv.out_proj.weight",
        },
    ),
}
# A is stored as the logarithm of -A
NEGATIVE_EXP = (Exp(), Scale(-1.0))
_MIXER: Mapping[str, str | Place] = {
    "A_log": Place("ssm_a", shape=("mamba_heads", "1"), steps=NEGATIVE_EXP),
    "D": Place("ssm_d", shape=("mamba_heads", "1")),
    "dt_bias": "ssm_dt.bias",
    "conv1d.weight": Place("ssm_conv1d.weight", shape=("convolved", "kernel")),
    "conv1d.bias": "ssm_conv1d.bias",
    "in_proj.weight": "ssm_in.weight",
    "norm.weight": Place("ssm_norm.weight", shape=("mamba_groups", "mamba_group")),
    "out_proj.weight": "ssm_out.weight",
}
MAMBA = _inside("mamba.", _MIXER)
_BACKBONE = "backbone.layers.{layer}."
NEMOTRON_H = {
    "backbone.embeddings.weight": Place("token_embd.weight"),
    "backbone.norm_f.weight": Place("output_norm.weight"),
    "lm_head.weight": HEAD["lm_head.weight"],
    **_inside("", {"norm.weight": "attn_norm.weight"}, layer=_BACKBONE),
    **_inside("mixer.", {**_ATTENTION, **_MIXER}, layer=_BACKBONE),
}


def key_heads(dims: Dims) -> int:
    """The number of key heads of linear attention, whose keys are as wide as its values."""
    return (dims.size("linear_qkv") - dims.size("linear_values")) // 2 // dims.size("linear_head")


def _tiled(*, head: str, after_keys: bool = False) -> Callable[[Dims], tuple[int, ...]]:
    """The order of value heads in which every key head's first one comes first, then every key head's second one.

    In checkpoints the value heads of one key head are side by side. `head` is the size of a head; `after_keys`: queries
    and keys come before the values and stay.
    """

    def order(dims: Dims) -> tuple[int, ...]:
        keys, values, width = key_heads(dims), dims.size("linear_heads"), dims.size(head)
        before = 2 * keys * dims.size("linear_head") if after_keys else 0
        each = values // keys
        heads = [key * each + turn for turn in range(each) for key in range(keys)]
        return (*range(before), *(before + place * width + row for place in heads for row in range(width)))

    return order


# its norms multiply by 1 + weight, but for those of linear attention
ONE_MORE = (Shift(1.0),)
QWEN3_5 = {
    **HEAD,
    "model.norm.weight": Place("output_norm.weight", steps=ONE_MORE),
    **ATTENTION,
    **_inside(
        "",
        {
            "input_layernorm.weight": Place("attn_norm.weight", steps=ONE_MORE),
            "post_attention_layernorm.weight": Place("post_attention_norm.weight", steps=ONE_MORE),
        },
    ),
    **_inside(
        "self_attn.",
        {
            "q_norm.weight": Place("attn_q_norm.weight", steps=ONE_MORE),
            "k_norm.weight": Place("attn_k_norm.weight", steps=ONE_MORE),
        },
    ),
    **_inside(
        "linear_attn.",
        {
            "A_log": Place("ssm_a", steps=NEGATIVE_EXP, order=_tiled(head="1")),
            "dt_bias": Place("ssm_dt.bias", order=_tiled(head="1")),
            "conv1d.weight": Place(
                "ssm_conv1d.weight", shape=("linear_qkv", "kernel"), order=_tiled(head="linear_head", after_keys=True)
            ),
            "norm.weight": "ssm_norm.weight",
            "in_proj_qkv.weight": Place("attn_qkv.weight", order=_tiled(head="linear_head", after_keys=True)),
            "in_proj_z.weight": Place("attn_gate.weight", order=_tiled(head="linear_head")),
            "in_proj_b.weight": Place("ssm_beta.weight", order=_tiled(head="1")),
            "in_proj_a.weight": Place("ssm_alpha.weight", order=_tiled(head="1")),
            "out_proj.weight": Place("ssm_out.weight", order=_tiled(head="linear_head"), columns=True),
        },
    ),
}
# Gemma 4's layers have seven norms; its router reads a norm of its own, and its experts' outputs are scaled one by one
GEMMA4 = {
    **ENDS,
    **NORM,
    **ATTENTION,
    **QK_NORM,
    "model.embed_tokens_per_layer.weight": Place("per_layer_token_embd.weight"),
    "model.per_layer_model_projection.weight": Place("per_layer_model_proj.weight"),
    "model.per_layer_projection_norm.weight": Place("per_layer_proj_norm.weight"),
    **_inside(
        "",
        {
            "post_attention_layernorm.weight": "post_attention_norm.weight",
            "pre_feedforward_layernorm.weight": "ffn_norm.weight",
            "post_feedforward_layernorm.weight": "post_ffw_norm.weight",
            "layer_scalar": Place("layer_output_scale.weight", shape=("1",)),
            "per_layer_input_gate.weight": "inp_gate.weight",
            "per_layer_projection.weight": "proj.weight",
            "post_per_layer_input_norm.weight": "post_norm.weight",
            "post_feedforward_layernorm_1.weight": Place("post_ffw_norm_1.weight", shape=("hidden",)),
            "pre_feedforward_layernorm_2.weight": Place("pre_ffw_norm_2.weight", shape=("hidden",)),
            "post_feedforward_layernorm_2.weight": Place("post_ffw_norm_2.weight", shape=("hidden",)),
            "router.scale": Place("ffn_gate_inp.scale", shape=("hidden",)),
            "router.per_expert_scale": Place("ffn_down_exps.scale", shape=("experts",)),
        },
    ),
}
ROUTER = BLOCK + "ffn_gate_inp.weight"
SHARED_ROUTER = BLOCK + "ffn_gate_inp_shexp.weight"
EXPERTS: Mapping[str, str] = {
    f"{which}_proj.weight": f"{BLOCK}ffn_{which}_exps.weight" for which in ("gate", "up", "down")
}
SHARED_EXPERT: Mapping[str, str] = {
    f"{which}_proj.weight": f"{BLOCK}ffn_{which}_shexp.weight" for which in ("gate", "up", "down")
}
# the FFN beside the experts where it has the names of a dense model's
DENSE_FFN: Mapping[str, str] = {
    f"{which}_proj.weight": f"{BLOCK}ffn_{which}.weight" for which in ("gate", "up", "down")
}
EVERY: Places = {**GEMMA4, **LFM2, **MAMBA, **NEMOTRON_H, **QWEN3_5, **PLAIN, **QKV_BIAS, **O_BIAS, **QK_NORM}


def gguf_name(name: str) -> str | None:
    """The GGUF name of a plain backbone tensor; None if no architecture here has such a tensor."""
    layer, generic = generic_name(name)
    return EVERY[generic].name.format(layer=layer) if generic in EVERY else None
