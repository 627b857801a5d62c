"""The result of a comparison in words: one sentence per question, then the evidence line by line."""

from collections.abc import Iterator, Mapping, Sequence
from statistics import mean
from types import MappingProxyType

from frankenmoe.evaluate.bootstrap import Interval
from frankenmoe.evaluate.compare import BASE, FORCED, MERGE, PARENT, RANDOM, Gains
from frankenmoe.evaluate.domains import GENERAL
from frankenmoe.evaluate.prompts import BENCHMARKS
from frankenmoe.evaluate.score import Result

By = Mapping[str, Sequence[tuple[Result, Gains]]]
"""Kind of model -> the models of that kind, with the MoE's gains over them."""
Shares = Mapping[str, Mapping[str, float]]
"""Model -> domain -> the share of the parents' advantage that it keeps."""
CHEAP = "needs only the memory of the base"


def verdict(
    moe: Result, others: Sequence[Result], found: Sequence[Gains], shares: Shares = MappingProxyType({})
) -> list[str]:
    """Whether the MoE beats its base and the best dense merge, what it keeps of its parents, then the evidence.

    `shares` are those of `compare.kept`.
    """
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
    return [
        f"{_head(over_base, whole, by_kind.get(PARENT, ()))}; it {cost}.",
        *_against_merges(by_kind.get(MERGE, ())),
        *_kept(moe, by_kind, shares),
        *_general(base, over_base),
        *_evidence(over_base, by_kind),
    ]


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
        return f"{head}, but parent {best.name} alone does as well or better"
    return f"{head}, and no parent alone does as well overall" if totals else head


def _against_merges(merges: Sequence[tuple[Result, Gains]]) -> Iterator[str]:
    """Whether the MoE is better than the best dense merge, which costs no more than the base."""
    totals = [(merge, gain, total) for merge, gain in merges if (total := _whole(gain)) is not None]
    if not totals:
        return
    merge, gain, total = min(totals, key=lambda each: each[2].value)
    size = _size(gain, total)
    if total.sign > 0:
        yield f"Better than the best dense merge of its parents ({merge.name}) by {size}; that merge {CHEAP}."
    elif total.sign < 0:
        yield f"Worse than the best dense merge of its parents ({merge.name}) by {size}: use that merge, which {CHEAP}."
    else:
        yield (
            f"Not shown to be better than the best dense merge of its parents ({merge.name}), which {CHEAP}: "
            f"{size} may be chance."
        )


def _kept(moe: Result, by_kind: By, shares: Shares) -> Iterator[str]:
    """How much of what the parents learnt is kept, beside the best that routing or a dense merge could keep."""
    own = shares.get(moe.name)
    if not own:
        return
    lowest = min(own, key=lambda domain: own[domain])
    where = f", the least on {lowest} ({own[lowest]:.0%})" if len(own) > 1 else ""
    known = {kind: [each for each, _ in by_kind.get(kind, ()) if each.name in shares] for kind in (FORCED, MERGE)}
    beside = [f"{FORCED} {_mean(shares, each)}" for each in known[FORCED]]
    merges = known[MERGE]
    if merges:
        best = max(merges, key=lambda merge: mean(shares[merge.name].values()))
        beside.append(f"{best.name} {_mean(shares, best)}")
    more = f"; {', '.join(beside)}" if beside else ""
    yield f"It keeps {mean(own.values()):.0%} of its parents' advantage over the base{where}{more}."


def _mean(shares: Shares, result: Result) -> str:
    return f"{mean(shares[result.name].values()):.0%}"


def _general(base: Result, gain: Gains) -> Iterator[str]:
    if gain.general is None:
        return
    percent = 100 / base.losses[GENERAL].mean
    low, high = -gain.general.high * percent, -gain.general.low * percent
    yield (
        f"On general text its loss is {-gain.general.value * percent:+.1f} % against the base's "
        f"(95 %: {low:+.1f} to {high:+.1f})."
    )


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


def _evidence(base: Gains, by_kind: By) -> Iterator[str]:
    if base.loss is not None:
        yield _against("its base", base)
    for other, gain in by_kind.get(PARENT, ()):
        wins = [name for name, each in gain.domains.items() if each.sign < 0]
        if wins:
            yield f"Parent {other.name} wins on {_listed(wins)}."
    for _, gain in by_kind.get(RANDOM, ()):
        if gain.loss is not None:
            yield _against("the same MoE with random gates", gain)
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
