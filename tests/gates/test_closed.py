"""Closed-form gates against formulas by hand, scipy-free; statistics against sums of all states at once."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from frankenmoe.errors import ArtifactError
from frankenmoe.gates.closed import CLOSED, centroid, lda, ridge, spread, sums_of
from frankenmoe.gates.fit import BY_STATES
from frankenmoe.gates.logistic import States, logistic
from frankenmoe.gates.regret import regret
from frankenmoe.gates.scale import search
from frankenmoe.gates.statistics import (
    Fitted,
    Moments,
    RouterStatistics,
    RouterText,
    load_statistics,
    start,
    statistics_bytes,
    with_text,
)
from frankenmoe.recipe import FIT_MODES

DIM = 6


def clouds(seed: int, *, classes: int = 3, tokens: tuple[int, ...] = (40, 400, 90)) -> list[torch.Tensor]:
    """One cloud of states per class, around a common mean far from zero, as a transformer's are."""
    generator = torch.Generator().manual_seed(seed)
    far = torch.randn(DIM, generator=generator) * 4
    mix = torch.randn(DIM, DIM, generator=generator) / 2
    return [
        far + torch.randn(DIM, generator=generator) + torch.randn(tokens[index], DIM, generator=generator) @ mix
        for index in range(classes)
    ]


def statistics_of(states: list[torch.Tensor], *, batch: int = 1000) -> RouterStatistics:
    found = start(layers=1, hidden=DIM)
    for index, states_ND in enumerate(states):
        moments = Moments(layers=1, hidden=DIM)
        for part in states_ND.split(batch):
            moments.add(0, part)
        target = tuple(float(index == other) for other in range(len(states)))
        found = with_text(found, RouterText(f"e{index}", target), moments)
    return found


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), batch=st.integers(1, 60))
def test_statistics_add_up_whatever_the_batches(seed: int, batch: int) -> None:
    states = clouds(seed)
    found, once = statistics_of(states, batch=batch), statistics_of(states)
    assert found.count_U.tolist() == [40, 400, 90]
    assert torch.allclose(found.mean_ULD, once.mean_ULD, atol=1e-12)
    assert torch.allclose(found.second_LDD, once.second_LDD, atol=1e-9)
    by_hand = sum(np.einsum("nd,ne->de", x.numpy(), x.numpy(), dtype=np.float64) / len(x) for x in states)
    assert np.allclose(once.second_LDD[0].numpy(), by_hand, rtol=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_lda_scores_are_fishers(seed: int) -> None:
    states = clouds(seed)
    rows_CD = lda(sums_of(statistics_of(states), 0), shrink=0.0)
    arrays = [x.double().numpy() for x in states]
    means = np.stack([x.mean(axis=0) for x in arrays])
    within = sum((x - m).T @ (x - m) / len(x) for x, m in zip(arrays, means, strict=True)) / 3
    weights = np.linalg.solve(within, means.T).T
    bias = -0.5 * np.einsum("cd,cd->c", weights, means)
    # at the class means the folded bias is exact, so scores there are Fisher's up to a constant for all classes
    ours = means @ rows_CD.numpy().T
    theirs = means @ weights.T + bias
    assert np.allclose(ours - ours.mean(axis=1)[:, None], theirs - theirs.mean(axis=1)[:, None], rtol=1e-5, atol=1e-5)
    chosen = np.concatenate([(rows_CD.numpy() @ x.T).argmax(axis=0) == c for c, x in enumerate(arrays)]).mean()
    best = np.concatenate([(weights @ x.T + bias[:, None]).argmax(axis=0) == c for c, x in enumerate(arrays)]).mean()
    assert chosen > best - 0.15


def test_ridge_is_least_squares_on_the_one_hot_class_with_classes_balanced() -> None:
    states = clouds(1)
    ours = ridge(sums_of(statistics_of(states), 0), penalty=0.0)
    root = np.concatenate([x.double().numpy() / np.sqrt(len(x)) for x in states])
    wanted = np.concatenate([np.eye(3)[[c] * len(x)] / np.sqrt(len(x)) for c, x in enumerate(states)])
    theirs = np.linalg.lstsq(root, wanted, rcond=None)[0].T
    # A is the mean over classes and not the sum, which scales all rows alike
    assert np.allclose(ours.numpy(), 3 * (theirs - theirs.mean(axis=0)), atol=1e-6)


def test_centroid_is_the_distance_to_the_means() -> None:
    states = clouds(2)
    means = torch.stack([x.double().mean(dim=0) for x in states])
    ours = means @ centroid(sums_of(statistics_of(states), 0)).T
    theirs = -0.5 * torch.cdist(means, means).square()
    assert torch.allclose(ours - ours.mean(dim=1)[:, None], theirs - theirs.mean(dim=1)[:, None], atol=1e-6)


@pytest.mark.parametrize("method", CLOSED)
def test_how_much_text_a_class_has_changes_nothing(method: str) -> None:
    states = clouds(3)
    many = [states[0], torch.cat([states[1]] * 7), states[2]]
    few, more = (CLOSED[method](sums_of(statistics_of(x), 0)) for x in (states, many))
    assert torch.allclose(few, more, atol=1e-6)


@pytest.mark.parametrize("method", CLOSED)
def test_spread_is_the_deviation_of_the_logits(method: str) -> None:
    states = clouds(4, tokens=(50, 50, 50))
    sums = sums_of(statistics_of(states), 0)
    rows_CD = CLOSED[method](sums)
    logits = torch.cat(states).double() @ rows_CD.T
    assert spread(rows_CD, sums) == pytest.approx(float(logits.square().mean().sqrt()), rel=1e-5)


def test_logistic_has_no_gradient_left_and_beats_chance() -> None:
    states = clouds(5)
    x = torch.cat(states)
    target = torch.cat([torch.eye(3)[[c] * len(each)] for c, each in enumerate(states)])
    weight = torch.cat([torch.full((len(each),), 1 / len(each)) for each in states])
    rows_CD = logistic(States(x, target, weight), penalty=1e-4, shrink=1e-6, steps=300)
    share = (weight / weight.sum()).double()
    probs = (x.double() @ rows_CD.T).softmax(dim=1)
    gradient = ((probs - target.double()) * share[:, None]).T @ x.double()
    moment = (x.double().T * share) @ x.double()
    wanted = -2e-4 * rows_CD @ moment  # the penalty is on mean squared logits
    assert torch.allclose(gradient - gradient.mean(dim=0), wanted, atol=1e-3)
    assert float((probs.argmax(dim=1) == target.argmax(dim=1)).double() @ share) > 0.6


def test_logistic_takes_soft_targets() -> None:
    states = torch.eye(DIM).repeat(5, 1)
    even = torch.full((len(states), 2), 0.5)
    rows_CD = logistic(States(states, even, torch.ones(len(states))))
    assert float(rows_CD.abs().max()) < 1e-4


def losing(states_ND: torch.Tensor, rows_CD: torch.Tensor, loss_NC: torch.Tensor) -> float:
    return float(((states_ND @ rows_CD.float().T).softmax(dim=1) * loss_NC).sum(dim=1).mean())


def test_regret_prefers_the_cheap_mistake_where_nobody_can_know() -> None:
    """Two kinds of states: one where the class shows, one that both classes share and where expert 1 is safe."""
    known = torch.tensor([[6.0, 0.0, 0.0], [0.0, 6.0, 0.0]]).repeat(50, 1)
    unknown = torch.tensor([[0.0, 0.0, 6.0]]).repeat(100, 1)
    x = torch.cat([known, unknown])
    own = torch.arange(2).repeat(100)
    target = torch.eye(2)[own]
    # a wrong expert costs 1; among states that say nothing expert 0 costs 3 where it is wrong
    loss = 1 - target
    loss[100:, 0] *= 3
    data = States(x, target, torch.ones(len(x)))
    plain = logistic(data)
    rows_CD = regret(data, loss, plain)
    assert abs(float((plain[0] - plain[1])[2])) < 1e-3
    assert [row.argmax().item() for row in (torch.eye(3).double() @ rows_CD.T)] == [0, 1, 1]
    assert losing(x, rows_CD, loss) < losing(x, plain, loss) - 0.1
    assert torch.allclose(rows_CD.sum(dim=0), torch.zeros(3, dtype=torch.float64), atol=1e-6)


def test_regret_is_as_good_as_any_gate_nearby() -> None:
    states = clouds(5)
    x = torch.cat(states)
    target = torch.cat([torch.eye(3)[[c] * len(each)] for c, each in enumerate(states)])
    data = States(x, target, torch.ones(len(x)))
    loss = torch.rand(len(x), 3, generator=torch.Generator().manual_seed(0))
    start = logistic(data)
    rows_CD = regret(data, loss, start, label=0.0, penalty=0.0)
    best = losing(x, rows_CD, loss)
    assert best < losing(x, start, loss) - 0.02
    for seed in range(20):
        step = 0.05 * torch.randn(3, DIM, generator=torch.Generator().manual_seed(seed))
        assert losing(x, rows_CD + step, loss) > best - 1e-3
    kept = regret(data, loss, start, penalty=1e6)
    assert torch.allclose(kept, start, atol=1e-3)


@given(best=st.floats(-2.5, 2.5))
def test_the_scale_search_finds_the_bottom_of_a_valley(best: float) -> None:
    tried: list[float] = []

    def valley(factor: float) -> float:
        tried.append(factor)
        return float((np.log(factor) - best) ** 2)

    assert search(valley, start=1.0, tokens=10**9) == pytest.approx(np.exp(best), rel=1e-3)
    assert len(set(tried)) == len(tried)
    assert len(tried) <= (3 if abs(best) < np.log(1.6) else 8)


def test_with_few_tokens_the_scale_stays_where_it_is_likely() -> None:
    found = search(lambda factor: -1e-4 * np.log(factor), start=2.0, tokens=100)
    assert 1.2 < found < 4
    far = search(lambda factor: -1e-4 * np.log(factor), start=2.0, tokens=10**7)
    assert far > 100


def test_a_later_expert_gets_nothing_from_earlier_texts() -> None:
    states = clouds(6)
    two = statistics_of(states[:2])
    moments = Moments(layers=1, hidden=DIM)
    moments.add(0, states[2])
    three = with_text(two, RouterText("e2", (0.0, 0.0, 1.0)), moments)
    whole = statistics_of(states)
    assert [text.target_C for text in three.texts] == [text.target_C for text in whole.texts]
    for method in CLOSED:
        assert torch.allclose(CLOSED[method](sums_of(three, 0)), CLOSED[method](sums_of(whole, 0)), atol=1e-9)


def test_statistics_survive_the_disk_and_damage_is_told(tmp_path: Path) -> None:
    file = tmp_path / "router-statistics.safetensors"
    with pytest.raises(ArtifactError, match="were not fitted"):
        load_statistics(file)
    found = statistics_of(clouds(7))
    file.write_bytes(statistics_bytes(Fitted({(): found, (1,): found, (-1,): found}, {"scale": 2.5})))
    read = load_statistics(file)
    assert read.facts == {"scale": 2.5}
    assert list(read.routers) == [(), (1,), (-1,)]
    assert read.routers[()].texts == found.texts
    assert torch.equal(read.routers[(1,)].second_LDD, found.second_LDD)
    assert torch.equal(read.routers[(-1,)].mean_ULD, found.mean_ULD)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ArtifactError, match="damaged"):
        load_statistics(file)


def test_every_fitted_gate_mode_has_its_function() -> None:
    assert {*CLOSED, *BY_STATES, "regret"} == FIT_MODES
