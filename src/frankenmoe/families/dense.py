"""One table per dense family that can be built into a stock MoE."""

from collections.abc import Mapping
from typing import Any

from frankenmoe.families.spec import Family, TensorSpec

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
            backbone=ENDS + ATTENTION + ATTENTION_BIAS + PRE_NORMS,
            ffn=FFN + FFN_BIAS,
            defaults=_defaults(
                max_position_embeddings=2048, bos_token_id=1, eos_token_id=2, attention_bias=False, mlp_bias=False
            ),
        ),
        Family(
            model_type="mistral",
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
            backbone=ENDS + ATTENTION + _rows(LAYER + "self_attn.", QKV_BIAS) + PRE_NORMS,
            ffn=FFN,
            defaults=_defaults(max_position_embeddings=32768, num_key_value_heads=32),
            window_switch="use_sliding_window",
        ),
        Family(
            model_type="qwen3",
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
    )
}
