"""Fitted routers in the user's cache, so that `chat`, `build`, `audit` and `export` of one recipe fit them once.

An entry is named after a digest of plan and text. Does not import torch.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from frankenmoe.artifact.folder import ROUTERS, STATISTICS, Routers, write_routers
from frankenmoe.cache import NAME, cache_folder, trim
from frankenmoe.checkpoint.writer import write_atomic
from frankenmoe.data.given import user_path
from frankenmoe.errors import FrankenMoEError
from frankenmoe.planning import Plan
from frankenmoe.recipe import Expert

KIND = "routers"
VERSION = 1  # raised whenever the same plan and text would give other gates
LIMIT = 2**30  # bytes of all entries together


def key_of(plan: Plan) -> str | None:
    """The digest of plan and text; None where an expert's data is not a local file, whose changes are not seen."""
    texts = [Path(user_path(name, folder=plan.recipe.folder)) for name in _data(plan.recipe.experts)]
    if not all(text.is_file() for text in texts):
        return None
    states = [(str(text), text.stat().st_size, text.stat().st_mtime_ns) for text in texts]
    facts = [VERSION, plan.digest, plan.recipe.gate_mode, states]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def find(key: str) -> Path | None:
    """The folder of an entry, which becomes the most recently used one; None where there is none."""
    folder = cache_folder(KIND) / key
    if not (folder / ROUTERS).is_file():
        return None
    with suppress(OSError):
        os.utime(folder)
    return folder


def keep(key: str, routers: Routers, statistics: bytes | None, *, name: str) -> None:
    """Caches routers, then removes the least recently used entries beyond the limit.

    A cache that cannot be written costs time later and nothing else: then nothing is kept.
    """
    folder = cache_folder(KIND) / key
    partial = folder.with_name(f"{key}.{os.getpid()}.partial")
    with suppress(OSError, FrankenMoEError):
        partial.mkdir(parents=True)
        write_routers(partial, routers)
        if statistics is not None:
            write_atomic(partial / STATISTICS, statistics)
        write_atomic(partial / NAME, name.encode(errors="replace"))
        shutil.rmtree(folder, ignore_errors=True)  # a damaged one
        partial.replace(folder)
        trim(KIND, limit=LIMIT)
    shutil.rmtree(partial, ignore_errors=True)


def _data(experts: Sequence[Expert]) -> Iterator[str]:
    for expert in experts:
        yield from expert.data
        yield from _data(expert.experts)
