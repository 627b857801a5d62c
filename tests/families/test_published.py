"""Settings that config.json files on the hub have beside those that transformers reads, and settings it ignores."""

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import frankenmoe as fm
import tiny
from frankenmoe.errors import PlanError, SourceError
from frankenmoe.families import FAMILIES, FORMATS, PARTLY, moe_config, rope, text_config, unsupported
from frankenmoe.families.archkeys import rotary_keys
from frankenmoe.families.runtimes import in_llamacpp
from frankenmoe.families.spec import MAY_BE_NULL
from frankenmoe.families.values import odd_value
from frankenmoe.families.wrapped import WRAPPERS
from frankenmoe.planning.configs import check_config
from frankenmoe.planning.gguf import layout
from frankenmoe.planning.parts import parts_of_plan
from published import MODELS, NESTED

LONGROPE = {"type": "longrope", "short_factor": [1.0] * 3, "long_factor": [2.0] * 3}
HYBRID = {"num_local_experts": 0, "mamba_n_heads": 8, "mamba_d_head": 8, "shared_intermediate_size": 48}
GEMMA4 = {
    "attention_k_eq_v": True, "head_dim": 8, "global_head_dim": 16, "num_global_key_value_heads": 1,
    "hidden_size_per_layer_input": 0, "sliding_window": 32,
}  # fmt: skip
NEMOTRON_H = {"hybrid_override_pattern": "M-*-"}
# model -> (family, format, its extra settings)
PUBLISHED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "LLaMA 7B": ("llama", "mixtral", {"max_sequence_length": 2048, "pad_token_id": -1}),
    "Phi-4-mini": (
        "phi3",
        "glm4_moe",
        {
            "full_attn_mod": 1, "interpolate_factor": 1, "lm_head_bias": False, "mlp_bias": False,
            "embd_pdrop": 0.0, "resid_pdrop": 0.0, "partial_rotary_factor": 0.75, "rope_scaling": LONGROPE,
            "original_max_position_embeddings": 4096, "max_position_embeddings": 131072, "sliding_window": 262144,
        },
    ),
    "Granite 4 hybrid": (
        "granitemoehybrid",
        "granitemoehybrid",
        HYBRID | {"init_method": "mup", "normalization_function": "rmsnorm", "num_experts_per_tok": 0},
    ),
    "Command R7B": (
        "cohere2",
        "cohere2_moe",
        {
            "_sliding_window_pattern": 4, "cache_implementation": "hybrid", "layer_switch": 4,
            "order_of_interleaved_layers": "local_attn_first", "position_embedding_type": "rope_gptj",
            "rotary_pct": 1.0, "use_embedding_sharing": True, "use_gated_activation": True,
            "use_parallel_block": True, "use_parallel_embedding": True, "use_qk_norm": False,
        },
    ),
    # from the time before transformers 5, when the settings of rotation were three fields
    "Gemma 3 1B": (
        "gemma3_text",
        "gemma4",
        {
            "attn_logit_softcapping": None, "cache_implementation": "hybrid", "final_logit_softcapping": None,
            "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256, "rope_local_base_freq": 10000,
            "rope_scaling": None, "rope_theta": 1000000, "sliding_window": 32, "sliding_window_pattern": 6,
        },
    ),
    "Gemma 4 31B, its text": (
        "gemma4_text",
        "gemma4",
        GEMMA4 | {"final_logit_softcapping": 30.0, "use_bidirectional_attention": "vision", "num_experts": None},
    ),
    "Nemotron-H 8B": (
        "nemotron_h",
        "nemotron_h",
        NEMOTRON_H
        | {
            "attention_head_dim": 128, "expand": 2, "hidden_dropout": 0.0, "mamba_proj_bias": False,
            "num_logits_to_keep": 1, "rescale_prenorm_residual": True, "residual_in_fp32": False, "rms_norm_eps": 1e-5,
            "time_step_floor": 1e-4, "time_step_limit": [0.0, float("inf")], "time_step_max": 0.1,
            "time_step_min": 0.001, "time_step_rank": 256, "use_mamba_kernels": True, "sliding_window": None,
        },
    ),
    "Command R": ("cohere", "cohere2_moe", {"logit_scale": 0.0625, "model_max_length": 131072, "use_qk_norm": False}),
    "Qwen3.5": (
        "qwen3_5_text",
        "qwen3_5_moe",
        {"attn_output_gate": True, "mamba_ssm_dtype": "float32", "mtp_use_dedicated_embeddings": False},
    ),
}  # fmt: skip


def config_of(family: str, **own: Any) -> dict[str, Any]:
    return tiny.SIZES | {"model_type": family} | own


def problems(fmt: str, family: str, **own: Any) -> list[str]:
    return unsupported(FORMATS[fmt], FAMILIES[family], config_of(family, **own))


@pytest.mark.parametrize("model", PUBLISHED)
def test_published_configs_are_built(model: str) -> None:
    family, fmt, own = PUBLISHED[model]
    assert problems(fmt, family, **own) == []


@pytest.mark.parametrize(
    ("fmt", "family", "field", "value"),
    [
        ("glm4_moe", "phi3", "interpolate_factor", 2),
        ("cohere2_moe", "cohere2", "use_parallel_block", False),
        ("cohere2_moe", "cohere2", "rotary_pct", 0.5),
        ("cohere2_moe", "cohere", "use_qk_norm", True),  # Command R+
        ("granitemoehybrid", "granitemoehybrid", "normalization_function", "layernorm"),
        ("qwen3_5_moe", "qwen3_5_text", "attn_output_gate", False),
        ("lfm2_moe", "lfm2", "use_pos_enc", False),
        # transformers attends in both directions with these; an MoE made of such a model would not
        ("mixtral", "llama", "is_causal", False),
        ("granitemoe", "gemma", "use_bidirectional_attention", True),
        ("gemma4", "gemma3_text", "attn_logit_softcapping", 50.0),
        ("gemma4", "gemma3_text", "use_bidirectional_attention", True),
        ("gemma4", "gemma4_text", "use_bidirectional_attention", "all"),
        ("gemma4", "gemma4_text", "per_layer_config", {"0": {"sliding_window": 4}}),
        ("gemma4", "gemma4_text", "query_pre_attn_scalar", 64),
        ("nemotron_h", "nemotron_h", "attention_head_dim", 64),
        ("nemotron_h", "nemotron_h", "residual_in_fp32", True),
        ("nemotron_h", "nemotron_h", "mlp_bias", True),
        ("nemotron_h", "nemotron_h", "attention_bias", True),
        ("nemotron_h", "nemotron_h", "sliding_window", 8),
        ("nemotron_h", "nemotron_h", "tie_word_embeddings", True),
        ("nemotron_h", "nemotron_h", "rope_scaling", {"rope_type": "yarn", "factor": 4.0}),
        ("nemotron_h", "nemotron_h", "ffn_multiplier", 2.0),
        # its class ignores them, but the format's does not
        ("mixtral", "llama", "sliding_window", 8),
        ("granitemoe", "llama", "embedding_multiplier", 12.0),
        ("granitemoe", "mistral", "attention_bias", True),
        ("glm4_moe", "phi3", "attention_bias", True),
        ("granitemoe_swa", "ministral", "no_rope_layers", [1, 0, 1, 1]),
        # shorter than the context
        ("glm4_moe", "phi3", "sliding_window", 2047),
    ],
)
def test_other_values_are_refused_by_name(fmt: str, family: str, field: str, value: Any) -> None:
    needed = {"granitemoehybrid": HYBRID, "nemotron_h": NEMOTRON_H}
    own = {"max_position_embeddings": 2048} | needed.get(family, {})
    before = problems(fmt, family, **own)
    assert [text for text in problems(fmt, family, **own | {field: value}) if text not in before and field in text]


def test_a_window_as_long_as_the_context_is_not_written() -> None:
    config = config_of("phi3", sliding_window=262144, max_position_embeddings=131072)
    assert made_of(config, "glm4_moe")["sliding_window"] is None


def test_of_two_rotary_settings_the_one_that_transformers_takes_counts(tmp_path: Path) -> None:
    # as in a file that transformers 5 wrote, to which someone added YaRN by hand
    own = {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512},
        "rope_theta": 1e6,
    }
    (tmp_path / "config.json").write_text(json.dumps(config_of("qwen3", **own)))
    theirs = AutoConfig.from_pretrained(tmp_path).rope_parameters
    ours = rope(FAMILIES["qwen3"], config_of("qwen3", **own))
    assert {key: theirs[key] for key in ours} == ours
    assert ours["rope_type"] == "yarn"


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0}
SCALED = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}


@pytest.mark.parametrize("rotary", [LLAMA3, YARN, SCALED], ids=lambda rotary: rotary["rope_type"])
def test_without_a_context_of_their_own_rotary_settings_have_the_models(rotary: dict[str, Any]) -> None:
    config = config_of("llama", rope_parameters=rotary | {"rope_theta": 1e4})
    theirs = AutoConfig.for_model(**json.loads(json.dumps(config))).rope_parameters
    assert odd_value(FAMILIES["llama"], config) is None
    assert rope(FAMILIES["llama"], config) == theirs
    assert rotary_keys(theirs, context=64).keys() == rotary_keys(rope(FAMILIES["llama"], config), context=64).keys()


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize(
    ("rotary", "lost"),
    [
        *((LLAMA3, name) for name in ("factor", "low_freq_factor", "high_freq_factor")),
        *((SCALED, name) for name in ("short_factor", "long_factor")),
        *((YARN | {"rope_type": kind}, "factor") for kind in ("linear", "dynamic", "yarn")),
    ],
)
def test_what_a_rotary_type_needs_must_be_there(rotary: dict[str, Any], lost: str, family: str) -> None:
    left = {key: value for key, value in rotary.items() if key != lost} | {"rope_theta": 1e4}
    plain = {"rope_type": "default", "rope_theta": 1e4}
    nested = {"full_attention": plain, "sliding_attention": left}
    config = config_of(family, rope_parameters=nested if family == "gemma3_text" else left)
    with pytest.raises(KeyError, match=lost):
        AutoConfig.for_model(**json.loads(json.dumps(config)))
    said = f"has rotary settings of type {rotary['rope_type']} without {lost}"
    assert odd_value(FAMILIES[family], config) == said


@pytest.mark.parametrize(
    "own",
    [
        {"rope_local_base_freq": 0},
        {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": -1.0}}},
        {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": "fast"}}},
    ],
)
def test_rotary_settings_of_a_kind_of_layer_are_checked_too(own: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"has rope_\w+ \S+.*, expected a \w+ number"):
        check_config("gemma", tmp_path, config_of("gemma3_text", **own))


def test_both_spellings_of_sizes_of_full_attention_are_read() -> None:
    family, config = FAMILIES["gemma4_text"], config_of("gemma4_text", **GEMMA4)
    theirs = AutoConfig.for_model(**config).to_dict()
    assert "global_head_dim" not in theirs
    assert family.dims(theirs).more == family.dims(config).more
    assert family.dims(config).cached == 2 * 8 + 1 * 16  # a layer of each kind


def test_gemma_4_with_ffns_of_two_widths_stays_virtual() -> None:
    wide = {"use_double_wide_mlp": True, "num_hidden_layers": 4, "num_kv_shared_layers": 2}
    layers = ["sliding_attention", "full_attention"] * 2
    found = problems("gemma4", "gemma4_text", **GEMMA4 | wide | {"layer_types": layers})
    assert len(found) == 1
    assert "use_double_wide_mlp" in found[0]


def test_gemma_3_reads_rotation_in_both_spellings() -> None:
    scaling = {"rope_type": "linear", "factor": 8.0}
    old = config_of("gemma3_text", rope_scaling=scaling, rope_theta=1e6, rope_local_base_freq=2e4)
    family, theirs = FAMILIES["gemma3_text"], AutoConfig.for_model(**old)
    for config in (old, theirs.to_dict()):
        assert family.rope_by_kind(family.filled(config)) == theirs.rope_parameters


def test_a_layer_that_changes_nothing_stands_in_for_full_attention_at_the_end() -> None:
    for layers, more in ((5, 1), (6, 0)):
        config = config_of("gemma3_text", num_hidden_layers=layers)
        made = made_of(config)
        assert made["num_hidden_layers"] == len(made["layer_types"]) == layers + more
        assert made["layer_types"][-1] == "full_attention"


def format_of(config: Mapping[str, Any]) -> str:
    """The first format in the order of the table that can represent a config."""
    family = FAMILIES[config["model_type"]]
    names = (fmt.name for fmt in FORMATS.values() if family.model_type in fmt.families and not fmt.on_request)
    return next(name for name in names if unsupported(FORMATS[name], family, config) == [])


def made_of(config: Mapping[str, Any], name: str | None = None) -> dict[str, Any]:
    """The config of an MoE in the format of that name, or in the first that can represent a config."""
    fmt, family = FORMATS[name or format_of(config)], FAMILIES[config["model_type"]]
    return moe_config(fmt, family, config, experts=4, experts_per_token=2, shared_ffn=0, dtype="bfloat16")


def parameters(folder: Path) -> int:
    """The numbers that a model of a config.json stores, counted without memory; a tied head is no other tensor."""
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    numbers = {name: tensor.numel() for name, tensor in model.state_dict().items()}
    return sum(numbers.values()) - (numbers["lm_head.weight"] if config.tie_word_embeddings else 0)


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_counts_are_those_of_the_classes(model: str, tmp_path: Path) -> None:
    published, dense, moe = dict(MODELS[model].config), tmp_path / "dense", tmp_path / "moe"
    text = text_config(published)
    for folder in (dense, moe):
        folder.mkdir()
    (dense / "config.json").write_text(json.dumps(text))
    family = FAMILIES[text["model_type"]]
    shapes = family.shapes((*family.backbone, *family.ffn), text)
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == parameters(dense)
    (dense / "config.json").write_text(json.dumps(published))
    made = fm.plan(fm.Recipe.load(tiny.write_recipe(tmp_path / "r.yml", dense, [dense] * 4)))
    assert made.fmt is not None
    assert made.fmt.name == format_of(text)
    (moe / "config.json").write_text(json.dumps(made.config))
    assert made.bill.total == parameters(moe)
    if not in_llamacpp(family, made.fmt).runs:
        with pytest.raises(PlanError, match="does not support this MoE"):
            layout(parts_of_plan(made))
        return
    for tensor in layout(parts_of_plan(made)).tensors:
        assert math.prod(tensor.shape) == sum(part.numel for part in tensor.parts) or not tensor.parts


def without_defaults(config: dict[str, Any]) -> dict[str, Any]:
    """Without the fields that say what the family's class takes for absent ones."""
    defaults = FAMILIES[config["model_type"]].defaults
    return {key: value for key, value in config.items() if key not in defaults or value != defaults[key]}


def with_null(config: dict[str, Any]) -> dict[str, Any]:
    """With null in the place of such fields, where null is no value of its own."""
    kept = without_defaults(config)
    return {key: value if key in kept or key in MAY_BE_NULL else None for key, value in config.items()}


def with_every_default(config: dict[str, Any]) -> dict[str, Any]:
    return dict(FAMILIES[config["model_type"]].defaults) | config


def as_transformers_5(config: dict[str, Any]) -> dict[str, Any]:
    """Rotary settings in one dictionary, and the new name of the dtype."""
    gone = ("rope_theta", "rope_local_base_freq", "rope_scaling", "partial_rotary_factor", "torch_dtype")
    family = FAMILIES[config["model_type"]]
    if family.rope_by_kind:
        rotary = family.rope_by_kind(family.filled(config))
    else:
        whole = {"partial_rotary_factor": 1.0} if "partial_rotary_factor" in family.defaults else {}
        rotary = whole | rope(family, config)
    return {key: value for key, value in config.items() if key not in gone} | {
        "rope_parameters": rotary,
        "dtype": config.get("torch_dtype", "bfloat16"),
    }


SPELLINGS: tuple[Callable[[dict[str, Any]], dict[str, Any]], ...] = (
    without_defaults,
    with_null,
    with_every_default,
    as_transformers_5,
)


@pytest.mark.parametrize("spelt", SPELLINGS, ids=lambda change: change.__name__)
@pytest.mark.parametrize("model", MODELS)
def test_every_spelling_makes_the_same_moe(model: str, spelt: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    config = text_config(MODELS[model].config)
    other = spelt(config)
    assert format_of(other) == format_of(config)
    assert made_of(other) == made_of(config)


def test_the_text_of_a_nested_config_is_read_as_its_class_reads_it() -> None:
    models = [*MODELS.values(), *NESTED.values()]
    nested = [dict(found.config) for found in models if "text_config" in found.config]
    for config in nested:
        text = text_config(config)
        theirs = AutoConfig.for_model(**json.loads(json.dumps(config))).text_config
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        assert [text[name] for name in sizes] == [getattr(theirs, name) for name in sizes]
    assert {config["model_type"] for config in nested} == set(WRAPPERS)


E2B = {
    "num_hidden_layers": 35, "num_kv_shared_layers": 20, "use_double_wide_mlp": True,
    "hidden_size_per_layer_input": 256, "layer_types": (["sliding_attention"] * 4 + ["full_attention"]) * 7,
}  # fmt: skip
STAY_VIRTUAL = {
    "gemma4_text": (E2B, "use_double_wide_mlp True, which Gemma 4 does not support: all its experts have one width"),
    "hyperclovax": ({}, "use_post_norm True, which Granite MoE does not support"),
    "cohere": ({"use_qk_norm": True}, "use_qk_norm True, which Cohere2 MoE does not support"),
}


@pytest.mark.parametrize("family", STAY_VIRTUAL)
def test_models_that_stay_virtual_are_refused_by_name(family: str) -> None:
    assert set(PARTLY) == set(STAY_VIRTUAL)
    own, why = STAY_VIRTUAL[family]
    for fmt in (fmt for fmt in FORMATS.values() if family in fmt.families):
        (found,) = problems(fmt.name, family, **own)
        assert why in found


def test_sources_are_named_and_every_family_has_three_models_if_as_many_were_published() -> None:
    assert all(found.source for found in MODELS.values())
    counts = Counter(text_config(found.config)["model_type"] for found in MODELS.values())
    # tests/published.py says why
    fewer = {"hyperclovax": 0, "gemma4_text": 2, "glm": 2} | dict.fromkeys(
        ("ernie4_5", "helium", "seed_oss", "smollm3", "ministral"), 1
    )
    assert {family: counts[family] for family in FAMILIES if counts[family] < 3} == fewer
