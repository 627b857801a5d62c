"""Differences are paired, intervals hold what they say, and the verdict says no more than they do."""

import random
from typing import Any

import numpy as np
import pytest

pytest.importorskip("lm_eval")

from frankenmoe.evaluate.bootstrap import minus, weighted
from frankenmoe.evaluate.compare import BASE, FORCED, MERGE, MOE, ORACLE, PARENT, best_of_parents, gains, kept
from frankenmoe.evaluate.domains import GENERAL, Losses
from frankenmoe.evaluate.prompts import BENCHMARKS
from frankenmoe.evaluate.score import Outcome, Result
from frankenmoe.evaluate.verdict import verdict


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
    others = [result("base", BASE, text), result("maths", PARENT, {"maths": [row - 3 for row in text["maths"]]})]
    said = verdict(moe, others, [gains(moe, other) for other in others])
    assert "but parent maths alone does as well or better" in said[0]


def less(text: dict[str, list[float]], by: float) -> dict[str, list[float]]:
    return {name: [row - by for row in rows] for name, rows in text.items()}


@pytest.mark.parametrize(
    ("by", "sentence"),
    [
        (
            1.0,
            "Better than the best dense merge of its parents (task arithmetic 0.7) by 0.050 nats per token on all 2 "
            "domains (95 %: +0.050 to +0.050); that merge needs only the memory of the base.",
        ),
        (
            0.2,
            "Worse than the best dense merge of its parents (task arithmetic 0.7) by 0.030 nats per token on all 2 "
            "domains (95 %: -0.030 to -0.030): use that merge, which needs only the memory of the base.",
        ),
    ],
)
def test_the_best_dense_merge_is_the_one_to_beat(by: float, sentence: str) -> None:
    text = {"maths": noisy(40, seed=1), "verse": noisy(50, seed=2)}
    moe = result("moe", MOE, less(text, by))
    others = [
        result("base", BASE, text),
        result("average", MERGE, less(text, 0.1)),
        result("task arithmetic 0.7", MERGE, less(text, 0.5)),
    ]
    assert verdict(moe, others, [gains(moe, other) for other in others])[1] == sentence


def test_a_dense_merge_within_chance_is_not_beaten() -> None:
    text = {"maths": noisy(40, seed=1)}
    moe, merge = (
        result("moe", MOE, {"maths": noisy(39, seed=3)}),
        result("ties 0.5", MERGE, {"maths": noisy(39, seed=4)}),
    )
    base = result("base", BASE, text)
    said = verdict(moe, [base, merge], [gains(moe, base), gains(moe, merge)])[1]
    assert said.startswith(
        "Not shown to be better than the best dense merge of its parents (ties 0.5), which needs only"
    )


def test_what_is_kept_of_the_parents_advantage() -> None:
    text = {"maths": [30.0] * 10, "verse": [50.0] * 10}
    base, moe = result("base", BASE, text), result("moe", MOE, {"maths": [26.0] * 10, "verse": [47.2] * 10})
    parents = [
        result("m", PARENT, {"maths": [25.0] * 10, "verse": [60.0] * 10}),
        result("v", PARENT, {"maths": [35.0] * 10, "verse": [46.0] * 10}),
    ]
    forced = result(FORCED, FORCED, {"maths": [25.0] * 10, "verse": [46.4] * 10})
    merge = result("average", MERGE, {"maths": [28.0] * 10, "verse": [48.0] * 10})
    others = [base, *parents, merge, forced]
    shares = kept([*others, moe], {"maths": "m", "verse": "v", "unread": "m"})
    assert {name: list(row) for name, row in shares.items()} == {
        "average": ["maths", "verse"],
        FORCED: ["maths", "verse"],
        "moe": ["maths", "verse"],
    }
    assert list(shares["moe"].values()) == pytest.approx([0.8, 0.7])
    assert list(shares["average"].values()) == pytest.approx([0.4, 0.5])
    said = verdict(moe, others, [gains(moe, other) for other in others], shares)
    assert (
        "It keeps 75% of its parents' advantage over the base, the least on verse (70%); own expert forced 95%, "
        "average 45%." in said
    )


def test_a_parent_that_learnt_nothing_has_no_share() -> None:
    text = {"maths": [30.0] * 10}
    results = [result("base", BASE, text), result("m", PARENT, {"maths": [31.0] * 10}), result("moe", MOE, text)]
    assert kept(results, {"maths": "m"}) == {}


def test_the_oracle_takes_the_best_parent_of_each_text() -> None:
    parents = [
        result("m", PARENT, {"maths": [25.0] * 10, "verse": [60.0] * 10}, memory=70),
        result("v", PARENT, {"maths": [35.0] * 10, "verse": [46.0] * 10}, memory=90),
    ]
    oracle = best_of_parents(parents)
    assert oracle is not None
    assert oracle.kind == ORACLE
    assert {name: losses.nats[0] for name, losses in oracle.losses.items()} == {"maths": 25.0, "verse": 46.0}
    assert oracle.facts["memory_bytes"] == 160
    assert best_of_parents([]) is None


def test_general_text_does_not_count_in_the_mean() -> None:
    text = {"maths": noisy(40, seed=1), GENERAL: [40.0] * 10}
    base = result("base", BASE, text)
    moe = result("moe", MOE, {"maths": [row - 1 for row in text["maths"]], GENERAL: [40.4] * 10})
    gain = gains(moe, base)
    assert gain.loss is not None
    assert gain.loss.value == pytest.approx(0.1)
    assert list(gain.domains) == ["maths"]
    assert moe.mean_loss == pytest.approx(moe.losses["maths"].mean)
    said = verdict(moe, [base], [gain])
    assert "On general text its loss is +1.0 % against the base's (95 %: +1.0 to +1.0)." in said


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
