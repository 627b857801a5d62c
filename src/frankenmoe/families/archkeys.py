"""The metadata that llama.cpp's architectures read, and factors of frequencies, as functions of what an MoE is.

Source: src/models and conversion/*.py of llama.cpp (MIT licence, the ggml authors; see NOTICE), read in b10605.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from frankenmoe.families.known import is_neutral
from frankenmoe.families.nemotron import FFN
from frankenmoe.families.nemotron import MAMBA as LINEAR
from frankenmoe.families.places import key_heads
from frankenmoe.families.rotary import longrope_attention, rope, rotary_size, written_rope
from frankenmoe.families.spec import ATTENTION_KINDS, FULL, SLIDING, Config, Dims, Family
from frankenmoe.families.towers import QWEN3_VISION
from frankenmoe.families.words import GRANITE_FIELDS, INERT_FFN

SOFTMAX, SIGMOID = 1, 2  # numbers of gating functions
STILL = 1e30  # divides a frequency to nothing


@dataclass(frozen=True)
class Facts:
    """What metadata tell of an MoE.

    `hidden`, `ffn` and `shared_ffn` are the sizes in the file; without a shared expert its width is 0. `outer` is the
    config of the model that it is nested in, if it is.
    """

    family: Family
    config: Config
    hidden: int
    ffn: int
    experts: int
    top_k: int
    shared_ffn: int
    eps: float
    outer: Config | None = None

    @property
    def dims(self) -> Dims:
        return self.family.dims(self.config)

    @property
    def context(self) -> int:
        return int(self.read("max_position_embeddings"))

    def read(self, name: str) -> Any:
        """A plain config field."""
        return self.family.read(self.config, name)


Keys = Callable[[Facts], Mapping[str, Any]]
"""Facts -> metadata, without the architecture's name in front of the keys."""
Factors = Callable[[Facts], Mapping[str, tuple[float, ...]]]
"""Facts -> tensors, by name, of the divisors of rotary frequencies."""


def multipliers(family: Family, config: Config) -> dict[str, float]:
    """Granite's multipliers that are not neutral, by name."""
    names = (name for name in GRANITE_FIELDS if not is_neutral(family, config, name))
    return {name: float(family.read(config, name)) for name in names}


def rotary_keys(rotary: Mapping[str, Any], *, context: int) -> dict[str, Any]:
    """Metadata of rotary settings that `rope` has read, for a model of this context (in tokens)."""
    found: dict[str, Any] = {"rope.freq_base": float(rotary["rope_theta"])}
    kind = rotary["rope_type"]
    if kind in ("linear", "yarn", "longrope"):
        found["rope.scaling.type"] = kind
    if kind in ("yarn", "longrope"):
        found["rope.scaling.original_context_length"] = int(rotary["original_max_position_embeddings"])
    if kind in ("linear", "yarn"):
        found["rope.scaling.factor"] = float(rotary["factor"])
    if kind == "yarn":
        for ours in ("beta_fast", "beta_slow"):
            if rotary.get(ours) is not None:
                found[f"rope.scaling.yarn_{ours}"] = float(rotary[ours])
    if kind == "longrope":
        found["rope.scaling.attn_factor"] = longrope_attention(rotary, context)
    return found


def rope_factors(facts: Facts) -> dict[str, tuple[float, ...]]:
    """The divisors of the rotary frequencies, where the rotary type has them."""
    rotary = rope(facts.family, facts.config)
    if rotary["rope_type"] == "llama3":
        return {"rope_freqs": llama3_factors(rotary, rotary_size(facts.family, facts.config))}
    if rotary["rope_type"] == "longrope":
        return {f"rope_factors_{which}": tuple(map(float, rotary[f"{which}_factor"])) for which in ("long", "short")}
    return {}


def llama3_factors(rotary: Mapping[str, Any], head_dim: int) -> tuple[float, ...]:
    """The divisor of each rotary frequency: 1 for short wavelengths, `factor` for long ones, interpolated in between.

    The formula is that of Llama 3.1 (transformers' rope type `llama3`).
    """
    factor, context = float(rotary["factor"]), float(rotary["original_max_position_embeddings"])
    low, high = float(rotary["low_freq_factor"]), float(rotary["high_freq_factor"])
    found = []
    for index in range(0, head_dim, 2):
        wavelength = 2 * math.pi * float(rotary["rope_theta"]) ** (index / head_dim)
        if wavelength < context / high:
            found.append(1.0)
        elif wavelength > context / low:
            found.append(factor)
        else:
            smooth = (context / wavelength - low) / (high - low)
            found.append(1 / ((1 - smooth) / factor + smooth))
    return tuple(found)


# ---- keys that several architectures have ----------------------------------------------------------------------------


def expert_ffn(facts: Facts) -> dict[str, Any]:
    return {"expert_feed_forward_length": facts.ffn}


def shared_ffn(facts: Facts) -> dict[str, Any]:
    return {"expert_shared_feed_forward_length": facts.shared_ffn} if facts.shared_ffn else {}


def granite_scales(facts: Facts) -> dict[str, Any]:
    given = multipliers(facts.family, facts.config)
    return {
        "logit_scale": given.get("logits_scaling", 1.0),
        "residual_scale": given.get("residual_multiplier", 1.0),
        "embedding_scale": given.get("embedding_multiplier", 1.0),
        "attention.scale": given.get("attention_multiplier", facts.dims.head_dim**-0.5),
    }


def all_sparse(facts: Facts) -> dict[str, Any]:
    return {"leading_dense_block_count": 0}


def kv_heads_by_layer(facts: Facts) -> dict[str, Any]:
    dims = facts.dims
    return {"attention.head_count_kv": [dims.kv_heads if kind in ATTENTION_KINDS else 0 for kind in dims.kinds]}


def window_pattern(facts: Facts) -> dict[str, Any]:
    """The layers with a window. llama.cpp wants one: without any, the first gets one as long as the context."""
    window = facts.read("sliding_window")
    sliding = [kind == SLIDING for kind in facts.dims.kinds] or [window is not None] * facts.dims.layers
    if not any(sliding):
        window, sliding = None, [layer == 0 for layer in range(len(sliding))]
    return {
        "attention.sliding_window": int(window or facts.context),
        "attention.sliding_window_pattern": sliding,
    }


def window_lacks(facts: Facts) -> str | None:
    """Cohere 2 rotates only in layers with a window, and llama.cpp wants one such layer."""
    rotates = SLIDING in facts.dims.kinds and facts.read("sliding_window") is not None
    return None if rotates else "needs a layer with a window"


def gating(number: int) -> Keys:
    return lambda facts: {"expert_gating_func": number, "expert_weights_norm": True, "expert_weights_scale": 1.0}


# ---- keys of one architecture ----------------------------------------------------------------------------------------


def deepseek(facts: Facts) -> dict[str, Any]:
    return {"expert_weights_scale": 1.0}


def shared_count(facts: Facts) -> dict[str, Any]:
    """The shared expert as so many experts side by side; one of zeros stands for none."""
    return {"expert_shared_count": facts.shared_ffn // facts.ffn or 1}


def shared_count_lacks(facts: Facts) -> str | None:
    if facts.shared_ffn % facts.ffn == 0:
        return None
    return f"has shared experts that are as wide as others, found widths {facts.shared_ffn} and {facts.ffn}"


def ernie(facts: Facts) -> dict[str, Any]:
    return {"interleave_moe_layer_step": 1, "expert_shared_count": facts.shared_ffn // facts.ffn}


def lfm2(facts: Facts) -> dict[str, Any]:
    return {"shortconv.l_cache": int(facts.read("conv_L_cache"))}


def rope_pattern(facts: Facts) -> dict[str, Any]:
    """The layers that rotate."""
    turned = facts.read("no_rope_layers") or [1] * facts.dims.layers
    return {"attention.rope_pattern": [bool(turn) for turn in turned]}


def rope_pattern_lacks(facts: Facts) -> str | None:
    return None if any(facts.read("no_rope_layers") or [1]) else "needs a layer that rotates"


def mamba(facts: Facts) -> dict[str, Any]:
    dims = facts.dims
    return {
        "ssm.conv_kernel": dims.size("kernel"),
        "ssm.state_size": int(facts.read("mamba_d_state")),
        "ssm.group_count": dims.size("mamba_groups"),
        "ssm.inner_size": dims.size("inner"),
        "ssm.time_step_rank": dims.size("mamba_heads"),
        "rope.scaling.finetuned": facts.read("no_rope_layers") == [1],  # whether layers rotate
    }


def mamba_lacks(facts: Facts) -> str | None:
    if all(kind in ATTENTION_KINDS for kind in facts.dims.kinds):
        return "needs a Mamba layer"
    if facts.read("mamba_expand") != 2:
        return f"widens its Mamba layers by 2, found mamba_expand {facts.read('mamba_expand')}"
    return None if facts.read("mamba_conv_bias") else "needs biases of the convolution, found mamba_conv_bias false"


def _sections(rotary: Mapping[str, Any], usual: tuple[int, ...]) -> list[int]:
    """How many frequencies turn with the place in time, in height and in width; in text these are one place."""
    found = [*(rotary.get("mrope_section") or usual), 0, 0, 0]
    return [int(each) for each in found[:4]]


def nested_in_vision(facts: Facts) -> dict[str, Any]:
    """What the text of Qwen3-VL needs for pictures, which come from another file."""
    outer = facts.outer or {}
    tower = {"deepstack_visual_indexes": QWEN3_VISION.defaults["deepstack_visual_indexes"], **outer["vision_config"]}
    return {
        "rope.dimension_sections": _sections(written_rope(outer["text_config"]), (24, 20, 20)),
        "n_deepstack_layers": len(tower["deepstack_visual_indexes"]),
    }


def nemotron_h(facts: Facts) -> dict[str, Any]:
    """A layer without FFN has width 0 there; if it has no keys either, llama.cpp takes it for Mamba."""
    dims = facts.dims
    return {
        "feed_forward_length": [facts.ffn * (kind == FFN) for kind in dims.kinds],
        "attention.layer_norm_epsilon": facts.eps,  # it wants both keys
        "expert_shared_count": 1,
        "expert_shared_feed_forward_length": facts.shared_ffn or INERT_FFN,
        "expert_weights_norm": True,
        "expert_weights_scale": 1.0,
        "ssm.conv_kernel": dims.size("kernel"),
        "ssm.state_size": int(facts.read("ssm_state_size")),
        "ssm.group_count": dims.size("mamba_groups"),
        "ssm.inner_size": dims.size("inner"),
        "ssm.time_step_rank": dims.size("mamba_heads"),
    }


def nemotron_h_lacks(facts: Facts) -> str | None:
    if LINEAR not in facts.dims.kinds:
        return "needs a Mamba layer"
    return None if facts.read("use_conv_bias") else "needs biases of the convolution, found use_conv_bias false"


def delta_net(facts: Facts) -> dict[str, Any]:
    dims = facts.dims
    return {
        "ssm.conv_kernel": dims.size("kernel"),
        "ssm.state_size": dims.size("linear_head"),
        "ssm.group_count": key_heads(dims),
        "ssm.inner_size": dims.size("linear_values"),
        "ssm.time_step_rank": dims.size("linear_heads"),
        "attention.recurrent_layers": [kind != FULL for kind in dims.kinds],
        "rope.dimension_sections": _sections(rope(facts.family, facts.config), (11, 11, 10)),
        "expert_shared_feed_forward_length": facts.shared_ffn or INERT_FFN,
    }


def delta_net_lacks(facts: Facts) -> str | None:
    keys, values = facts.read("linear_key_head_dim"), facts.read("linear_value_head_dim")
    return f"has keys as wide as values in linear attention, found {keys} and {values}" if keys != values else None


def cohere2_norms(facts: Facts) -> dict[str, Any]:
    return {
        # with the key of the other norm it would take that one
        "attention.layer_norm_rms_epsilon": None,
        "attention.layer_norm_epsilon": float(facts.read("layer_norm_eps")),
        "logit_scale": float(facts.read("logit_scale")),
    }


def gemma4(facts: Facts) -> dict[str, Any]:
    """Layers with full attention have sizes and rotary settings of their own; all others are in the plain keys' `_swa`.

    What scales the rotation of full attention is among the factors, as it does not hold for the others.
    """
    dims, types = facts.dims, facts.read("layer_types")
    head = int(facts.read("global_head_dim"))
    kv_heads = {FULL: int(facts.read("num_global_key_value_heads")), SLIDING: dims.kv_heads}
    return {
        "feed_forward_length": facts.shared_ffn or INERT_FFN,
        "expert_feed_forward_length": facts.ffn,
        "embedding_length_per_layer_input": int(facts.read("hidden_size_per_layer_input")),
        "attention.head_count_kv": [kv_heads[kind] for kind in types],
        "attention.key_length": head,
        "attention.value_length": head,
        "attention.key_length_swa": dims.head_dim,
        "attention.value_length_swa": dims.head_dim,
        "attention.sliding_window": int(facts.read("sliding_window") or facts.context),
        "attention.sliding_window_pattern": [kind == SLIDING for kind in types],
        "attention.shared_kv_layers": int(facts.read("num_kv_shared_layers")),
        "rope.dimension_count": head,
        "rope.dimension_count_swa": dims.head_dim,
        "rope.freq_base_swa": float(_ropes(facts)[SLIDING]["rope_theta"]),
        "rope.scaling.type": None,
        "rope.scaling.factor": None,
        # without this key llama.cpp would cap at 30; 0 is none
        "final_logit_softcapping": float(facts.read("final_logit_softcapping") or 0.0),
    }


def gemma4_factors(facts: Facts) -> dict[str, tuple[float, ...]]:
    """One for every pair that full attention rotates, times what its rotation is slowed down by; others stand still."""
    rotary, pairs = _ropes(facts)[FULL], int(facts.read("global_head_dim")) // 2
    turned = int(float(rotary.get("partial_rotary_factor") or 1.0) * pairs)
    return {"rope_freqs": (float(rotary.get("factor") or 1.0),) * turned + (STILL,) * (pairs - turned)}


def gemma4_lacks(facts: Facts) -> str | None:
    ropes = _ropes(facts)
    if SLIDING not in facts.read("layer_types"):
        return "needs a layer with a window"
    for kind, types in ((SLIDING, ("default",)), (FULL, ("default", "linear", "proportional"))):
        rotary = ropes[kind]
        partial = rotary.get("partial_rotary_factor") or 1.0
        if rotary["rope_type"] not in types or (partial != 1 and rotary["rope_type"] != "proportional"):
            return f"has rotation of {kind} only of type {' or '.join(types)}, found {dict(rotary)}"
    inputs, own = int(facts.read("hidden_size_per_layer_input")), facts.read("vocab_size_per_layer_input")
    if inputs and own != facts.dims.vocab:
        return f"has as many inputs of layers as tokens, found {own} and {facts.dims.vocab}"
    return None


def _ropes(facts: Facts) -> Mapping[str, Mapping[str, Any]]:
    """The rotary settings of each kind of layer."""
    assert facts.family.rope_by_kind is not None
    return facts.family.rope_by_kind(facts.family.filled(facts.config))
