"""One table per MoE format that can be written."""

from collections.abc import Mapping

from frankenmoe.families.layeredformats import LAYERED_FORMATS
from frankenmoe.families.nemotron import NEMOTRON_H_MOE
from frankenmoe.families.rotary import rope
from frankenmoe.families.rows import LAYER, QKV_BIAS
from frankenmoe.families.spec import SOFTMAX, Inside, MoEFormat, Note, RouterRule, TensorSpec
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
    W132,
    alone,
)

QWEN = {"decoder_sparse_step": 1, "norm_topk_prob": True, "mlp_only_layers": [], "use_sliding_window": False}
QWEN3_VL = "model.language_model."
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


HEADS_IN_VLLM = Note("vLLM assumes heads of hidden size / heads in this format, which is not so here", free_heads=True)

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
            expert=alone(LAYER + "block_sparse_moe.experts.{expert}.", W132),
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
            shared=alone(LAYER + "mlp.shared_experts."),
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
            balances=False,
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
            shared=alone(LAYER + "mlp.shared_expert."),
            shared_gate=LAYER + "mlp.shared_expert_gate.weight",
            max_shared=1,
            inert_shared_ffn=INERT_FFN,
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
            notes=(BIASES_IN_VLLM,),
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
            shared=alone(LAYER + "mlp.shared_experts."),
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
            shared=alone(LAYER + "mlp.shared_experts."),
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
            balances=False,
            holds=frozenset({"qkv_bias"}),
            partial_rotary=True,
            notes=(
                Note("vLLM 0.32 expects an untied head in this format; with a tied head it writes nonsense", tied=True),
            ),
        ),
        MoEFormat(
            name="qwen3_vl_moe",
            title="Qwen3-VL MoE",
            model_type="qwen3_vl_moe",
            architecture="Qwen3VLMoeForConditionalGeneration",
            families=("qwen3",),
            inside=Inside(wrapper="qwen3_vl", text="qwen3_vl_moe_text", tower="qwen3_vl_moe", root=QWEN3_VL),
            gate=QWEN3_VL + "layers.{layer}.mlp.gate.weight",
            expert={
                QWEN3_VL + "layers.{layer}.mlp.experts.gate_up_proj": GATE_UP,
                QWEN3_VL + "layers.{layer}.mlp.experts.down_proj": DOWN,
            },
            turned=True,
            constants=QWEN,
            holds=frozenset({"attention_bias"}),
            counted=COUNTED | {"moe_intermediate_size": "ffn"},
            notes=(BIASES_IN_VLLM,),
        ),
        NEMOTRON_H_MOE,
        *LAYERED_FORMATS,
    )
}
