"""Cohere: attention and FFN read one norm, side by side."""

from dataclasses import replace

from frankenmoe.families.rows import ATTENTION, ATTENTION_BIAS, ENDS, FFN, LAYER, all_but_every, defaults, rows
from frankenmoe.families.spec import SLIDING, Family

COHERE2 = Family(
    model_type="cohere2",
    plain_mlp="Cohere2MLP",
    # attention and FFN read the same norm
    backbone=(*ENDS, *ATTENTION, *ATTENTION_BIAS, *rows(LAYER, {"input_layernorm.weight": ("hidden",)})),
    ffn=FFN,
    defaults=defaults(
        max_position_embeddings=8192,
        sliding_window=4096,
        layer_norm_eps=1e-5,
        logit_scale=0.0625,
        pad_token_id=0,
        bos_token_id=5,
        eos_token_id=255001,
        tie_word_embeddings=True,
        attention_bias=False,
    ),
    reads={"layer_types": all_but_every(SLIDING, "sliding_window_pattern")},
    fields=frozenset(
        {
            "sliding_window_pattern",
            "layer_switch",
            "cache_implementation",
            "order_of_interleaved_layers",
            "use_parallel_embedding",  # how embeddings were shared out in training
        }
    ),
    # Command R7B's
    fixed={
        "position_embedding_type": "rope_gptj",
        "rotary_pct": 1.0,
        "use_embedding_sharing": True,
        "use_gated_activation": True,
        "use_parallel_block": True,
        "use_qk_norm": False,
    },
    interleaved=True,
)
# Cohere2 rotates only in layers with a window; one as long as the context hides nothing
COHERE = replace(
    COHERE2,
    model_type="cohere",
    plain_mlp="CohereMLP",
    backbone=COHERE2.backbone
    + rows(
        LAYER + "self_attn.",
        {"q_norm.weight": ("heads", "head_dim"), "k_norm.weight": ("kv_heads", "head_dim")},
        when="use_qk_norm",
    ),
    defaults={key: value for key, value in COHERE2.defaults.items() if key != "sliding_window"}
    | {"rope_theta": 500000.0, "use_qk_norm": False},
    reads={
        "layer_types": lambda config: [SLIDING] * config["num_hidden_layers"],
        "sliding_window": "max_position_embeddings",
    },
    fields=frozenset(),
    fixed={},
)
