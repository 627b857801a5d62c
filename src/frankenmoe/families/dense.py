"""One table per dense family that can be built into a stock MoE."""

from collections.abc import Mapping
from dataclasses import replace

from frankenmoe.checkpoint.tensors import Shift
from frankenmoe.families.gemma import GEMMAS
from frankenmoe.families.layered import LAYERED
from frankenmoe.families.nemotron import NEMOTRON_H
from frankenmoe.families.rows import (
    ATTENTION,
    ATTENTION_BIAS,
    ENDS,
    FFN,
    FFN_BIAS,
    FUSED_ATTENTION,
    FUSED_FFN,
    FUSED_FFN_PIECES,
    FUSED_QKV_PIECES,
    HEAD_NORMS,
    LAYER,
    PRE_NORMS,
    QKV_BIAS,
    QKV_BIASES,
    defaults,
    rows,
)
from frankenmoe.families.spec import Family, Reading

# where the field called attention_bias is that of q, k and v
BIAS_OF_QKV: Mapping[str, Reading] = {"qkv_bias": "attention_bias", "attention_bias": lambda config: False}

FAMILIES: Mapping[str, Family] = {
    family.model_type: family
    for family in (
        Family(
            model_type="llama",
            plain_mlp="LlamaMLP",
            backbone=ENDS + ATTENTION + ATTENTION_BIAS + PRE_NORMS,
            ffn=FFN + FFN_BIAS,
            defaults=defaults(
                max_position_embeddings=2048, bos_token_id=1, eos_token_id=2, attention_bias=False, mlp_bias=False
            ),
        ),
        Family(
            model_type="mistral",
            plain_mlp="MistralMLP",
            backbone=ENDS + ATTENTION + PRE_NORMS,
            ffn=FFN,
            defaults=defaults(
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
            defaults=defaults(max_position_embeddings=32768, num_key_value_heads=32),
            window_switch="use_sliding_window",
            reads={"qkv_bias": lambda config: True},
        ),
        Family(
            model_type="qwen3",
            plain_mlp="Qwen3MLP",
            backbone=ENDS + ATTENTION + ATTENTION_BIAS + HEAD_NORMS + PRE_NORMS,
            ffn=FFN,
            defaults=defaults(
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
            + rows(LAYER + "self_attn.", {"q_norm.weight": ("query",), "k_norm.weight": ("kv",)})
            + rows(
                LAYER,
                {"post_attention_layernorm.weight": ("hidden",), "post_feedforward_layernorm.weight": ("hidden",)},
            ),
            ffn=FFN,
            defaults=defaults(
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
            + rows(LAYER + "self_attn.", QKV_BIAS, when="attention_bias")
            + rows(LAYER + "self_attn.", {"o_proj.bias": ("hidden",)}, when="attention_out_bias")
            + PRE_NORMS,
            ffn=FFN + FFN_BIAS,
            defaults=defaults(
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
            reads={"attention_bias": "attention_out_bias", "qkv_bias": "attention_bias"},
            fields=frozenset({"residual_dropout"}),
        ),
        Family(
            model_type="phi3",
            backbone=ENDS + FUSED_ATTENTION + PRE_NORMS,
            ffn=FUSED_FFN,
            pieces={**FUSED_QKV_PIECES, **FUSED_FFN_PIECES},
            defaults=defaults(
                max_position_embeddings=4096,
                original_max_position_embeddings=4096,
                rms_norm_eps=1e-5,
                bos_token_id=1,
                eos_token_id=32000,
                pad_token_id=32000,
                sliding_window=None,
            ),
            rope_names={"su": "longrope", "yarn": "longrope"},
            # Phi-4-mini's; code of the time before transformers had the class reads them
            fixed={"full_attn_mod": 1, "interpolate_factor": 1, "lm_head_bias": False},
        ),
        Family(
            model_type="granite",
            plain_mlp="GraniteMLP",
            backbone=ENDS + ATTENTION + ATTENTION_BIAS + PRE_NORMS,
            ffn=FFN + FFN_BIAS,
            defaults=defaults(
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
        Family(
            model_type="hyperclovax",
            plain_mlp="HyperCLOVAXMLP",
            backbone=ENDS + ATTENTION + ATTENTION_BIAS + PRE_NORMS,
            ffn=FFN + FFN_BIAS,
            defaults=defaults(
                max_position_embeddings=2048,
                bos_token_id=1,
                eos_token_id=2,
                attention_bias=False,
                mlp_bias=False,
                embedding_multiplier=1.0,
                logits_scaling=1.0,
                residual_multiplier=1.0,
                use_post_norm=True,
            ),
            # it multiplies logits where Granite divides
            reads={
                "logits_scaling": lambda config: 1 / config["logits_scaling"],
                "attention_multiplier": "attention_multiplier",
            },
        ),
        Family(
            model_type="gemma",
            plain_mlp="GemmaMLP",
            backbone=ENDS + ATTENTION + ATTENTION_BIAS + PRE_NORMS,
            ffn=FFN,
            # its norms multiply by 1 + weight
            changes={name: (Shift(1.0),) for name in (*(row.name for row in PRE_NORMS), "model.norm.weight")},
            defaults=defaults(
                hidden_act="gelu_pytorch_tanh",
                max_position_embeddings=8192,
                num_key_value_heads=16,
                head_dim=256,
                pad_token_id=0,
                bos_token_id=2,
                eos_token_id=1,
                tie_word_embeddings=True,
                attention_bias=False,
            ),
            reads={
                "embedding_multiplier": lambda config: config["hidden_size"] ** 0.5,
                # in its first configs `gelu` meant the approximation by tanh
                "hidden_act": lambda config: {"gelu": "gelu_pytorch_tanh"}.get(
                    config["hidden_act"], config["hidden_act"]
                ),
            },
            fields=frozenset({"hidden_activation"}),
        ),
        Family(
            model_type="ernie4_5",
            plain_mlp="Ernie4_5MLP",
            backbone=ENDS + ATTENTION + tuple(replace(row, when="use_bias") for row in ATTENTION_BIAS) + PRE_NORMS,
            ffn=FFN + tuple(replace(row, when="use_bias") for row in FFN_BIAS),
            defaults=defaults(
                rope_theta=500000.0,
                max_position_embeddings=131072,
                num_key_value_heads=2,
                head_dim=128,
                rms_norm_eps=1e-5,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
                tie_word_embeddings=True,
                use_bias=False,
            ),
            reads={"attention_bias": "use_bias", "mlp_bias": "use_bias"},
            interleaved=True,
        ),
        Family(
            model_type="glm",
            backbone=ENDS + ATTENTION + rows(LAYER + "self_attn.", QKV_BIAS, when="attention_bias") + PRE_NORMS,
            ffn=FUSED_FFN,
            pieces=FUSED_FFN_PIECES,
            defaults=defaults(
                max_position_embeddings=131072,
                num_key_value_heads=2,
                head_dim=128,
                rms_norm_eps=1.5625e-7,
                attention_bias=True,
                partial_rotary_factor=0.5,
                pad_token_id=151329,
                eos_token_id=[151329, 151336, 151338],
            ),
            reads=BIAS_OF_QKV,
            interleaved=True,
        ),
        Family(
            model_type="helium",
            plain_mlp="HeliumMLP",
            backbone=ENDS + ATTENTION + rows(LAYER + "self_attn.", QKV_BIAS, when="attention_bias") + PRE_NORMS,
            ffn=FFN + FFN_BIAS,
            reads=BIAS_OF_QKV,
            defaults=defaults(
                max_position_embeddings=4096,
                num_key_value_heads=20,
                head_dim=128,
                rms_norm_eps=1e-8,
                rope_theta=100000.0,
                pad_token_id=3,
                bos_token_id=1,
                eos_token_id=2,
                attention_bias=False,
                mlp_bias=False,
            ),
            interleaved=True,
        ),
        *LAYERED,
        *GEMMAS,
        NEMOTRON_H,
    )
}

OPAQUE = frozenset(name for family in FAMILIES.values() for name in family.opaque)
"""Classes whose code reads the weights of its linear layers itself, so that these cannot be wrapped."""

MLPS = tuple(dict.fromkeys(family.mlp for family in FAMILIES.values() if family.in_every_layer))
"""Names of the module that is an FFN in every layer, in all families; models without a table call it `mlp`."""


def _ffn_part(family: Family) -> str:
    """What in a tensor's name tells that it is one of an FFN, as a regular expression."""
    inside = "" if family.in_every_layer else rf"(?=\.(?:{'|'.join(family.linears)})\.)"
    return family.mlp + inside


FFN_PARTS = "|".join(dict.fromkeys(map(_ffn_part, FAMILIES.values())))
"""A regular expression of the part of a tensor's name that tells that it is one of an FFN, in all families."""
