"""Settings that config.json files on the hub have beside those that transformers reads, and settings it ignores."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

import tiny
from frankenmoe.families import FAMILIES, FORMATS, moe_config, rope, unsupported

LONGROPE = {"type": "longrope", "short_factor": [1.0] * 3, "long_factor": [2.0] * 3}
HYBRID = {"num_local_experts": 0, "mamba_n_heads": 8, "mamba_d_head": 8, "shared_intermediate_size": 48}
# model -> (family, format, its extra settings)
PUBLISHED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "LLaMA 7B": ("llama", "mixtral", {"max_sequence_length": 2048, "pad_token_id": -1}),
    "Phi-4-mini": (
        "phi3",
        "glm4_moe",
        {
            "full_attn_mod": 1, "interpolate_factor": 1, "lm_head_bias": False, "mlp_bias": False,
            "embd_pdrop": 0.0, "resid_pdrop": 0.0, "partial_rotary_factor": 0.75, "rope_scaling": LONGROPE,
            "original_max_position_embeddings": 4096, "max_position_embeddings": 131072, "sliding_window": 262144,
        },
    ),
    "Granite 4 hybrid": (
        "granitemoehybrid",
        "granitemoehybrid",
        HYBRID | {"init_method": "mup", "normalization_function": "rmsnorm", "num_experts_per_tok": 0},
    ),
    "Command R7B": (
        "cohere2",
        "cohere2_moe",
        {
            "_sliding_window_pattern": 4, "cache_implementation": "hybrid", "layer_switch": 4,
            "order_of_interleaved_layers": "local_attn_first", "position_embedding_type": "rope_gptj",
            "rotary_pct": 1.0, "use_embedding_sharing": True, "use_gated_activation": True,
            "use_parallel_block": True, "use_parallel_embedding": True, "use_qk_norm": False,
        },
    ),
    "Qwen3.5": (
        "qwen3_5_text",
        "qwen3_5_moe",
        {"attn_output_gate": True, "mamba_ssm_dtype": "float32", "mtp_use_dedicated_embeddings": False},
    ),
}  # fmt: skip


def config_of(family: str, **own: Any) -> dict[str, Any]:
    return tiny.SIZES | {"model_type": family} | own


def problems(fmt: str, family: str, **own: Any) -> list[str]:
    return unsupported(FORMATS[fmt], FAMILIES[family], config_of(family, **own))


@pytest.mark.parametrize("model", PUBLISHED)
def test_published_configs_are_built(model: str) -> None:
    family, fmt, own = PUBLISHED[model]
    assert problems(fmt, family, **own) == []


@pytest.mark.parametrize(
    ("fmt", "family", "field", "value"),
    [
        ("glm4_moe", "phi3", "interpolate_factor", 2),
        ("cohere2_moe", "cohere2", "use_parallel_block", False),
        ("cohere2_moe", "cohere2", "rotary_pct", 0.5),
        ("granitemoehybrid", "granitemoehybrid", "normalization_function", "layernorm"),
        ("qwen3_5_moe", "qwen3_5_text", "attn_output_gate", False),
        ("lfm2_moe", "lfm2", "use_pos_enc", False),
        # transformers attends in both directions with these; an MoE made of such a model would not
        ("mixtral", "llama", "is_causal", False),
        ("granitemoe", "gemma", "use_bidirectional_attention", True),
        # its class ignores them, but the format's does not
        ("mixtral", "llama", "sliding_window", 8),
        ("granitemoe", "llama", "embedding_multiplier", 12.0),
        ("granitemoe", "mistral", "attention_bias", True),
        ("glm4_moe", "phi3", "attention_bias", True),
        ("granitemoe_swa", "ministral", "no_rope_layers", [1, 0, 1, 1]),
        # shorter than the context
        ("glm4_moe", "phi3", "sliding_window", 2047),
    ],
)
def test_other_values_are_refused_by_name(fmt: str, family: str, field: str, value: Any) -> None:
    own = {"max_position_embeddings": 2048} | (HYBRID if family == "granitemoehybrid" else {})
    before = problems(fmt, family, **own)
    assert [text for text in problems(fmt, family, **own | {field: value}) if text not in before and field in text]


def test_a_window_as_long_as_the_context_is_not_written() -> None:
    config = config_of("phi3", sliding_window=262144, max_position_embeddings=131072)
    made = moe_config(
        FORMATS["glm4_moe"], FAMILIES["phi3"], config, experts=4, experts_per_token=2, shared_ffn=0, dtype="float32"
    )
    assert made["sliding_window"] is None


def test_of_two_rotary_settings_the_one_that_transformers_takes_counts(tmp_path: Path) -> None:
    # as in a file that transformers 5 wrote, to which someone added YaRN by hand
    own = {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512},
        "rope_theta": 1e6,
    }
    (tmp_path / "config.json").write_text(json.dumps(config_of("qwen3", **own)))
    theirs = AutoConfig.from_pretrained(tmp_path).rope_parameters
    ours = rope(FAMILIES["qwen3"], config_of("qwen3", **own))
    assert {key: theirs[key] for key in ours} == ours
    assert ours["rope_type"] == "yarn"
