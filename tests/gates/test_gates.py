"""Gate modes against mergekit-moe itself and against sums by hand; oracle 8: a padded batch is one prompt at a time."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mergekit.common import ModelReference
from mergekit.moe.config import Expert as PeerExpert
from mergekit.moe.router import get_gate_params
from transformers import AutoModelForCausalLM, AutoTokenizer

import frankenmoe as fm
import tiny
from frankenmoe.errors import RecipeError
from frankenmoe.gates.capture import encode, layer_inputs
from frankenmoe.gates.chance import uniform_rows
from frankenmoe.gates.made import make_routers
from frankenmoe.progress import SILENT

Parents = dict[str, list[Path]]
SAME_LENGTH = [["one", "two"], ["xyz", "abc"]]
NEGATIVES = [["no!"], []]


def gates(recipe: Path) -> torch.Tensor:
    """All gates of a recipe as [layers, experts, hidden], in float32."""
    made = make_routers(fm.plan(fm.Recipe.load(recipe)), SILENT, cache=False).routers
    assert {kind for kind, _, _ in made.values()} == {"F32"}
    return torch.stack([torch.from_numpy(raw.view(np.float32).reshape(shape)) for _, shape, raw in made.values()])


def recipe_of(tmp_path: Path, base: Path, prompts: list[list[str]], negatives: list[list[str]], **keys: Any) -> Path:
    experts = [
        {"source_model": str(base), "name": f"e{index}", "positive_prompts": positive}
        | ({"negative_prompts": negative} if negative else {})
        for index, (positive, negative) in enumerate(zip(prompts, negatives, strict=True))
    ]
    return tiny.write_recipe(tmp_path / "r.yml", base, [], experts=experts, **keys)


def peer_gates(base: Path, prompts: list[list[str]], negatives: list[list[str]], mode: str) -> torch.Tensor:
    """What mergekit-moe computes, set up as its command does it."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.padding_side = "left"
    tokenizer.pad_token_id = tokenizer.bos_token_id
    reference = ModelReference.parse(str(base))
    experts = [
        PeerExpert(source_model=reference, positive_prompts=positive, negative_prompts=negative or None)
        for positive, negative in zip(prompts, negatives, strict=True)
    ]
    return get_gate_params(reference, tokenizer, experts, mode=mode, device="cpu").float()


@pytest.mark.parametrize("mode", ["hidden", "hidden_last", "hidden_avg", "cheap_embed"])
def test_gates_are_mergekits_where_nothing_is_padded(mode: str, parents: Parents, tmp_path: Path) -> None:
    base = parents["llama"][0]
    ours = gates(recipe_of(tmp_path, base, SAME_LENGTH, NEGATIVES, gate_mode=mode))
    theirs = peer_gates(base, SAME_LENGTH, NEGATIVES, mode)
    assert ours.shape == theirs.shape == (2, 2, 32)
    # mergekit runs the base in bfloat16 whatever it is stored in, hence the tolerance
    assert float((ours - theirs).abs().max()) < (1e-5 if mode == "cheap_embed" else 0.03)
    assert torch.allclose(ours.norm(dim=-1), torch.ones(2, 2))


def test_hidden_avg_leaves_padding_out_where_mergekit_averages_it(parents: Parents, tmp_path: Path) -> None:
    base = parents["llama"][0]
    prompts, none = [["a", "a much longer prompt than the other"], ["zz", "q"]], [[], []]
    ours = gates(recipe_of(tmp_path, base, prompts, none, gate_mode="hidden_avg"))
    alone = [
        torch.stack([peer_states(base, prompt) for prompt in expert]).mean(dim=0)
        for expert in prompts
    ]  # fmt: skip
    by_hand = torch.stack([state / state.norm(dim=-1, keepdim=True) for state in alone], dim=1)
    assert torch.allclose(ours, by_hand, atol=1e-5)
    assert float((ours - peer_gates(base, prompts, none, "hidden_avg")).abs().max()) > 0.05


def peer_states(base: Path, prompt: str) -> torch.Tensor:
    """[layers, hidden]: the mean over one prompt's tokens of what enters each layer, computed without our code."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base).eval(), AutoTokenizer.from_pretrained(base)
    ids = tokenizer("<s>" + prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        states = model(ids, output_hidden_states=True).hidden_states[:-1]
    return torch.stack([state[0].mean(dim=0) for state in states])


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_padded_batch_is_one_prompt_at_a_time(family: str, parents: Parents) -> None:
    base = parents[family][0]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base).eval(), AutoTokenizer.from_pretrained(base)
    prompts = encode(tokenizer, ["a", "somewhat longer", "the longest of all the three prompts"])
    together = list(layer_inputs(model, prompts))
    apart = [next(layer_inputs(model, [ids])) for ids in prompts]
    assert [states.shape for states in together] == [(2, len(ids), 32) for ids in prompts]
    assert all(torch.allclose(one, two, atol=1e-5) for one, two in zip(together, apart, strict=True))


def test_random_gates_follow_the_seed(parents: Parents, tmp_path: Path) -> None:
    base, one, two = parents["llama"]
    drawn = [gates(tiny.write_recipe(tmp_path / "r.yml", base, [one, two], seed=seed)) for seed in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0][0], drawn[0][1])


def test_uniform_rows_have_the_range_of_a_linear_layer() -> None:
    rows = uniform_rows(np.random.default_rng(0), 64, 100)
    assert 0.095 < np.abs(rows).max() <= 0.1
    assert abs(float(rows.mean())) < 0.005


def test_nested_routers_are_fitted_from_their_own_experts_prompts(parents: Parents, tmp_path: Path) -> None:
    base, one, two = parents["llama"]
    leaves = [
        {"source_model": str(folder), "name": name, "positive_prompts": [name]}
        for folder, name in ((base, "first"), (one, "second"), (two, "third"))
    ]
    nested = [{"name": "group", "experts": leaves[:2], "experts_per_token": 1}, leaves[2]]
    file = tiny.write_recipe(tmp_path / "n.yml", base, [], experts=nested, gate_mode="hidden", experts_per_token=1)
    made = make_routers(fm.plan(fm.Recipe.load(file)), SILENT, cache=False).routers
    flat = tiny.write_recipe(tmp_path / "f.yml", base, [], experts=leaves, gate_mode="hidden")
    expected = make_routers(fm.plan(fm.Recipe.load(flat)), SILENT, cache=False).routers
    inner = made["model.layers.0.mlp.experts.0.gate.weight"]
    outer = expected["model.layers.0.block_sparse_moe.gate.weight"]
    assert inner[1] == (2, 32)
    assert np.array_equal(inner[2], outer[2][: 2 * 32 * 4])


def test_prompts_need_tokens(parents: Parents, tmp_path: Path) -> None:
    base = parents["llama"][0]
    tokenizer = AutoTokenizer.from_pretrained(base)
    assert encode(tokenizer, ["ab"]) == [[0, 67, 68]]
    assert encode(tokenizer, [""]) == [[0]]
    tokenizer.bos_token = None
    tokenizer.save_pretrained(shutil.copytree(base, tmp_path / "no begin"))
    without = recipe_of(tmp_path, tmp_path / "no begin", [[""], ["b"]], [[], []], gate_mode="hidden")
    with pytest.raises(RecipeError, match="the prompt '' has 0 tokens"):
        gates(without)
    some, none = (
        gates(recipe_of(tmp_path, tmp_path / "no begin", [first, ["b"]], [[], []], gate_mode="hidden"))
        for first in (["", "a"], ["a"])
    )
    assert torch.equal(some, none)


@pytest.mark.parametrize("mode", ["hidden", "hidden_last", "cheap_embed"])
@pytest.mark.parametrize(
    ("prompts", "negatives"),
    [
        ([["one"], ["two"], [""]], [[], [], ["one", "two"]]),
        ([["one", ""], ["two"]], [[], []]),
        ([["a"], ["b"]], [[""], []]),
    ],
)
def test_blank_prompts_give_mergekits_gates(
    mode: str, prompts: list[list[str]], negatives: list[list[str]], parents: Parents, tmp_path: Path
) -> None:
    base = parents["llama"][0]
    ours = gates(recipe_of(tmp_path, base, prompts, negatives, gate_mode=mode))
    theirs = peer_gates(base, prompts, negatives, mode)  # in bfloat16
    assert torch.cosine_similarity(ours, theirs, dim=-1).min() > 0.999
