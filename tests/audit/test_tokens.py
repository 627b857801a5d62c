"""Token data: what the page will decode is what the routers decided, and it stays within its budget."""

import base64
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch

from frankenmoe.audit.tokens import Passage, TokenTrace, as_data, encoded


def make_trace(layers: int, tokens: int, experts: int, top_k: int = 2, seed: int = 0) -> TokenTrace:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(layers, tokens, experts, generator=generator) * 2
    weights, ids = logits.softmax(dim=-1).topk(top_k, dim=-1)
    weights = weights / weights.sum(dim=-1, keepdim=True)
    half = tokens // 2
    passages = tuple(
        Passage(label, tuple(range(count)), tuple(f"w{index}" for index in range(count)))
        for label, count in (("a", half), ("b", tokens - half))
    )
    return TokenTrace(passages, tuple(range(layers)), ids, weights, logits)


def decoded(text: str, kind: str, shape: tuple[int, ...]) -> np.ndarray:
    """[column, layer, token] as page.js reads it, turned back to [layer, token, column]."""
    raw = np.frombuffer(zlib.decompress(base64.b64decode(text)), np.dtype(kind))
    return np.moveaxis(raw.reshape(shape), 0, -1)


def test_a_small_trace_keeps_everything() -> None:
    trace = make_trace(3, 20, 5)
    data = encoded(trace, budget=10**7)
    assert (data["kept"], data["bytes"]) == (5, 2)
    assert data["weights_sum_to_one"]
    weights = decoded(data["weights"], "u1", (1, 3, 20)) / 255
    assert np.abs(weights - trace.weights_LTK[..., :1].numpy()).max() <= 0.5 / 255 + 1e-6
    best = decoded(data["best"], "u1", (5, 3, 20))
    assert np.array_equal(best[..., :2], trace.ids_LTK.numpy())
    assert np.array_equal(np.sort(best, axis=-1), np.broadcast_to(np.arange(5), (3, 20, 5)))
    codes = decoded(data["logits"], "<u2", (5, 3, 20)).astype(float)
    logits = np.array(data["low"])[:, None, None] + np.array(data["unit"])[:, None, None] * codes
    expected = np.take_along_axis(trace.logits_LTE.numpy(), best.astype(int), axis=-1)
    assert np.abs(logits - expected).max() < 2e-4


@pytest.mark.parametrize("budget", [40_000, 20_000, 1])
def test_a_tight_budget_keeps_the_chosen_and_the_next(budget: int) -> None:
    trace = make_trace(4, 500, 16)
    data = encoded(trace, budget=budget)
    size = sum(len(value) for value in data.values() if isinstance(value, str))
    assert data["bytes"] == 1
    assert data["kept"] >= 3
    assert size <= budget or data["kept"] == 3
    best = decoded(data["best"], "u1", (data["kept"], 4, 500))
    assert np.array_equal(best[..., :2], trace.ids_LTK.numpy())


def test_dropped_choices_and_sixty_four_experts_survive() -> None:
    trace = make_trace(2, 30, 64)
    trace.ids_LTK[0, 3, 1] = -1
    data = encoded(trace, budget=10**7)
    dropped = decoded(data["dropped"], "u1", (2, 2, 30))
    assert dropped.sum() == dropped[0, 3, 1] == 1
    assert decoded(data["best"], "u1", (64, 2, 30)).max() == 63


def test_weights_that_do_not_sum_to_one_are_all_kept() -> None:
    trace = make_trace(1, 10, 4)
    halved = replace(trace, weights_LTK=trace.weights_LTK / 2)
    data = encoded(halved, budget=10**7)
    assert not data["weights_sum_to_one"]
    assert np.abs(decoded(data["weights"], "u1", (2, 1, 10)) / 255 - halved.weights_LTK.numpy()).max() < 0.003


def test_of_equal_logits_what_the_router_took_comes_first() -> None:
    trace = make_trace(1, 4, 3)
    trace.logits_LTE.zero_()
    trace.ids_LTK[:] = torch.tensor([2, 1])
    assert decoded(encoded(trace, budget=10**7)["best"], "u1", (3, 1, 4))[0, 0].tolist() == [2, 1, 0]


def test_equal_logits_have_no_range_to_divide_by() -> None:
    trace = make_trace(1, 4, 3)
    trace.logits_LTE.zero_()
    data = encoded(trace, budget=10**7)
    assert data["low"] == [0.0]
    assert decoded(data["logits"], "<u2", (3, 1, 4)).max() == 0


def test_plain_data_is_per_passage() -> None:
    trace = make_trace(2, 5, 3)
    one, two = as_data(trace)
    assert (one["label"], one["tokens"], two["tokens"]) == ("a", ["w0", "w1"], ["w0", "w1", "w2"])
    assert two["layers"][1]["experts"] == trace.ids_LTK[1, 2:].tolist()
    assert one["layers"][0]["weights"][1] == pytest.approx(trace.weights_LTK[0, 1].tolist(), abs=1e-4)
