"""One table per dense family that can be built into a stock MoE."""

from collections.abc import Mapping
from typing import Any

from frankenmoe.families.spec import Family, Piece, TensorSpec

LAYER = "model.layers.{layer}."


def _rows(prefix: str, shapes: Mapping[str, tuple[str, ...]], when: str | None = None) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(prefix + name, shape, when) for name, shape in shapes.items())


ENDS = (
    TensorSpec("model.embed_tokens.weight", ("vocab", "hidden")),
    TensorSpec("model.norm.weight", ("hidden",)),
    TensorSpec("lm_head.weight", ("vocab", "hidden"), when="untied"),
)
ATTENTION = _rows(
    LAYER + "self_attn.",
    {
        "q_proj.weight": ("query", "hidden"),
        "k_proj.weight": ("kv", "hidden"),
        "v_proj.weight": ("kv", "hidden"),
        "o_proj.weight": ("hidden", "query"),
    },
)
QKV_BIAS = {"q_proj.bias": ("query",), "k_proj.bias": ("kv",), "v_proj.bias": ("kv",)}
ATTENTION_BIAS = _rows(LAYER + "self_attn.", QKV_BIAS | {"o_proj.bias": ("hidden",)}, when="attention_bias")
QKV_BIASES = _rows(LAYER + "self_attn.", QKV_BIAS)
# q, k and v in one matrix, gate and up in another, as in Phi
FUSED_ATTENTION = _rows(
    LAYER + "self_attn.", {"qkv_proj.weight": ("query+kv+kv", "hidden"), "o_proj.weight": ("hidden", "query")}
)
FUSED_FFN = _rows(LAYER + "mlp.", {"gate_up_proj.weight": ("ffn+ffn", "hidden"), "down_proj.weight": ("hidden", "ffn")})
FUSED_QKV_PIECES: Mapping[str, tuple[Piece, ...]] = {
    LAYER + "self_attn.qkv_proj.weight": (
        Piece(LAYER + "self_attn.q_proj.weight", "query"),
        Piece(LAYER + "self_attn.k_proj.weight", "kv"),
        Piece(LAYER + "self_attn.v_proj.weight", "kv"),
    )
}
FUSED_FFN_PIECES: Mapping[str, tuple[Piece, ...]] = {
    LAYER + "mlp.gate_up_proj.weight": (
        Piece(LAYER + "mlp.gate_proj.weight", "ffn"),
        Piece(LAYER + "mlp.up_proj.weight", "ffn"),
    )
}
PRE_NORMS = _rows(LAYER, {"input_layernorm.weight": ("hidden",), "post_attention_layernorm.weight": ("hidden",)})
FFN = _rows(
    LAYER + "mlp.",
    {
        "gate_proj.weight": ("ffn", "hidden"),
        "up_proj.weight": ("ffn", "hidden"),
        "down_proj.weight": ("hidden", "ffn"),
    },
)
FFN_BIAS = _rows(
    LAYER + "mlp.",
    {"gate_proj.bias": ("ffn",), "up_proj.bias": ("ffn",), "down_proj.bias": ("hidden",)},
    when="mlp_bias",
)


def _defaults(**own: Any) -> Mapping[str, Any]:
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


FAMILIES: Mapping[str, Family] = {
    family.model_type: family
    for family in (
        Family(
            model_type="llama",
            plain_mlp="LlamaMLP",
            backbone=ENDS + ATTENTION + ATTENTION_BIAS + PRE_NORMS,
            ffn=FFN + FFN_BIAS,
            defaults=_defaults(
                max_position_embeddings=2048, bos_token_id=1, eos_token_id=2, attention_bias=False, mlp_bias=False
            ),
        ),
        Family(
            model_type="mistral",
            plain_mlp="MistralMLP",
            backbone=ENDS + ATTENTION + PRE_NORMS,
            ffn=FFN,
            defaults=_defaults(
                max_position_embeddings=131072,
                num_key_value_heads=8,
                sliding_window=4096,
                bos_token_id=1,
                eos_token_id=2,
            ),
        ),
        Family(
            model_type="qwen2",
            plain_mlp="Qwen2MLP",
            backbone=ENDS + ATTENTION + QKV_BIASES + PRE_NORMS,
            ffn=FFN,
            defaults=_defaults(max_position_embeddings=32768, num_key_value_heads=32),
            window_switch="use_sliding_window",
        ),
        Family(
            model_type="qwen3",
            plain_mlp="Qwen3MLP",
            backbone=ENDS
            + ATTENTION
            + ATTENTION_BIAS
            + _rows(LAYER + "self_attn.", {"q_norm.weight": ("head_dim",), "k_norm.weight": ("head_dim",)})
            + PRE_NORMS,
            ffn=FFN,
            defaults=_defaults(
                max_position_embeddings=32768, num_key_value_heads=32, head_dim=128, attention_bias=False
            ),
            window_switch="use_sliding_window",
        ),
        Family(
            model_type="olmo2",
            plain_mlp="Olmo2MLP",
            backbone=ENDS
            + ATTENTION
            + ATTENTION_BIAS
            + _rows(LAYER + "self_attn.", {"q_norm.weight": ("query",), "k_norm.weight": ("kv",)})
            + _rows(
                LAYER,
                {"post_attention_layernorm.weight": ("hidden",), "post_feedforward_layernorm.weight": ("hidden",)},
            ),
            ffn=FFN,
            defaults=_defaults(
                max_position_embeddings=2048,
                rms_norm_eps=1e-5,
                pad_token_id=1,
                eos_token_id=50279,
                attention_bias=False,
            ),
        ),
        Family(
            model_type="seed_oss",
            plain_mlp="SeedOssMLP",
            backbone=ENDS
            + ATTENTION
            + _rows(LAYER + "self_attn.", QKV_BIAS, when="attention_bias")
            + _rows(LAYER + "self_attn.", {"o_proj.bias": ("hidden",)}, when="attention_out_bias")
            + PRE_NORMS,
            ffn=FFN + FFN_BIAS,
            defaults=_defaults(
                max_position_embeddings=524288,
                num_key_value_heads=8,
                head_dim=128,
                attention_bias=True,
                attention_out_bias=False,
                mlp_bias=False,
                attention_dropout=0.1,
                pad_token_id=1,
                bos_token_id=0,
                eos_token_id=2,
            ),
            # its attention_bias is that of q, k and v only
            reads={"attention_bias": "attention_out_bias"},
            fields=frozenset({"residual_dropout"}),
        ),
        Family(
            model_type="phi3",
            backbone=ENDS + FUSED_ATTENTION + PRE_NORMS,
            ffn=FUSED_FFN,
            pieces={**FUSED_QKV_PIECES, **FUSED_FFN_PIECES},
            defaults=_defaults(
                max_position_embeddings=4096,
                original_max_position_embeddings=4096,
                rms_norm_eps=1e-5,
                bos_token_id=1,
                eos_token_id=32000,
                pad_token_id=32000,
            ),
            rope_names={"su": "longrope", "yarn": "longrope"},
            fields=frozenset({"resid_pdrop", "embd_pdrop"}),
        ),
        Family(
            model_type="granite",
            plain_mlp="GraniteMLP",
            backbone=ENDS + ATTENTION + ATTENTION_BIAS + PRE_NORMS,
            ffn=FFN + FFN_BIAS,
            defaults=_defaults(
                max_position_embeddings=2048,
                bos_token_id=1,
                eos_token_id=2,
                attention_bias=False,
                mlp_bias=False,
                embedding_multiplier=1.0,
                logits_scaling=1.0,
                residual_multiplier=1.0,
                attention_multiplier=1.0,
            ),
        ),
    )
}

MLPS = tuple(dict.fromkeys(family.mlp for family in FAMILIES.values()))
"""Names of the module that is an FFN, in all families; models without a table call it `mlp`."""
