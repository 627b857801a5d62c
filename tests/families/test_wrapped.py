"""Models around a language model: what is nested in them becomes an MoE of text."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

import frankenmoe as fm
import tiny
from family_cases import CASES, LONG, ROUNDED_AGAIN, apart, logits, make_parent
from frankenmoe.errors import SourceError
from frankenmoe.families import prefixes_of, text_config, text_name
from frankenmoe.planning.configs import check_config
from refusals import cli, refused

SIGLIP = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
GEMMA4 = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 8, "position_embedding_size": 16,
}  # fmt: skip
QWEN = {
    "depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 36, "patch_size": 4,
    "num_position_embeddings": 16,
}  # fmt: skip
PLACES = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 1], "mrope_interleaved": True}
# outer model type -> (case of its text, what differs there, config of what sees, format)
WRAPPED: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {
    "gemma3": ("gemma3", {}, SIGLIP, "gemma4"),
    "gemma4": ("gemma4", {}, GEMMA4, "gemma4"),
    "qwen3_5": ("qwen3_5", {}, QWEN, "qwen3_5_moe"),
    # for the format that reads pictures too see test_vision.py
    "qwen3_vl": ("qwen3", {"rope_parameters": PLACES}, QWEN | {"deepstack_visual_indexes": [0]}, "qwen3_moe"),
}


def make_wrapped(folder: Path, outer: str, *, tied: bool, seed: int = 0) -> Path:
    """A random model around a language model."""
    name, own, vision, _ = WRAPPED[outer]
    text = CASES[name].sizes | own | {"tie_word_embeddings": tied}
    config = AutoConfig.for_model(outer, text_config=text, vision_config=vision, tie_word_embeddings=tied)
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(config)
    tiny.scatter(model)
    model.save_pretrained(folder)
    tokenizer = tiny.make_qwen_tokenizer() if outer == "qwen3_5" else tiny.make_tokenizer()
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("outer", WRAPPED)
def test_the_language_model_inside_becomes_experts(outer: str, tied: bool, tmp_path: Path) -> None:
    case, fmt = CASES[WRAPPED[outer][0]], WRAPPED[outer][3]
    base = make_wrapped(tmp_path / "base", outer, tied=tied)
    keys = {"architecture": "Qwen3 MoE"} if outer == "qwen3_vl" else {}
    recipe = tiny.write_recipe(tmp_path / "r.yml", base, [base] * 4, experts_per_token=2, **keys)
    made = fm.plan(fm.Recipe.load(recipe))
    assert made.fmt.name == fmt
    assert {why for _, _, why in made.unused} == {"it reads pictures or sound, and the MoE is one of text"}
    fm.build(recipe, tmp_path / "built", allow_identical=True)
    ids = tiny.ids(LONG)
    dense = logits(AutoModelForImageTextToText.from_pretrained(base).eval(), ids)
    assert apart(dense, logits(AutoModelForCausalLM.from_pretrained(tmp_path / "built").eval(), ids)) <= case.dense
    assert apart(dense, logits(fm.load(recipe).model, ids)) <= case.dense
    # an expert is a language model alone again
    fm.extract(tmp_path / "built", tmp_path / "e0", expert="e0")
    assert apart(dense, logits(AutoModelForCausalLM.from_pretrained(tmp_path / "e0").eval(), ids)) <= case.close


@pytest.mark.parametrize("outer", ["gemma3", "qwen3_5"])
def test_a_language_model_alone_and_one_inside_another_are_parents_of_one_moe(outer: str, tmp_path: Path) -> None:
    case = CASES[WRAPPED[outer][0]]
    base = make_wrapped(tmp_path / "base", outer, tied=True)
    other = make_parent(tmp_path / "other", case, seed=1, tie_word_embeddings=True)
    recipe = tiny.write_recipe(tmp_path / "r.yml", base, [base, other], experts_per_token=2)
    fm.build(recipe, tmp_path / "built")
    built, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "built").eval(), tiny.ids(LONG)
    assert apart(logits(fm.load(recipe).model, ids), logits(built, ids)) <= case.close


@pytest.mark.parametrize("outer", WRAPPED)
def test_what_a_model_inside_another_has_learnt_is_an_adapter(outer: str, tmp_path: Path) -> None:
    base, other = (make_wrapped(tmp_path / str(seed), outer, tied=True, seed=seed) for seed in range(2))
    experts = [{"source_model": str(base)}, {"source_model": str(other), "as_adapter": {"rank": 4}}]
    keys = {"architecture": "Qwen3 MoE"} if outer == "qwen3_vl" else {}
    recipe = tiny.write_recipe(tmp_path / "r.yml", base, [], experts=experts, experts_per_token=2, **keys)
    built, ids = fm.build(recipe, tmp_path / "built").folder, tiny.ids(LONG)
    virtual = fm.load(fm.build(recipe, tmp_path / "virtual", virtual=True)).model
    model = AutoModelForCausalLM.from_pretrained(built).eval()
    assert apart(logits(virtual, ids), logits(model, ids)) <= ROUNDED_AGAIN
    # PEFT finds modules by the names that transformers gives them
    asked, out = ("export", tmp_path / "virtual", "--peft"), tmp_path / "peft"
    if outer == "qwen3_5":
        assert cli(*asked, out).code == 0
    else:
        refused(*asked, out, inside=tmp_path, facts=("is a language model inside", outer), hint="extract")


def test_fields_of_the_outer_config_count_where_the_nested_one_has_none(tmp_path: Path) -> None:
    base = make_wrapped(tmp_path / "base", "gemma3", tied=True)
    file = base / "config.json"
    config = json.loads(file.read_text())
    for key in ("eos_token_id", "tie_word_embeddings"):
        del config["text_config"][key]
    file.write_text(json.dumps(config | {"eos_token_id": [1, 7]}))
    made = fm.plan(fm.Recipe.load(tiny.write_recipe(tmp_path / "r.yml", base, [base] * 2)))
    assert made.config["eos_token_id"] == [1, 7]
    assert made.config["tie_word_embeddings"] is True


@pytest.mark.parametrize(
    ("outer", "why"), [("gemma3n", r": its layers exchange more than one residual stream"), ("llava", "")]
)
def test_models_inside_which_nothing_is_read_are_refused_by_name(outer: str, why: str, tmp_path: Path) -> None:
    config = {"model_type": outer, "text_config": CASES["gemma3"].sizes | {"model_type": "gemma3_text"}}
    with pytest.raises(
        SourceError, match=rf"is that of {outer}, and inside such a model the language model is not read{why}"
    ):
        check_config("base", tmp_path, text_config(config))


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("model.language_model.layers.3.mlp.up_proj.weight", "model.layers.3.mlp.up_proj.weight"),
        ("language_model.model.norm.weight", "model.norm.weight"),
        ("language_model.lm_head.weight", "lm_head.weight"),
        ("model.visual.blocks.0.norm1.weight", "model.visual.blocks.0.norm1.weight"),
        (
            "base_model.model.model.language_model.layers.0.mlp.up_proj.lora_A.weight",
            "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight",
        ),
    ],
)
def test_names_lose_the_prefix_of_what_is_around(name: str, plain: str) -> None:
    assert text_name(name) == plain


def test_nemotron_h_says_backbone_in_its_files_and_model_in_its_class() -> None:
    prefixes = prefixes_of({"model_type": "nemotron_h"})
    assert text_name("backbone.layers.3.mixer.D", prefixes) == "model.layers.3.mixer.D"
    assert text_name("model.layers.3.mixer.D", prefixes) == "model.layers.3.mixer.D"
    assert text_name("lm_head.weight", prefixes) == "lm_head.weight"
    name = "layers.1.mixer.up_proj.lora_A.weight"
    assert text_name(f"base_model.model.backbone.{name}", prefixes) == f"base_model.model.model.{name}"
