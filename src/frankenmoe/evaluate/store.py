"""Stores finished answers by model, task and request, line by line, so that an interrupted run resumes.

A file belongs to one version of one model, so versions never mix. Does not import torch.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from frankenmoe.errors import ArtifactError

FLUSH = 32  # answers between two writes


def request_key(kind: str, arguments: Iterable[Any]) -> str:
    """SHA-256, in hex, of a request: its kind and its arguments, few-shot examples included."""
    text = json.dumps([kind, *arguments], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


class Store:
    """The answers of one model to one version of one task. `add` appends whole lines to its file.

    `keep` writes only when FLUSH answers wait; `flush` writes the rest.
    """

    def __init__(self, folder: Path, *, model: str, task: str, version: int) -> None:
        self.file = folder / model / f"{task}-v{version}.jsonl"
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.found = dict(_read(self.file))
            self.waiting: list[tuple[str, Any]] = []
        except OSError as error:
            raise self._unusable(error) from error

    def keep(self, key: str, answer: Any) -> None:
        """Stores an answer soon."""
        self.waiting.append((key, answer))
        if len(self.waiting) >= FLUSH:
            self.flush()

    def flush(self) -> None:
        """Stores the answers that wait."""
        if self.waiting:
            self.add(self.waiting)
            self.waiting.clear()

    def add(self, answers: Iterable[tuple[str, Any]]) -> None:
        """Stores (key, answer) pairs."""
        pairs = list(answers)
        self.found |= dict(pairs)
        lines = "".join(json.dumps([key, answer], ensure_ascii=False) + "\n" for key, answer in pairs)
        try:
            with self.file.open("ab") as file:  # one write, so that concurrent runs do not mix within a line
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
        except ValueError:  # an empty line, or the last one of a run that was killed
            continue
        yield key, answer
