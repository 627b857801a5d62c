"""Compares an MoE with its parents on the same rows: paired differences, and a verdict in words. Runs no model."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from frankenmoe.evaluate.bootstrap import Group, Interval, minus, weighted
from frankenmoe.evaluate.prompts import BENCHMARKS
from frankenmoe.evaluate.score import Result

BASE, PARENT, AVERAGE, RANDOM, MOE, MODEL = "base", "parent", "average", "random gates", "moe", "model"
SAME = 1e-6  # nats per token; two models that differ by no more compute the same


@dataclass(frozen=True)
class Gains:
    """How much better the MoE is than another model, in nats per token and shares of documents; above 0 is better."""

    other: str
    kind: str
    domains: Mapping[str, Interval]
    loss: Interval | None
    tasks: Mapping[str, Interval]
    average: Interval | None
    identical: bool

    def to_dict(self) -> dict[str, Any]:
        return {
            "than": self.other,
            "nats_per_token": {name: gain.to_dict() for name, gain in self.domains.items()},
            "mean_nats_per_token": self.loss and self.loss.to_dict(),
            "tasks": {name: gain.to_dict() for name, gain in self.tasks.items()},
            "average": self.average and self.average.to_dict(),
            "identical": self.identical,
        }


def gains(moe: Result, other: Result) -> Gains:
    """Differences on blocks and documents that both models scored, with 95 % bootstrap intervals."""
    shared = [name for name in moe.losses if name in other.losses]
    losses = {name: _loss_group(moe, other, name) for name in shared}
    tasks = {
        name: _task_groups(moe, other, name)
        for name in moe.outcomes
        if name in other.outcomes and not moe.outcomes[name].error and not other.outcomes[name].error
    }
    six = [name for name, benchmark in BENCHMARKS.items() if benchmark.counted]
    every = [group for name in six if name in tasks for group in tasks[name]]
    return Gains(
        other=other.name,
        kind=other.kind,
        domains={name: weighted([group]) for name, group in losses.items()},
        loss=weighted(_weighted(list(losses.values()), len(losses))) if losses else None,
        tasks={name: weighted(groups) for name, groups in tasks.items()},
        average=weighted(_weighted(every, len(six))) if all(name in tasks for name in six) else None,
        identical=bool(losses)
        and all(
            abs(gain) <= SAME * tokens
            for nats, counts, _ in losses.values()
            for gain, tokens in zip(nats, counts, strict=True)
        ),
    )


def _loss_group(moe: Result, other: Result, name: str) -> Group:
    ours, theirs = moe.losses[name], other.losses[name]
    return minus(theirs.nats, ours.nats), [float(count) for count in ours.targets], 1.0


def _task_groups(moe: Result, other: Result, name: str) -> list[Group]:
    ours, theirs = moe.outcomes[name].scores, other.outcomes[name].scores
    return [(minus(ours[group], theirs[group]), [1.0] * len(ours[group]), 1.0 / len(ours)) for group in ours]


def _weighted(groups: Sequence[Group], parts: int) -> list[Group]:
    return [(top, bottom, weight / parts) for top, bottom, weight in groups]


def verdict(moe: Result, others: Sequence[Result], found: Sequence[Gains]) -> list[str]:
    """The result of the comparison: one sentence, then its evidence line by line."""
    by_kind: dict[str, list[tuple[Result, Gains]]] = {}
    for other, gain in zip(others, found, strict=True):
        by_kind.setdefault(other.kind, []).append((other, gain))
    if not by_kind.get(BASE):
        return []
    base, over_base = by_kind[BASE][0]
    cost = _cost(moe, base)
    if over_base.identical:
        return [f"It computes its base exactly: no gain is possible; it {cost}."]
    whole = _whole(over_base)
    if whole is None:
        return ["Nothing was scored by both the MoE and its base, so nothing can be said."]
    rivals = [pair for kind in (PARENT, AVERAGE) for pair in by_kind.get(kind, [])]
    return [f"{_head(over_base, whole, rivals)}; it {cost}.", *_evidence(over_base, by_kind)]


def _head(over_base: Gains, whole: Interval, rivals: Sequence[tuple[Result, Gains]]) -> str:
    """Whether it beats its base and, if so, whether one dense model does as well."""
    if not whole.sign:
        return f"Not shown to be better than its base: {_size(over_base, whole)} may be chance"
    if whole.sign < 0:
        return f"Worse than its base by {_size(over_base, whole)}"
    head = f"Beats its base by {_size(over_base, whole)}"
    totals = [(rival, total) for rival, gain in rivals if (total := _whole(gain)) is not None]
    better = [(rival, total) for rival, total in totals if total.value <= 0]
    if better:
        best = min(better, key=lambda pair: pair[1].value)[0]
        return f"{head}, but {_called(best)} alone does as well or better"
    return f"{head}, and no parent alone does as well overall" if totals else head


def _called(other: Result) -> str:
    return "the average of its parents' weights" if other.kind == AVERAGE else f"parent {other.name}"


def _size(gain: Gains, whole: Interval) -> str:
    """A gain with its unit. With texts it also says whether every domain's interval excludes zero."""
    if gain.loss is None:
        return f"{abs(whole.value) * 100:.1f} points ({_bounds(whole, 100)})"
    clear = [name for name, each in gain.domains.items() if whole.sign and each.sign == whole.sign]
    where = f" on all {len(clear)} domains" if 1 < len(clear) == len(gain.domains) else ""
    return f"{abs(whole.value):.3f} nats per token{where} ({_bounds(whole)})"


def _whole(gain: Gains) -> Interval | None:
    """The gain that decides: the loss if there are texts, else the average of the tasks, else the first task."""
    return gain.loss or gain.average or next(iter(gain.tasks.values()), None)


def _evidence(base: Gains, by_kind: Mapping[str, Sequence[tuple[Result, Gains]]]) -> Iterator[str]:
    if base.loss is not None:
        yield _against("its base", base)
    for other, gain in by_kind.get(PARENT, ()):
        wins = [name for name, each in gain.domains.items() if each.sign < 0]
        if wins:
            yield f"Parent {other.name} wins on {_listed(wins)}."
    for kind, name in ((AVERAGE, "the average of its parents' weights"), (RANDOM, "the same MoE with random gates")):
        for _, gain in by_kind.get(kind, ()):
            if gain.loss is not None:
                yield _against(name, gain)
    for name, points in base.tasks.items():
        if points.sign:
            size = f"{abs(points.value) * 100:.1f} points {_word(points)} than its base"
            yield f"{BENCHMARKS[name].title}: {size} ({_bounds(points, 100)})."
    if base.tasks and not any(points.sign for points in base.tasks.values()):
        yield "On the tasks its difference to its base may be chance."


def _against(name: str, gain: Gains) -> str:
    assert gain.loss is not None
    total, clear = gain.loss, [domain for domain, each in gain.domains.items() if each.sign == gain.loss.sign]
    if not total.sign:
        return f"Against {name}: {total.value:+.3f} nats per token, which may be chance ({_bounds(total)})."
    everywhere = (
        f"all {len(gain.domains)} domains" if len(gain.domains) > 1 else f"{clear[0] if clear else 'one domain'}"
    )
    where = everywhere if len(clear) == len(gain.domains) else _listed(clear) or "no single domain alone"
    return (
        f"Against {name}: {abs(total.value):.3f} nats per token {_word(total)} in the mean ({_bounds(total)}), "
        f"clear of chance on {where}."
    )


def _word(gain: Interval) -> str:
    return "better" if gain.value > 0 else "worse"


def _bounds(gain: Interval, scale: float = 1) -> str:
    digits = 3 if scale == 1 else 1
    return f"95 %: {gain.low * scale:+.{digits}f} to {gain.high * scale:+.{digits}f}"


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def _cost(moe: Result, base: Result) -> str:
    memory = moe.facts["memory_bytes"] / base.facts["memory_bytes"]
    speed = moe.facts["tokens_per_second"] / base.facts["tokens_per_second"]
    return f"takes {memory:.2g} x the memory of its base and reads at {speed:.2g} x its speed"
