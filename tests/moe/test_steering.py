"""Within the context a model chooses as it was told, in its traces too; afterwards it is as before."""

from pathlib import Path
from typing import Any

import pytest
import torch

import family_cases
import frankenmoe as fm
import tiny
from frankenmoe.moe.steering import NEVER, UNCHANGED, Steering, steered
from frankenmoe.moe.trace import outer_blocks

CASES = ("llama", "llama-qwen", "glm", "granite-shared")  # softmax, without renormalisation, sigmoid, a shared expert
IDS = tiny.ids()


@pytest.fixture(params=CASES)
def moe(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    case = family_cases.CASES[request.param]
    parents = [family_cases.make_parent(tmp_path / str(seed), case, seed=seed) for seed in range(3)]
    return fm.load(family_cases.write_recipe(tmp_path / "r.yml", case, parents[0], parents))


def routing(moe: Any, steering: Steering) -> Any:
    """What the first layer decided; its input does not depend on the steering."""
    with steered(moe.model, steering):
        return moe.forward_with_trace(IDS)[1].layers[0]


def test_the_others_get_what_they_would_get_without_an_expert(moe: Any) -> None:
    router = outer_blocks(moe.model)[0].router
    plain = routing(moe, UNCHANGED)
    expected = router.choose(plain.logits_TE[:, [0, 2]], top_k=2)
    found = routing(moe, Steering(bias_E=(0.0, NEVER, 0.0)))
    assert torch.equal(found.ids_TK, torch.tensor([0, 2])[expected.ids_TK])
    assert torch.allclose(found.weights_TK, expected.weights_TK)


def test_a_bias_is_added_and_a_number_is_set(moe: Any) -> None:
    router = outer_blocks(moe.model)[0].router
    plain = routing(moe, UNCHANGED)
    found = routing(moe, Steering(top_k=1, bias_E=(0.0, 0.5, -0.5)))
    expected = router.choose(plain.logits_TE + torch.tensor([0.0, 0.5, -0.5]), top_k=1)
    assert torch.equal(found.ids_TK, expected.ids_TK)
    assert torch.equal(found.weights_TK, expected.weights_TK)
    assert not torch.equal(found.ids_TK, plain.ids_TK[:, :1])


def test_afterwards_the_model_is_as_before(moe: Any) -> None:
    before = family_cases.logits(moe.model, IDS)
    with steered(moe.model, Steering(top_k=1)):
        assert not torch.equal(family_cases.logits(moe.model, IDS), before)
    assert torch.equal(family_cases.logits(moe.model, IDS), before)
    with steered(moe.model, Steering(top_k=2, bias_E=(0.0, 0.0, 0.0))):
        assert torch.equal(family_cases.logits(moe.model, IDS), before)


def test_a_bias_is_not_rounded_to_sixteen_bits(tmp_path: Path) -> None:
    parents = [tiny.make_parent(tmp_path / str(seed), seed=seed, dtype=torch.bfloat16) for seed in range(3)]
    moe = fm.load(tiny.write_recipe(tmp_path / "r.yml", parents[0], parents, dtype="bfloat16"))
    plain, found = routing(moe, UNCHANGED), routing(moe, Steering(bias_E=(1 / 1024, 0.0, 0.0)))
    assert plain.logits_TE.dtype == torch.bfloat16
    assert torch.equal(found.logits_TE[:, 0] - plain.logits_TE[:, 0].float(), torch.full((IDS.numel(),), 1 / 1024))
