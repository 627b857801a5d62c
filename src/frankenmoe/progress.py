"""How a stage tells how far it is; does not know who listens, or whether anybody does."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """A listener: `start(stage, total, unit)` begins a stage (unit "B" for bytes), `advance(amount)` moves it, `note`
    says something about it in a few words."""

    start: Callable[[str, int, str], None] = lambda stage, total, unit: None
    advance: Callable[[int], None] = lambda amount: None
    note: Callable[[str], None] = lambda text: None


SILENT = Progress()
