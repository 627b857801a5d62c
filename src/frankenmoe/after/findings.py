"""Comparisons -> what is not as it should be, in sentences. No torch."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

from frankenmoe.after.compare import MARGIN, RouterSeen, Seen, percent, root_mean
from frankenmoe.after.experts import ExpertSeen, State
from frankenmoe.after.folds import Evened
from frankenmoe.after.other import EXPERTS, ROUTERS, SHARED, Other, Place
from frankenmoe.recipe.backbone import ATTENTION

SHOWN = 4  # names in a sentence
# what is said of an expert whose numbers are not its own
SAID: Mapping[State, str] = {
    State.MISSING: "missing",
    State.MISSHAPEN: "another shape",
    State.BROKEN: "NaN or infinity",
    State.ZERO: "all zeros",
    State.UNKNOWN: "unlike every expert of the artifact, as if random",
    State.TURNED: "gate and up in each other's place",
}

# what is said of the matrices of a part that a norm's factors have missed
ONE_SIDED: Mapping[str, str] = {
    part: f"the norm before {reader} divided by factors that {missed} not multiplied by"
    for part, reader, missed in (
        (ROUTERS, "the router's gate was", "it was"),
        (EXPERTS, "the experts was", "they were"),
        (SHARED, "the shared expert was", "it was"),
        (ATTENTION, "attention was", "it was"),
    )
}


@dataclass(frozen=True)
class Compared:
    """Every comparison of two models. `rest` are the tensors that are neither experts nor gates."""

    other: Other
    names: tuple[str, ...]
    layers: int
    experts: tuple[ExpertSeen, ...]
    routers: tuple[RouterSeen, ...]
    rest: Mapping[Place, Seen]
    absent: tuple[Place, ...] = ()
    even: Evened = field(default_factory=lambda: Evened({}))

    def name(self, index: int) -> str:
        """The name of an expert of theirs: ours at that place, as far as there is one."""
        return self.names[index] if index < len(self.names) else f"number {index}"

    def by_part(self) -> dict[str, list[Seen]]:
        """Part of the model -> its tensors that could be compared."""
        found: dict[str, list[Seen]] = {EXPERTS: [seen for each in self.experts for seen in each.matrices.values()]}
        found[ROUTERS] = [each.seen for each in self.routers if each.seen.far == each.seen.far]
        for place, seen in self.rest.items():
            found.setdefault(place.part, []).append(seen)
        return {part: some for part, some in found.items() if some}


@dataclass(frozen=True)
class Finding:
    """A sentence without its full stop. `fault`: it should not be so. `kind` is a word for programs."""

    kind: str
    text: str
    fault: bool = True
    layers: tuple[int, ...] = field(default=())


def findings(found: Compared) -> list[Finding]:
    """What is not as it should be, the worst first, then what is only worth knowing."""
    every = [
        *_sizes(found),
        *_experts(found),
        *_order(found),
        *_routers(found),
        *_one_sided(found),
        *_unquantized(found),
        *_stands_out(found),
        *_rest(found),
        *_missed(found),
        *_settings(found),
        *(Finding("note", note, fault=False) for note in found.other.notes),
    ]
    return sorted(every, key=lambda each: not each.fault)


def where(layers: Iterable[int], total: int) -> str:
    """`in layers 0, 2-5`, or `in every layer`."""
    sorted_layers = sorted(set(layers))
    if len(sorted_layers) == total:
        return "in every layer" if total > 1 else "in layer 0"
    runs: list[list[int]] = []
    for layer in sorted_layers:
        if runs and runs[-1][-1] == layer - 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    words = [f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs]
    return f"in layer{'s' if len(sorted_layers) > 1 else ''} {', '.join(words)}"


def _grouped(rows: Iterable[tuple[str, str, int]], total: int) -> Iterator[Finding]:
    """(kind, sentence, layer) -> one finding for each sentence, with its layers; of many of a kind, the first."""
    layers: dict[str, dict[str, list[int]]] = {}
    for kind, text, layer in rows:
        layers.setdefault(kind, {}).setdefault(text, []).append(layer)
    for kind, found in layers.items():
        for text, some in list(found.items())[:SHOWN]:
            yield Finding(kind, f"{text} {where(some, total)}", layers=tuple(sorted(set(some))))
        if len(found) > SHOWN:
            rest = sorted({layer for some in list(found.values())[SHOWN:] for layer in some})
            yield Finding(kind, f"{len(found) - SHOWN} more like this {where(rest, total)}", layers=tuple(rest))


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _sizes(found: Compared) -> Iterator[Finding]:
    other = found.other
    if other.layers != found.layers:
        yield Finding("layers", f"number of layers: {other.layers}, expected {found.layers}")
    if other.experts != len(found.names):
        there = {each.expert for each in found.experts}
        gone = [name for index, name in enumerate(found.names) if index not in there]
        which = f"; missing: {_some(gone)}" if gone else ""
        yield Finding("count", f"number of experts: {other.experts}, expected {len(found.names)}{which}")


def _experts(found: Compared) -> Iterator[Finding]:
    """Experts whose numbers are not their own; those of which the same is true in the same layers share a sentence."""
    layers: dict[tuple[State, str, str], list[int]] = {}
    for each in found.experts:
        if each.state is not State.FOUND:
            parts = [name.partition(".")[0] for name, seen in each.matrices.items() if seen.lost]
            said = SAID.get(each.state) or f"{' and '.join(parts)} not its own"
            layers.setdefault((each.state, said, found.name(each.index)), []).append(each.layer)
    names: dict[tuple[State, str, tuple[int, ...]], list[str]] = {}
    for (state, said, name), some in layers.items():
        names.setdefault((state, said, tuple(some)), []).append(name)
    for (state, said, there), alike in names.items():
        text = f"expert{'s' if len(alike) > 1 else ''} {_some(alike)} {where(there, found.layers)}: {said}"
        yield Finding(str(state), text, layers=there)


def _order(found: Compared) -> Iterator[Finding]:
    """Experts that are in the place of others, unless the rows of the router moved with them."""
    gates = {each.layer: each.rows for each in found.routers}
    rows, together = [], []
    for layer in range(found.layers):
        held = {each.index: each.expert for each in found.experts if each.layer == layer and each.expert is not None}
        moved = {index: expert for index, expert in held.items() if index != expert}
        gate = gates.get(layer, ())
        with_gate = bool(moved) and all(index < len(gate) and gate[index] == expert for index, expert in held.items())
        for index, expert in moved.items():
            name, own = found.names[expert], found.name(index)
            if list(held.values()).count(expert) > 1:
                rows.append(("copied", f"expert {own} is a copy of {name}", layer))
            elif found.other.experts != len(found.names):
                continue  # those behind one that is gone have moved up
            elif with_gate:
                together.append(layer)
            elif held.get(expert) == index:
                if index < expert:
                    rows.append(("swapped", f"experts {own} and {name} are swapped", layer))
            else:
                rows.append(("moved", f"expert {name} is in the place of {own}", layer))
    yield from _grouped(rows, found.layers)
    if together:
        text = f"experts and router rows are in another order {where(together, found.layers)}, which changes nothing"
        yield Finding("reordered", text, fault=False, layers=tuple(sorted(set(together))))


def _routers(found: Compared) -> Iterator[Finding]:
    held: dict[int, dict[int, int | None]] = {}
    for each in found.experts:
        held.setdefault(each.layer, {})[each.index] = each.expert
    rows, quantized = [], []
    for router in found.routers:
        known = {index: row for index, row in enumerate(router.rows) if row is not None}
        if router.transposed:
            rows.append(("transposed", "the router's gate is transposed", router.layer))
        elif router.seen.broken:
            rows.append(("router broken", "the router's gate holds NaN or infinity", router.layer))
        elif router.seen.zero:
            rows.append(("router zeros", "the router's gate is zeros", router.layer))
        elif not router.seen.fits:
            rows.append(("router misshapen", "the router's gate has another shape", router.layer))
        elif not known:
            text = "the router's gate is another one, as if random or trained anew"
            rows.append(("router random", text, router.layer))
        elif len(known) < len(router.rows):
            lost = [found.name(index) for index in range(len(router.rows)) if index not in known]
            rows.append(("router rows", f"the router's rows for {_some(lost)} are like no row of ours", router.layer))
        elif any(index != row for index, row in known.items()) and known != held.get(router.layer):
            rows.append(("router rows", "the router's rows are in another order than its experts", router.layer))
        if router.seen.quantized:
            quantized.append(router.layer)
    gates = {place.layer for place in found.absent if place.part == ROUTERS}
    rows += [("router missing", "the router's gate is missing", layer) for layer in sorted(gates)]
    yield from _grouped(rows, found.layers)
    if quantized:
        text = f"routers are quantized {where(quantized, found.layers)}, so tokens near a border change experts"
        yield Finding("router quantized", text, fault=False, layers=tuple(quantized))


def _one_sided(found: Compared) -> Iterator[Finding]:
    """Factors that were moved to one side only, so that the model computes something else."""
    rows = [("one-sided", ONE_SIDED[part], layer) for part, layer in found.even.one_sided]
    columns = [(place.name, place.layer) for place, seen in found.rest.items() if seen.scaled]
    for each in found.experts:
        names = [name.partition(".")[0] for name, seen in each.matrices.items() if seen.scaled]
        if names:
            columns.append((f"{', '.join(names)} of {found.name(each.index)}", each.layer))
    for name, layer in columns:
        text = f"the factors of columns of {name} are not those that their inputs were divided by"
        rows.append(("one-sided", text, layer))
    yield from _grouped(rows, found.layers)
    if found.even.layers:
        text = f"factors that {found.other.method} moved between matrices were taken back for the comparison"
        layers = tuple(sorted(set(found.even.layers)))
        yield Finding("factors", f"{text} {where(layers, found.layers)}", fault=False, layers=layers)


def _unquantized(found: Compared) -> Iterator[Finding]:
    """Layers whose experts are stored as they were in a model that says that it is quantized."""
    other = found.other
    if other.method is None:
        return
    left: dict[int, set[str]] = {}
    for each in found.experts:
        for suffix, seen in each.matrices.items():
            matrix = other.theirs[Place(EXPERTS, each.layer, each.index, suffix)]
            if not seen.quantized and not other.kept(matrix.name):
                left.setdefault(each.layer, set()).add(seen.kind)
    if left:
        kinds = ", ".join(sorted(set().union(*left.values())))
        text = f"unquantized experts {where(left, found.layers)}: stored as {kinds}, while the model is {other.method}"
        yield Finding("unquantized", text, layers=tuple(sorted(left)))


def _stands_out(found: Compared) -> Iterator[Finding]:
    """Experts of a quantized model that are farther away than rounding explains, where most are not."""
    able = [
        (seen, name.partition(".")[0], each)
        for each in found.experts
        for name, seen in each.matrices.items()
        if each.state is State.FOUND and seen.quantized and not seen.scaled
    ]
    if not able or median(seen.moved for seen, _, _ in able) > 0:
        return
    odd = [row for row in able if row[0].moved]
    if odd:
        seen, name, each = max(odd, key=lambda row: row[0].moved)
        names = _some(list(dict.fromkeys(found.name(each.index) for _, _, each in odd)))
        layers = tuple(sorted({each.layer for _, _, each in odd}))
        text = (
            f"expert{'s' if ',' in names else ''} {names} {where(layers, found.layers)}: farther away than rounding "
            f"explains, such as {name} of {found.name(each.index)} by {percent(seen.far)}, where {seen.kind} explains "
            f"{percent(seen.rounding)}"
        )
        yield Finding("farther", text, layers=layers)


def _rest(found: Compared) -> Iterator[Finding]:
    """Tensors beside experts and gates that are missing or unlike ours."""
    for kind, places in (
        ("missing", [place for place in found.absent if place.part not in (EXPERTS, ROUTERS)]),
        ("unlike ours", [place for place, seen in found.rest.items() if seen.unlike]),
    ):
        parts = dict.fromkeys(place.part for place in places)
        for part in parts:
            some = [_spelled(place) for place in places if place.part == part]
            count = f"{len(some)} tensors" if len(some) > 1 else "a tensor"
            yield Finding(kind, f"{count} of {part} {'are' if len(some) > 1 else 'is'} {kind}: {_some(some)}")


def _spelled(place: Place) -> str:
    return place.name if place.layer < 0 or f".{place.layer}." in place.name else f"{place.name} of layer {place.layer}"


def _missed(found: Compared) -> Iterator[Finding]:
    """Attention that was trained while no expert was, although their rounding would not hide it."""
    parts = found.by_part()
    # what is not ours any more has findings of its own
    moved = root_mean([seen for seen in parts.get(ATTENTION, ()) if not seen.scaled and not seen.unlike], "moved")
    seen_through = moved > MARGIN * root_mean(parts.get(EXPERTS, ()), "rounding")
    experts = [each for each in found.experts if each.state is State.FOUND]
    still = [each for each in experts if not any(seen.moved for seen in each.matrices.values())]
    if seen_through and experts and len(still) == len(experts):
        text = (
            f"attention moved by {percent(moved)}, and no expert moved: an adapter for experts missed them, "
            "or only attention was trained"
        )
        yield Finding("experts missed", text)
    elif still and len(still) < len(experts):
        layers = [each.layer for each in still]
        names = dict.fromkeys(found.name(each.index) for each in still)
        text = (
            f"{len(still)} of {len(experts)} experts did not move ({_some(list(names))}), {where(layers, found.layers)}"
        )
        yield Finding("still", text, fault=False)


def _settings(found: Compared) -> Iterator[Finding]:
    for name, expected, got in found.other.settings:
        yield Finding("setting", f"{name}: {got}, expected {expected}")
