"""The family tables against transformers' own classes: names, shapes and defaults."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import tiny
from frankenmoe.families import FAMILIES, FORMATS, rope

VARIANTS = [{}, {"tie_word_embeddings": True}, {"attention_bias": True}, {"mlp_bias": True}]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_a_family_has_exactly_the_tensors_of_its_class(name: str, variant: dict[str, bool]) -> None:
    config = AutoConfig.for_model(name, **(tiny.SIZES | variant))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    theirs = {key: tuple(value.shape) for key, value in model.named_parameters()}
    family, data = FAMILIES[name], config.to_dict()
    assert family.shapes(family.backbone, data) | family.shapes(family.ffn, data) == theirs


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_defaults_are_those_of_the_config_class(name: str) -> None:
    theirs = AutoConfig.for_model(name).to_dict()
    family = FAMILIES[name]
    for key, value in family.defaults.items():
        found = theirs["rope_parameters"]["rope_theta"] if key == "rope_theta" else theirs[key]
        if key != "sliding_window":
            assert value == found, key


def test_rope_is_read_from_both_spellings() -> None:
    family = FAMILIES["llama"]
    old = {"rope_theta": 7.0, "rope_scaling": {"type": "linear", "factor": 4.0}}
    new = {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 7.0}}
    assert rope(family, old) == rope(family, new) == {"rope_type": "linear", "factor": 4.0, "rope_theta": 7.0}
    assert rope(family, {}) == {"rope_type": "default", "rope_theta": 10000.0}


def test_every_format_takes_families_that_have_a_table() -> None:
    assert {family for fmt in FORMATS.values() for family in fmt.families} == set(FAMILIES)
