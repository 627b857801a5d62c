"""Dense families whose layers differ: windows, rotation in some layers only, linear attention, convolution, Mamba."""

import math
from collections.abc import Mapping
from dataclasses import replace

from frankenmoe.families.cohere import COHERE, COHERE2
from frankenmoe.families.rows import (
    ATTENTION,
    ATTENTION_BIAS,
    ENDS,
    FFN,
    FFN_BIAS,
    GATE_UP_PIECES,
    LAYER,
    PRE_NORMS,
    all_but_every,
    defaults,
    mamba,
    rows,
)
from frankenmoe.families.spec import FULL, SLIDING, Config, Family, Piece, TensorSpec

LINEAR = "linear_attention"
# Granite's layers, in the words of transformers 5 and in its own
GRANITE_ATTENTION, GRANITE_MAMBA = (FULL, "attention"), (LINEAR, "mamba")


def _lfm2_kinds(config: Config) -> list[str]:
    """What its layers are: from `layer_types`, or from the older list of attention layers."""
    if config.get("layer_types"):
        return list(config["layer_types"])
    full = config.get("full_attn_idxs")
    return [FULL if full is None or layer in full else "conv" for layer in range(config["num_hidden_layers"])]


def _lfm2_ffn(config: Config) -> int:
    """The width of its FFNs: two thirds of the number in the config, rounded up to a multiple."""
    width = int(config.get("block_ff_dim") or config["intermediate_size"])
    if not config["block_auto_adjust_ff_dim"]:
        return width
    width, step = int(config["block_ffn_dim_multiplier"] * int(2 * width / 3)), int(config["block_multiple_of"])
    return -(-width // step) * step


def _qwen3_5_sizes(config: Config) -> Mapping[str, int]:
    keys = int(config["linear_num_key_heads"]) * int(config["linear_key_head_dim"])
    heads, head = int(config["linear_num_value_heads"]), int(config["linear_value_head_dim"])
    return {
        "linear_heads": heads,
        "linear_head": head,
        "linear_values": heads * head,
        "linear_qkv": 2 * keys + heads * head,
        "kernel": int(config["linear_conv_kernel_dim"]),
    }


def _smollm3_rotated(config: Config) -> list[int]:
    """1 for every layer that rotates: all but every fourth, where the config does not list them."""
    every, layers = int(config["no_rope_layer_interval"]), range(1, config["num_hidden_layers"] + 1)
    return list(config.get("no_rope_layers") or (int(layer % every != 0) for layer in layers))


def _smollm3_kinds(config: Config) -> list[str]:
    window = config["use_sliding_window"] and config.get("sliding_window") is not None
    rotated = _smollm3_rotated(config)
    return list(config.get("layer_types") or (SLIDING if window and not turn else FULL for turn in rotated))


def _ministral_kinds(config: Config) -> list[str]:
    kind = FULL if config.get("sliding_window") is None else SLIDING
    return list(config.get("layer_types") or [kind] * config["num_hidden_layers"])


def _time_step_limit(config: Config) -> object:
    """The limits of its time steps; None where they limit nothing. transformers writes infinity as a mapping."""
    found = config.get("time_step_limit")
    return None if found in (None, [0.0, math.inf], [0.0, {"__float__": "Infinity"}]) else str(found)


def _granite4_sizes(config: Config) -> Mapping[str, int]:
    inner = int(config["mamba_expand"]) * int(config["hidden_size"])
    groups, heads = int(config["mamba_n_groups"]) * int(config["mamba_d_state"]), int(config["mamba_n_heads"])
    return {
        "inner": inner,
        "convolved": inner + 2 * groups,
        "projected": 2 * inner + 2 * groups + heads,
        "mamba_heads": heads,
        "mamba_groups": int(config["mamba_n_groups"]),
        "mamba_group": inner // int(config["mamba_n_groups"]),
        "kernel": int(config["mamba_d_conv"]),
    }


LFM2 = Family(
    model_type="lfm2",
    mlp="feed_forward",
    backbone=(
        ENDS[0],
        TensorSpec("model.embedding_norm.weight", ("hidden",)),
        ENDS[2],
        *rows(LAYER, {"operator_norm.weight": ("hidden",), "ffn_norm.weight": ("hidden",)}),
        *rows(
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
        *rows(
            LAYER + "conv.",
            {
                "conv.weight": ("hidden", "1", "kernel"),
                "in_proj.weight": ("hidden+hidden+hidden", "hidden"),
                "out_proj.weight": ("hidden", "hidden"),
            },
            kinds=("conv",),
        ),
        *rows(
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
    ffn=rows(
        LAYER + "feed_forward.",
        {"w1.weight": ("ffn", "hidden"), "w3.weight": ("ffn", "hidden"), "w2.weight": ("hidden", "ffn")},
    ),
    pieces={
        f"{LAYER}feed_forward.{name}.weight": (Piece(f"{LAYER}mlp.{plain}_proj.weight", ""),)
        for name, plain in (("w1", "gate"), ("w3", "up"), ("w2", "down"))
    },
    defaults=defaults(
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
        "layer_types": _lfm2_kinds,
        "intermediate_size": _lfm2_ffn,
        "tie_word_embeddings": lambda config: config.get("tie_embedding", config["tie_word_embeddings"]),
    },
    sizes=lambda config: {"kernel": int(config["conv_L_cache"])},
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
            "block_norm_eps",
            "block_mlp_init_scale",
            "block_out_init_scale",
            "block_use_xavier_init",
            "conv_use_xavier_init",
        }
    ),
    fixed={"use_pos_enc": True, "block_use_swiglu": True},
)
QWEN3_5 = Family(
    model_type="qwen3_5_text",
    plain_mlp="Qwen3_5MLP",
    backbone=(
        *ENDS,
        *PRE_NORMS,
        *rows(
            LAYER + "self_attn.",
            {
                "q_proj.weight": ("query+query", "hidden"),  # queries and their gates, head by head
                "k_proj.weight": ("kv", "hidden"),
                "v_proj.weight": ("kv", "hidden"),
                "o_proj.weight": ("hidden", "query"),
                "q_norm.weight": ("head_dim",),
                "k_norm.weight": ("head_dim",),
            },
            kinds=(FULL,),
        ),
        *rows(
            LAYER + "linear_attn.",
            {
                "dt_bias": ("linear_heads",),
                "A_log": ("linear_heads",),
                "conv1d.weight": ("linear_qkv", "1", "kernel"),
                "norm.weight": ("linear_head",),
                "out_proj.weight": ("hidden", "linear_values"),
                "in_proj_qkv.weight": ("linear_qkv", "hidden"),
                "in_proj_z.weight": ("linear_values", "hidden"),
                "in_proj_b.weight": ("linear_heads", "hidden"),
                "in_proj_a.weight": ("linear_heads", "hidden"),
            },
            kinds=(LINEAR,),
        ),
    ),
    ffn=FFN,
    defaults=defaults(
        max_position_embeddings=32768,
        num_key_value_heads=4,
        head_dim=256,
        attention_bias=False,
        partial_rotary_factor=0.25,
        linear_conv_kernel_dim=4,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        linear_num_key_heads=16,
        linear_num_value_heads=32,
    ),
    reads={"layer_types": all_but_every(LINEAR, "full_attention_interval")},
    sizes=_qwen3_5_sizes,
    fields=frozenset({"full_attention_interval", "mtp_num_hidden_layers"}),
    fixed={"attn_output_gate": True, "mamba_ssm_dtype": "float32"},
)
SMOLLM3 = Family(
    model_type="smollm3",
    plain_mlp="SmolLM3MLP",
    backbone=ENDS + ATTENTION + ATTENTION_BIAS + PRE_NORMS,
    ffn=FFN + FFN_BIAS,
    defaults=defaults(
        rope_theta=2000000.0,
        max_position_embeddings=32768,
        num_key_value_heads=4,
        pad_token_id=128004,
        bos_token_id=128000,
        eos_token_id=128001,
        tie_word_embeddings=True,
        attention_bias=False,
        mlp_bias=False,
        no_rope_layer_interval=4,
        use_sliding_window=False,
        sliding_window=None,
    ),
    # `use_sliding_window` counts only where `layer_types` is absent: masks follow that list
    reads={"layer_types": _smollm3_kinds, "no_rope_layers": _smollm3_rotated},
)
MINISTRAL = Family(
    model_type="ministral",
    plain_mlp="MinistralMLP",
    backbone=ENDS + ATTENTION + PRE_NORMS,
    ffn=FFN,
    defaults=defaults(
        max_position_embeddings=131072, num_key_value_heads=8, sliding_window=4096, bos_token_id=1, eos_token_id=2
    ),
    reads={"layer_types": _ministral_kinds},
)
GRANITE4 = Family(
    model_type="granitemoehybrid",
    mlp="shared_mlp",
    opaque=("GraniteMoeHybridMambaLayer",),
    backbone=(
        *ENDS,
        *PRE_NORMS,
        *(replace(row, kinds=GRANITE_ATTENTION) for row in ATTENTION + ATTENTION_BIAS),
        *mamba(LAYER + "mamba.", GRANITE_MAMBA, conv_bias="mamba_conv_bias", bias="mamba_proj_bias"),
    ),
    ffn=rows(
        LAYER + "shared_mlp.",
        {"input_linear.weight": ("ffn+ffn", "hidden"), "output_linear.weight": ("hidden", "ffn")},
    ),
    pieces={
        LAYER + "shared_mlp.input_linear.weight": GATE_UP_PIECES,
        LAYER + "shared_mlp.output_linear.weight": (Piece(LAYER + "mlp.down_proj.weight", ""),),
    },
    defaults=defaults(
        max_position_embeddings=2048,
        bos_token_id=1,
        eos_token_id=2,
        attention_bias=False,
        embedding_multiplier=1.0,
        logits_scaling=1.0,
        residual_multiplier=1.0,
        attention_multiplier=1.0,
        num_local_experts=8,
        shared_intermediate_size=1024,
        mamba_n_heads=128,
        mamba_n_groups=1,
        mamba_d_state=256,
        mamba_d_conv=4,
        mamba_expand=2,
        mamba_chunk_size=256,
        mamba_conv_bias=True,
        mamba_proj_bias=False,
    ),
    reads={
        "intermediate_size": "shared_intermediate_size",
        "own_experts": "num_local_experts",
        "time_step_limit": _time_step_limit,
        "no_rope_layers": lambda config: [int(config.get("position_embedding_type") == "rope")],
        "mamba_d_head": lambda config: int(config["mamba_expand"] * config["hidden_size"] / config["mamba_n_heads"]),
        "layer_types": lambda config: config.get("layer_types") or [LINEAR] * config["num_hidden_layers"],
    },
    sizes=_granite4_sizes,
    fields=frozenset(
        {
            "num_experts_per_tok",
            "router_aux_loss_coef",
            "position_embedding_type",
            "mamba_d_head",
            "init_method",
            "time_step_min",
            "time_step_max",
            "time_step_floor",
        }
    ),
    fixed={"normalization_function": "rmsnorm"},
)
LAYERED = (LFM2, QWEN3_5, SMOLLM3, MINISTRAL, GRANITE4, COHERE2, COHERE)
