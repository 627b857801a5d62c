"""What a run remembers: which step was done from what, and what it left; does not know what a step is for.

The file is rewritten whole after every step, so that a kill loses one step at most. Contents decide, not times.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from frankenmoe.artifact.folder import lock_file, write_json
from frankenmoe.errors import ArtifactError

STATE = "run.json"
LOCK = "run.lock"
VERSION = 1
WHOLE = 2**24  # bytes up to which a file is read whole
BLOCK, BLOCKS = 2**12, 256  # of larger files


@dataclass(frozen=True)
class Step:
    """A step that was done: the digest of all it came from, its files with their prints, its line in the summary."""

    digest: str
    outputs: Mapping[str, str]
    said: str
    seconds: float


def content_print(file: Path) -> str:
    """32 hexadecimal digits that name a file's content: all of it, or of a large file its size and 256 blocks.

    It notices another model, text or training run; a few bytes changed in a large file it does not.
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
    """Path from `root` (or absolute, outside of it) -> print, of files that are there."""
    found = {}
    for file in sorted(set(files)):
        if file.is_file():
            name = str(file.relative_to(root)) if file.is_relative_to(root) else str(file)
            found[name] = content_print(file)
    return found


def digest_of(*facts: Any) -> str:
    """Names plain data."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def files_below(folder: Path) -> Iterator[Path]:
    """Every file of a folder."""
    return (file for file in folder.rglob("*") if file.is_file())


@dataclass(frozen=True)
class State:
    """The steps that were done, and the one begun since: name, digest, inode of the folder it replaces."""

    steps: Mapping[str, Step]
    doing: tuple[str, str, int] | None = None


def read_state(out: Path) -> State:
    """What is remembered in a run's folder; nothing in a new one. ArtifactError where it is not ours."""
    file = out / STATE
    if not file.is_file():
        return State({})
    try:
        data = json.loads(file.read_bytes())
        if data["version"] != VERSION:
            raise ValueError(f"it is of version {data['version']}, this frankenmoe reads version {VERSION}")
        doing = data["doing"]
        return State({name: Step(**step) for name, step in data["steps"].items()}, tuple(doing) if doing else None)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(
            f"{file} is not the state of a run: {error}",
            hint="choose another folder, or remove that file to start over",
        ) from error


def write_state(out: Path, state: State) -> None:
    """Puts the state down, whole."""
    steps = {name: asdict(step) for name, step in state.steps.items()}
    write_json(out / STATE, {"version": VERSION, "doing": state.doing, "steps": steps})


def is_done(step: Step | None, *, digest: str, out: Path) -> bool:
    """Whether a step need not be done again: it came from the same, and what it left is there unchanged."""
    if step is None or step.digest != digest:
        return False
    return all((out / name).is_file() and content_print(out / name) == was for name, was in step.outputs.items())


@contextmanager
def claimed(out: Path) -> Iterator[None]:
    """Holds a run's folder against a second run; ArtifactError where it is taken, or is not a run's."""
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / LOCK).exists())):
        raise ArtifactError(
            f"{out} exists and is not the folder of a run, expected a new, empty or earlier one",
            hint="choose another folder",
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArtifactError(f"{out} cannot be made: {error.strerror}", hint="choose another folder") from error
    busy = ArtifactError(f"another process is running {out}", hint="wait for it to end")
    with lock_file(out / LOCK, busy=busy):
        yield
