"""The reports that a card quotes: the newest of each kind, and only those about this state of the artifact."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from frankenmoe.artifact.folder import Artifact
from frankenmoe.artifact.healing import HealReport
from frankenmoe.artifact.reports import HINT, REPORTS, AuditReport, EvalReport, StageReport, about, read_object
from frankenmoe.checkpoint.jsonfile import small_bytes
from frankenmoe.errors import ArtifactError, SourceError
from frankenmoe.publish.leaderboard import LeaderboardReport

FOLDER = "reports"
TRAINING = "training.json"
# where stages write reports by default: training into the artifact, `frankenmoe export` next to its files
BESIDE = (TRAINING, "export.json", "gguf/export.json")
KINDS: Mapping[str, type[StageReport]] = {
    **REPORTS,
    HealReport.name: HealReport,
    LeaderboardReport.name: LeaderboardReport,
}

R = TypeVar("R", bound=StageReport)


@dataclass(frozen=True)
class Evidence:
    """The newest report of each kind; `stale` are sentences about reports of another state of the model.

    `counts` are evaluations with another number of experts per token than the model's own.
    """

    found: Mapping[str, StageReport]
    stale: tuple[str, ...]
    counts: Mapping[int, EvalReport]

    def get(self, kind: type[R]) -> R | None:
        """The report of that type, if there is one."""
        return next((report for report in self.found.values() if isinstance(report, kind)), None)


def collect(artifact: Artifact, *, given: Sequence[Path] = ()) -> Evidence:
    """Every report in the artifact's folder, and those given, which replace them.

    A report about another model, or about the artifact before its routers were changed, is left out and named.
    Raises ArtifactError for a given file that is no report, and for a report that cannot be read.
    """
    found: dict[str, StageReport] = {}
    counts: dict[int, EvalReport] = {}
    stale: list[str] = []
    state = about(artifact)

    def keep(report: StageReport) -> None:
        used = report.moe.experts_per_token if isinstance(report, EvalReport) and report.moe else None
        if isinstance(report, EvalReport) and used not in (None, artifact.record["experts_per_token"]):
            counts[used] = report
        else:
            found[report.name] = report

    for file in _files(artifact.folder):
        report = _read(file)
        if report is None:
            continue
        reason = _foreign(report, artifact, state)
        if reason:
            stale.append(f"{file.relative_to(artifact.folder)} {reason}")
        else:
            keep(report)
    for file in given:
        report = _read(file)
        if report is None:
            raise ArtifactError(
                f"{file} is not a report that a card can quote", hint=f"it can quote those of {', '.join(KINDS)}"
            )
        reason = _foreign(report, artifact, state)
        if reason:
            raise ArtifactError(f"{file} {reason}", hint=HINT)
        keep(report)
    return Evidence(found, tuple(stale), counts)


def _files(folder: Path) -> Iterator[Path]:
    """Possible reports, the oldest first."""
    places = [*(folder / FOLDER).rglob("*.json"), *(folder / name for name in BESIDE)]
    files = [file for file in places if file.is_file()]
    return iter(sorted(files, key=lambda file: (file.stat().st_mtime_ns, str(file))))


def _read(file: Path) -> StageReport | None:
    """The report in a file; None if it is of a kind that cards do not quote."""
    data = _list_of_files(file) or read_object(file)
    kind = str(data.get("kind") or file.stem).removeprefix("frankenmoe ")
    if {"harness", "models"} <= data.keys():  # `frankenmoe eval --json FILE` may give the file any name
        kind = EvalReport.name
    return KINDS[kind].parse(data, file=file) if kind in KINDS else None


def _list_of_files(file: Path) -> dict[str, object] | None:
    """What `frankenmoe export --json` prints: the files of a report alone."""
    try:
        data = json.loads(small_bytes(file))
    except (OSError, ValueError, RecursionError, SourceError):  # the last: it is too large
        return None
    return {"files": data} if isinstance(data, list) else None


def _foreign(report: StageReport, artifact: Artifact, state: Mapping[str, object]) -> str | None:
    """Why a report is not about this state of the artifact, as far as it says what it is about."""
    if report.recipe_digest not in (None, state["recipe_digest"]):
        return "is about another model"
    if report.routers_sha256 not in (None, state["routers_sha256"]):
        return "was made before the routers were changed"
    audited = report.record if isinstance(report, AuditReport) else None
    if audited is not None and audited.get("stages") != artifact.record.get("stages"):
        return "was made before the model was changed"
    return None
