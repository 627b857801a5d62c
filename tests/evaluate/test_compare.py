"""Differences are paired, intervals hold what they say, and the verdict says no more than they do."""

import random
from typing import Any

import numpy as np
import pytest

pytest.importorskip("lm_eval")

from frankenmoe.evaluate.bootstrap import minus, weighted
from frankenmoe.evaluate.compare import AVERAGE, BASE, MOE, PARENT, gains, verdict
from frankenmoe.evaluate.domains import Losses
from frankenmoe.evaluate.prompts import BENCHMARKS
from frankenmoe.evaluate.score import Outcome, Result


def result(name: str, kind: str, losses: dict[str, list[float]], *, memory: int = 100, **scores: list[float]) -> Result:
    facts: dict[str, Any] = {"memory_bytes": memory, "tokens_per_second": 1000.0}
    outcomes = {
        task: Outcome(BENCHMARKS[task], metrics={"acc": float(np.mean(rows))}, scores={task: tuple(rows)})
        for task, rows in scores.items()
    }
    per_domain = {domain: Losses(tuple(nats), (10,) * len(nats), 100) for domain, nats in losses.items()}
    return Result(name, kind, "", facts, outcomes, per_domain)


def noisy(level: float, *, seed: int, rows: int = 40) -> list[float]:
    rng = random.Random(seed)
    return [level + rng.gauss(0, 1) for _ in range(rows)]


def test_an_interval_is_that_of_the_mean() -> None:
    rng = np.random.default_rng(1)
    rows = rng.normal(3, 2, size=400)
    found = weighted([(rows.tolist(), [1.0] * 400, 1.0)])
    assert found.value == pytest.approx(rows.mean())
    spread = 1.96 * rows.std() / 20
    assert found.low == pytest.approx(rows.mean() - spread, abs=0.05)
    assert found.high == pytest.approx(rows.mean() + spread, abs=0.05)


def test_pairing_finds_what_is_smaller_than_the_rows_differ() -> None:
    hard = noisy(30, seed=0)
    better = [row - 0.01 * (1 + at % 3) for at, row in enumerate(hard)]
    gain = weighted([(minus(hard, better), [10.0] * len(hard), 1.0)])
    assert gain.sign == 1
    alone = weighted([(hard, [10.0] * len(hard), 1.0)])
    assert alone.high - alone.low > 10 * gain.value


def test_subjects_count_alike_however_many_rows_they_have() -> None:
    groups = [([1.0] * 10, [1.0] * 10, 0.5), ([0.0] * 90, [1.0] * 90, 0.5)]
    assert weighted(groups).value == 0.5


def test_beats_its_base_and_all_parents() -> None:
    text = {"maths": noisy(40, seed=1), "verse": noisy(50, seed=2)}
    moe = result("moe", MOE, {name: [row - 1 for row in rows] for name, rows in text.items()}, memory=250)
    base = result("base", BASE, text)
    parent = result("maths", PARENT, {"maths": [row - 2 for row in text["maths"]], "verse": [60.0] * 40})
    found = [gains(moe, other) for other in (base, parent)]
    said = verdict(moe, [base, parent], found)
    assert said[0] == (
        "Beats its base by 0.100 nats per token on all 2 domains (95 %: +0.100 to +0.100), and no parent alone does as "
        "well overall; it takes 2.5 x the memory of its base and reads at 1 x its speed."
    )
    assert "Parent maths wins on maths." in said


def test_a_parent_that_does_as_well_is_named() -> None:
    text = {"maths": noisy(40, seed=1)}
    moe = result("moe", MOE, {"maths": [row - 1 for row in text["maths"]]})
    others = [
        result("base", BASE, text),
        result("average", AVERAGE, {"maths": [row - 3 for row in text["maths"]]}),
    ]
    said = verdict(moe, others, [gains(moe, other) for other in others])
    assert "but the average of its parents' weights alone does as well or better" in said[0]


def test_noise_is_not_sold_as_progress() -> None:
    text = {"maths": noisy(40, seed=1)}
    moe = result("moe", MOE, {"maths": noisy(40, seed=3)})
    base = result("base", BASE, text)
    assert "may be chance" in verdict(moe, [base], [gains(moe, base)])[0]
    worse = result("moe", MOE, {"maths": [row + 1 for row in text["maths"]]})
    assert verdict(worse, [base], [gains(worse, base)])[0].startswith("Worse than its base by 0.100")


def test_an_moe_that_computes_its_base_is_told_so() -> None:
    text = {"maths": noisy(40, seed=1)}
    moe, base = result("moe", MOE, text, memory=1600), result("base", BASE, text)
    assert verdict(moe, [base], [gains(moe, base)]) == [
        "It computes its base exactly: no gain is possible; it takes 16 x the memory of its base and reads at 1 x its "
        "speed."
    ]


def test_tasks_decide_where_there_are_no_texts() -> None:
    moe = result("moe", MOE, {}, winogrande=[1.0] * 30 + [0.0] * 10)
    base = result("base", BASE, {}, winogrande=[1.0] * 10 + [0.0] * 30)
    said = verdict(moe, [base], [gains(moe, base)])
    assert said[0].startswith("Beats its base by 50.0 points (95 %: +35.0")
    assert said[1].startswith("Winogrande: 50.0 points better than its base")
