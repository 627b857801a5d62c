"""What the answers say of facts made up for them: verdicts at their limits, and sentences that read as sentences."""

from dataclasses import replace
from typing import Any

import pytest

import synthetic
from frankenmoe.audit.answers import Answer, Whole, answers, layer_sentences
from frankenmoe.audit.measures import MEASURES, compared

Facts = dict[str, Any]


def whole(*, experts: int = 4, layers: int = 3) -> Whole:
    report = synthetic.make_audit(experts=experts, layers=layers, tokens=120).report
    return Whole(report["routers"], report["model"]["paths"], [], False, 0.3, None, True)


def said(about: Whole, key: str) -> Answer:
    return next(answer for answer in answers(about) if answer.key == key)


def changed(about: Whole, part: str, **values: Any) -> Whole:
    routers = [{**facts, part: {**facts[part], **values}} for facts in about.routers]
    return replace(about, routers=routers)


@pytest.mark.parametrize(("layers", "words"), [(1, ""), (3, " in every layer")])
def test_equal_layers_read_as_a_sentence(layers: int, words: str) -> None:
    found = changed(whole(layers=layers), "apart", median=0.5, moved=0.4)
    found = changed(found, "load", cv=0.25)
    found = changed(found, "domains", own_first={"expert 0": 0.75}, information=0.5, most_information=1.0)
    found = changed(found, "gate", largest_cosine=0.5, logit_spread=2.0, condition=2.0, condition_centred=1.5)
    found = changed(found, "capacity", over={"1.0": 0.2, "1.25": 0.125, "2.0": 0.0})
    found = changed(found, "tokens_seen", used=3, switches=0.5)
    for key, start in {
        "moe": f"The distance between experts is 0.50{words}, relative to the norm of the base's FFN. With the next "
        f"best experts chosen, outputs change by 40%{words}, and predictions by 0.30 nats per token.",
        "load": f"The coefficient of variation of the load (0 is even) is 0.25{words}. The busiest expert is ",
        "domain": f"The share of tokens whose first expert is their domain's own is 75%{words}; chance is 25%. Its "
        f"information about the domain is 0.50{words}, of 1.00 bits possible.",
        "gate": f"The largest cosine of two rows is 0.50{words}. The spread of a token's logits over the experts is "
        f"2.00{words}. The condition number is 2.00{words}; without the mean row it is 1.50{words}.",
        "survive": "In batches of one domain's text, the share of assignments that a capacity of 1.25 would drop is "
        f"12%{words}. ",
        "token": f"Of 4 experts, the number that are first for any of the 120 tokens shown is 3{words}. The share of "
        f"tokens whose first expert differs from the previous token's is 50%{words}.",
    }.items():
        assert said(found, key).sentence.startswith(start)


def test_a_gate_bad_only_by_its_mean_is_no_bad_gate() -> None:
    """Closed-form gates have rows that sum to nearly nothing: a large condition number, and none that matters."""
    found = changed(whole(), "gate", condition=820.0, condition_centred=1.3, degenerate=True, largest_cosine=-0.2)
    answer = said(found, "gate")
    assert (answer.verdict, answer.level, answer.number) == ("yes", "good", 1.3)
    assert "3 of 3 are, but only because of their mean row, which changes no choice." in answer.sentence
    assert "Fit the gates" not in answer.sentence


@pytest.mark.parametrize(("condition", "centred"), [(None, 1.0), (9.0, None), (9.0, 7.0)])
def test_infinite_conditions(condition: float | None, centred: float | None) -> None:
    found = changed(
        whole(), "gate", condition=condition, condition_centred=centred, degenerate=True, largest_cosine=0.1
    )
    answer = said(found, "gate")
    assert answer.level == ("good" if centred == 1.0 else "bad" if centred is None else "mind")
    assert answer.number == centred
    assert ("infinite in every layer" in answer.sentence) == (condition is None or centred is None)
    assert ("Fit the gates at the true router input" in answer.sentence) == (centred != 1.0)


@pytest.mark.parametrize(
    ("experts", "share", "level"),
    [(2, 0.95, "good"), (2, 0.7, "mind"), (2, 0.55, "bad"), (4, 0.5, "good"), (4, 0.4, "mind"), (16, 0.13, "good")],
)
def test_whether_routing_follows_the_domain(experts: int, share: float, level: str) -> None:
    found = changed(whole(experts=experts), "domains", own_first={"expert 0": share})
    assert said(found, "domain").level == level


def test_every_measure_is_read_from_a_routers_facts() -> None:
    facts = whole().routers[0]
    assert all(measure.read(facts) is not None for measure in MEASURES)
    assert len({measure.key for measure in compared()}) == len(compared())
    assert not [measure for measure in MEASURES if not measure.title and not measure.short]


def test_one_domain_has_no_bits_to_tell() -> None:
    found = changed(whole(), "domains", most_information=0.0, information=0.0)
    assert "bits" not in said(found, "domain").sentence
    assert "bits" not in layer_sentences(found.routers[0], found.names)["domain"]


def test_dead_experts_are_counted_nested_ones_too() -> None:
    found = changed(whole(layers=2), "load", dead=[])
    nested = {**found.routers[1], "path": "3", "load": {**found.routers[1]["load"], "dead": [1]}}
    unreached = {**nested, "path": "2", "tokens": 0}
    found = replace(found, nested=[nested, unreached], names={**found.names, "3.1": "inner/law", "2.1": "other/law"})
    load, survive = said(found, "load"), said(found, "survive")
    assert (load.level, survive.level) == ("bad", "bad")
    assert " 1 expert got none of 120 tokens (layer 1)." in load.sentence
    assert "find no data for inner/law in layer 1:" in survive.sentence
