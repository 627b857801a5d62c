"""The metadata that llama.cpp's architectures read, as functions of what an MoE is.

Source: src/models and conversion/*.py of llama.cpp (MIT licence, the ggml authors; see NOTICE), read in b10605.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from frankenmoe.families.known import is_neutral
from frankenmoe.families.nemotron import FFN
from frankenmoe.families.nemotron import MAMBA as LINEAR
from frankenmoe.families.places import key_heads
from frankenmoe.families.rotary import longrope_attention, rope, written_rope
from frankenmoe.families.spec import ATTENTION_KINDS, FULL, SLIDING, Config, Dims, Family
from frankenmoe.families.towers import QWEN3_VISION
from frankenmoe.families.words import GRANITE_FIELDS, INERT_FFN

SOFTMAX, SIGMOID = 1, 2  # numbers of gating functions


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
