"""Reports on disk -> what a card quotes from them; does not decide what it says about them.

Stages meet on disk, and here is the one place of publish/ that knows their files: a reader per kind, in READERS.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from frankenmoe.artifact import ROUTERS, Artifact
from frankenmoe.checkpoint.fingerprint import sha256
from frankenmoe.errors import ArtifactError
from frankenmoe.publish.leaderboard import Origin, known

FOLDER = "reports"
TRAINING = "training.json"
# where stages leave theirs by themselves: training in the artifact, `frankenmoe export` beside the files it wrote
BESIDE = (TRAINING, "export.json", "gguf/export.json")
HINT = "run the stage again that wrote it, or take the file away"

# L layers, E experts


@dataclass(frozen=True)
class Routing:
    """Who gets the tokens: share_LE sums to 1 per layer. `findings` are the audit's own sentences with their level,
    `own` the share of a domain's tokens whose first expert is the domain's own, per layer."""

    experts: tuple[str, ...]
    layers: tuple[int, ...]
    share_LE: tuple[tuple[float, ...], ...]
    dead: tuple[tuple[int, int], ...]
    tokens: int
    texts: tuple[str, ...]
    findings: tuple[tuple[str, str], ...]
    own: Mapping[str, tuple[float, ...]]


@dataclass(frozen=True)
class Row:
    """One model that was measured: held-out loss (nats per token) by domain, scores in percent by task, the standard
    error of those, tokens per second, memory in bytes. `role` is moe, base, parent, random, average or other."""

    name: str
    role: str
    loss: Mapping[str, float]
    scores: Mapping[str, float]
    errors: Mapping[str, float]
    speed: float | None
    memory: int | None


@dataclass(frozen=True)
class Measured:
    """What an evaluation found. `documents` counts the rows per task, `verdict` are its own sentences."""

    rows: tuple[Row, ...]
    documents: Mapping[str, int]
    verdict: tuple[str, ...]


@dataclass(frozen=True)
class Published:
    """Scores of this model that somebody else measured, in percent by task."""

    scores: Mapping[str, float]
    origin: Origin


@dataclass(frozen=True)
class Quantized:
    """One GGUF file; the comparisons with its source are None where it was not checked."""

    name: str
    type: str
    bytes: int
    bits: float
    kl: float | None
    top1: float | None
    perplexity_ratio: float | None
    speed: float | None
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Exported:
    """The files that were made for llama.cpp."""

    files: tuple[Quantized, ...]


@dataclass(frozen=True)
class Sample:
    """A prompt and what the model said. `trace` is (token, first expert per layer) of its beginning."""

    prompt: str
    reply: str
    trace: tuple[tuple[str, tuple[int, ...]], ...]


@dataclass(frozen=True)
class Samples:
    """What the model said, and how it was asked."""

    items: tuple[Sample, ...]
    experts: tuple[str, ...]
    max_new_tokens: int
    temperature: float
    seed: int


@dataclass(frozen=True)
class Training:
    """How routers or more were trained: mean held-out loss before and of the state that was kept."""

    what: tuple[str, ...]
    steps: int
    best_step: int
    before: float
    kept: float
    domains: tuple[str, ...]


Report = Routing | Measured | Published | Exported | Samples | Training
R = TypeVar("R", bound=Report)


class Table:
    """A mapping from a report with typed access; a key that is missing or odd is an ArtifactError naming the file."""

    def __init__(self, data: Any, *, file: Path, at: str = "") -> None:
        if not isinstance(data, Mapping):
            raise ArtifactError(f"{file}: {at or 'the report'} should be an object, found {data!r:.40}", hint=HINT)
        self.data, self.file, self.at = data, file, at

    def get(self, key: str, kind: type | tuple[type, ...]) -> Any:
        """The value of a key that must be there."""
        value = self.data.get(key)
        odd = isinstance(value, float) and not math.isfinite(value)
        if odd or not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise ArtifactError(
                f"{self.file}: {self.at}{key} should be {_said(kind)}, found {'nothing' if value is None else value!r}"[
                    :300
                ],
                hint=HINT,
            )
        return value

    def maybe(self, key: str, kind: type | tuple[type, ...]) -> Any:
        """The value of a key, None where it is absent, null or NaN, which is how a measure of nothing is written."""
        value = self.data.get(key)
        return None if value is None or value != value else self.get(key, kind)

    def table(self, key: str) -> "Table":
        """A nested object."""
        return Table(self.data.get(key), file=self.file, at=f"{self.at}{key}.")

    def tables(self, key: str) -> "list[Table]":
        """A list of objects."""
        rows = self.get(key, list)
        return [Table(row, file=self.file, at=f"{self.at}{key}[{index}].") for index, row in enumerate(rows)]

    def numbers(self, key: str) -> dict[str, float]:
        """An object whose values are numbers, null left out."""
        table = Table(self.data.get(key) or {}, file=self.file, at=f"{self.at}{key}.")
        return {name: table.get(name, (int, float)) for name in table.data if table.data[name] is not None}


def _said(kind: type | tuple[type, ...]) -> str:
    words = {str: "text", int: "a whole number", float: "a number", list: "a list", dict: "an object", bool: "a bool"}
    return words[kind] if isinstance(kind, type) else words[kind[-1]]


def _audit(report: Table) -> Routing:
    experts = tuple(report.table("model").get("experts", list))
    outer = [router for router in report.tables("routers") if not router.get("path", str)]
    own: dict[str, list[float]] = {}
    for router in outer:
        if router.data.get("domains") is not None:
            for domain, share in router.table("domains").numbers("own_first").items():
                own.setdefault(domain, []).append(share)
    if not outer:
        raise ArtifactError(f"{report.file}: routers should be a list with one per layer, found none", hint=HINT)
    texts = report.get("text", dict)
    return Routing(
        experts=experts,
        layers=tuple(router.get("layer", int) for router in outer),
        share_LE=tuple(tuple(router.table("load").get("share", list)) for router in outer),
        dead=tuple(
            (router.get("layer", int), each) for router in outer for each in router.table("load").get("dead", list)
        ),
        tokens=sum(report.table("text").table(name).get("tokens", int) for name in texts),
        texts=tuple(texts),
        findings=tuple((answer.get("level", str), answer.get("sentence", str)) for answer in report.tables("answers")),
        own={domain: tuple(shares) for domain, shares in own.items()},
    )


# the words of an evaluation for what a model is to the MoE
ROLES = {"moe": "moe", "base": "base", "parent": "parent", "average": "average", "random gates": "random"}


def _eval(report: Table) -> Measured:
    models = report.tables("models")
    documents: dict[str, int] = {}
    for model in models:
        for task, found in _tasks(model):
            documents[task] = min(documents.get(task, found.get("documents", int)), found.get("documents", int))
    return Measured(tuple(map(_measured, models)), documents, tuple(report.get("verdict", list)))


def _tasks(model: Table) -> Iterator[tuple[str, Table]]:
    """The tasks that a model was scored on; one that failed has an error in place of a value."""
    tasks = model.table("tasks")
    for name in tasks.data:
        found = tasks.table(name)
        if found.data.get("value") is not None:
            yield name, found


def _measured(model: Table) -> Row:
    tasks = dict(_tasks(model))
    domains = model.table("domains")
    return Row(
        name=model.get("name", str),
        role=ROLES.get(model.get("kind", str), "other"),
        loss={name: domains.table(name).get("nats_per_token", (int, float)) for name in domains.data},
        scores={name: 100 * found.get("value", (int, float)) for name, found in tasks.items()},
        errors={
            name: 100 * found.get("stderr", (int, float))
            for name, found in tasks.items()
            if found.data.get("stderr") is not None
        },
        speed=model.maybe("tokens_per_second", (int, float)),
        memory=model.maybe("memory_bytes", int),
    )


def _export(report: Table) -> Exported:
    return Exported(tuple(map(_quantized, report.tables("files"))))


def _quantized(file: Table) -> Quantized:
    check = file.table("check") if file.data.get("check") is not None else None
    return Quantized(
        name=Path(file.get("path", str)).name,
        type=file.get("type", str),
        bytes=file.get("bytes", int),
        bits=file.get("bits_per_weight", (int, float)),
        kl=check.maybe("kl", (int, float)) if check else None,
        top1=check.maybe("top1", (int, float)) if check else None,
        perplexity_ratio=check.maybe("perplexity_ratio", (int, float)) if check else None,
        speed=check.maybe("tokens_per_second", (int, float)) if check else None,
        notes=tuple(file.get("notes", list)),
    )


def _published(report: Table) -> Published:
    source = report.table("source")
    scores = {known(task): score for task, score in report.numbers("scores").items()}
    odd = next((f"{task} {score:g}" for task, score in scores.items() if not 0 <= score <= 100), None)
    if odd or not scores:
        raise ArtifactError(
            f"{report.file}: scores are in percent, from 0 to 100, found {odd or 'none'}", hint="correct that file"
        )
    return Published(scores, Origin(source.get("name", str), source.get("url", str)))


def _samples(report: Table) -> Samples:
    settings = report.table("settings")
    return Samples(
        items=tuple(
            Sample(
                prompt=item.get("prompt", str),
                reply=item.get("reply", str),
                trace=tuple(
                    (step.get("token", str), tuple(step.get("experts", list))) for step in item.tables("trace")
                ),
            )
            for item in report.tables("samples")
        ),
        experts=tuple(report.get("experts", list)),
        max_new_tokens=settings.get("max_new_tokens", int),
        temperature=settings.get("temperature", (int, float)),
        seed=settings.get("seed", int),
    )


def _training(report: Table) -> Training:
    mean = report.table("mean_held_out_loss")
    kept = mean.get("best", (int, float)) if report.get("improved", bool) else mean.get("after", (int, float))
    return Training(
        what=tuple(report.table("settings").maybe("what", list) or ("routers",)),
        steps=report.get("steps", int),
        best_step=report.get("best_step", int),
        before=mean.get("before", (int, float)),
        kept=kept,
        domains=tuple(report.get("data", dict)),
    )


# what a report says it is ("frankenmoe audit"), or is called where it says nothing, and who reads it
READERS: Mapping[str, Callable[[Table], Report]] = MappingProxyType(
    {
        "audit": _audit,
        "eval": _eval,
        "export": _export,
        "leaderboard": _published,
        "samples": _samples,
        "training": _training,
    }
)


@dataclass(frozen=True)
class Evidence:
    """The newest report of each kind; `stale` are sentences about reports of another state of the model."""

    found: Mapping[str, Report]
    stale: tuple[str, ...]

    def get(self, kind: type[R]) -> R | None:
        """The report of that type, if there is one."""
        return next((report for report in self.found.values() if isinstance(report, kind)), None)


def collect(artifact: Artifact, *, given: Sequence[Path] = ()) -> Evidence:
    """Every report in the artifact's folder, and those given, which go before them.

    A report that names another model, or the artifact before its routers were changed, is left out and named.
    Raises ArtifactError for a given file that is no report, and for a report that cannot be read.
    """
    found: dict[str, Report] = {}
    stale: list[str] = []
    for file in _files(artifact.folder):
        kind, table = _open(file)
        if kind is None:
            continue
        reason = _foreign(table, artifact)
        if reason:
            stale.append(f"{file.relative_to(artifact.folder)} {reason}")
        else:
            found[kind] = READERS[kind](table)
    for file in given:
        kind, table = _open(file)
        if kind is None:
            raise ArtifactError(
                f"{file} is not a report that a card can quote", hint=f"it can quote those of {', '.join(READERS)}"
            )
        reason = _foreign(table, artifact)
        if reason:
            raise ArtifactError(f"{file} {reason}", hint=HINT)
        found[kind] = READERS[kind](table)
    return Evidence(found, tuple(stale))


def _files(folder: Path) -> Iterator[Path]:
    """Possible reports, the oldest first."""
    places = [*(folder / FOLDER).rglob("*.json"), *(folder / name for name in BESIDE)]
    files = [file for file in places if file.is_file()]
    return iter(sorted(files, key=lambda file: (file.stat().st_mtime_ns, str(file))))


def _open(file: Path) -> tuple[str | None, Table]:
    try:
        data = json.loads(file.read_bytes())
    except OSError as error:
        raise ArtifactError(f"{file} cannot be read: {error.strerror}", hint="check the path") from error
    except ValueError as error:
        raise ArtifactError(f"{file} is not JSON: {error}", hint=HINT) from error
    if isinstance(data, list):  # what `frankenmoe export --json` prints
        data = {"files": data}
    table = Table(data, file=file)
    said = str(table.data.get("kind", "")).removeprefix("frankenmoe ") or file.stem
    if {"harness", "models"} <= table.data.keys():  # what `frankenmoe eval --json FILE` writes, whatever the file
        said = "eval"
    return (said if said in READERS else None), table


def _foreign(table: Table, artifact: Artifact) -> str | None:
    """Why a report is not about this state of the artifact, as far as it says what it is about."""
    record, data = artifact.record, table.data
    if data.get("recipe_digest") not in (None, record["recipe_digest"]):
        return "is about another model"
    routers = data.get("routers_sha256")
    if routers is not None and routers != sha256(artifact.folder / ROUTERS):
        return "was made before the routers were changed"
    audited = data.get("record")
    if isinstance(audited, Mapping) and audited.get("stages") != record.get("stages"):
        return "was made before the model was changed"
    return None
