"""Fitted routers in the user's cache, so that all commands on one recipe fit its routers only once.

The key of an entry is a digest of plan and text. Does not import torch.
"""

import hashlib
import json
import os
import shutil
from contextlib import suppress
from pathlib import Path

from frankenmoe.artifact.folder import ROUTERS, STATISTICS, Routers, write_routers
from frankenmoe.cache import NAME, cache_folder, trim
from frankenmoe.checkpoint.fingerprint import sha256
from frankenmoe.checkpoint.writer import write_atomic
from frankenmoe.data.given import user_path
from frankenmoe.errors import FrankenMoEError
from frankenmoe.planning import Plan
from frankenmoe.planning.names import expert_data

KIND = "routers"
VERSION = 3  # increase it when a change of the code gives other gates for the same plan and text
LIMIT = 2**30  # bytes of all entries
SUMS = "sha256.json"  # name -> SHA-256 of the files of an entry


def key_of(plan: Plan) -> str | None:
    """The digest of plan and text; None if some text is not a local file, because its changes would go unnoticed."""
    texts = [Path(user_path(name, folder=plan.recipe.folder)) for name in expert_data(plan.recipe)]
    if not all(text.is_absolute() and text.is_file() for text in texts):
        return None
    states = [(str(text), text.stat().st_size, text.stat().st_mtime_ns) for text in texts]
    facts = [VERSION, plan.digest, states]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def find(key: str) -> Path | None:
    """The folder of an entry, marked as just used; None if there is none or if it is damaged."""
    folder = cache_folder(KIND) / key
    try:
        sums = json.loads((folder / SUMS).read_bytes())
        whole = all(sha256(folder / name) == was for name, was in sums.items())
    except (OSError, ValueError, AttributeError):
        return None
    if not whole or ROUTERS not in sums:
        return None
    with suppress(OSError):
        os.utime(folder)
    return folder


def keep(key: str, routers: Routers, statistics: bytes | None, *, name: str) -> None:
    """Caches routers, then removes old entries beyond the limit. Keeps nothing if the cache cannot be written."""
    folder = cache_folder(KIND) / key
    partial = folder.with_name(f"{key}.{os.getpid()}.partial")
    with suppress(OSError, FrankenMoEError):
        partial.mkdir(parents=True)
        write_routers(partial, routers)
        if statistics is not None:
            write_atomic(partial / STATISTICS, statistics)
        write_atomic(partial / SUMS, json.dumps({file.name: sha256(file) for file in partial.iterdir()}).encode())
        write_atomic(partial / NAME, name.encode(errors="replace"))
        shutil.rmtree(folder, ignore_errors=True)  # a damaged entry
        partial.replace(folder)
        trim(KIND, limit=LIMIT)
    shutil.rmtree(partial, ignore_errors=True)
