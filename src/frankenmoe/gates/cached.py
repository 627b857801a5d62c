"""Fitted routers in the user's cache, so that all commands on one recipe fit its routers only once.

The key of an entry is a digest of plan and text. Does not import torch.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from frankenmoe.artifact import store
from frankenmoe.artifact.folder import ROUTERS, STATISTICS, Routers, write_routers
from frankenmoe.checkpoint.writer import write_atomic
from frankenmoe.data.given import user_path
from frankenmoe.planning import Plan
from frankenmoe.planning.names import expert_data

KIND = "routers"
VERSION = 5  # increase it when a change of the code gives other gates for the same plan and text


def key_of(plan: Plan) -> str | None:
    """The digest of plan, settings and text; None if some text is not a local file, which may change unseen."""
    states = text_states(plan)
    settings = plan.recipe.fit_settings.to_dict()
    return None if states is None else digest_of(VERSION, plan.digest, settings, states)


def text_states(plan: Plan) -> list[tuple[str, int, int]] | None:
    """(path, size, time of change) of every text of the experts; None if some is not a local file."""
    return states_of(expert_data(plan.recipe), folder=plan.recipe.folder)


def states_of(names: Iterable[str], *, folder: Path) -> list[tuple[str, int, int]] | None:
    """(path, size, time of change) of every text; relative names start at `folder`. None if some is not a file."""
    texts = [Path(user_path(name, folder=folder)) for name in names]
    if not all(text.is_absolute() and text.is_file() for text in texts):
        return None
    return [(str(text), text.stat().st_size, text.stat().st_mtime_ns) for text in texts]


def digest_of(*facts: object) -> str:
    """SHA-256 of plain data."""
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def find(key: str) -> Path | None:
    """The folder of an entry, marked as just used; None if there is none or if it is damaged."""
    return store.find(KIND, key, needs=ROUTERS)


def keep(key: str, routers: Routers, statistics: bytes | None, *, name: str) -> None:
    """Caches routers, then removes old entries beyond the limit. Keeps nothing if the cache cannot be written."""

    def fill(folder: Path) -> None:
        write_routers(folder, routers)
        if statistics is not None:
            write_atomic(folder / STATISTICS, statistics)

    store.keep(KIND, key, fill, name=name)
