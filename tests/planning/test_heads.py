"""Heads stored beside a config that ties them: what transformers does with them is what every form here does."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import frankenmoe as fm
import tiny

HEAD, EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"
LARGE_VOCABULARY = 20_000  # a head of 2.5 MB: more than a plan compares in full


def with_head(folder: Path, change: Any, **sizes: Any) -> Path:
    """A tied parent whose file holds a head too: its embeddings, after `change`."""
    tiny.make_parent(folder, tie_word_embeddings=True, **sizes)
    tensors = load_file(folder / "model.safetensors")
    assert HEAD not in tensors
    tensors[HEAD] = tensors[EMBEDDINGS].clone()
    change(tensors[HEAD])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tiny.ids()).logits


@pytest.mark.parametrize("gate_mode", ["random", "hidden"])
def test_a_head_of_its_own_is_used_in_every_form_as_transformers_does(gate_mode: str, tmp_path: Path) -> None:
    base = with_head(tmp_path / "base", lambda head: head.mul_(-1))
    recipe = tiny.write_recipe(tmp_path / "r.yml", base, [base, base], prompts=True, gate_mode=gate_mode)
    made = fm.plan(fm.Recipe.load(recipe))
    assert any("stored lm_head.weight differs from its embeddings" in text for text in made.warnings)
    assert made.config["tie_word_embeddings"] is False
    assert HEAD in {write.name for write in made.writes}
    expected = logits(AutoModelForCausalLM.from_pretrained(base))
    fm.build(recipe, tmp_path / "virtual", virtual=True, allow_identical=True)
    built = fm.build(recipe, tmp_path / "built", allow_identical=True).folder
    fm.verify(built)
    stock, report = AutoModelForCausalLM.from_pretrained(built, output_loading_info=True)
    assert not report["missing_keys"]
    for model in (fm.load(recipe).model, fm.load(tmp_path / "virtual").model, fm.load(built).model, stock):
        assert torch.allclose(logits(model), expected, atol=1e-5)
        assert not model.config.tie_word_embeddings


def test_a_head_that_repeats_the_embeddings_is_left_out(tmp_path: Path) -> None:
    base = with_head(tmp_path / "base", lambda head: None)
    made = fm.plan(fm.Recipe.load(tiny.write_recipe(tmp_path / "r.yml", base, [base, base])))
    assert made.config["tie_word_embeddings"] is True
    assert not any("lm_head" in text for text in made.warnings)
    assert [why for _, name, why in made.unused if name == HEAD] == [
        "the head is tied to the embeddings, and holds the same numbers"
    ]


def test_one_other_number_in_a_large_head_is_seen_by_whoever_builds(tmp_path: Path) -> None:
    base = with_head(tmp_path / "base", lambda head: head[-200, :1].add_(1), vocab_size=LARGE_VOCABULARY)
    recipe = fm.Recipe.load(tiny.write_recipe(tmp_path / "r.yml", base, [base, base]))
    assert not fm.plan(recipe).base.own_head  # sampled, so that a plan stays quick
    assert fm.plan(recipe, weights=True).base.own_head
    config = json.loads((fm.build(recipe, tmp_path / "out", allow_identical=True).folder / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
