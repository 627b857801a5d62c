"""Every family in every format: the built MoE in stock transformers is the dense model, and the virtual MoE."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import frankenmoe as fm
import tiny
from family_cases import CASES, LONG, apart, logits, make_parent, per_token, write_recipe
from frankenmoe.checkpoint.reader import open_checkpoint
from frankenmoe.families import FAMILIES, FORMATS


def stock(folder: Path, **loading: Any) -> Any:
    """The model that stock transformers loads; no parameter may be missing or left over."""
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **loading)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    return model.eval()


def divergence(truth: torch.Tensor, other: torch.Tensor) -> float:
    """Mean KL over tokens, in nats."""
    truth, other = truth.log_softmax(-1), other.log_softmax(-1)
    return float((truth.exp() * (truth - other)).sum(-1).mean())


def test_every_pair_of_the_tables_has_a_case() -> None:
    text = [fmt for fmt in FORMATS.values() if fmt.loads_in_transformers and fmt.inside is None]  # test_vision.py
    pairs = {(family, fmt.name) for fmt in text for family in fmt.families}
    assert {(case.family, case.fmt) for case in CASES.values()} == pairs
    assert {case.family for case in CASES.values()} == set(FAMILIES)


@pytest.mark.parametrize("name", CASES)
def test_equal_experts_are_the_dense_model(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    base = make_parent(tmp_path / "base", case)
    recipe = write_recipe(tmp_path / "r.yml", case, base, [base] * 4, half=True, experts_per_token=2)
    assert fm.plan(fm.Recipe.load(recipe)).fmt.name == case.fmt
    fm.build(recipe, tmp_path / "built", allow_identical=True)
    ids = tiny.ids(LONG)
    dense, moe = logits(stock(base), ids), logits(stock(tmp_path / "built", **case.loading), ids)
    assert dense.std() > 0.05
    assert apart(dense, moe) <= case.dense


@pytest.mark.parametrize("name", CASES)
def test_different_experts_virtual_is_built_is_stock(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    base, *others = (make_parent(tmp_path / str(seed), case, seed=seed) for seed in range(3))
    recipe = write_recipe(tmp_path / "r.yml", case, base, [base, *others], experts_per_token=2)
    made = fm.plan(fm.Recipe.load(recipe))
    fm.build(recipe, tmp_path / "built")
    ids = tiny.ids(LONG)
    theirs = stock(tmp_path / "built", **case.loading)
    first, again, other = (
        logits(model, ids) for model in (fm.load(recipe).model, fm.load(tmp_path / "built").model, theirs)
    )
    assert apart(first, again) <= case.close
    assert apart(first, other) <= case.close
    gates = load_file(tmp_path / "built" / "model-routers.safetensors")
    shared = base if case.recipe.get("shared_experts") else None
    assert apart(other, logits(per_token(case, base, [base, *others], gates, shared=shared), ids)) <= case.close
    assert made.bill.total == sum(ref.numel for ref in open_checkpoint(tmp_path / "built").tensors.values())
    fm.verify(tmp_path / "built")


@pytest.mark.parametrize("name", CASES)
def test_bfloat16_costs_at_most_twice_what_it_costs_the_dense_model(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    base = make_parent(tmp_path / "base", case, dtype=torch.bfloat16)
    recipe = write_recipe(tmp_path / "r.yml", case, base, [base] * 4, half=True, experts_per_token=2)
    fm.build(recipe, tmp_path / "built", allow_identical=True)
    ids = tiny.ids(LONG, batch=8)
    truth, dense = (logits(stock(base, dtype=dtype), ids) for dtype in (torch.float32, torch.bfloat16))
    # torch's grouped products take only sizes that are multiples of 8
    loading = {"dtype": torch.bfloat16, "experts_implementation": "eager"} | case.loading
    moe = logits(stock(tmp_path / "built", **loading), ids)
    assert 0 < divergence(truth, moe) <= 2 * divergence(truth, dense)


def test_gemma_3_is_not_built_in_a_type_that_loses_its_small_numbers(tmp_path: Path) -> None:
    base = make_parent(tmp_path / "base", CASES["gemma3"])
    recipe = write_recipe(tmp_path / "r.yml", CASES["gemma3"], base, [base] * 2, dtype="float16")
    assert any("float16" in problem for problem in fm.plan(fm.Recipe.load(recipe)).problems)
