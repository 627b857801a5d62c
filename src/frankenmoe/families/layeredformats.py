"""MoE formats whose layers differ: windows, linear attention, convolution, Mamba."""

from frankenmoe.families.rotary import rope
from frankenmoe.families.rows import LAYER
from frankenmoe.families.spec import SOFTMAX, Config, Family, MoEFormat, Note, RouterRule, TensorSpec
from frankenmoe.families.words import (
    BIASES_IN_VLLM,
    COUNTED,
    DOWN,
    EXPERT,
    GATE,
    GATE_UP,
    GRANITE,
    GRANITE_EXPERTS,
    GRANITE_FIELDS,
    GRANITE_HOLDS,
    GRANITE_SHARED,
    INERT_FFN,
    LOCAL_COUNTED,
    TIED_IN_VLLM,
    W132,
    alone,
)

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


def _window(family: Family, config: Config) -> int:
    """The window; without one these classes want a number all the same."""
    return int(family.read(config, "sliding_window") or family.read(config, "max_position_embeddings"))


WIDER_IN_VLLM = Note(
    "vLLM 0.32 lets the windows of Cohere2 models reach one token further than transformers; "
    "with --hf-overrides and a sliding_window less by one it computes the same",
    setting="sliding_window",
)
PRE_FFN = LAYER + "pre_feedforward_layernorm.weight"
# so small a scale that the squares of what a norm reads do not count beside its epsilon
FAINT = 2.0**-11
GEMMA4_FIELDS = (
    "layer_types", "final_logit_softcapping", "global_head_dim", "num_global_key_value_heads",
    "attention_k_eq_v", "num_kv_shared_layers", "hidden_size_per_layer_input", "vocab_size_per_layer_input",
)  # fmt: skip


LAYERED_FORMATS = (
    MoEFormat(
        name="lfm2_moe",
        title="LFM2 MoE",
        model_type="lfm2_moe",
        architecture="Lfm2MoeForCausalLM",
        families=("lfm2",),
        gate=LAYER + "feed_forward.gate.weight",
        expert=alone(LAYER + "feed_forward.experts.{expert}.", W132),
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
        balances=False,
        notes=(TIED_IN_VLLM,),
    ),
    MoEFormat(
        name="qwen3_5_moe",
        title="Qwen3.5 MoE",
        model_type="qwen3_5_moe_text",
        architecture="Qwen3_5MoeForCausalLM",
        families=("qwen3_5_text",),
        gate=GATE,
        expert=EXPERT,
        shared=alone(LAYER + "mlp.shared_expert."),
        shared_gate=LAYER + "mlp.shared_expert_gate.weight",
        max_shared=1,
        inert_shared_ffn=INERT_FFN,
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
            "sliding_window": _window,
        },
        holds=GRANITE_HOLDS | {"layer_types", "no_rope_layers", "sliding_window"},
        notes=(Note("transformers runs this format only with attn_implementation='eager'"), BIASES_IN_VLLM),
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
        inert_shared_ffn=INERT_FFN,
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
        families=("cohere2", "cohere"),
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
        balances=False,
        notes=(WIDER_IN_VLLM, TIED_IN_VLLM, BIASES_IN_VLLM),
    ),
    MoEFormat(
        name="gemma4",
        title="Gemma 4",
        model_type="gemma4_text",
        architecture="Gemma4ForCausalLM",
        families=("gemma4_text", "gemma3_text"),
        gate=LAYER + "router.proj.weight",
        expert={LAYER + "experts.gate_up_proj": GATE_UP, LAYER + "experts.down_proj": DOWN},
        # beside its experts it always has an FFN, whose norm is off here
        shared=alone(LAYER + "mlp."),
        inert_shared_ffn=INERT_FFN,
        added=(
            TensorSpec(LAYER + "layer_scalar", ("1",), fill=1.0),
            TensorSpec(LAYER + "post_feedforward_layernorm_1.weight", ("hidden",)),
            TensorSpec(LAYER + "pre_feedforward_layernorm_2.weight", ("hidden",), fill=1.0, like=PRE_FFN),
            TensorSpec(LAYER + "router.scale", ("hidden",), fill=lambda c: c["hidden_size"] ** 0.5, like=PRE_FFN),
            # the experts' sum has two norms behind it: far below its epsilon the first one only scales
            TensorSpec(LAYER + "router.per_expert_scale", ("experts",), fill=FAINT),
            TensorSpec(
                LAYER + "post_feedforward_layernorm_2.weight",
                ("hidden",),
                fill=lambda config: config["rms_norm_eps"] ** 0.5 / FAINT,
            ),
        ),
        constants={"enable_moe_block": True, "use_double_wide_mlp": False},
        counted={
            "num_experts": "experts",
            "top_k_experts": "experts_per_token",
            "moe_intermediate_size": "ffn",
            "intermediate_size": "shared_ffn",
        },
        fields={
            "hidden_activation": "hidden_act",
            "sliding_window": _window,
            **{name: name for name in GEMMA4_FIELDS},
        },
        holds=frozenset({"layer_types", "sliding_window", "attention_bias"}),
        router=SOFTMAX,
        balances=False,
        rope_by_kind=True,
        ends_in_full=True,
    ),
)
