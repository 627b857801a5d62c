"""RegMean against least squares, and its limits."""

import pytest
import torch

from frankenmoe.backbone.regmean import in_turns, merged

O, I = 5, 7  # noqa: E741


def case(seed: int, *, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(O, I, generator=generator), torch.randn(tokens, I, generator=generator)


def regmean(
    cases: list[tuple[torch.Tensor, torch.Tensor]], *, alpha: float, base_OI: torch.Tensor | None = None
) -> torch.Tensor:
    base_OI = torch.zeros(O, I) if base_OI is None else base_OI
    parents = [
        ({"x": inputs_NI.T @ inputs_NI / len(inputs_NI)}, lambda name, weight_OI=weight_OI: weight_OI)
        for weight_OI, inputs_NI in cases
    ]
    return merged(parents, lambda name: base_OI, alpha=alpha)["x"]


def test_without_shrinking_it_is_the_least_squares_solution() -> None:
    cases = [case(seed, tokens=50) for seed in range(3)]
    inputs = torch.cat([inputs_NI for _, inputs_NI in cases])
    targets = torch.cat([inputs_NI @ weight_OI.T for weight_OI, inputs_NI in cases])
    expected = torch.linalg.lstsq(inputs, targets).solution.T

    assert torch.allclose(regmean(cases, alpha=1.0), expected, atol=1e-4)
    assert torch.allclose(regmean(cases, alpha=1.0, base_OI=torch.ones(O, I)), expected, atol=1e-4)


def test_the_paper_s_formula_with_a_shrunk_off_diagonal() -> None:
    cases, alpha = [case(seed, tokens=50) for seed in range(2)], 0.9
    top, bottom = torch.zeros(I, O), torch.zeros(I, I)
    for weight_OI, inputs_NI in cases:
        gram = inputs_NI.T @ inputs_NI / len(inputs_NI)
        gram = alpha * gram + (1 - alpha) * torch.diag(torch.diag(gram))
        top, bottom = top + gram @ weight_OI.T, bottom + gram

    assert torch.allclose(regmean(cases, alpha=alpha), (torch.linalg.inv(bottom) @ top).T, atol=1e-4)


@pytest.mark.parametrize("alpha", [0.0, 0.95, 1.0])
def test_one_parent_and_equal_parents_give_that_parent(alpha: float) -> None:
    weight_OI, inputs_NI = case(0, tokens=30)

    assert torch.allclose(regmean([(weight_OI, inputs_NI)], alpha=alpha), weight_OI, atol=1e-4)
    twins = [(weight_OI, inputs_NI), (weight_OI, case(1, tokens=30)[1])]
    assert torch.allclose(regmean(twins, alpha=alpha), weight_OI, atol=1e-4)


@pytest.mark.parametrize("alpha", [0.95, 1.0])
def test_fewer_tokens_than_inputs_and_inputs_that_are_always_zero(alpha: float) -> None:
    one, two = case(0, tokens=3), case(1, tokens=2)
    for _, inputs_NI in (one, two):
        inputs_NI[:, 0] = 0
    found = regmean([one, two], alpha=alpha)

    assert found.isfinite().all()
    share = (found - two[0])[:, 0] / (one[0] - two[0])[:, 0]  # a mean of the two, where no text says more
    assert torch.allclose(share, share.mean(), atol=1e-3)
    assert 0.2 < share.mean() < 0.8


def test_turns_keep_to_the_budget() -> None:
    shapes = {"a": (4, 4), "b": (4, 4), "c": (4, 4)}
    need = 4 * 4 * (2 * 4 + 4)

    assert in_turns(list(shapes), shapes, budget=2 * need) == [["a", "b"], ["c"]]
    assert in_turns(list(shapes), shapes, budget=1) == [["a"], ["b"], ["c"]]
