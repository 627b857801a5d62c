"""The models that in_vllm.py builds for vLLM: a family with the config of its parents, and the format it becomes."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

# sizes that vLLM's CPU kernels take: heads of 32
SIZES: Mapping[str, Any] = {
    "vocab_size": 384,
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
SHARED = {"shared_experts": 1}
MULTIPLIERS = {
    "embedding_multiplier": 12.0,
    "logits_scaling": 8.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.15,
}
WINDOWS: Mapping[str, Any] = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 32}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0 + place / 16 for place in range(16)],
    "long_factor": [1.0 + place / 4 for place in range(16)],
    "original_max_position_embeddings": 512,
}
LFM2 = {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}
GEMMA3 = WINDOWS | {
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 32,
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        "full_attention": {"rope_type": "default", "rope_theta": 1e6},
    },
}
GEMMA4 = WINDOWS | {
    "tie_word_embeddings": True,
    "global_head_dim": 64,
    "num_global_key_value_heads": 1,
    "attention_k_eq_v": True,
    "hidden_size_per_layer_input": 0,
    "final_logit_softcapping": 30.0,
}
PLACES = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [8, 4, 4], "mrope_interleaved": True}
VISION = {
    "depth": 2, "hidden_size": 64, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 128,
    "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
}  # fmt: skip
PARTIAL = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}


@dataclass(frozen=True)
class Toy:
    """A family built as a format. `config` are the parents' own settings, `recipe` keys of the recipe.

    With `vision`, parents are models of that type around a language model, with this config of what reads pictures.
    `cached` is False where transformers 5.23 computes something else with a cache than without. `options` are those of
    vLLM's engine, `mends` what is corrected in vLLM first (in_vllm_once.py), `dtype` what it computes in.
    """

    family: str
    fmt: str
    config: Mapping[str, Any] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    loading: Mapping[str, Any] = field(default_factory=dict)
    cached: bool = True
    vision: tuple[str, Mapping[str, Any]] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    mends: tuple[str, ...] = ()
    dtype: str = "float32"

    @property
    def auto(self) -> Any:
        """The class with which transformers loads parents and MoE."""
        return AutoModelForImageTextToText if self.vision else AutoModelForCausalLM

    @property
    def engine(self) -> Mapping[str, Any]:
        """Options of vLLM's engine: only the text of a model that reads pictures is compared."""
        return {"limit_mm_per_prompt": {"image": 0, "video": 0}, **self.options} if self.vision else self.options

    def parent_config(self) -> Any:
        """The config of its parents."""
        text = SIZES | self.config
        if self.vision is None:
            return AutoConfig.for_model(self.family, **text)
        outer, vision = self.vision
        tied = text["tie_word_embeddings"]
        return AutoConfig.for_model(outer, text_config=text, vision_config=vision, tie_word_embeddings=tied)


EAGER = {"attn_implementation": "eager"}
AS_IT_IS: Mapping[str, Toy] = {
    "mixtral": Toy("llama", "mixtral"),
    "qwen2_moe": Toy("qwen2", "qwen2_moe", recipe=SHARED),
    "qwen3_moe": Toy("qwen3", "qwen3_moe"),
    "flex_olmo": Toy("olmo2", "flex_olmo"),
    "mistral": Toy("mistral", "mixtral", {"sliding_window": 32}),
    "phi3": Toy("phi3", "mixtral", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 512}),
    "helium": Toy("helium", "mixtral"),
    "seed_oss": Toy("seed_oss", "qwen2_moe", {"attention_bias": True}),
    "granite": Toy("granite", "granitemoe", MULTIPLIERS),
    "granite-shared": Toy("granite", "granitemoeshared", MULTIPLIERS, SHARED),
    "llama-shared": Toy("llama", "granitemoeshared", recipe=SHARED),
    "hyperclovax": Toy("hyperclovax", "granitemoe", MULTIPLIERS | {"logits_scaling": 0.125, "use_post_norm": False}),
    "ernie4_5": Toy("ernie4_5", "ernie4_5_moe"),
    "ernie4_5-shared": Toy("ernie4_5", "ernie4_5_moe", recipe=SHARED),
    "glm": Toy("glm", "glm4_moe"),
    "glm-shared": Toy("glm", "glm4_moe", recipe=SHARED),
    "phi3-partial": Toy("phi3", "glm4_moe", {"rope_parameters": PARTIAL}),
    "phi3-partial-shared": Toy("phi3", "glm4_moe", {"rope_parameters": PARTIAL}, SHARED),
    "phi3-partial-tied": Toy("phi3", "glm4_moe", {"rope_parameters": PARTIAL, "tie_word_embeddings": True}, SHARED),
    "lfm2": Toy("lfm2", "lfm2_moe", LFM2 | {"tie_word_embeddings": True}),
    "lfm2-untied": Toy("lfm2", "lfm2_moe", LFM2),
    "cohere2": Toy("cohere2", "cohere2_moe", WINDOWS | {"tie_word_embeddings": True}),
    "cohere": Toy("cohere", "cohere2_moe", {"tie_word_embeddings": True}),
    "cohere-untied": Toy("cohere", "cohere2_moe"),
    "gemma3": Toy("gemma3_text", "gemma4", GEMMA3),
    "gemma4": Toy("gemma4_text", "gemma4", GEMMA4),
    "qwen3_vl": Toy("qwen3", "qwen3_vl_moe", {"rope_parameters": PLACES}, vision=("qwen3_vl", VISION)),
    "smollm3": Toy("smollm3", "granitemoe_swa", {"no_rope_layers": [1, 0]}, loading=EAGER),
    "ministral": Toy("ministral", "granitemoe_swa", WINDOWS, loading=EAGER),
    "qwen3_5": Toy(
        "qwen3_5_text",
        "qwen3_5_moe",
        {
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 128,  # of 32, vLLM's kernel says "Unexpected head dim size"
            "linear_value_head_dim": 128,
            "rope_parameters": PARTIAL | {"mrope_section": [4, 2, 2]},
        },
        dtype="bfloat16",  # vLLM's linear attention on a CPU takes nothing else
    ),
    "granite4": Toy(
        "granitemoehybrid",
        "granitemoehybrid",
        MULTIPLIERS
        | {
            "layer_types": ["mamba", "attention"],
            "num_local_experts": 0,
            "shared_intermediate_size": 96,
            "mamba_n_heads": 8,
            "mamba_d_head": 32,
            "mamba_d_state": 32,
            "mamba_n_groups": 1,
            "position_embedding_type": "nope",
        },
        cached=False,
    ),
}
# what vLLM computes otherwise than transformers -> how it computes the same
MENDED: Mapping[str, Mapping[str, Any]] = {
    "lfm2": {"mends": ("flat_rotation",)},
    "lfm2-untied": {"mends": ("flat_rotation", "own_head")},
    "glm": {"mends": ("torch_for_empty",)},
    "phi3-partial": {"mends": ("torch_for_empty",)},
    "cohere2": {"options": {"hf_overrides": {"sliding_window": WINDOWS["sliding_window"] - 1}}},
}
# formats of which vLLM lacks some biases of attention, or all
BIASED = ("qwen3_moe", "qwen3_vl", "smollm3", "cohere")
TOYS = {
    **AS_IT_IS,
    **{f"{name}-mended": replace(AS_IT_IS[name], **how) for name, how in MENDED.items()},
    **{
        f"{name}-biased": replace(AS_IT_IS[name], config={**AS_IT_IS[name].config, "attention_bias": True})
        for name in BIASED
    },
}
DEEPSEEK = Toy("llama", "deepseek", recipe=SHARED | {"architecture": "deepseek"})
