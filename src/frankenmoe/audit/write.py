"""Audits -> audit.json and audit.html in a new folder."""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from frankenmoe.artifact.folder import partial_folder
from frankenmoe.artifact.reports import AuditReport
from frankenmoe.audit.compare import difference
from frankenmoe.audit.examine import KIND, VERSION, Audit
from frankenmoe.audit.page import page, storable
from frankenmoe.checkpoint.writer import write_atomic
from frankenmoe.errors import ArtifactError
from frankenmoe.system import LONGEST, file_name

JSON, HTML = "audit.json", "audit.html"


def as_json(audits: Sequence[Audit]) -> dict[str, Any]:
    """The report of one audit, or two reports with their differences."""
    if len(audits) == 1:
        return AuditReport.model_validate(audits[0].report).to_dict()
    one, two = (audit.report for audit in audits)
    return {
        "kind": f"{KIND} of two",
        "version": VERSION,
        "finished": two["finished"],
        "audits": [one, two],
        "difference": difference(one, two),
    }


def check_place(out: Path) -> None:
    """Raises ArtifactError if no folder can be created in `out`. Creates nothing."""
    there = next(path for path in (out.absolute(), *out.absolute().parents) if os.path.exists(path))
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        reason = "is not writable" if there.is_dir() else "is not a folder"
        raise ArtifactError(
            f"the report cannot be written to {out}: {there} {reason}", hint="choose another folder with --out"
        )


def as_text(audits: Sequence[Audit]) -> str:
    """`as_json` as text that is valid UTF-8."""
    return storable(json.dumps(as_json(audits), indent=1, ensure_ascii=False, allow_nan=False)).decode()


def write_report(audits: Sequence[Audit], out: Path) -> Path:
    """Writes `audit.json` and `audit.html` into a new folder in `out` and returns it.

    If a folder of that name exists, the new one gets the next free number. It appears complete or not at all. Raises
    ArtifactError if `out` is not writable.
    """
    files = {
        JSON: (as_text(audits) + "\n").encode(),
        HTML: page(audits).encode(),
    }
    stem = _stem([audit.report["subject"] for audit in audits])
    try:
        out.mkdir(parents=True, exist_ok=True)
        folder, partial = _claim(out, stem)
    except OSError as error:
        raise ArtifactError(
            f"the report cannot be written to {out}: {error.strerror}", hint="choose another folder with --out"
        ) from error
    try:
        for name, content in files.items():
            write_atomic(partial / name, content)
        partial.rename(folder)
    except BaseException as error:  # Ctrl-C too
        shutil.rmtree(partial, ignore_errors=True)
        if not isinstance(error, OSError):
            raise
        raise ArtifactError(
            f"the report cannot be written to {folder}: {error.strerror}", hint="choose another folder with --out"
        ) from error
    return folder


def _claim(out: Path, stem: str) -> tuple[Path, Path]:
    """The first free name, and a new partial folder for it, which reserves the name."""
    number = 1
    while True:
        folder = out / (stem if number == 1 else f"{stem}-{number}")
        partial = partial_folder(folder)
        if not folder.exists():
            try:
                partial.mkdir()
            except FileExistsError:
                pass
            else:
                return folder, partial
        number += 1


def _stem(subjects: Sequence[Mapping[str, Any]]) -> str:
    names = [file_name(str(subject["name"]), default="moe") for subject in subjects]
    return f"audit-{'-and-'.join(dict.fromkeys(names))}"[:LONGEST].rstrip("-.")
