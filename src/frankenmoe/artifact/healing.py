"""What healing reports: heal.json. Does not import torch."""

from statistics import mean
from typing import Any

from frankenmoe.artifact.record import AnyText
from frankenmoe.artifact.reports import Measure, ReportPart, StageReport


class HealedPart(ReportPart):
    """One expert. Losses are held-out, in nats per token, with this expert forced in every layer.

    `step` is the share of the changes that was kept, 0 for none. `noise` is the standard error of what it lowers the
    loss by. `reason` says why an expert was not tried. The text is read in blocks of `block` tokens; `spans`
    are the places of the fitted ones in the data's tokens. By layer: `ridges`, and `left`, the share of the held-out
    distance to the parent's states that the refit left.
    """

    name: AnyText
    kept: bool
    reason: AnyText = ""
    tokens: int = 0
    block: int = 0
    spans: tuple[tuple[int, int], ...] = ()
    held_out_tokens: int = 0
    step: float = 0.0
    parent: Measure = None
    before: Measure = None
    after: Measure = None
    noise: Measure = None
    ridges: tuple[float, ...] = ()
    left: tuple[float, ...] = ()


class HealReport(StageReport):
    """heal.json: which experts were refitted to the backbone, and what it did to their held-out loss."""

    name = "heal"

    settings: dict[str, Any]
    data: dict[str, Any]
    experts: tuple[HealedPart, ...]
    bytes: int = 0

    @property
    def tried(self) -> tuple[HealedPart, ...]:
        return tuple(expert for expert in self.experts if expert.before is not None)

    @property
    def kept(self) -> tuple[HealedPart, ...]:
        return tuple(expert for expert in self.experts if expert.kept)

    @property
    def means(self) -> dict[str, float]:
        """The mean losses of the experts that were tried: the parents' own, before and after."""
        keys = ("parent", "before", "after")
        return {key: mean(getattr(expert, key) for expert in self.tried) for key in keys} if self.tried else {}
