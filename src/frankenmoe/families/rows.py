"""Rows and defaults that the tables of dense families share."""

from collections.abc import Callable, Mapping
from typing import Any

from frankenmoe.families.spec import FULL, Config, Piece, TensorSpec

LAYER = "model.layers.{layer}."


def rows(
    prefix: str, shapes: Mapping[str, tuple[str, ...]], when: str | None = None, kinds: tuple[str, ...] = ()
) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(prefix + name, shape, when, kinds) for name, shape in shapes.items())


ENDS = (
    TensorSpec("model.embed_tokens.weight", ("vocab", "hidden")),
    TensorSpec("model.norm.weight", ("hidden",)),
    TensorSpec("lm_head.weight", ("vocab", "hidden"), when="untied"),
)
QKVO = {
    "q_proj.weight": ("query", "hidden"),
    "k_proj.weight": ("kv", "hidden"),
    "v_proj.weight": ("kv", "hidden"),
    "o_proj.weight": ("hidden", "query"),
}
ATTENTION = rows(LAYER + "self_attn.", QKVO)
QKV_BIAS = {"q_proj.bias": ("query",), "k_proj.bias": ("kv",), "v_proj.bias": ("kv",)}
ATTENTION_BIAS = rows(LAYER + "self_attn.", QKV_BIAS | {"o_proj.bias": ("hidden",)}, when="attention_bias")
QKV_BIASES = rows(LAYER + "self_attn.", QKV_BIAS)
HEAD_NORMS = rows(LAYER + "self_attn.", {"q_norm.weight": ("head_dim",), "k_norm.weight": ("head_dim",)})
# q, k and v in one matrix, gate and up in another, as in Phi
FUSED_ATTENTION = rows(
    LAYER + "self_attn.", {"qkv_proj.weight": ("query+kv+kv", "hidden"), "o_proj.weight": ("hidden", "query")}
)
FUSED_FFN = rows(LAYER + "mlp.", {"gate_up_proj.weight": ("ffn+ffn", "hidden"), "down_proj.weight": ("hidden", "ffn")})
FUSED_QKV_PIECES: Mapping[str, tuple[Piece, ...]] = {
    LAYER + "self_attn.qkv_proj.weight": (
        Piece(LAYER + "self_attn.q_proj.weight", "query"),
        Piece(LAYER + "self_attn.k_proj.weight", "kv"),
        Piece(LAYER + "self_attn.v_proj.weight", "kv"),
    )
}
GATE_UP_PIECES = (Piece(LAYER + "mlp.gate_proj.weight", "ffn"), Piece(LAYER + "mlp.up_proj.weight", "ffn"))
FUSED_FFN_PIECES: Mapping[str, tuple[Piece, ...]] = {LAYER + "mlp.gate_up_proj.weight": GATE_UP_PIECES}
PRE_NORMS = rows(LAYER, {"input_layernorm.weight": ("hidden",), "post_attention_layernorm.weight": ("hidden",)})
FFN = rows(
    LAYER + "mlp.",
    {
        "gate_proj.weight": ("ffn", "hidden"),
        "up_proj.weight": ("ffn", "hidden"),
        "down_proj.weight": ("hidden", "ffn"),
    },
)
FFN_BIAS = rows(
    LAYER + "mlp.",
    {"gate_proj.bias": ("ffn",), "up_proj.bias": ("ffn",), "down_proj.bias": ("hidden",)},
    when="mlp_bias",
)


def mamba(prefix: str, kinds: tuple[str, ...], *, conv_bias: str, bias: str) -> tuple[TensorSpec, ...]:
    """The rows of a Mamba 2 layer; `conv_bias` and `bias` are the settings that say whether it has biases."""
    shapes = {
        "A_log": ("mamba_heads",),
        "D": ("mamba_heads",),
        "dt_bias": ("mamba_heads",),
        "conv1d.weight": ("convolved", "1", "kernel"),
        "in_proj.weight": ("projected", "hidden"),
        "norm.weight": ("inner",),
        "out_proj.weight": ("hidden", "inner"),
    }
    return (
        *rows(prefix, shapes, kinds=kinds),
        *rows(prefix, {"conv1d.bias": ("convolved",)}, conv_bias, kinds),
        *rows(prefix, {"in_proj.bias": ("projected",), "out_proj.bias": ("hidden",)}, bias, kinds),
    )


def defaults(**own: Any) -> Mapping[str, Any]:
    """Defaults that all families' config classes share, then the family's own."""
    common = {
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "use_cache": True,
        "tie_word_embeddings": False,
        "attention_dropout": 0.0,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
    }
    return common | own


def all_but_every(kind: str, interval: str, *, usual: int = 4) -> Callable[[Config], list[str]]:
    """Full attention in every n-th layer, and `kind` in the others, unless layers are listed.

    n is the field `interval`, or `usual` where that is absent.
    """

    def kinds(config: Config) -> list[str]:
        every = int(config.get(interval) or usual)
        layers = range(1, config["num_hidden_layers"] + 1)
        return list(config.get("layer_types") or (kind if layer % every else FULL for layer in layers))

    return kinds
