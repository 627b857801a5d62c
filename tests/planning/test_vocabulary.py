"""Parents with a few more or fewer rows of embeddings than the base: experts behind the base's embeddings."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import frankenmoe as fm
import tiny
from frankenmoe.errors import SourceError
from frankenmoe.moe.dense import load_source
from frankenmoe.planning.vocabulary import token_ids

Parents = dict[str, list[Path]]
EXTRA = ["<|im_start|>", "<|im_end|>"]


def grown(folder: Path, *, rows: int, tokens: list[str], **changes: Any) -> Path:
    """A parent with another number of rows, and tokens that the base does not have."""
    tiny.make_parent(folder, seed=7, vocab_size=rows, **changes)
    tokenizer = tiny.make_tokenizer()
    tokenizer.add_tokens(tokens, special_tokens=True)
    tokenizer.save_pretrained(folder)
    return folder


def with_embeddings_of(parent: Path, base: Path) -> Any:
    model, ours = (AutoModelForCausalLM.from_pretrained(folder) for folder in (parent, base))
    model.resize_token_embeddings(ours.config.vocab_size)
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(ours.get_input_embeddings().weight)
        model.get_output_embeddings().weight.copy_(ours.get_output_embeddings().weight)
    return model.eval()


@pytest.mark.parametrize(("rows", "tokens"), [(130, EXTRA), (99, EXTRA), (120, [])])
@pytest.mark.parametrize("backbone", ["base", "average"])
def test_an_expert_behind_the_bases_embeddings(
    rows: int, tokens: list[str], backbone: str, tmp_path: Path, parents: Parents
) -> None:
    base = parents["llama"][0]
    other = grown(tmp_path / "other", rows=rows, tokens=tokens)
    recipe = tiny.write_recipe(tmp_path / "r.yml", base, [base, other], backbone=backbone)
    made = fm.plan(fm.Recipe.load(recipe), weights=True)
    assert not made.problems
    (said,) = [text for text in made.warnings if "rows of embeddings" in text]
    assert f"{other} has {rows} rows of embeddings and the base {base} has 128" in said
    assert all(repr(token) in said for token in tokens)
    built = fm.build(recipe, tmp_path / "out").folder
    stored, ours, theirs = (load_file(each) for each in (
        built / "model-00001-of-00001.safetensors", base / "model.safetensors", other / "model.safetensors",
    ))  # fmt: skip
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(stored[name], ours[name])
    up = "model.layers.1.block_sparse_moe.experts.1.w3.weight"
    assert torch.equal(stored[up], theirs["model.layers.1.mlp.up_proj.weight"])
    assert AutoModelForCausalLM.from_pretrained(built).config.vocab_size == 128


@pytest.mark.parametrize("tied", [False, True])
def test_such_a_parent_reads_text_with_the_bases_embeddings(tied: bool, tmp_path: Path, parents: Parents) -> None:
    base = parents["llama"][0]
    other = grown(tmp_path / "other", rows=130, tokens=EXTRA, tie_word_embeddings=tied)
    recipe = tiny.write_recipe(tmp_path / "r.yml", base, [base, other])
    made = fm.plan(fm.Recipe.load(recipe), weights=True)
    (source,) = [each for each in made.sources if each.folder == other]
    model = load_source(source, stored="F32")
    ids = tiny.ids()
    if not tied:
        with torch.no_grad():
            assert torch.allclose(model(ids).logits, with_embeddings_of(other, base)(ids).logits, atol=1e-5)
    assert model(ids).logits.shape[-1] == 128


def test_a_vocabulary_that_cannot_be_read_may_differ_a_little(tmp_path: Path, parents: Parents) -> None:
    base = parents["llama"][0]
    for rows, fine in ((130, True), (200, False)):
        other = grown(tmp_path / str(rows), rows=rows, tokens=[])
        (other / "tokenizer.json").write_text("{")
        recipe = tiny.write_recipe(tmp_path / f"{rows}.yml", base, [base, other])
        if fine:
            assert not fm.plan(fm.Recipe.load(recipe)).problems
        else:
            with pytest.raises(SourceError, match="vocabulary 128 against 200"):
                fm.plan(fm.Recipe.load(recipe))


def test_token_ids_are_those_of_the_tokenizer(tmp_path: Path) -> None:
    tokenizer = tiny.make_tokenizer()
    tokenizer.add_tokens(EXTRA, special_tokens=True)
    tokenizer.save_pretrained(tmp_path)
    assert token_ids(tmp_path) == tokenizer.get_vocab()
