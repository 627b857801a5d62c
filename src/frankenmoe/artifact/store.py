"""Entries of the user's cache that are folders of files with a key. Does not import torch.

An entry holds the SHA-256 of its files; a damaged one counts as absent. The key says what it was computed from.
"""

import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from frankenmoe.cache import NAME, cache_folder, trim
from frankenmoe.checkpoint.fingerprint import sha256
from frankenmoe.checkpoint.writer import write_atomic
from frankenmoe.errors import FrankenMoEError

LIMIT = 2**30  # bytes of all entries of a kind
SUMS = "sha256.json"  # name -> SHA-256 of the files of an entry


def find(kind: str, key: str, *, needs: str) -> Path | None:
    """The folder of an entry that holds the file `needs`, marked as just used; None if it is absent or damaged."""
    folder = cache_folder(kind) / key
    if needs not in _whole(folder):
        return None
    with suppress(OSError):
        os.utime(folder)
    return folder


def _whole(folder: Path) -> frozenset[str]:
    """The names of the files of an entry; none if it is absent or damaged."""
    try:
        sums = json.loads((folder / SUMS).read_bytes())
        whole = all(sha256(folder / name) == was for name, was in sums.items())
    except (OSError, ValueError, AttributeError):
        return frozenset()
    return frozenset(sums if whole else ())


def keep(kind: str, key: str, fill: Callable[[Path], None], *, name: str, limit: int = LIMIT) -> Path | None:
    """Caches the files that `fill` writes into a new folder, then removes old entries beyond the limit.

    Returns the entry's folder; None if the cache cannot be written. Nothing is left of an entry that was not finished.
    An entry that another process has finished meanwhile stays, as that process may be reading it.
    """
    folder = cache_folder(kind) / key
    partial = folder.with_name(f"{key}.{os.getpid()}.partial")
    try:
        with suppress(OSError, FrankenMoEError):
            partial.mkdir(parents=True)
            fill(partial)
            write_atomic(partial / SUMS, json.dumps({file.name: sha256(file) for file in partial.iterdir()}).encode())
            write_atomic(partial / NAME, name.encode(errors="replace"))
            if not _whole(folder):
                shutil.rmtree(folder, ignore_errors=True)  # a damaged entry
                partial.replace(folder)
            trim(kind, limit=limit)
            return folder if folder.is_dir() else None
        return None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
