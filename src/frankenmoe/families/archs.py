"""llama.cpp's architectures and what each of them computes.

Source: src/models of llama.cpp (MIT licence, the ggml authors; see NOTICE), read in b10605. Every row was run with
b11549 (tests/export/test_greedy.py).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from frankenmoe.families.archkeys import (
    SIGMOID,
    SOFTMAX,
    Factors,
    Facts,
    Keys,
    all_sparse,
    cohere2_norms,
    deepseek,
    delta_net,
    delta_net_lacks,
    ernie,
    expert_ffn,
    gating,
    gemma4,
    gemma4_factors,
    gemma4_lacks,
    granite_scales,
    kv_heads_by_layer,
    lfm2,
    mamba,
    mamba_lacks,
    nemotron_h,
    nemotron_h_lacks,
    nested_in_vision,
    rope_factors,
    rope_pattern,
    rope_pattern_lacks,
    rotary_keys,
    shared_count,
    shared_count_lacks,
    shared_ffn,
    window_lacks,
    window_pattern,
)
from frankenmoe.families.formats import FORMATS
from frankenmoe.families.places import (
    COHERE2,
    DENSE_FFN,
    GEMMA4,
    GLM4,
    LFM2,
    MAMBA,
    NEMOTRON_H,
    O_BIAS,
    PLAIN,
    QK_NORM,
    QKV_BIAS,
    QWEN3_5,
    SHARED_EXPERT,
    Places,
)
from frankenmoe.families.rotary import rope, rotary_size
from frankenmoe.families.words import INERT_FFN

MAX_EXPERTS = 1024  # llama.cpp's LLAMA_MAX_EXPERTS
# rotary types; those with a factor for each frequency only where the graph passes one on
PLAIN_ROPES = ("default", "linear", "yarn")
ROPES = (*PLAIN_ROPES, "llama3", "longrope")
# formats whose layers are those of Llama
LLAMA_LIKE = ("mixtral", "granitemoe", "granitemoeshared", "deepseek", "qwen2_moe", "qwen3_moe")


@dataclass(frozen=True, slots=True)
class Arch:
    """An architecture of llama.cpp and how it computes an MoE.

    `formats` are those whose function it can have, `places` the tensors it has; those in `needs` must be there, and
    those in `added` are what the format adds to the plain ones. `activation` is that of its experts.
    `normalizes`: top-k weights are renormalised to sum 1. `shared`: the kinds of shared expert it has, of "none",
    "plain" (always added) and "gated" (times a sigmoid). `inert` is the width of the shared expert of zeros that
    stands for none: a number, or "ffn"; `beside` has the names of its matrices. `interleaved`: rotary pairs are
    adjacent, so rows of q and k are permuted.
    `own_head`: the head cannot be tied. `free_heads`: heads times head size may differ from the hidden size.
    `multipliers`: it has Granite's. `windows`: it has windows per layer. `unrotated`: layers may be without rotation.
    `pads`: hidden and FFN sizes may be padded with zeros. `constants` are tensors of one value: name, shape, value.
    `factors` are the divisors of rotary frequencies. `lacks` says what else of a model it does not have.
    """

    name: str
    normalizes: bool
    shared: tuple[str, ...]
    interleaved: bool
    places: Places
    formats: tuple[str, ...] = LLAMA_LIKE
    needs: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    activation: str = "silu"
    keys: tuple[Keys, ...] = ()
    inert: str = ""
    beside: Mapping[str, str] = field(default_factory=lambda: SHARED_EXPERT)
    ropes: tuple[str, ...] = PLAIN_ROPES
    partial_rotary: bool = False
    own_head: bool = False
    free_heads: bool = True
    multipliers: bool = False
    windows: bool = False
    unrotated: bool = False
    pads: bool = True
    constants: tuple[tuple[str, tuple[str, ...], float], ...] = ()
    factors: Factors = rope_factors
    lacks: Callable[[Facts], str | None] = lambda facts: None


def metadata(arch: Arch, facts: Facts) -> dict[str, Any]:
    """All metadata of an architecture: sizes, rotary settings, and its own keys."""
    dims = facts.dims
    found = {
        "vocab_size": dims.vocab,
        "context_length": facts.context,
        "embedding_length": facts.hidden,
        "block_count": dims.layers,
        "feed_forward_length": facts.ffn,
        "attention.head_count": dims.heads,
        "attention.head_count_kv": dims.kv_heads,
        "attention.key_length": dims.head_dim,
        "attention.value_length": dims.head_dim,
        "attention.layer_norm_rms_epsilon": facts.eps,
        "expert_count": facts.experts,
        # without it llama.cpp aborts
        "expert_used_count": facts.top_k,
        "rope.dimension_count": rotary_size(facts.family, facts.config),
    }
    found |= rotary_keys(rope(facts.family, facts.config), context=facts.context)
    for keys in arch.keys:
        found |= keys(facts)
    return {f"{arch.name}.{key}": value for key, value in found.items() if value is not None}


# tried in this order
ARCHS: Sequence[Arch] = (
    Arch("llama", normalizes=True, shared=("none",), interleaved=True, places={**PLAIN, **QKV_BIAS}, ropes=ROPES),
    Arch(
        "qwen3moe",
        normalizes=True,
        shared=("none",),
        interleaved=False,
        places={**PLAIN, **QK_NORM},
        needs=tuple(QK_NORM),
        keys=(expert_ffn,),
    ),
    Arch(
        "qwen3vlmoe",
        formats=("qwen3_vl_moe",),
        normalizes=True,
        shared=("none",),
        interleaved=False,
        places={**PLAIN, **QK_NORM},
        needs=tuple(QK_NORM),
        ropes=("default",),
        pads=False,
        keys=(expert_ffn, nested_in_vision),
    ),
    Arch(
        "granitemoe",
        normalizes=True,
        shared=("none", "plain"),
        interleaved=True,
        formats=(*LLAMA_LIKE, "granitemoehybrid"),
        places={**PLAIN, **QKV_BIAS, **O_BIAS},
        multipliers=True,
        ropes=ROPES,
        keys=(shared_ffn, granite_scales),
    ),
    Arch(
        "qwen2moe",
        normalizes=False,
        shared=("gated",),
        interleaved=False,
        places={**PLAIN, **QKV_BIAS},
        own_head=True,
        free_heads=False,
        keys=(expert_ffn, shared_ffn),
    ),
    Arch(
        "deepseek",
        normalizes=False,
        shared=("plain",),
        interleaved=True,
        places=PLAIN,
        own_head=True,
        free_heads=False,
        keys=(expert_ffn, all_sparse, shared_count, deepseek),
        lacks=shared_count_lacks,
    ),
    Arch(
        "glm4moe",
        formats=("glm4_moe",),
        normalizes=True,
        shared=("none", "plain"),
        inert="ffn",
        interleaved=False,
        places=GLM4,
        partial_rotary=True,
        keys=(expert_ffn, all_sparse, gating(SIGMOID), shared_count),
        constants=(("exp_probs_b.bias", ("experts",), 0.0),),
    ),
    Arch(
        "ernie4_5-moe",
        formats=("ernie4_5_moe",),
        normalizes=True,
        shared=("none", "plain"),
        interleaved=True,
        places=PLAIN,
        keys=(expert_ffn, shared_ffn, all_sparse, ernie),
    ),
    Arch(
        "lfm2moe",
        formats=("lfm2_moe",),
        normalizes=True,
        shared=("none",),
        interleaved=False,
        places=LFM2,
        free_heads=False,
        pads=False,
        keys=(expert_ffn, all_sparse, gating(SIGMOID), kv_heads_by_layer, lfm2),
        constants=(("exp_probs_b.bias", ("experts",), 0.0),),
    ),
    Arch(
        "qwen35moe",
        formats=("qwen3_5_moe",),
        normalizes=True,
        shared=("none", "plain", "gated"),
        inert=str(INERT_FFN),
        interleaved=False,
        places=QWEN3_5,
        partial_rotary=True,
        keys=(expert_ffn, delta_net),
        lacks=delta_net_lacks,
    ),
    Arch(
        "granite_swa",
        formats=("granitemoe_swa", "mixtral"),
        normalizes=True,
        shared=("none",),
        interleaved=True,
        places={**PLAIN, **QKV_BIAS, **O_BIAS},
        multipliers=True,
        windows=True,
        unrotated=True,
        ropes=ROPES,
        keys=(granite_scales, window_pattern, rope_pattern),
        lacks=rope_pattern_lacks,
        constants=(("attn_sinks.weight", ("heads",), -1e4),),
    ),
    Arch(
        "granitehybrid",
        formats=("granitemoehybrid",),
        normalizes=True,
        shared=("none", "plain"),
        interleaved=True,
        places={**PLAIN, **QKV_BIAS, **O_BIAS, **MAMBA},
        multipliers=True,
        unrotated=True,
        ropes=(*PLAIN_ROPES, "llama3"),
        pads=False,
        keys=(shared_ffn, granite_scales, kv_heads_by_layer, mamba),
        lacks=mamba_lacks,
    ),
    Arch(
        "cohere2moe",
        formats=("cohere2_moe",),
        normalizes=True,
        shared=("none",),
        interleaved=True,
        places=COHERE2,
        windows=True,
        pads=False,
        keys=(expert_ffn, all_sparse, gating(SOFTMAX), window_pattern, cohere2_norms),
        lacks=window_lacks,
    ),
    Arch(
        "nemotron_h_moe",
        formats=("nemotron_h",),
        normalizes=True,
        shared=("none", "plain"),
        inert=str(INERT_FFN),
        interleaved=False,
        places=NEMOTRON_H,
        unrotated=True,
        activation="relu2",
        pads=False,
        keys=(expert_ffn, kv_heads_by_layer, nemotron_h),
        lacks=nemotron_h_lacks,
        constants=(("exp_probs_b.bias", ("experts",), 0.0),),
    ),
    Arch(
        "gemma4",
        formats=("gemma4",),
        normalizes=True,
        shared=("none",),
        inert=str(INERT_FFN),
        beside=DENSE_FFN,
        interleaved=False,
        activation="gelu_pytorch_tanh",
        places=GEMMA4,
        added=tuple(row.name for row in FORMATS["gemma4"].added),
        windows=True,
        partial_rotary=True,
        pads=False,
        ropes=("default", "linear", "proportional"),
        keys=(gemma4,),
        factors=gemma4_factors,
        lacks=gemma4_lacks,
    ),
)
