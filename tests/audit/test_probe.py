"""Outputs with other experts chosen and against the base, against models put together in another way."""

from pathlib import Path

import pytest
import torch

import frankenmoe as fm
import tiny
from frankenmoe.audit.probe import against_base, change, joined, swapped
from frankenmoe.audit.stats import others
from frankenmoe.moe.trace import blocks
from frankenmoe.planning import plan
from frankenmoe.recipe import Recipe

Parents = dict[str, list[Path]]
PROBES = [tiny.ids(10, batch=1)[0].tolist(), tiny.ids(6, batch=1, seed=3)[0].tolist()]


def load(folder: Path, base: Path, parents: list[Path], **keys: object) -> tuple[Recipe, fm.MoE]:
    recipe = Recipe.load(tiny.write_recipe(folder / "r.yml", base, parents, **keys))
    return recipe, fm.load(recipe)


def test_change_by_hand() -> None:
    """Logits (ln 3, 0) are (3/4, 1/4); against (1/2, 1/2): 3/4 ln(3/2) + 1/4 ln(1/2)."""
    ln3 = torch.tensor(3.0).log()
    own = torch.stack([torch.tensor([ln3, 0.0]), torch.tensor([0.0, ln3])])
    found = change(own, torch.tensor([[0.0, 0.0], [0.0, ln3]]))
    expected = (0.75 * torch.tensor(1.5).log() + 0.25 * torch.tensor(0.5).log()) / 2
    assert found.divergence == pytest.approx(float(expected), rel=1e-5)
    assert (found.changed, found.largest) == (0.0, pytest.approx(float(ln3)))
    assert change(own, own.flip(1)).changed == 1
    assert joined([(found, 2), (change(own, own), 2)]).divergence == pytest.approx(float(expected) / 2, rel=1e-5)


def test_one_layer_with_others_is_the_block_with_other_ids(parents: Parents, tmp_path: Path) -> None:
    base, one, two = parents["llama"]
    _, moe = load(tmp_path, base, [base, one, two])
    moved, model = swapped(moe, PROBES)
    assert set(moved) == {0, 1}
    assert model is not None
    assert model.divergence > 0
    _, _, block = blocks(moe.model)[0]
    changes = []
    with torch.no_grad():
        for probe in PROBES:
            read: list[torch.Tensor] = []
            handle = block.register_forward_pre_hook(lambda _, inputs, into=read: into.append(inputs[0][0]))
            moe.model(input_ids=torch.tensor([probe]))
            handle.remove()
            weights_TK, ids_TK, logits_TE = block.router(read[0])
            other_TK = others(logits_TE.argsort(descending=True), top_k=2)
            for token, hidden_D in enumerate(read[0]):
                own, other = (
                    sum(weights_TK[token, k] * block.experts[int(ids[token, k])](hidden_D[None])[0] for k in range(2))
                    for ids in (ids_TK, other_TK)
                )
                changes.append(float((other - own).norm() / own.norm()))
    assert moved[0] == pytest.approx(sum(changes) / len(changes), rel=1e-4)


def test_the_model_is_left_as_it_was(parents: Parents, tmp_path: Path) -> None:
    base, one, two = parents["llama"]
    _, moe = load(tmp_path, base, [base, one, two])
    with torch.no_grad():
        before = moe.model(input_ids=torch.tensor(PROBES[:1])).logits
        swapped(moe, PROBES)
        assert torch.equal(moe.model(input_ids=torch.tensor(PROBES[:1])).logits, before)


def test_identical_experts_do_not_move_and_compute_their_base(parents: Parents, tmp_path: Path) -> None:
    base = parents["llama"][0]
    recipe, moe = load(tmp_path, base, [base] * 3)
    moved, model = swapped(moe, PROBES)
    assert max(moved.values()) < 1e-5
    assert model is not None
    assert model.within_rounding(torch.float32)
    found = against_base(moe, plan(recipe), PROBES)
    assert found.within_rounding(torch.float32)
    assert found.divergence < 1e-6


def test_other_experts_do_not_compute_the_base(parents: Parents, tmp_path: Path) -> None:
    base, one, two = parents["llama"]
    recipe, moe = load(tmp_path, base, [one, two])
    assert not against_base(moe, plan(recipe), PROBES).within_rounding(torch.float32)


def test_without_a_choice_there_are_no_others(parents: Parents, tmp_path: Path) -> None:
    base, one, two = parents["llama"]
    _, moe = load(tmp_path, base, [one, two], experts_per_token=2)
    assert swapped(moe, PROBES) == ({}, None)
