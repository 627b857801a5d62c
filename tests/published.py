"""Shapes of published models, as facts, each with the address where it was read.

What a source does not say is left out.
Not found with all their sizes: a third OLMo 2 and Granite 3; more than one of Ernie 4.5 (dense), GLM, Helium, SmolLM3
and Cohere2; any of Seed-OSS, HyperCLOVA X, Ministral and Granite 4 (dense and hybrid).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

LITGPT = "https://github.com/Lightning-AI/litgpt/blob/v0.5.13/litgpt/config.py, from https://huggingface.co/"
EXECUTORCH = "https://github.com/pytorch/executorch/tree/main/examples/models/"
MEGATRON = "https://github.com/NVIDIA-NeMo/Megatron-Bridge, src/megatron/bridge/models/nemotronh/nemotron_h_provider.py"
DEFAULTS = "defaults of its config class in transformers 5.23, whose documentation names the model"
COPY = "a copy of its config.json in a public repository (code index of 2026-11)"


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
    "google/gemma-2b": _model(LITGPT, "gemma", 18, 2048, 16384, 8, 256000, num_key_value_heads=1, head_dim=256),
    "google/gemma-7b": _model(LITGPT, "gemma", 28, 3072, 24576, 16, 256000, head_dim=256),
    "google/codegemma-7b-it": _model(LITGPT, "gemma", 28, 3072, 24576, 16, 256000, head_dim=256),
    "baidu/ERNIE-4.5-0.3B-PT": _model(
        COPY, "ernie4_5", 18, 1024, 3072, 16, 103424, bos_token_id=1, eos_token_id=2, pad_token_id=0, head_dim=128,
        hidden_act="silu", max_position_embeddings=131072, num_key_value_heads=2, rms_norm_eps=1e-05, use_cache=False,
        rope_theta=500000, use_bias=False, tie_word_embeddings=True, torch_dtype="bfloat16",
    ),
    "THUDM/glm-4-9b-chat-hf": _model(
        DEFAULTS, "glm", 40, 4096, 13696, 32, 151552, num_key_value_heads=2, head_dim=128, partial_rotary_factor=0.5
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
    "HuggingFaceTB/SmolLM3-3B": _model(
        EXECUTORCH + "smollm3", "smollm3", 36, 2048, 11008, 16, 128256, num_key_value_heads=4, rms_norm_eps=1e-6,
        rope_theta=5e6, no_rope_layer_interval=4,
    ),
    "CohereForAI/c4ai-command-r7b-12-2024": _model(
        "https://huggingface.co/Svngoku/c4ai-command-r7b-12-2024-4bit (the printed model)", "cohere2", 32, 4096, 14336,
        32, 256000, num_key_value_heads=8, head_dim=128,
    ),
}  # fmt: skip
