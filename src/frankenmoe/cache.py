"""The user's cache: one folder per kind of result, one entry per result. Everything in it can be computed again.

It is in `$XDG_CACHE_HOME/frankenmoe`, by default `~/.cache/frankenmoe`.
"""

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

# fitted routers, measured backbones, answers scored by `eval`, distances of parents from their base, adapters extracted
# from parents, what transformers agreed with, compiled kernels, the models of `demo --real`, the environment in which
# benchmarks run vLLM
KINDS = ("routers", "backbones", "scores", "distances", "adapters", "proofs", "kernels", "real", "vllm")
NAME = "name.txt"  # file in an entry with its name for `frankenmoe cache`
PARTIAL = ".partial"  # suffix of an entry that is being written
SHOWN = 12  # characters of an entry's file name, if it has no other name
ABANDONED = 24 * 3600  # seconds; an older partial entry is left from a killed run


@dataclass(frozen=True)
class Entry:
    """One cached result. `used` is the time of its last use, in seconds since 1970."""

    kind: str
    path: Path
    name: str
    bytes: int
    used: float


def cache_folder(kind: str) -> Path:
    """The folder of a kind's entries."""
    given = os.environ.get("XDG_CACHE_HOME", "")  # the XDG specification ignores relative paths
    return (Path(given) if os.path.isabs(given) else Path.home() / ".cache") / "frankenmoe" / kind


def entries(kind: str) -> list[Entry]:
    """All entries of a kind, the most recently used first."""
    found = []
    for path in _paths(kind):
        if path.suffix != PARTIAL:
            with suppress(OSError):  # another process has just removed it
                found.append(_entry(kind, path))
    return sorted(found, key=lambda entry: -entry.used)


def trim(kind: str, *, limit: int) -> None:
    """Removes the least recently used entries of a kind until at most `limit` bytes are left, and old partial ones."""
    for path in _paths(kind):
        with suppress(OSError):
            if path.suffix == PARTIAL and path.stat().st_mtime < time.time() - ABANDONED:
                _remove(path)
    total = 0
    for entry in entries(kind):
        total += entry.bytes
        if total > limit:
            _remove(entry.path)


def clear(kind: str) -> int:
    """Removes all entries of a kind; returns the number of bytes freed."""
    before = sum(entry.bytes for entry in entries(kind))
    _remove(cache_folder(kind))
    return before - sum(entry.bytes for entry in entries(kind))


def _paths(kind: str) -> list[Path]:
    """The entries of a kind, an empty list if there are none or if they cannot be read. All kernels are one entry."""
    folder = cache_folder(kind)
    try:
        found = list(folder.iterdir())
    except OSError:
        return []
    return [folder] if found and kind == "kernels" else found


def _entry(kind: str, path: Path) -> Entry:
    name = path / NAME
    size = sum(file.stat().st_size for file in _files(path))
    label = name.read_text(encoding="utf-8", errors="replace") if name.is_file() else path.name[:SHOWN]
    return Entry(kind, path, label, size, path.stat().st_mtime)


def _files(path: Path) -> Iterator[Path]:
    return (file for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file())


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()
