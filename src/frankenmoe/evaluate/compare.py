"""Compares an MoE with its parents on the same rows: paired differences and the share of the parents' advantage that
is kept. Runs no model.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from frankenmoe.evaluate.bootstrap import Group, Interval, minus, weighted
from frankenmoe.evaluate.domains import GENERAL, Losses
from frankenmoe.evaluate.prompts import SIX
from frankenmoe.evaluate.score import Result

BASE, PARENT, MERGE, RANDOM, MOE, MODEL = "base", "parent", "merge", "random gates", "moe", "model"
FORCED, ORACLE = "own expert forced", "best parent per text"
SAME = 1e-6  # nats per token; two models that differ by no more compute the same


@dataclass(frozen=True)
class Gains:
    """How much better the MoE is than another model, in nats per token and shares of documents; above 0 is better.

    `loss` is the mean over `domains`. `general` is the gain on general text, which is not a domain.
    """

    other: str
    kind: str
    domains: Mapping[str, Interval]
    loss: Interval | None
    tasks: Mapping[str, Interval]
    average: Interval | None
    identical: bool
    general: Interval | None = None

    def to_dict(self) -> dict[str, Any]:
        return {
            "than": self.other,
            "nats_per_token": {name: gain.to_dict() for name, gain in self.domains.items()},
            "mean_nats_per_token": self.loss and self.loss.to_dict(),
            "general_text": self.general and self.general.to_dict(),
            "tasks": {name: gain.to_dict() for name, gain in self.tasks.items()},
            "average": self.average and self.average.to_dict(),
            "identical": self.identical,
        }


def gains(moe: Result, other: Result) -> Gains:
    """Differences on blocks and documents that both models scored, with 95 % bootstrap intervals."""
    shared = [name for name in moe.losses if name in other.losses]
    every_loss = {name: _loss_group(moe, other, name) for name in shared}
    losses = {name: group for name, group in every_loss.items() if name != GENERAL}
    tasks = {
        name: _task_groups(moe, other, name)
        for name in moe.outcomes
        if name in other.outcomes and not moe.outcomes[name].error and not other.outcomes[name].error
    }
    every = [group for name in SIX if name in tasks for group in tasks[name]]
    return Gains(
        other=other.name,
        kind=other.kind,
        domains={name: weighted([group]) for name, group in losses.items()},
        loss=weighted(_weighted(list(losses.values()), len(losses))) if losses else None,
        tasks={name: weighted(groups) for name, groups in tasks.items()},
        average=weighted(_weighted(every, len(SIX))) if all(name in tasks for name in SIX) else None,
        identical=bool(every_loss)
        and all(
            abs(gain) <= SAME * tokens
            for nats, counts, _ in every_loss.values()
            for gain, tokens in zip(nats, counts, strict=True)
        ),
        general=weighted([every_loss[GENERAL]]) if GENERAL in every_loss else None,
    )


def _loss_group(moe: Result, other: Result, name: str) -> Group:
    ours, theirs = moe.losses[name], other.losses[name]
    return minus(theirs.nats, ours.nats), [float(count) for count in ours.targets], 1.0


def _task_groups(moe: Result, other: Result, name: str) -> list[Group]:
    ours, theirs = moe.outcomes[name].scores, other.outcomes[name].scores
    return [(minus(ours[group], theirs[group]), [1.0] * len(ours[group]), 1.0 / len(ours)) for group in ours]


def _weighted(groups: Sequence[Group], parts: int) -> list[Group]:
    return [(top, bottom, weight / parts) for top, bottom, weight in groups]


def kept(results: Sequence[Result], own: Mapping[str, str]) -> dict[str, dict[str, float]]:
    """Model -> domain -> the share of the own parent's advantage over the base that the model keeps.

    (loss of the base - loss of the model) / (loss of the base - loss of the parent). `own` maps a domain to the name of
    its parent. Domains where the parent is no better than the base are left out, and so are base and parents.
    """
    base = next((result for result in results if result.kind == BASE), None)
    named = {result.name: result for result in results if result.kind == PARENT}
    if base is None:
        return {}
    possible = {
        domain: base.losses[domain].mean - named[parent].losses[domain].mean
        for domain, parent in own.items()
        if domain in base.losses and parent in named and domain in named[parent].losses
    }
    shares = {
        result.name: {
            domain: (base.losses[domain].mean - result.losses[domain].mean) / advantage
            for domain, advantage in possible.items()
            if advantage > SAME and domain in result.losses
        }
        for result in results
        if result.kind not in (BASE, PARENT)
    }
    return {name: row for name, row in shares.items() if row}


def best_of_parents(parents: Sequence[Result]) -> Result | None:
    """What somebody would get who keeps all parents and uses the best one for each text; None without a parent's loss.

    It needs the memory of all of them. Tasks are left out.
    """
    scored = [parent for parent in parents if parent.losses]
    if not scored:
        return None
    losses: dict[str, Losses] = {
        domain: min((parent.losses[domain] for parent in scored), key=lambda each: each.mean)
        for domain in scored[0].losses
        if all(domain in parent.losses for parent in scored)
    }
    speed = mean(parent.facts["tokens_per_second"] for parent in scored)
    memory = sum(parent.facts["memory_bytes"] for parent in scored)
    facts = {**scored[0].facts, "digest": None, "memory_bytes": memory, "tokens_per_second": speed}
    return Result(ORACLE, ORACLE, "parents", facts, outcomes={}, losses=losses)
