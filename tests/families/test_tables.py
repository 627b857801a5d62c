"""The family tables against transformers' own classes: names, shapes and defaults."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import tiny
from family_cases import CASES
from frankenmoe.families import FAMILIES, FORMATS, moe_config, rope

VARIANTS = [{}, {"tie_word_embeddings": True}, {"attention_bias": True}, {"mlp_bias": True}]
PLAIN = ("llama", "mistral", "qwen2", "qwen3", "olmo2", "seed_oss", "granite")
TENSORS = [(name, variant) for name in PLAIN for variant in VARIANTS] + [
    (case.family, case.sizes) for case in CASES.values()
]


@pytest.mark.parametrize(("name", "variant"), TENSORS, ids=str)
def test_a_family_has_exactly_the_tensors_of_its_class(name: str, variant: dict[str, bool]) -> None:
    config = AutoConfig.for_model(name, **(tiny.SIZES | variant))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    theirs = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    if config.tie_word_embeddings:
        del theirs["lm_head.weight"]
    family, data = FAMILIES[name], config.to_dict()
    assert family.shapes(family.backbone, data) | family.shapes(family.ffn, data) == theirs


@pytest.mark.parametrize("name", FAMILIES)
def test_defaults_are_those_of_the_config_class(name: str) -> None:
    theirs = AutoConfig.for_model(name).to_dict()
    family = FAMILIES[name]
    rotary = theirs.get("rope_parameters") or {}
    for key, value in family.defaults.items():
        if key in rotary or (key in theirs and key != "sliding_window"):
            assert value == (rotary[key] if key in rotary else theirs[key]), key


@pytest.mark.parametrize("name", FAMILIES)
def test_linear_layers_of_an_ffn_are_named_once_and_down_is_last(name: str) -> None:
    family = FAMILIES[name]
    assert len(family.linears) == len(set(family.linears))
    assert family.ffn[family.linears.index(family.linears[-1])].shape == ("hidden", "ffn")
    assert family.in_every_layer == (name != "nemotron_h")


def test_rope_is_read_from_both_spellings() -> None:
    family = FAMILIES["llama"]
    old = {"rope_theta": 7.0, "rope_scaling": {"type": "linear", "factor": 4.0}}
    new = {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 7.0}}
    assert rope(family, old) == rope(family, new) == {"rope_type": "linear", "factor": 4.0, "rope_theta": 7.0}
    assert rope(family, {}) == {"rope_type": "default", "rope_theta": 10000.0}


def test_every_format_takes_families_that_have_a_table() -> None:
    assert {family for fmt in FORMATS.values() for family in fmt.families} == set(FAMILIES)


@pytest.mark.parametrize("name", [name for name, fmt in FORMATS.items() if fmt.loads_in_transformers])
def test_the_balance_loss_is_off_where_the_class_has_one(name: str) -> None:
    fmt = FORMATS[name]
    family = FAMILIES[fmt.families[0]]
    sizes = tiny.SIZES | NEEDED.get(family.model_type, {})
    config = AutoConfig.for_model(family.model_type, **sizes).to_dict()
    plain, off = (
        moe_config(fmt, family, config, experts=4, experts_per_token=2, shared_ffn=0, dtype="float32", by_domain=mode)
        for mode in (False, True)
    )
    key = "router_aux_loss_coef"
    assert key not in plain
    assert (key in off) == hasattr(AutoConfig.for_model(fmt.model_type).get_text_config(), key)
    assert off.get(key, 0) == 0


# without these a config does not say how large the model is
REQUIRED = {
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
}
# null is a value of its own in these fields of a written config
NULLS = {
    "sliding_window", "bos_token_id", "eos_token_id", "pad_token_id", "rope_scaling", "n_shared_experts",
    "rms_norm_eps", "position_embedding_type", "final_logit_softcapping", "moe_latent_size",
}  # fmt: skip
# sizes that belong together, as the defaults of the class do not fit the small ones here
NEEDED: dict[str, dict[str, Any]] = {
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_expand": 2, "shared_intermediate_size": 48},
}
# those inside another model are in test_vision.py
BUILDABLE = [(name, family) for name, fmt in FORMATS.items() for family in fmt.families if fmt.inside is None]


def written(name: str, family: str, config: dict[str, Any]) -> dict[str, Any]:
    return moe_config(
        FORMATS[name], FAMILIES[family], config, experts=4, experts_per_token=2, shared_ffn=0, dtype="float32"
    )


def with_fields_missing(family: str) -> dict[str, dict[str, Any]]:
    """What was done -> a config of the family: every optional field left out or null, each alone and all together."""
    needed = NEEDED.get(family, {})
    full = AutoConfig.for_model(family, **(tiny.SIZES | needed)).to_dict()
    optional = [key for key in full if key not in REQUIRED and key not in needed]
    found = {"all": full, "only the sizes": {key: full[key] for key in full if key not in optional}}
    found["all others null"] = full | dict.fromkeys(optional)
    for key in optional:
        found[f"no {key}"] = {other: value for other, value in full.items() if other != key}
        found[f"null {key}"] = full | {key: None}
    return found


@pytest.mark.parametrize(("name", "family"), BUILDABLE)
def test_written_configs_have_no_null_that_no_class_takes(name: str, family: str) -> None:
    for done, config in with_fields_missing(family).items():
        nulls = {key for key, value in written(name, family, config).items() if value is None}
        assert nulls <= NULLS, done


@pytest.mark.parametrize(("name", "family"), [pair for pair in BUILDABLE if FORMATS[pair[0]].loads_in_transformers])
def test_transformers_loads_written_configs_whatever_field_is_missing(name: str, family: str, tmp_path: Path) -> None:
    default = AutoConfig.for_model(family).to_dict()
    for done, config in with_fields_missing(family).items():
        (tmp_path / "config.json").write_text(json.dumps(written(name, family, config)))
        loaded = AutoConfig.from_pretrained(tmp_path)
        assert loaded.model_type == FORMATS[name].model_type, done
        if done == "only the sizes":
            for key in ("rms_norm_eps", "max_position_embeddings", "attention_bias", "eos_token_id", "pad_token_id"):
                if key in default and key not in FAMILIES[family].reads:
                    assert getattr(loaded, key, default[key]) == default[key], key
