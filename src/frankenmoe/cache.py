"""The user's cache: a folder per kind of thing that can be computed again, and an entry in it per thing.

`$XDG_CACHE_HOME/frankenmoe` or `~/.cache/frankenmoe`; losing it costs time and nothing else.
"""

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# kind -> what its entries are
KINDS = {
    "routers": "fitted routers of recipes",
    "scores": "answers that `eval` computed",
    "kernels": "compiled products",
}
NAME = "name.txt"  # in an entry: what it is called in a list


@dataclass(frozen=True)
class Entry:
    """One cached thing. `used` is when it was last used, in seconds since 1970."""

    kind: str
    path: Path
    name: str
    bytes: int
    used: float


def cache_folder(kind: str) -> Path:
    """Where entries of a kind are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "frankenmoe" / kind


def entries(kind: str) -> list[Entry]:
    """Everything cached of a kind, the most recently used first."""
    folder = cache_folder(kind)
    found = [_entry(kind, path) for path in (folder.iterdir() if folder.is_dir() else ()) if path.suffix != ".partial"]
    return sorted(found, key=lambda entry: -entry.used)


def trim(kind: str, *, limit: int) -> None:
    """Removes the least recently used entries of a kind beyond `limit` bytes together."""
    total = 0
    for entry in entries(kind):
        total += entry.bytes
        if total > limit:
            _remove(entry.path)


def clear(kind: str) -> int:
    """Empties the cache of a kind; returns the bytes that were freed."""
    freed = sum(entry.bytes for entry in entries(kind))
    _remove(cache_folder(kind))
    return freed


def _entry(kind: str, path: Path) -> Entry:
    name = path / NAME
    size = sum(file.stat().st_size for file in _files(path))
    return Entry(kind, path, name.read_text() if name.is_file() else path.name, size, path.stat().st_mtime)


def _files(path: Path) -> Iterator[Path]:
    return (file for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file())


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
