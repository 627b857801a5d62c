"""Answers that were computed before, by model, task and request, kept line by line so that a killed run goes on.

Knows nothing of what an answer means. A file belongs to one version of one model, so versions never mix.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from frankenmoe.errors import ArtifactError


def default_folder() -> Path:
    """Where answers are kept: `frankenmoe/scores` in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "frankenmoe" / "scores"


def request_key(kind: str, arguments: Iterable[Any]) -> str:
    """SHA-256, in hex, of a request: its document with its few-shot examples, what is asked, and how."""
    text = json.dumps([kind, *arguments], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


class Store:
    """The answers of one model to one version of one task; `add` writes them at once, whole lines only."""

    def __init__(self, folder: Path, *, model: str, task: str, version: int) -> None:
        self.file = folder / model / f"{task}-v{version}.jsonl"
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.found = dict(_read(self.file))
        except OSError as error:
            raise self._unusable(error) from error

    def add(self, answers: Iterable[tuple[str, Any]]) -> None:
        """Keeps (key, answer) pairs."""
        pairs = list(answers)
        self.found |= dict(pairs)
        lines = "".join(json.dumps([key, answer], ensure_ascii=False) + "\n" for key, answer in pairs)
        try:
            with self.file.open("ab") as file:  # one write, so that two runs at once cannot tear each other's lines
                file.write(lines.encode("utf-8", "surrogatepass"))
        except OSError as error:
            raise self._unusable(error) from error

    def _unusable(self, error: OSError) -> ArtifactError:
        return ArtifactError(
            f"{self.file}, where finished answers are kept, cannot be used: {error.strerror}",
            hint="free disk space, or choose another folder with --cache",
        )


def _read(file: Path) -> Iterator[tuple[str, Any]]:
    if not file.exists():
        return
    for line in file.read_bytes().decode("utf-8", "replace").split("\n"):
        try:
            key, answer = json.loads(line)
        except ValueError:  # the last line of a run that was killed while it wrote, or none
            continue
        yield key, answer
