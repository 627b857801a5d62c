"""What llama.cpp runs of the pairs of family and format, as which architecture; and what it cannot run, and why."""

from dataclasses import replace

from family_cases import CASES, LONGROPE, SHARED, Case

CONTEXT = 256  # llama.cpp rounds it up to a multiple of this
PLAIN_ROPE = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75}
MORE: dict[str, Case] = {
    "qwen3-plain": Case("qwen3", "qwen3_moe", {"head_dim": 8}),
    "qwen2-shared": Case("qwen2", "qwen2_moe", {}, SHARED | {"experts_per_token": 3}),
    "llama-deepseek": Case("llama", "deepseek", {}, SHARED | {"architecture": "deepseek", "experts_per_token": 1}),
    "phi3-short": replace(
        CASES["phi3-longrope"],
        config=CASES["phi3-longrope"].config
        | {"original_max_position_embeddings": CONTEXT, "max_position_embeddings": 4 * CONTEXT}
        | {"rope_parameters": LONGROPE | {"original_max_position_embeddings": CONTEXT}},
    ),
    "phi3-partial-plain": replace(
        CASES["phi3-partial"],
        config=CASES["phi3-partial"].config | {"rope_parameters": PLAIN_ROPE, "original_max_position_embeddings": 64},
    ),
    "mistral-deepseek": Case(
        "mistral",
        "deepseek",
        {"sliding_window": None},
        SHARED | {"architecture": "deepseek", "experts_per_token": 1},
    ),
    "cohere2-biases": replace(CASES["cohere2"], config=CASES["cohere2"].config | {"attention_bias": True}),
    "cohere2-full": replace(CASES["cohere2"], config=CASES["cohere2"].config | {"layer_types": ["full_attention"] * 4}),
    "smollm3-unrotated": replace(CASES["smollm3"], config=CASES["smollm3"].config | {"no_rope_layers": [0] * 4}),
    "granite4-no-bias": replace(CASES["granite4"], config=CASES["granite4"].config | {"mamba_conv_bias": False}),
    "cohere-plain": replace(CASES["cohere"], config=CASES["cohere"].config | {"attention_bias": False}),
    "qwen3_5-shared": replace(CASES["qwen3_5"], recipe=SHARED),
    "granite4-attention": replace(
        CASES["granite4-shared"], config=CASES["granite4-shared"].config | {"layer_types": ["attention"] * 4}
    ),
    "granite4-unrotated": replace(
        CASES["granite4"], config=CASES["granite4"].config | {"layer_types": ["attention"] * 4}
    ),
    "granite4-groups": replace(CASES["granite4"], config=CASES["granite4"].config | {"mamba_n_groups": 2}),
    "nemotron_h-both": replace(CASES["nemotron_h"], recipe=SHARED),
    "nemotron_h-bias": replace(CASES["nemotron_h"], config=CASES["nemotron_h"].config | {"use_bias": True}),
    "nemotron_h-no-bias": replace(CASES["nemotron_h"], config=CASES["nemotron_h"].config | {"use_conv_bias": False}),
    "nemotron_h-attention": replace(
        CASES["nemotron_h"], config=CASES["nemotron_h"].config | {"layers_block_type": ["full_attention", "mlp"] * 2}
    ),
    "nemotron_h-mamba": replace(
        CASES["nemotron_h"], config=CASES["nemotron_h"].config | {"layers_block_type": ["linear_attention", "mlp"] * 2}
    ),
    "granite4-mamba": replace(CASES["granite4"], config=CASES["granite4"].config | {"layer_types": ["mamba"] * 4}),
    "lfm2-conv": replace(CASES["lfm2"], config=CASES["lfm2"].config | {"layer_types": ["conv"] * 4}),
    "qwen3_5-linear": replace(
        CASES["qwen3_5"], config=CASES["qwen3_5"].config | {"layer_types": ["linear_attention"] * 4}
    ),
    "gemma3-linear": replace(CASES["gemma3-full"], config=CASES["gemma3-full"].config | {"attention_bias": False}),
    "gemma4-shared-keys": replace(
        CASES["gemma4-inputs"],
        config=CASES["gemma4-inputs"].config
        # with larger weights, half precision alone moves logits by 0.4: nothing divides its scores
        | {"attention_bias": False, "vocab_size_per_layer_input": 400, "initializer_range": 0.05},
    ),
}
ALL = CASES | MORE
# case -> the architecture
ARCHITECTURE: dict[str, str] = {
    "llama": "llama",
    "llama-qwen": "llama",
    "mistral-qwen": "llama",
    "qwen2": "llama",
    "seed_oss": "llama",
    "seed_oss-plain": "llama",
    "helium": "llama",
    "phi3-longrope": "llama",
    "phi3-short": "llama",
    "mistral-window": "granite_swa",
    "phi3-window": "granite_swa",
    "qwen3-plain": "qwen3moe",
    "qwen2-shared": "qwen2moe",
    "llama-deepseek": "deepseek",
    "mistral-deepseek": "deepseek",
    "mistral-granite": "llama",
    "llama-biases": "granitemoe",
    "llama-shared": "granitemoe",
    "mistral-shared": "granitemoe",
    "granite": "granitemoe",
    "granite-shared": "granitemoe",
    "hyperclovax": "granitemoe",
    "ernie4_5": "ernie4_5-moe",
    "ernie4_5-shared": "ernie4_5-moe",
    "glm": "glm4moe",
    "glm-shared": "glm4moe",
    "phi3-partial-plain": "glm4moe",
    "lfm2": "lfm2moe",
    "qwen3_5": "qwen35moe",
    "qwen3_5-shared": "qwen35moe",
    "smollm3": "granite_swa",
    "smollm3-window": "granite_swa",
    "ministral": "granite_swa",
    "cohere2": "cohere2moe",
    "cohere-plain": "cohere2moe",
    "granite4": "granitehybrid",
    "granite4-shared": "granitehybrid",
    "granite4-attention": "granitemoe",
    "granite4-groups": "granitehybrid",
    "nemotron_h": "nemotron_h_moe",
    "nemotron_h-both": "nemotron_h_moe",
    "gemma3": "gemma4",
    "gemma3-linear": "gemma4",
    "gemma4": "gemma4",
    "gemma4-shared-keys": "gemma4",
}
# architectures of models that read pictures, which tests/families/test_vision.py runs -> (outer family, format)
WITH_VISION = {"qwen3vlmoe": ("qwen3_vl", "qwen3_vl_moe")}
# case -> words of the reason
REFUSED: dict[str, str] = {
    "qwen3": "qwen3moe has no place for model.layers.0.self_attn.q_proj.bias",
    "olmo2": "FlexOlmo",
    "cohere2-biases": "cohere2moe has no place for model.layers.0.self_attn.q_proj.bias",
    "cohere2-full": "cohere2moe needs a layer with a window",
    "smollm3-unrotated": "granite_swa needs a layer that rotates",
    "cohere": "cohere2moe has no place for model.layers.0.self_attn.q_proj.bias",
    "gemma3-full": "gemma4 has no place for model.layers.0.self_attn.q_proj.bias",
    "gemma4-inputs": "gemma4 has no place for model.layers.0.self_attn.q_proj.bias",
    "gemma": "gelu_pytorch_tanh",
    "phi3-partial": "glm4moe has no rope scaling 'longrope'",
    "granite4-unrotated": "granitehybrid needs a Mamba layer",
    "granite4-no-bias": "granitehybrid needs biases of the convolution, found mamba_conv_bias false",
    "nemotron_h-shared": "nemotron_h_moe has experts with relu2 only, found gelu_pytorch_tanh",
    "nemotron_h-bias": "nemotron_h_moe has no place for backbone.layers.0.mixer.in_proj.bias",
    "nemotron_h-no-bias": "nemotron_h_moe needs biases of the convolution, found use_conv_bias false",
    "nemotron_h-attention": "nemotron_h_moe needs a Mamba layer",
    "nemotron_h-mamba": "nemotron_h_moe needs a layer with attention",
    "granite4-mamba": "granitehybrid needs a layer with attention",
    "lfm2-conv": "lfm2moe needs a layer with attention",
    "qwen3_5-linear": "qwen35moe needs a layer with attention",
    "lfm2-bias": "lfm2moe has no place for model.layers.0.conv.conv.bias",
}
