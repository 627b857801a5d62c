"""Artifact and what another tool made of it -> whether its experts are still there.

Imports torch only to run both models on text.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from frankenmoe.after.compare import RouterSeen, Seen, compare, compare_gate, finite, percent, root_mean
from frankenmoe.after.experts import ExpertSeen, compare_experts
from frankenmoe.after.findings import Compared, Finding, findings
from frankenmoe.after.folder import open_folder
from frankenmoe.after.folds import evened
from frankenmoe.after.ggufs import open_file
from frankenmoe.after.other import EXPERTS, ROUTERS, Other, Place
from frankenmoe.after.plain import built_config
from frankenmoe.artifact.folder import Artifact
from frankenmoe.data.given import Pair
from frankenmoe.errors import ArtifactError, SourceError
from frankenmoe.planning.kind import kind_of
from frankenmoe.progress import SILENT, Progress
from frankenmoe.subject import Subject, open_subject

if TYPE_CHECKING:
    from frankenmoe.after.text import OnText


@dataclass(frozen=True)
class PartSeen:
    """A part of the model: the types it is stored in, and distances over all its tensors; `worst` is of one tensor."""

    part: str
    kinds: tuple[str, ...]
    far: float
    worst: float
    rounding: float
    moved: float


@dataclass(frozen=True)
class After:
    """The comparison of an artifact with what another tool made of it. `text` is None where no text was given."""

    compared: Compared
    findings: tuple[Finding, ...]
    parts: tuple[PartSeen, ...]
    text: "OnText | None" = None

    @property
    def faults(self) -> tuple[Finding, ...]:
        """What is not as it should be."""
        return tuple(each for each in self.findings if each.fault)

    @property
    def ok(self) -> bool:
        """Whether every expert is still itself, and the rest is as it should be."""
        return not self.faults

    @property
    def verdict(self) -> str:
        """One sentence."""
        if self.faults:
            more = len(self.faults) - 1
            return f"not as it should be: {self.faults[0].text}" + (f", and {more} more" if more else "")
        moved = [f"{each.part} by {percent(each.moved)}" for each in self.parts if each.moved]
        if moved:
            return f"every expert is still itself; moved: {', '.join(moved)}"
        experts = next(each for each in self.parts if each.part == EXPERTS)
        if not experts.far:
            return "every expert is still itself, bit for bit"
        kinds = " and ".join(experts.kinds)
        return f"every expert is still itself; the distance of {percent(experts.far)} is the rounding of {kinds}"

    def to_dict(self) -> dict[str, Any]:
        """The result as plain data."""
        found = self.compared
        return {
            "ok": self.ok,
            "verdict": self.verdict,
            "other": found.other.where,
            "format": found.other.what,
            "findings": [asdict(each) for each in self.findings],
            "parts": [asdict(each) for each in self.parts],
            "experts": [
                {
                    "layer": each.layer,
                    "index": each.index,
                    "state": str(each.state),
                    "expert": None if each.expert is None else found.names[each.expert],
                    "matrices": {name: _plain(seen) for name, seen in each.matrices.items()},
                }
                for each in found.experts
            ],
            "routers": [
                {"layer": each.layer, "rows": list(each.rows), "transposed": each.transposed, **_plain(each.seen)}
                for each in found.routers
            ],
            "text": self.text.to_dict() if self.text else None,
        }


def _plain(seen: Seen) -> dict[str, Any]:
    return finite({key: getattr(seen, key) for key in ("kind", "far", "worst", "rounding", "moved")})


def verify_after(
    what: Subject | Artifact | str | Path,
    other: str | Path,
    *,
    text: Sequence[Pair] | None = None,
    device: str = "auto",
    progress: Progress = SILENT,
) -> After:
    """Compares an artifact with what another tool made of it: a folder of transformers, or a GGUF file.

    Every expert of every layer is paired by content. `text` are pairs of (expert or None, file or hub dataset), or
    empty for the recipe's own data: then both models run on it. Raises ArtifactError, SourceError or PlanError for
    input that cannot be compared; what is wrong with the other model is in the result.
    """
    subject = open_subject(what)
    subject.need_artifact(hint="build it first, or write its virtual form")
    opened = _opened(Path(other), subject)
    texts = None
    if text is not None:
        from frankenmoe.after.text import read_texts

        texts = read_texts(subject, text)
    found = _compared(opened, subject, progress)
    every = findings(found)
    ran = None
    if texts is not None:
        from frankenmoe.after.text import run_both

        ran = run_both(subject, found, texts, device=device, progress=progress)
    return After(found, tuple(every), tuple(_parts(found.by_part())), ran)


def _opened(other: Path, subject: Subject) -> Other:
    if kind_of(other) == "gguf":
        return open_file(other, subject.parts)
    if not other.is_dir():
        raise SourceError(f"{other} is neither a folder nor a GGUF file", hint="give what the other tool wrote")
    return open_folder(other, subject.parts, built_config(subject))


def _compared(other: Other, subject: Subject, progress: Progress) -> Compared:
    """Every tensor, layer by layer; of layers that are not in both models, none."""
    names, layers = subject.parts.experts, subject.parts.layers
    shared = {place: write for place, write in other.ours.items() if place.layer < other.layers}
    progress.start("comparing", sum(write.nbytes for write in shared.values()), "B")
    even = evened(other)
    here = replace(other, theirs=even.theirs)
    experts: list[ExpertSeen] = []
    routers: list[RouterSeen] = []
    rest: dict[Place, Seen] = {}
    for layer in sorted({place.layer for place in shared if place.part == EXPERTS}):
        experts += compare_experts(here, layer, len(names), progress)
        gate = Place(ROUTERS, layer, 0, "gate")
        if gate in here.theirs:
            routers.append(compare_gate(layer, here.ours[gate], here.theirs[gate], here.experts))
            progress.advance(other.ours[gate].nbytes)
    for place, write in shared.items():
        if place.part != EXPERTS and place.name != "gate" and place in other.theirs:
            rest[place] = compare(write, here.theirs[place], folds=here.folds)
            progress.advance(write.nbytes)
    absent = tuple(place for place in shared if place.part != EXPERTS and place not in other.theirs)
    if not experts:
        raise ArtifactError(f"{other.where} has no layer in common with {subject.name}", hint="is it the right file?")
    return Compared(other, names, layers, tuple(experts), tuple(routers), rest, absent, even)


def _parts(parts: Mapping[str, Sequence[Seen]]) -> list[PartSeen]:
    found = []
    for part, some in parts.items():
        kinds = tuple(sorted({seen.kind for seen in some}))
        able = [seen for seen in some if seen.far < float("inf")]
        far, rounding, moved = (root_mean(able, value) for value in ("far", "rounding", "moved"))
        found.append(PartSeen(part, kinds, far, max((seen.far for seen in able), default=0.0), rounding, moved))
    return found
