"""One table per dense family that can be built into a stock MoE."""

from collections.abc import Mapping
from typing import Any

from frankenmoe.checkpoint.tensors import Shift
from frankenmoe.families.spec import FULL, Config, Family, Piece, TensorSpec

LAYER = "model.layers.{layer}."


def _rows(
    prefix: str, shapes: Mapping[str, tuple[str, ...]], when: str | None = None, kinds: tuple[str, ...] = ()
) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(prefix + name, shape, when, kinds) for name, shape in shapes.items())


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


def _lfm2_kinds(config: Config) -> tuple[str, ...]:
    """What its layers are: from `layer_types`, or from the older list of attention layers."""
    if config.get("layer_types"):
        return tuple(config["layer_types"])
    full = config.get("full_attn_idxs")
    return tuple(FULL if full is None or layer in full else "conv" for layer in range(config["num_hidden_layers"]))


def _lfm2_ffn(config: Config) -> int:
    """The width of its FFNs: two thirds of the number in the config, rounded up to a multiple."""
    width = int(config.get("block_ff_dim") or config["intermediate_size"])
    if not config["block_auto_adjust_ff_dim"]:
        return width
    width, step = int(config["block_ffn_dim_multiplier"] * int(2 * width / 3)), int(config["block_multiple_of"])
    return -(-width // step) * step


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
        Family(
            model_type="hyperclovax",
            plain_mlp="HyperCLOVAXMLP",
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
                use_post_norm=True,
            ),
            # it multiplies logits where Granite divides
            reads={"logits_scaling": lambda config: 1 / config["logits_scaling"]},
        ),
        Family(
            model_type="gemma",
            plain_mlp="GemmaMLP",
            backbone=ENDS + ATTENTION + ATTENTION_BIAS + PRE_NORMS,
            ffn=FFN,
            # its norms multiply by 1 + weight
            changes={name: (Shift(1.0),) for name in (*(row.name for row in PRE_NORMS), "model.norm.weight")},
            defaults=_defaults(
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
            backbone=ENDS
            + ATTENTION
            + _rows(LAYER + "self_attn.", QKV_BIAS | {"o_proj.bias": ("hidden",)}, when="use_bias")
            + PRE_NORMS,
            ffn=FFN
            + _rows(
                LAYER + "mlp.",
                {"gate_proj.bias": ("ffn",), "up_proj.bias": ("ffn",), "down_proj.bias": ("hidden",)},
                when="use_bias",
            ),
            defaults=_defaults(
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
            backbone=ENDS + ATTENTION + _rows(LAYER + "self_attn.", QKV_BIAS, when="attention_bias") + PRE_NORMS,
            ffn=FUSED_FFN,
            pieces=FUSED_FFN_PIECES,
            defaults=_defaults(
                max_position_embeddings=131072,
                num_key_value_heads=2,
                head_dim=128,
                rms_norm_eps=1.5625e-7,
                attention_bias=True,
                partial_rotary_factor=0.5,
                pad_token_id=151329,
                eos_token_id=[151329, 151336, 151338],
            ),
            reads={"qkv_bias": "attention_bias", "attention_bias": lambda config: False},
            interleaved=True,
        ),
        Family(
            model_type="lfm2",
            mlp="feed_forward",
            backbone=(
                ENDS[0],
                TensorSpec("model.embedding_norm.weight", ("hidden",)),
                ENDS[2],
                *_rows(LAYER, {"operator_norm.weight": ("hidden",), "ffn_norm.weight": ("hidden",)}),
                *_rows(
                    LAYER + "self_attn.",
                    {
                        "q_proj.weight": ("query", "hidden"),
                        "k_proj.weight": ("kv", "hidden"),
                        "v_proj.weight": ("kv", "hidden"),
                        "out_proj.weight": ("hidden", "query"),
                        "q_layernorm.weight": ("head_dim",),
                        "k_layernorm.weight": ("head_dim",),
                    },
                    kinds=(FULL,),
                ),
                *_rows(
                    LAYER + "conv.",
                    {
                        "conv.weight": ("hidden", "1", "kernel"),
                        "in_proj.weight": ("hidden+hidden+hidden", "hidden"),
                        "out_proj.weight": ("hidden", "hidden"),
                    },
                    kinds=("conv",),
                ),
                *_rows(
                    LAYER + "conv.",
                    {
                        "conv.bias": ("hidden",),
                        "in_proj.bias": ("hidden+hidden+hidden",),
                        "out_proj.bias": ("hidden",),
                    },
                    kinds=("conv",),
                    when="conv_bias",
                ),
            ),
            ffn=_rows(
                LAYER + "feed_forward.",
                {"w1.weight": ("ffn", "hidden"), "w3.weight": ("ffn", "hidden"), "w2.weight": ("hidden", "ffn")},
            ),
            pieces={
                f"{LAYER}feed_forward.{name}.weight": (Piece(f"{LAYER}mlp.{plain}_proj.weight", ""),)
                for name, plain in (("w1", "gate"), ("w3", "up"), ("w2", "down"))
            },
            defaults=_defaults(
                rope_theta=1000000.0,
                max_position_embeddings=128000,
                num_key_value_heads=8,
                norm_eps=1e-5,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
                tie_word_embeddings=True,
                conv_bias=False,
                conv_L_cache=3,
                block_multiple_of=256,
                block_ffn_dim_multiplier=1.0,
                block_auto_adjust_ff_dim=True,
            ),
            reads={
                "rms_norm_eps": "norm_eps",
                "layer_types": lambda config: list(_lfm2_kinds(config)),
                "intermediate_size": _lfm2_ffn,
                "tie_word_embeddings": lambda config: config.get("tie_embedding", config["tie_word_embeddings"]),
            },
            sizes=lambda config: {"kernel": int(config["conv_L_cache"])},
            kinds=_lfm2_kinds,
            fields=frozenset(
                {
                    "block_ff_dim",
                    "full_attn_idxs",
                    "tie_embedding",
                    "block_dim",
                    "conv_dim",
                    "conv_dim_out",
                    "num_heads",
                    "theta",
                    "use_pos_enc",
                    "block_norm_eps",
                    "block_use_swiglu",
                    "block_mlp_init_scale",
                    "block_out_init_scale",
                    "block_use_xavier_init",
                    "conv_use_xavier_init",
                }
            ),
        ),
    )
}

MLPS = tuple(dict.fromkeys(family.mlp for family in FAMILIES.values()))
"""Names of the module that is an FFN, in all families; models without a table call it `mlp`."""
