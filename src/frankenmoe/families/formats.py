"""One table per MoE format that can be written."""

from collections.abc import Callable, Mapping

from frankenmoe.families.rotary import rope
from frankenmoe.families.rows import LAYER, QKV_BIAS
from frankenmoe.families.spec import SOFTMAX, Config, Family, MoEFormat, Note, RouterRule, TensorSpec

FFN_SUFFIXES = ("gate_proj.weight", "up_proj.weight", "down_proj.weight")
GATE_UP, DOWN = FFN_SUFFIXES[:2], FFN_SUFFIXES[2:]
W132 = ("w1.weight", "w3.weight", "w2.weight")
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


def _alone(prefix: str, names: tuple[str, ...] = FFN_SUFFIXES) -> Mapping[str, tuple[str, ...]]:
    """A tensor for each matrix of an FFN; `names` are those of gate, up and down."""
    return {prefix + name: (suffix,) for name, suffix in zip(names, FFN_SUFFIXES, strict=True)}


def _attention_multiplier(family: Family, config: Config) -> float:
    """Granite's, or what other attention divides by: the root of the head size."""
    found = family.read(config, "attention_multiplier")
    return float(family.dims(config).head_dim ** -0.5 if found is None else found)


def _multiplier(name: str) -> Callable[[Family, Config], float]:
    """Granite's multiplier of that name, or 1."""
    return lambda family, config: float(family.read(config, name) or 1.0)


# the names that every format but Mixtral's gives to gates and experts
GATE = LAYER + "mlp.gate.weight"
EXPERT = _alone(LAYER + "mlp.experts.{expert}.")
COUNTED = {"num_experts": "experts", "num_experts_per_tok": "experts_per_token"}
QWEN = {"decoder_sparse_step": 1, "norm_topk_prob": True, "mlp_only_layers": [], "use_sliding_window": False}
GRANITE = LAYER + "block_sparse_moe."
GRANITE_EXPERTS = {GRANITE + "input_linear.weight": GATE_UP, GRANITE + "output_linear.weight": DOWN}
GRANITE_SHARED = {
    LAYER + "shared_mlp.input_linear.weight": GATE_UP,
    LAYER + "shared_mlp.output_linear.weight": DOWN,
}
LOCAL_COUNTED = {"num_local_experts": "experts", "num_experts_per_tok": "experts_per_token"}
GRANITE_FIELDS: Mapping[str, str | Callable[[Family, Config], float]] = {
    "attention_multiplier": _attention_multiplier
} | {name: _multiplier(name) for name in ("embedding_multiplier", "residual_multiplier", "logits_scaling")}
MAMBA_FIELDS = (
    "mamba_n_heads", "mamba_n_groups", "mamba_d_state", "mamba_d_head", "mamba_d_conv", "mamba_expand",
    "mamba_chunk_size", "mamba_conv_bias", "mamba_proj_bias", "position_embedding_type", "layer_types",
)  # fmt: skip
LINEAR_FIELDS = (
    "layer_types", "linear_conv_kernel_dim", "linear_key_head_dim", "linear_value_head_dim", "linear_num_key_heads",
    "linear_num_value_heads",
)  # fmt: skip


def _layer_thetas(family: Family, config: Config) -> list[float]:
    """The base of the rotation in every layer; 0 where a layer does not rotate."""
    theta, layers = rope(family, config)["rope_theta"], family.dims(config).layers
    rotated = family.read(config, "no_rope_layers") or [1] * layers
    return [float(theta if turn else 0) for turn in rotated]


GRANITE_HOLDS = frozenset(GRANITE_FIELDS) | {"attention_bias"}
HEADS_IN_VLLM = Note("vLLM assumes heads of hidden size / heads in this format, which is not so here", free_heads=True)
BIASES_IN_VLLM = Note("vLLM's code for this format has no attention biases", setting="attention_bias")

FORMATS: Mapping[str, MoEFormat] = {
    fmt.name: fmt
    for fmt in (
        MoEFormat(
            name="mixtral",
            title="Mixtral",
            model_type="mixtral",
            architecture="MixtralForCausalLM",
            families=("llama", "mistral", "phi3", "helium"),
            gate=LAYER + "block_sparse_moe.gate.weight",
            expert=_alone(LAYER + "block_sparse_moe.experts.{expert}.", W132),
            constants={"router_jitter_noise": 0.0},
            counted=LOCAL_COUNTED,
            holds=frozenset({"sliding_window"}),
            router=SOFTMAX,
        ),
        MoEFormat(
            name="granitemoe",
            title="Granite MoE",
            model_type="granitemoe",
            architecture="GraniteMoeForCausalLM",
            families=("granite", "hyperclovax", "gemma", "llama", "mistral"),
            gate=GRANITE + "router.layer.weight",
            expert=GRANITE_EXPERTS,
            constants={},
            counted=LOCAL_COUNTED,
            fields=GRANITE_FIELDS,
            holds=GRANITE_HOLDS,
            notes=(HEADS_IN_VLLM, BIASES_IN_VLLM),
        ),
        MoEFormat(
            name="granitemoeshared",
            title="Granite MoE shared",
            model_type="granitemoeshared",
            architecture="GraniteMoeSharedForCausalLM",
            families=("granite", "llama", "mistral"),
            gate=GRANITE + "router.layer.weight",
            expert=GRANITE_EXPERTS,
            shared=GRANITE_SHARED,
            max_shared=1,
            constants={},
            counted=LOCAL_COUNTED | {"shared_intermediate_size": "shared_ffn"},
            fields=GRANITE_FIELDS,
            holds=GRANITE_HOLDS,
            notes=(HEADS_IN_VLLM, BIASES_IN_VLLM),
        ),
        MoEFormat(
            name="deepseek",
            title="DeepSeek MoE",
            model_type="deepseek",
            architecture="DeepseekForCausalLM",
            families=("llama", "mistral"),
            gate=GATE,
            expert=EXPERT,
            shared=_alone(LAYER + "mlp.shared_experts."),
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
                "n_shared_experts": "shared_or_null",
                "moe_intermediate_size": "ffn",
            },
            router=RouterRule(renormalizes_top1=False),
            on_request=True,
            ropes=("default", "linear", "dynamic"),
            free_heads=False,
            holds=frozenset({"attention_bias"}),
            loads_in_transformers=False,
            two_word_rope=True,
            notes=(WEAKER,),
        ),
        MoEFormat(
            name="qwen2_moe",
            title="Qwen MoE",
            model_type="qwen2_moe",
            architecture="Qwen2MoeForCausalLM",
            families=("qwen2", "seed_oss", "llama", "mistral"),
            gate=GATE,
            expert=EXPERT,
            shared=_alone(LAYER + "mlp.shared_expert."),
            shared_gate=LAYER + "mlp.shared_expert_gate.weight",
            max_shared=1,
            # 32 is the narrowest row that llama.cpp's quantizers take
            inert_shared_ffn=32,
            added=tuple(TensorSpec(LAYER + "self_attn." + name, shape) for name, shape in QKV_BIAS.items()),
            constants=QWEN | {"qkv_bias": True},
            counted=COUNTED | {"moe_intermediate_size": "ffn", "shared_expert_intermediate_size": "shared_ffn"},
            holds=frozenset({"qkv_bias"}),
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
            holds=frozenset({"attention_bias"}),
            counted=COUNTED | {"moe_intermediate_size": "ffn"},
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
            no_gguf="it lacks FlexOlmo (norms after attention and experts)",
            holds=frozenset({"attention_bias"}),
            counted=COUNTED,
        ),
        MoEFormat(
            name="ernie4_5_moe",
            title="Ernie 4.5 MoE",
            model_type="ernie4_5_moe",
            architecture="Ernie4_5_MoeForCausalLM",
            families=("ernie4_5",),
            gate=GATE,
            expert=EXPERT,
            shared=_alone(LAYER + "mlp.shared_experts."),
            max_shared=1,
            added=(TensorSpec(LAYER + "mlp.moe_statics.e_score_correction_bias", ("1", "experts"), dtype="F32"),),
            constants={
                "use_bias": False,
                "moe_layer_start_index": 0,
                "moe_layer_end_index": -1,
                "moe_layer_interval": 1,
                "moe_norm_min": 1e-12,
            },
            counted={
                "moe_num_experts": "experts",
                "moe_k": "experts_per_token",
                "moe_intermediate_size": "ffn",
                "moe_num_shared_experts": "shared",
            },
            router=RouterRule(wide=True),
            interleaved=True,
        ),
        MoEFormat(
            name="glm4_moe",
            title="GLM 4 MoE",
            model_type="glm4_moe",
            architecture="Glm4MoeForCausalLM",
            families=("glm", "phi3"),
            gate=GATE,
            expert=EXPERT,
            shared=_alone(LAYER + "mlp.shared_experts."),
            max_shared=1,
            inert_shared_ffn=0,
            added=(TensorSpec(LAYER + "mlp.gate.e_score_correction_bias", ("experts",), dtype="F32"),),
            constants={
                "first_k_dense_replace": 0,
                "n_group": 1,
                "topk_group": 1,
                "routed_scaling_factor": 1.0,
                "norm_topk_prob": True,
                "use_qk_norm": False,
                "num_mtp_layers": 0,
            },
            counted={
                "n_routed_experts": "experts",
                "num_experts_per_tok": "experts_per_token",
                "moe_intermediate_size": "ffn",
                "n_shared_experts": "shared",
            },
            fields={
                "attention_bias": lambda family, config: bool(family.read(config, "qkv_bias")),
                # absent, its class would take one half
                "partial_rotary_factor": lambda family, config: rope(family, config).get("partial_rotary_factor", 1.0),
            },
            router=RouterRule(score="sigmoid", epsilon=1e-20, rounds_weights=False, wide=True),
            holds=frozenset({"qkv_bias"}),
            partial_rotary=True,
        ),
        MoEFormat(
            name="lfm2_moe",
            title="LFM2 MoE",
            model_type="lfm2_moe",
            architecture="Lfm2MoeForCausalLM",
            families=("lfm2",),
            gate=LAYER + "feed_forward.gate.weight",
            expert=_alone(LAYER + "feed_forward.experts.{expert}.", W132),
            added=(TensorSpec(LAYER + "feed_forward.expert_bias", ("experts",), dtype="F32"),),
            constants={
                "num_dense_layers": 0,
                "use_expert_bias": True,
                "norm_topk_prob": True,
                "routed_scaling_factor": 1.0,
            },
            counted=COUNTED | {"moe_intermediate_size": "ffn"},
            fields={
                "norm_eps": "rms_norm_eps",
                "layer_types": "layer_types",
                "conv_bias": "conv_bias",
                "conv_L_cache": "conv_L_cache",
            },
            holds=frozenset({"layer_types"}),
            router=RouterRule(score="sigmoid", epsilon=1e-6),
        ),
        MoEFormat(
            name="qwen3_5_moe",
            title="Qwen3.5 MoE",
            model_type="qwen3_5_moe_text",
            architecture="Qwen3_5MoeForCausalLM",
            families=("qwen3_5_text",),
            gate=GATE,
            expert=EXPERT,
            shared=_alone(LAYER + "mlp.shared_expert."),
            shared_gate=LAYER + "mlp.shared_expert_gate.weight",
            max_shared=1,
            inert_shared_ffn=32,
            constants={},
            counted=COUNTED | {"moe_intermediate_size": "ffn", "shared_expert_intermediate_size": "shared_ffn"},
            fields={name: name for name in LINEAR_FIELDS},
            holds=frozenset({"layer_types"}),
            partial_rotary=True,
        ),
        MoEFormat(
            name="granitemoe_swa",
            title="Granite MoE SWA",
            model_type="granitemoe_swa",
            architecture="GraniteMoeSWAForCausalLM",
            families=("smollm3", "ministral"),
            gate=GRANITE + "router.weight",
            expert={GRANITE + "experts.gate_up_proj": GATE_UP, GRANITE + "experts.down_proj": DOWN},
            # a sink so far below every score adds nothing to the softmax
            added=(TensorSpec(LAYER + "self_attn.sinks", ("heads",), fill=-1e4),),
            constants={"shared_intermediate_size": 0},
            counted=LOCAL_COUNTED,
            fields={
                **GRANITE_FIELDS,
                "layer_types": "layer_types",
                "layer_rope_theta": _layer_thetas,
                # without a window its class wants a number all the same
                "sliding_window": lambda family, config: (
                    family.read(config, "sliding_window") or family.read(config, "max_position_embeddings")
                ),
            },
            holds=GRANITE_HOLDS | {"layer_types", "no_rope_layers", "sliding_window"},
            notes=(Note("transformers runs this format only with attn_implementation='eager'"),),
        ),
        MoEFormat(
            name="granitemoehybrid",
            title="Granite MoE hybrid",
            model_type="granitemoehybrid",
            architecture="GraniteMoeHybridForCausalLM",
            families=("granitemoehybrid",),
            gate=GRANITE + "router.layer.weight",
            expert=GRANITE_EXPERTS,
            shared=GRANITE_SHARED,
            max_shared=1,
            inert_shared_ffn=32,
            constants={},
            counted=LOCAL_COUNTED | {"shared_intermediate_size": "shared_ffn"},
            fields={**GRANITE_FIELDS, **{name: name for name in MAMBA_FIELDS}},
            holds=GRANITE_HOLDS | {"layer_types", "no_rope_layers"},
        ),
        MoEFormat(
            name="cohere2_moe",
            title="Cohere2 MoE",
            model_type="cohere2_moe",
            architecture="Cohere2MoeForCausalLM",
            families=("cohere2",),
            gate=GATE,
            expert=EXPERT,
            constants={
                "rms_norm_eps": None,
                "num_shared_experts": 0,
                "expert_selection_fn": "softmax",
                "norm_topk_prob": True,
            },
            counted=COUNTED,
            fields={
                "layer_types": "layer_types",
                "layer_norm_eps": "layer_norm_eps",
                "logit_scale": "logit_scale",
                "mlp_layer_types": lambda family, config: ["sparse"] * family.dims(config).layers,
            },
            holds=frozenset({"layer_types", "sliding_window", "attention_bias"}),
            interleaved=True,
        ),
    )
}
