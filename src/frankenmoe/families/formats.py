"""One table per MoE format that can be written, and the config.json it needs."""

from collections.abc import Mapping
from typing import Any

from frankenmoe.families.dense import LAYER, QKV_BIAS
from frankenmoe.families.spec import MAY_BE_NULL, Config, Family, MoEFormat, Note, Rule, TensorSpec

FFN_SUFFIXES = ("gate_proj.weight", "up_proj.weight", "down_proj.weight")
EXPERT_BIAS = Rule("mlp_bias", (False, None), "its experts have no bias")
NO_WINDOW = Rule("sliding_window", (None,), "other runtimes disagree on its sliding window")
ATTENTION_BIAS = Rule("attention_bias", (False, None), "its attention does not have all four biases")
# source: llama.cpp's graphs (norm_w is false) and converters (only the Llama classes write rope_freqs)
WEAKER = Note(
    "llama.cpp does not renormalise the top-k weights of this format, so experts have less weight there than in "
    "transformers and frankenmoe",
    renormalizing=True,
)
NO_LLAMA3 = Note(
    "llama.cpp's converter drops the llama3 rotary factors of this format, which hurts long contexts",
    rope="llama3",
)
# fields that dense and MoE configs spell the same
COPIED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "tie_word_embeddings",
    "attention_dropout",
    "attention_bias",
    "sliding_window",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


def _as_is(prefix: str) -> Mapping[str, str]:
    return {suffix: prefix + suffix for suffix in FFN_SUFFIXES}


# the names that every format but Mixtral's gives to gates and experts
GATE = LAYER + "mlp.gate.weight"
EXPERT = _as_is(LAYER + "mlp.experts.{expert}.")
COUNTED = {"num_experts": "experts", "num_experts_per_tok": "experts_per_token"}
QWEN = {"decoder_sparse_step": 1, "norm_topk_prob": True, "mlp_only_layers": [], "use_sliding_window": False}

FORMATS: Mapping[str, MoEFormat] = {
    fmt.name: fmt
    for fmt in (
        MoEFormat(
            name="mixtral",
            title="Mixtral",
            model_type="mixtral",
            architecture="MixtralForCausalLM",
            families=("llama", "mistral"),
            gate=LAYER + "block_sparse_moe.gate.weight",
            expert={
                "gate_proj.weight": LAYER + "block_sparse_moe.experts.{expert}.w1.weight",
                "up_proj.weight": LAYER + "block_sparse_moe.experts.{expert}.w3.weight",
                "down_proj.weight": LAYER + "block_sparse_moe.experts.{expert}.w2.weight",
            },
            constants={"router_jitter_noise": 0.0},
            counted={"num_local_experts": "experts", "num_experts_per_tok": "experts_per_token"},
            rules=(ATTENTION_BIAS, EXPERT_BIAS),
            rounds_weights=False,
        ),
        MoEFormat(
            name="deepseek",
            title="DeepSeek MoE",
            model_type="deepseek",
            architecture="DeepseekForCausalLM",
            families=("llama", "mistral"),
            gate=GATE,
            expert=EXPERT,
            shared=_as_is(LAYER + "mlp.shared_experts."),
            max_shared=1,
            constants={
                "first_k_dense_replace": 0,
                "moe_layer_freq": 1,
                "scoring_func": "softmax",
                "norm_topk_prob": True,
                "auto_map": {
                    "AutoConfig": "deepseek-ai/deepseek-moe-16b-base--configuration_deepseek.DeepseekConfig",
                    "AutoModel": "deepseek-ai/deepseek-moe-16b-base--modeling_deepseek.DeepseekModel",
                    "AutoModelForCausalLM": (
                        "deepseek-ai/deepseek-moe-16b-base--modeling_deepseek.DeepseekForCausalLM"
                    ),
                },
            },
            counted={
                "n_routed_experts": "experts",
                "num_experts_per_tok": "experts_per_token",
                "n_shared_experts": "shared_experts",
                "moe_intermediate_size": "ffn",
            },
            rules=(EXPERT_BIAS, NO_WINDOW),
            renormalizes_top1=False,
            loads_in_transformers=False,
            two_word_rope=True,
            notes=(WEAKER,),
        ),
        MoEFormat(
            name="qwen2_moe",
            title="Qwen MoE",
            model_type="qwen2_moe",
            architecture="Qwen2MoeForCausalLM",
            families=("qwen2", "llama", "mistral"),
            gate=GATE,
            expert=EXPERT,
            shared=_as_is(LAYER + "mlp.shared_expert."),
            shared_gate=LAYER + "mlp.shared_expert_gate.weight",
            max_shared=1,
            # 32 is the narrowest row that llama.cpp's quantizers take
            inert_shared_ffn=32,
            added=tuple(TensorSpec(LAYER + "self_attn." + name, shape) for name, shape in QKV_BIAS.items()),
            constants=QWEN | {"qkv_bias": True},
            counted=COUNTED | {"moe_intermediate_size": "ffn", "shared_expert_intermediate_size": "shared_ffn"},
            rules=(ATTENTION_BIAS, EXPERT_BIAS, NO_WINDOW),
            notes=(WEAKER, NO_LLAMA3),
        ),
        MoEFormat(
            name="qwen3_moe",
            title="Qwen3 MoE",
            model_type="qwen3_moe",
            architecture="Qwen3MoeForCausalLM",
            families=("qwen3",),
            gate=GATE,
            expert=EXPERT,
            constants=QWEN,
            counted=COUNTED | {"moe_intermediate_size": "ffn"},
            rules=(NO_WINDOW,),
        ),
        MoEFormat(
            name="flex_olmo",
            title="FlexOlmo",
            model_type="flex_olmo",
            architecture="FlexOlmoForCausalLM",
            families=("olmo2",),
            gate=GATE,
            expert=EXPERT,
            constants={"norm_topk_prob": True},
            counted=COUNTED,
        ),
    )
}


def rope(family: Family, config: Config) -> dict[str, Any]:
    """Rotary settings as transformers 5's one dictionary, read from that form or from transformers 4's two fields."""
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    found = {key: value for key, value in given.items() if value is not None}
    legacy = found.pop("type", "default")
    found.setdefault("rope_type", legacy)
    found.setdefault("rope_theta", config.get("rope_theta") or family.defaults["rope_theta"])
    return found


def moe_config(
    fmt: MoEFormat,
    family: Family,
    config: Config,
    *,
    experts: int,
    experts_per_token: int,
    shared_experts: int,
    dtype: str,
) -> dict[str, Any]:
    """config.json of the MoE: fields copied from the base, or its family's defaults, then the format's own fields.

    Rotary settings and dtype are written in the spellings of transformers 4 and 5. Without `rope_theta`, transformers 4
    would take the *format's* default. `dtype` is a torch name such as `bfloat16`.
    """
    dims = family.dims(config)
    quantities = {
        "experts": experts,
        "experts_per_token": experts_per_token,
        "shared_experts": shared_experts or None,
        "ffn": dims.ffn,
        "shared_ffn": dims.ffn if shared_experts else fmt.inert_shared_ffn,
    }
    rotary = rope(family, config)
    scaling = {key: value for key, value in rotary.items() if key != "rope_theta"}
    if fmt.two_word_rope:
        scaling = {"type": rotary["rope_type"], "factor": rotary.get("factor")}
    copied = {key: family.value(config, key) for key in COPIED}
    # transformers 5.23 rejects null where it expects a number or a truth value, so what the family lacks is left out
    copied = {key: value for key, value in copied.items() if value is not None or key in MAY_BE_NULL}
    return {
        "architectures": [fmt.architecture],
        "model_type": fmt.model_type,
        **copied,
        "num_key_value_heads": dims.kv_heads,
        "head_dim": dims.head_dim,
        "rope_theta": rotary["rope_theta"],
        "rope_scaling": None if rotary["rope_type"] == "default" else scaling,
        "rope_parameters": rotary,
        **fmt.constants,
        **{key: quantities[quantity] for key, quantity in fmt.counted.items()},
        "output_router_logits": False,
        "dtype": dtype,
        "torch_dtype": dtype,
    }
