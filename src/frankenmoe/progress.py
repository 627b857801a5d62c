"""How stages report their progress."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """Callbacks: `start(stage, total, unit)` starts an activity (unit "B" for bytes), `advance(amount)` adds to what is
    done, `note(text)` shows a few words about it."""

    start: Callable[[str, int, str], None] = lambda stage, total, unit: None
    advance: Callable[[int], None] = lambda amount: None
    note: Callable[[str], None] = lambda text: None


SILENT = Progress()
