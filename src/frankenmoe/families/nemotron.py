"""Nemotron-H, dense and as an MoE: every layer is Mamba, attention, or an FFN without a gate.

Its files call `backbone` what its class calls `model`. It does not rotate.
"""

from collections.abc import Mapping
from typing import Any

from frankenmoe.families.rows import LAYER, QKVO, defaults, mamba, rows
from frankenmoe.families.spec import FULL, Config, Family, MoEFormat, Piece, RouterRule, TensorSpec
from frankenmoe.families.words import DOWN, INERT_FFN

MAMBA, FFN, EXPERTS = "linear_attention", "mlp", "moe"
# letters of the pattern in config.json, and older words -> kinds of layers
KINDS: Mapping[str, str] = {
    "M": MAMBA, "*": FULL, "-": FFN, "E": EXPERTS, "mamba": MAMBA, "attention": FULL,
    **{kind: kind for kind in (MAMBA, FULL, FFN, EXPERTS)},
}  # fmt: skip
LETTERS: Mapping[str, str] = {kind: letter for letter, kind in KINDS.items() if len(letter) == 1}
PATTERN, LIST = "hybrid_override_pattern", "layers_block_type"
COPIED = (
    "mamba_num_heads", "mamba_head_dim", "ssm_state_size", "n_groups", "conv_kernel", "expand", "chunk_size",
    "use_conv_bias", "use_bias", "mamba_hidden_act", "time_step_min",
)  # fmt: skip
MIXER = "backbone.layers.{layer}.mixer."
UP = ("up_proj.weight",)


def _listed(config: Config) -> Any:
    """A word or a letter for every layer: from the list, from the pattern, or what the class takes without both."""
    return config.get(LIST) or config.get(PATTERN) or (MAMBA, EXPERTS, FULL, FFN)


def _kinds(config: Config) -> list[str]:
    found = list(_listed(config))
    strange = [each for each in found if each not in KINDS]
    if strange:
        raise ValueError(f"kind of layer {strange[0]!r:.20}, expected {', '.join(LETTERS.values())} or a word for one")
    return [KINDS[each] for each in found]


def _is_mixture(config: Config) -> bool:
    found = _listed(config)
    return isinstance(found, list | tuple | str) and any(word in found for word in (EXPERTS, "E"))


def dense_kinds(config: Config) -> list[str]:
    """The kinds of layers of the dense model of a mixture. They stay if it has dense FFNs too: no recipe says that."""
    kinds = _kinds(config)
    return kinds if FFN in kinds else [FFN if kind == EXPERTS else kind for kind in kinds]


def _sizes(config: Config) -> Mapping[str, int]:
    inner = int(config["mamba_num_heads"]) * int(config["mamba_head_dim"])
    groups = int(config["n_groups"])
    convolved = inner + 2 * groups * int(config["ssm_state_size"])
    return {
        "inner": inner,
        "convolved": convolved,
        "projected": inner + convolved + int(config["mamba_num_heads"]),
        "mamba_heads": int(config["mamba_num_heads"]),
        "mamba_groups": groups,
        "mamba_group": inner // groups,
        "kernel": int(config["conv_kernel"]),
    }


BACKBONE = (
    TensorSpec("model.embeddings.weight", ("vocab", "hidden")),
    TensorSpec("model.norm_f.weight", ("hidden",)),
    TensorSpec("lm_head.weight", ("vocab", "hidden")),
    TensorSpec(LAYER + "norm.weight", ("hidden",)),
    *rows(LAYER + "mixer.", QKVO, kinds=(FULL,)),
    *mamba(LAYER + "mixer.", (MAMBA,), conv_bias="use_conv_bias", bias="use_bias"),
)
FFN_ROWS = (
    *rows(LAYER + "mixer.", {"up_proj.weight": ("ffn", "hidden"), "down_proj.weight": ("hidden", "ffn")}, kinds=(FFN,)),
    *rows(LAYER + "mixer.", {"up_proj.bias": ("ffn",), "down_proj.bias": ("hidden",)}, "mlp_bias", (FFN,)),
)

NEMOTRON_H = Family(
    model_type="nemotron_h",
    mlp="mixer",
    plain_mlp="NemotronHMLP",
    opaque=("NemotronHMamba2Mixer",),
    unadapted=("out_proj",),
    prefixes={"backbone.": "model."},
    backbone=BACKBONE,
    ffn=FFN_ROWS,
    pieces={
        **{row.name: (Piece(row.name.replace("model.", "backbone.", 1), ""),) for row in BACKBONE},
        **{row.name: (Piece(row.name.replace(".mixer.", ".mlp."), ""),) for row in FFN_ROWS},
    },
    defaults=defaults(
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=4096,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        attention_bias=False,
        mlp_bias=False,
        mlp_hidden_act="relu2",
        layer_norm_epsilon=1e-5,
        mamba_num_heads=128,
        mamba_head_dim=64,
        ssm_state_size=128,
        n_groups=8,
        conv_kernel=4,
        expand=2,
        chunk_size=128,
        use_conv_bias=True,
        use_bias=False,
        mamba_hidden_act="silu",
        time_step_min=0.001,
    ),
    reads={
        # the class counts the kinds, whatever number stands beside them; its own files have none
        "num_hidden_layers": lambda config: len(_listed(config)),
        "rms_norm_eps": "layer_norm_epsilon",
        "hidden_act": "mlp_hidden_act",
        "layer_types": _kinds,
        "no_rope_layers": lambda config: [0],
        "time_step_limit": lambda config: None,  # the class reads only the least time step
        "own_experts": lambda config: int(_is_mixture(config)),
    },
    sizes=_sizes,
    fields=frozenset(
        {
            LIST, PATTERN, "hidden_act", "norm_eps", "num_logits_to_keep", "use_mamba_kernels",
            "rescale_prenorm_residual", "mamba_ssm_cache_dtype", "time_step_limit", "time_step_max",
            "time_step_floor", "time_step_rank",
            # of its mixtures, which this is not, and of layers that only guess ahead
            "n_routed_experts", "n_shared_experts", "moe_intermediate_size", "moe_shared_expert_intermediate_size",
            "moe_latent_size", "moe_shared_expert_overlap", "num_experts_per_tok", "routed_scaling_factor", "n_group",
            "topk_group", "norm_topk_prob", "num_nextn_predict_layers", "mtp_layers_block_type",
            "mtp_hybrid_override_pattern",
        }
    ),
    # NVIDIA's own code reads the size of a head from another field than transformers
    fixed={
        "attention_head_dim": 128, "residual_in_fp32": False, "mamba_proj_bias": False, "tie_word_embeddings": False,
        "rope_scaling": None,
    },
)  # fmt: skip


def _pattern(family: Family, config: Config) -> str:
    """The kinds of its layers in letters, as published files have them."""
    kinds = family.read(config, "layer_types")
    return "".join(LETTERS[EXPERTS if kind == FFN else kind] for kind in kinds)


NEMOTRON_H_MOE = MoEFormat(
    name="nemotron_h",
    title="Nemotron-H MoE",
    model_type="nemotron_h",
    architecture="NemotronHForCausalLM",
    families=("nemotron_h",),
    gate=MIXER + "gate.weight",
    expert={MIXER + "experts.{expert}.up_proj.weight": UP, MIXER + "experts.{expert}.down_proj.weight": DOWN},
    shared={MIXER + "shared_experts.up_proj.weight": UP, MIXER + "shared_experts.down_proj.weight": DOWN},
    max_shared=1,
    inert_shared_ffn=INERT_FFN,
    added=(TensorSpec(MIXER + "gate.e_score_correction_bias", ("experts",), kinds=(FFN,)),),
    constants={
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 1.0,
        "norm_topk_prob": True,
        "moe_latent_size": None,
    },
    counted={
        "n_routed_experts": "experts",
        "num_experts_per_tok": "experts_per_token",
        "moe_intermediate_size": "ffn",
        "moe_shared_expert_intermediate_size": "shared_ffn",
    },
    fields={
        PATTERN: _pattern,
        "layer_norm_epsilon": "rms_norm_eps",
        "mlp_hidden_act": "hidden_act",
        **{name: name for name in COPIED},
    },
    holds=frozenset({"layer_types", "no_rope_layers"}),
    router=RouterRule(score="sigmoid", epsilon=1e-20, rounds_weights=False, wide=True),
    balances=False,
    rotates=False,
)
