"""What an export has begun, so that the same command can continue after an interruption.

A file gets its name when it is whole. The note beside it says which files of which model were begun, until their report
is written.
"""

import json
import os
from collections.abc import Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from frankenmoe.artifact.folder import ROUTERS
from frankenmoe.checkpoint.fingerprint import sha256
from frankenmoe.checkpoint.writer import write_atomic
from frankenmoe.export.files import is_file_name
from frankenmoe.gates.cached import digest_of, key_of, states_of
from frankenmoe.recipe.sections import ExportSettings
from frankenmoe.subject import Subject

BEGUN = "export.begun.json"


@dataclass(frozen=True)
class Begun:
    """The note in the folder of an export; `key` stands for the model and its settings."""

    file: Path
    key: str

    @classmethod
    def of(cls, subject: Subject, out: Path, settings: ExportSettings) -> Self:
        """The note of an export to `out`, a folder or a .gguf file."""
        folder = out.parent if is_file_name(out) else out
        if subject.artifact is None:
            model = key_of(subject.plan) or subject.plan.digest
        else:
            model = f"{subject.artifact.record['recipe_digest']}/{sha256(subject.artifact.folder / ROUTERS)}"
        texts = states_of(settings.imatrix, folder=Path.cwd()) or settings.imatrix
        used = subject.parts.top_k
        return cls(folder / BEGUN, digest_of(os.path.realpath(subject.origin), model, texts, settings.pad256, used))

    def finished(self) -> frozenset[Path]:
        """The files that were begun by the same export and have their names."""
        with suppress(OSError, ValueError, AttributeError, TypeError):
            data = json.loads(self.file.read_bytes())
            if data.get("key") == self.key:
                found = (self.file.parent / Path(name).name for name in data["files"])
                return frozenset(path for path in found if path.is_file())
        return frozenset()

    def note(self, paths: Iterable[Path]) -> None:
        """Notes that these files are going to be written; those of the same model that wait for a report stay noted."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        _write(self.file, self.key, {path.name for path in (*paths, *self.finished())})


def reported(folder: Path, names: Collection[str]) -> None:
    """Deletes files that now have a report from the note in `folder`, and deletes the note when it is empty."""
    file = folder / BEGUN
    with suppress(OSError, ValueError, KeyError, TypeError):
        data = json.loads(file.read_bytes())
        left = {name for name in data["files"] if name not in names and (folder / name).is_file()}
        if left:
            _write(file, data["key"], left)
            return
    file.unlink(missing_ok=True)


def _write(file: Path, key: str, names: Iterable[str]) -> None:
    write_atomic(file, (json.dumps({"key": key, "files": sorted(names)}, indent=2) + "\n").encode())
