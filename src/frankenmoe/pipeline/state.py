"""The state of a run: which stages were done, from which inputs, with which outputs.

The file is rewritten as a whole after every stage, so that a kill loses one stage at most. Files are compared by
content, not by time.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from frankenmoe.artifact.folder import lock_file, write_json
from frankenmoe.errors import ArtifactError

STATE = "run.json"
LOCK = "run.lock"
VERSION = 1
WHOLE = 2**24  # bytes; smaller files are read completely
BLOCK, BLOCKS = 2**12, 256  # read of larger files


@dataclass(frozen=True)
class Step:
    """A finished stage: the digest of its settings and inputs, path -> hash of its outputs, a line about its result."""

    digest: str
    outputs: Mapping[str, str]
    summary: str
    seconds: float


def content_print(file: Path) -> str:
    """A hash (32 hexadecimal digits) of a file's content; of a large file, its size and 256 blocks.

    It detects another model, text or training run, but not a few changed bytes in a large file.
    """
    status = file.stat()
    return _print(os.path.realpath(file), status.st_size, status.st_mtime_ns)


@cache
def _print(file: str, size: int, mtime_ns: int) -> str:
    digest = hashlib.blake2b(size.to_bytes(8, "little"), digest_size=16)
    with open(file, "rb") as stream:
        if size <= WHOLE:
            digest.update(stream.read())
        else:
            for index in range(BLOCKS):
                stream.seek(index * (size - BLOCK) // (BLOCKS - 1))
                digest.update(stream.read(BLOCK))
    return digest.hexdigest()


def prints(files: Iterable[Path], *, root: Path) -> dict[str, str]:
    """Path (relative to `root`, absolute outside of it) -> hash, for the files that exist."""
    found = {}
    for file in sorted(set(files)):
        if file.is_file():
            name = str(file.relative_to(root)) if file.is_relative_to(root) else str(file)
            found[name] = content_print(file)
    return found


def digest_of(*facts: Any) -> str:
    """SHA-256 of plain data."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def files_below(folder: Path) -> Iterator[Path]:
    """Every file of a folder, at any depth."""
    return (file for file in folder.rglob("*") if file.is_file())


@dataclass(frozen=True)
class State:
    """The finished stages, and the one in progress: (name, digest, inode of the folder that it replaces)."""

    steps: Mapping[str, Step]
    doing: tuple[str, str, int] | None = None


def read_state(out: Path) -> State:
    """Reads the state in a run's folder; a new folder has an empty one. ArtifactError for an invalid file."""
    file = out / STATE
    if not file.is_file():
        return State({})
    try:
        data = json.loads(file.read_bytes())
        if data["version"] != VERSION:
            raise ValueError(f"it has version {data['version']}, expected version {VERSION}")
        doing = data["doing"]
        steps = {
            name: Step(step["digest"], step["outputs"], step["said"], step["seconds"])
            for name, step in data["steps"].items()
        }
        return State(steps, tuple(doing) if doing else None)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(
            f"{file} is not the state of a run: {error}",
            hint="choose another folder, or remove that file to start again",
        ) from error


def write_state(out: Path, state: State) -> None:
    """Writes the state atomically."""
    steps = {
        name: {"digest": step.digest, "outputs": step.outputs, "said": step.summary, "seconds": step.seconds}
        for name, step in state.steps.items()
    }
    write_json(out / STATE, {"version": VERSION, "doing": state.doing, "steps": steps})


def is_done(step: Step | None, *, digest: str, out: Path) -> bool:
    """Whether a stage can be skipped: same settings and inputs, and its outputs exist unchanged."""
    if step is None or step.digest != digest:
        return False
    return all((out / name).is_file() and content_print(out / name) == was for name, was in step.outputs.items())


@contextmanager
def claimed(out: Path) -> Iterator[None]:
    """Locks a run's folder. ArtifactError if another process holds it, or if it is no folder of a run."""
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / LOCK).exists())):
        raise ArtifactError(
            f"{out} exists and is not the folder of a run, expected a new or empty folder, or that of an earlier run",
            hint="choose another folder",
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArtifactError(f"{out} cannot be created: {error.strerror}", hint="choose another folder") from error
    busy = ArtifactError(f"another process is using {out}", hint="wait for it to end")
    with lock_file(out / LOCK, busy=busy):
        yield
