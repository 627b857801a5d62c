"""Every pair of a dense family and an MoE format that tests build, with a config that makes a loss visible."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from transformers import AutoModelForCausalLM

import tiny
from frankenmoe.checkpoint.jsonfile import read_object
from frankenmoe.families import FAMILIES, FORMATS

# odd sizes, groups of heads, four layers
SIZES: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 36,
    "intermediate_size": 52,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 6,
    "max_position_embeddings": 64,
    "initializer_range": 0.15,
}
LONG = 40  # tokens of a text that is longer than every window here
SHARED = {"shared_experts": [{"source_model": "BASE"}]}
MULTIPLIERS = {
    "embedding_multiplier": 12.0,
    "logits_scaling": 8.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.3,
}
# its router divides by the sum of two sigmoids plus 1e-6, which counts where both are small
LFM2_EPSILON = 5e-3
# weights that are rounded once more move the logits of any MoE of these sizes by up to 2e-5, as they move gates
ROUNDED_AGAIN = 3e-5
LFM2 = {
    "layer_types": ["conv", "full_attention", "conv", "full_attention"],
    "block_multiple_of": 4,
    "norm_eps": 3e-5,
    "pad_token_id": None,
}
MAMBA = {
    "layer_types": ["mamba", "attention", "mamba", "attention"],
    "num_local_experts": 0,
    "shared_intermediate_size": 52,
    "mamba_n_heads": 6,
    "mamba_d_head": 12,
    "mamba_d_state": 8,
    "mamba_expand": 2,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 8,
}
NEMOTRON_H = {
    "layers_block_type": ["linear_attention", "mlp", "full_attention", "mlp", "linear_attention"],
    "head_dim": 8,
    "mamba_num_heads": 6,
    "mamba_head_dim": 10,
    "ssm_state_size": 8,
    "n_groups": 2,
    "chunk_size": 8,
    "layer_norm_epsilon": 3e-5,
    "pad_token_id": None,
}
GEMMA3 = {
    "layer_types": ["sliding_attention", "full_attention", "full_attention", "sliding_attention"],
    "sliding_window": 8,
    "head_dim": 8,
    "query_pre_attn_scalar": 24,
    "tie_word_embeddings": True,
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e2},
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e4},
    },
}
GEMMA4 = {
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "full_attention"],
    "sliding_window": 8,
    "head_dim": 8,
    "global_head_dim": 12,
    "num_global_key_value_heads": 2,
    "attention_k_eq_v": True,
    "hidden_size_per_layer_input": 0,
    "final_logit_softcapping": 3.0,
    "tie_word_embeddings": True,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.1, 1.2],
    "long_factor": [1.5, 2.0, 2.5],
    "original_max_position_embeddings": 16,
}


@dataclass(frozen=True)
class Case:
    """A family built as a format: the parents' config, keys of the recipe.

    `loading` are options of stock transformers. `close` is the largest relative difference; `dense` that from the
    dense model, where experts are equal.
    """

    family: str
    fmt: str
    config: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    loading: dict[str, Any] = field(default_factory=dict)
    close: float = 5e-6
    dense: float = 5e-6

    @property
    def sizes(self) -> dict[str, Any]:
        return SIZES | self.config


CASES: dict[str, Case] = {
    "llama": Case("llama", "mixtral"),
    "mistral-window": Case("mistral", "mixtral", {"sliding_window": 8, "tie_word_embeddings": True}),
    "llama-qwen": Case("llama", "qwen2_moe", recipe={"architecture": "Qwen MoE"}),
    "mistral-qwen": Case("mistral", "qwen2_moe", {"sliding_window": None}, {"architecture": "Qwen MoE"}),
    "mistral-granite": Case("mistral", "granitemoe", {"sliding_window": None}, {"architecture": "Granite MoE"}),
    "qwen2": Case("qwen2", "qwen2_moe"),
    "qwen3": Case("qwen3", "qwen3_moe", {"attention_bias": True, "head_dim": 8}),
    "olmo2": Case("olmo2", "flex_olmo"),
    "llama-biases": Case("llama", "granitemoe", {"attention_bias": True, "head_dim": 8}),
    "llama-shared": Case("llama", "granitemoeshared", recipe=SHARED),
    "mistral-shared": Case("mistral", "granitemoeshared", {"sliding_window": None}, SHARED),
    "granite": Case("granite", "granitemoe", MULTIPLIERS | {"tie_word_embeddings": True}),
    "granite-shared": Case("granite", "granitemoeshared", MULTIPLIERS | {"attention_bias": True}, SHARED),
    "seed_oss": Case("seed_oss", "qwen2_moe", {"head_dim": 8, "attention_bias": True}),
    "seed_oss-plain": Case("seed_oss", "qwen2_moe", {"attention_bias": False, "tie_word_embeddings": True}),
    "phi3-window": Case("phi3", "mixtral", {"sliding_window": 8, "pad_token_id": None}),
    "phi3-longrope": Case(
        "phi3",
        "mixtral",
        {
            "original_max_position_embeddings": 16,
            "rope_parameters": LONGROPE,
            "tie_word_embeddings": True,
            "pad_token_id": None,
        },
    ),
    "phi3-partial": Case(
        "phi3",
        "glm4_moe",
        {
            "head_dim": 8,
            "hidden_size": 48,
            "original_max_position_embeddings": 16,
            "rope_parameters": LONGROPE | {"partial_rotary_factor": 0.75},
            "pad_token_id": None,
        },
    ),
    "hyperclovax": Case("hyperclovax", "granitemoe", MULTIPLIERS | {"logits_scaling": 0.125, "use_post_norm": False}),
    "gemma": Case("gemma", "granitemoe", {"head_dim": 8, "tie_word_embeddings": True}),
    "ernie4_5": Case("ernie4_5", "ernie4_5_moe", {"tie_word_embeddings": True}),
    "ernie4_5-shared": Case("ernie4_5", "ernie4_5_moe", {"head_dim": 8, "tie_word_embeddings": False}, SHARED),
    "glm": Case("glm", "glm4_moe", {"head_dim": 8, "pad_token_id": None}),
    "glm-shared": Case("glm", "glm4_moe", {"head_dim": 8, "attention_bias": False, "pad_token_id": None}, SHARED),
    "lfm2": Case("lfm2", "lfm2_moe", LFM2, dense=LFM2_EPSILON),
    "lfm2-bias": Case("lfm2", "lfm2_moe", LFM2 | {"conv_bias": True, "tie_word_embeddings": False}, dense=LFM2_EPSILON),
    "qwen3_5": Case(
        "qwen3_5_text",
        "qwen3_5_moe",
        {
            "head_dim": 16,
            "layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"],
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "partial_rotary_factor": 0.25,
                "mrope_section": [1, 1, 0],
            },
        },
        close=1e-4,
        dense=1e-4,
    ),
    "smollm3": Case(
        "smollm3",
        "granitemoe_swa",
        {"no_rope_layers": [1, 1, 0, 1], "tie_word_embeddings": True},
        loading={"attn_implementation": "eager"},
    ),
    # masks follow layer_types, whatever use_sliding_window says
    "smollm3-window": Case(
        "smollm3",
        "granitemoe_swa",
        {
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
            "sliding_window": 8,
            "use_sliding_window": False,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        },
        loading={"attn_implementation": "eager"},
    ),
    "ministral": Case(
        "ministral",
        "granitemoe_swa",
        {
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
            "sliding_window": 8,
        },
        loading={"attn_implementation": "eager"},
    ),
    "cohere2": Case(
        "cohere2",
        "cohere2_moe",
        {
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
            "sliding_window": 8,
            "logit_scale": 0.25,
            "tie_word_embeddings": True,
        },
    ),
    "cohere": Case(
        "cohere", "cohere2_moe", {"logit_scale": 0.25, "attention_bias": True, "tie_word_embeddings": False}
    ),
    # its MoE has one more layer, which changes nothing
    "gemma3": Case("gemma3_text", "gemma4", GEMMA3, close=ROUNDED_AGAIN),
    "gemma3-full": Case(
        "gemma3_text",
        "gemma4",
        GEMMA3
        | {
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
            "attention_bias": True,
            "tie_word_embeddings": False,
            "final_logit_softcapping": 3.0,
        },
        close=ROUNDED_AGAIN,
    ),
    "gemma4": Case("gemma4_text", "gemma4", GEMMA4),
    # the last two layers read the keys of earlier ones
    "gemma4-inputs": Case(
        "gemma4_text",
        "gemma4",
        GEMMA4
        | {
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
            "num_kv_shared_layers": 2,
            "hidden_size_per_layer_input": 5,
            "vocab_size_per_layer_input": 101,
            "attention_k_eq_v": False,
            "attention_bias": True,
            "tie_word_embeddings": False,
            "final_logit_softcapping": None,
        },
        # scores are not divided by the root of the head size: rounding the embeddings moves the logits by 3e-6
        close=1e-5,
    ),
    "helium": Case("helium", "mixtral", {"pad_token_id": None}),
    "granite4": Case(
        "granitemoehybrid",
        "granitemoehybrid",
        MULTIPLIERS | MAMBA | {"position_embedding_type": "nope", "tie_word_embeddings": True},
    ),
    "granite4-shared": Case(
        "granitemoehybrid",
        "granitemoehybrid",
        MULTIPLIERS | MAMBA | {"position_embedding_type": "rope", "attention_bias": True},
        SHARED,
    ),
    "nemotron_h": Case("nemotron_h", "nemotron_h", NEMOTRON_H),
    "nemotron_h-shared": Case(
        "nemotron_h",
        "nemotron_h",
        NEMOTRON_H
        | {
            "layers_block_type": ["mlp", "linear_attention", "full_attention", "mlp"],
            "use_conv_bias": False,
            "use_bias": True,
            "mlp_hidden_act": "gelu_pytorch_tanh",
        },
        SHARED,
    ),
}


def make_parent(folder: Path, case: Case, *, seed: int = 0, **changes: Any) -> Path:
    """A random parent of a case's family."""
    return tiny.make_parent(folder, case.family, seed=seed, **(case.sizes | changes))


def write_recipe(file: Path, case: Case, base: Path, parents: list[Path], *, half: bool = False, **keys: Any) -> Path:
    """A recipe over parents, with the case's own keys; `half` halves all experts where there is a shared one."""
    own = {
        key: [each | {"source_model": str(base)} for each in value] if key == "shared_experts" else value
        for key, value in case.recipe.items()
    }
    tiny.write_recipe(file, base, parents, **(own | keys))
    if half and "shared_experts" in own:
        recipe = yaml.safe_load(file.read_text())
        for each in (*recipe["experts"], *recipe["shared_experts"]):
            each["residual_scale"] = 0.5
        file.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return file


def logits(model: Any, ids_BT: torch.Tensor) -> torch.Tensor:
    """All logits [B, T, V] in float32."""
    with torch.no_grad():
        return model(input_ids=ids_BT).logits.float()


def apart(one: torch.Tensor, two: torch.Tensor) -> float:
    """The largest difference, relative to the largest number."""
    return float((one - two).abs().max() / one.abs().max())


class PerToken(nn.Module):
    """An MoE written down as its definition: token by token, expert by expert.

    `experts` and `shared` are FFNs of stock dense models. `shared_gate` (1, D) weighs the shared one.
    """

    def __init__(
        self,
        fmt: str,
        gate_ED: torch.Tensor,
        experts: list[nn.Module],
        shared: nn.Module | None,
        shared_gate: torch.Tensor | None,
        *,
        top_k: int,
    ) -> None:
        super().__init__()
        self.rule = FORMATS[fmt].router
        self.gate_ED, self.shared_gate, self.top_k = gate_ED, shared_gate, top_k
        self.experts, self.shared = nn.ModuleList(experts), shared

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        tokens = hidden.reshape(-1, hidden.shape[-1])
        return torch.stack([self.one(token) for token in tokens]).reshape(hidden.shape)

    def one(self, token_D: torch.Tensor) -> torch.Tensor:
        """The sum for one token."""
        scores = (self.gate_ED @ token_D).tolist()
        raised = torch.tensor(scores).sigmoid() if self.rule.score == "sigmoid" else torch.tensor(scores).softmax(0)
        weights = dict(sorted(enumerate(raised.tolist()), key=lambda pair: -pair[1])[: self.top_k])
        whole = sum(weights.values()) + self.rule.epsilon
        total = torch.zeros_like(token_D)
        for index, weight in weights.items():
            total += weight / whole * self.experts[index](token_D[None])[0]
        if self.shared is not None:
            share = 1.0 if self.shared_gate is None else (self.shared_gate @ token_D).sigmoid()
            total += share * self.shared(token_D[None])[0]
        return total


def per_token(
    case: Case, base: Path, parents: list[Path], gates: Mapping[str, torch.Tensor], *, shared: Path | None
) -> Any:
    """The stock model of `base` with a loop in place of every FFN; `gates` are an artifact's stored routers."""
    fmt, mlp = FORMATS[case.fmt], FAMILIES[case.family].mlp
    with_ffn = FAMILIES[case.family].layered(read_object(base / "config.json", hint=""))
    model, *others = (AutoModelForCausalLM.from_pretrained(each).eval() for each in (base, *parents))
    common = AutoModelForCausalLM.from_pretrained(shared).eval() if shared else None
    for index, layer in ((index, model.model.layers[index]) for index in with_ffn):
        own = gates.get(fmt.shared_gate.format(layer=index)) if fmt.shared_gate and common is not None else None
        loop = PerToken(
            case.fmt,
            gates[fmt.gate.format(layer=index)],
            [getattr(other.model.layers[index], mlp) for other in others],
            getattr(common.model.layers[index], mlp) if common is not None else None,
            own,
            top_k=2,
        )
        setattr(layer, mlp, loop)
    return model
