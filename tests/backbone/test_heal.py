"""The arithmetic of healing against numpy's least squares, and running layer by layer against the models themselves."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import tiny
from frankenmoe.backbone.heal import Moments, low_rank, refit
from frankenmoe.backbone.stream import Stream
from frankenmoe.errors import PlanError
from frankenmoe.moe.dense import mlp_modules

Parents = dict[str, list[Path]]
INPUTS, OUTPUTS = 12, 5


def tokens(count: int, *, seed: int, change_OI: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
    """Inputs, errors (a change of the matrix, or chance) and weights of `count` tokens."""
    draw = torch.Generator().manual_seed(seed)
    inputs_NI = torch.randn(count, INPUTS, generator=draw)
    errors_NO = torch.randn(count, OUTPUTS, generator=draw) if change_OI is None else inputs_NI @ change_OI.T
    return inputs_NI, errors_NO, torch.rand(count, generator=draw) + 0.1


def moments(*parts: tuple[torch.Tensor, ...]) -> Moments:
    found = Moments(INPUTS, OUTPUTS)
    for part in parts:
        found.add(*part)
    return found


def test_a_known_change_is_recovered() -> None:
    change_OI = torch.randn(OUTPUTS, INPUTS, generator=torch.Generator().manual_seed(3))
    kept, held = (moments(tokens(200, seed=seed, change_OI=change_OI)) for seed in (0, 1))

    found = refit(kept, held, ridges=(1e-8,))

    torch.testing.assert_close(found.change_OI, change_OI, rtol=1e-4, atol=1e-4)
    assert found.left < 1e-5


@pytest.mark.parametrize("count", [40, 7])  # more and fewer tokens than inputs
def test_the_change_is_that_of_weighted_ridge_regression(count: int) -> None:
    inputs_NI, errors_NO, weights_N = tokens(count, seed=0)
    kept, ridge = moments((inputs_NI, errors_NO, weights_N)), 0.3
    unit = float(kept.gram_II.diagonal().mean())
    root_N1 = weights_N.sqrt()[:, None].numpy()
    # ridge regression is least squares with one more row per input
    rows = np.vstack([inputs_NI.numpy() * root_N1, np.sqrt(ridge * unit) * np.eye(INPUTS)])
    goals = np.vstack([errors_NO.numpy() * root_N1, np.zeros((INPUTS, OUTPUTS))])
    expected, *_ = np.linalg.lstsq(rows, goals, rcond=None)

    found = refit(kept, kept, ridges=(ridge,))

    np.testing.assert_allclose(found.change_OI.numpy(), expected.T, rtol=1e-4, atol=1e-5)
    after = float((weights_N[:, None] * (errors_NO - inputs_NI @ found.change_OI.T) ** 2).sum())
    assert kept.error_after(found.change_OI) == pytest.approx(after, rel=1e-5)
    assert found.left == pytest.approx(after / kept.error, rel=1e-5)


def test_moments_add_up() -> None:
    one, two = tokens(30, seed=0), tokens(50, seed=1)
    together = tuple(torch.cat(pair) for pair in zip(one, two, strict=True))

    split, whole = moments(one, two), moments(together)

    torch.testing.assert_close(split.gram_II, whole.gram_II, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(split.cross_OI, whole.cross_OI, rtol=1e-5, atol=1e-5)
    assert (split.tokens, split.error) == (whole.tokens, pytest.approx(whole.error))


def test_what_held_out_tokens_do_not_confirm_is_left_out() -> None:
    """Errors by chance: with as many inputs as tokens the fit is perfect, and worthless for other tokens."""
    found = refit(moments(tokens(INPUTS, seed=0)), moments(tokens(200, seed=1)), ridges=(1e-6,))

    assert found.left == 1
    assert not found.change_OI.any()


def test_no_error_is_no_change() -> None:
    zero = torch.zeros(OUTPUTS, INPUTS)
    found = refit(moments(tokens(50, seed=0, change_OI=zero)), moments(tokens(50, seed=1, change_OI=zero)))

    assert found.left == 1
    assert not found.change_OI.any()


def noisy(count: int, seed: int) -> Moments:
    """Of tokens whose errors are a known change, plus chance of three times its size."""
    change_OI = torch.randn(OUTPUTS, INPUTS, generator=torch.Generator().manual_seed(3))
    inputs_NI, errors_NO, weights_N = tokens(count, seed=seed, change_OI=change_OI)
    chance_NO = 3 * torch.randn(count, OUTPUTS, generator=torch.Generator().manual_seed(seed + 9))
    return moments((inputs_NI, errors_NO + chance_NO, weights_N))


def test_the_ridge_is_chosen_by_held_out_tokens() -> None:
    """Few tokens with much chance in their errors want a larger ridge than many tokens."""
    few, many = (refit(noisy(count, 0), noisy(5000, 1)) for count in (16, 5000))

    assert few.ridge > many.ridge
    assert many.left < few.left < 1


@pytest.mark.parametrize("first", [None, 1e-9, 1e3, 7.0])
def test_ridges_are_tried_downhill(first: float | None) -> None:
    """Wherever the search begins, it ends at the best of all ridges; an unknown one begins in the middle."""
    kept, held = noisy(16, 0), noisy(5000, 1)
    ridges = (1e-9, 1e-3, 1e-2, 0.1, 1.0, 10.0, 1e3)

    best = min((refit(kept, held, ridges=(ridge,)) for ridge in ridges), key=lambda each: each.left)

    assert refit(kept, held, ridges=ridges, first=first).ridge == best.ridge
    assert best.ridge not in (ridges[0], ridges[-1])


def test_low_rank_is_the_best_for_the_inputs() -> None:
    draw = torch.Generator().manual_seed(0)
    change_OI = torch.randn(OUTPUTS, INPUTS, generator=draw)
    inputs_NI = torch.randn(300, INPUTS, generator=draw) * torch.logspace(0, -3, INPUTS)
    gram_II = inputs_NI.T @ inputs_NI

    a_RI, b_OR = low_rank(change_OI, gram_II, rank=2)

    outputs_NO = inputs_NI @ change_OI.T
    left = (outputs_NO - inputs_NI @ (b_OR @ a_RI).T).norm()
    best = torch.linalg.svdvals(outputs_NO)[2:].norm()  # Eckart-Young: no matrix of rank 2 is nearer
    assert float(left) == pytest.approx(float(best), rel=1e-3)
    a_RI, b_OR = low_rank(change_OI, gram_II, rank=99)
    torch.testing.assert_close(b_OR @ a_RI, change_OI, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", ["llama", "qwen3", tiny.UNLISTED])
def test_layer_by_layer_is_the_model(family: str, parents: Parents) -> None:
    model = AutoModelForCausalLM.from_pretrained(parents[family][0]).eval()
    ids_NT = tiny.ids(24, batch=100)  # two batches of different size
    with torch.no_grad():
        expected = model(input_ids=ids_NT, output_hidden_states=True).hidden_states
    stream = Stream(model, ids_NT)

    torch.testing.assert_close(torch.cat(stream.states), expected[0])
    outs, inputs = zip(*stream.run(0, observed=mlp_modules(model)[0][1]), strict=True)
    torch.testing.assert_close(torch.cat(outs), expected[1])
    assert torch.cat(inputs).shape == expected[1].shape
    torch.testing.assert_close(torch.cat(stream.states), expected[0])
    stream.advance(0)
    torch.testing.assert_close(torch.cat(stream.states), expected[1])
    assert stream.gain(0, mlp_modules(model)[0][1]) == pytest.approx(1, abs=1e-3)


def test_a_multiplier_on_the_ffn_is_found(tmp_path: Path) -> None:
    folder = tiny.make_parent(tmp_path / "granite", "granite", residual_multiplier=0.25)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()

    assert Stream(model, tiny.ids()).gain(0, mlp_modules(model)[0][1]) == pytest.approx(0.25, abs=1e-3)


def test_an_ffn_whose_output_is_normalised_is_refused(parents: Parents) -> None:
    model = AutoModelForCausalLM.from_pretrained(parents["olmo2"][0]).eval()

    with pytest.raises(PlanError, match="Olmo2DecoderLayer does not add its FFN's output"):
        Stream(model, tiny.ids()).gain(0, mlp_modules(model)[0][1])
