"""Distances of experts against norms computed in the plain way, for dense, noisy, adapter and nested experts."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import frankenmoe as fm
import tiny
from frankenmoe.audit.facts import identical_everywhere
from frankenmoe.audit.weights import BASE, MEAN, Matrix, base_ffn, distances, matrices
from frankenmoe.moe.adapter import with_adapter
from frankenmoe.moe.trace import blocks
from frankenmoe.planning import plan
from frankenmoe.recipe import Recipe

Parents = dict[str, list[Path]]


def recipe_of(folder: Path, base: Path, parents: list[Path], **keys: object) -> Recipe:
    return Recipe.load(tiny.write_recipe(folder / "r.yml", base, parents, **keys))


def flat(module: torch.nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().double().flatten() for parameter in module.parameters()])


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_distances_are_plain_norms_over_that_of_the_base(family: str, parents: Parents, tmp_path: Path) -> None:
    base, one, two = parents[family]
    recipe = recipe_of(tmp_path, base, [base, one, two, one])
    moe = fm.load(recipe)
    for found, (_, _, block) in zip(distances(moe.model, base_ffn(plan(recipe))), blocks(moe.model), strict=True):
        vectors = [flat(expert) for expert in block.experts]
        norm = vectors[0].norm()
        expected = torch.stack([torch.stack([(a - b).norm() / norm for b in vectors]) for a in vectors])
        torch.testing.assert_close(found.pairs_EE, expected)
        torch.testing.assert_close(found.to_reference_E, expected[0])
        assert found.to_reference_E[0] == 0
        assert found.identical == ((1, 3),)
        assert found.reference == BASE
        assert found.pairs_EE[1, 3] == 0


def test_without_the_base_distances_are_relative_to_the_mean(parents: Parents, tmp_path: Path) -> None:
    base, one, two = parents["llama"]
    moe = fm.load(recipe_of(tmp_path, base, [one, two]))
    found = next(iter(distances(moe.model, None)))
    _, _, block = blocks(moe.model)[0]
    a, b = (flat(expert) for expert in block.experts)
    mean = (a + b) / 2
    assert found.reference == MEAN
    torch.testing.assert_close(found.pairs_EE[0, 1], (a - b).norm() / mean.norm())
    torch.testing.assert_close(found.to_reference_E, torch.stack([(a - mean).norm(), (b - mean).norm()]) / mean.norm())


def test_an_adapter_is_compared_by_its_low_rank_term() -> None:
    torch.manual_seed(0)
    mlp = torch.nn.Sequential(torch.nn.Linear(6, 5))
    lora = (torch.randn(2, 6) * 1e-4, torch.randn(5, 2), 0.5)
    found = matrices(with_adapter(mlp, {"0": lora}))
    assert set(found) == {"0.weight", "0.bias"}
    difference = found["0.weight"].minus(mlp[0].weight, 1, 4)
    # exactly the term: nothing of it is lost against the much larger weights
    torch.testing.assert_close(difference, 0.5 * (lora[1].double() @ lora[0].double())[1:4], rtol=1e-12, atol=0)
    assert not found["0.weight"].equals(Matrix(mlp[0].weight))
    assert found["0.bias"].equals(Matrix(mlp[0].bias.reshape(1, -1)))


def test_slices_do_not_change_the_result(parents: Parents, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, one, two = parents["llama"]
    moe = fm.load(recipe_of(tmp_path, base, [base, one, two]))
    whole = list(distances(moe.model, None))
    monkeypatch.setattr("frankenmoe.audit.weights.SLICE", 100)
    for one_way, other in zip(whole, distances(moe.model, None), strict=True):
        torch.testing.assert_close(one_way.pairs_EE, other.pairs_EE)


def test_experts_equal_in_every_layer_are_one_group(parents: Parents, tmp_path: Path) -> None:
    base, one, two = parents["llama"]
    moe = fm.load(recipe_of(tmp_path, base, [two, one, two, one, base]))
    found = list(distances(moe.model, None))
    assert identical_everywhere(found) == [["0", "2"], ["1", "3"]]
    half = [found[0], replace(found[1], identical=())]
    assert identical_everywhere(half) == []


def test_the_same_numbers_in_two_files_are_identical(parents: Parents, tmp_path: Path) -> None:
    """A built MoE keeps equal experts as separate tensors: they are compared, not only recognised."""
    base, one, _ = parents["llama"]
    built = fm.build(recipe_of(tmp_path, base, [one, base, one]), tmp_path / "out")
    found = next(iter(distances(fm.load(built).model, None)))
    assert found.identical == ((0, 2),)
    assert found.pairs_EE[0, 2] == 0
