"""What a fit of routers costs, in forward passes over its text. Does not import torch.

One forward pass is every token of the text, fitted and held out, through the whole model once. A reading that stops
before the head counts as the part of a token's multiplications that it does: the weights of the layers as a share of
those of layers and head, without embeddings, which are looked up. Of every MoE block the chosen experts count.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from frankenmoe.data.given import user_path
from frankenmoe.planning.layout import SHARED, RouterPath, gate_paths
from frankenmoe.planning.names import named_experts
from frankenmoe.planning.plan import Plan
from frankenmoe.recipe.gatemodes import FIT_MODES
from frankenmoe.recipe.sections import FitSettings
from frankenmoe.recipe.text import written

BEFORE, AFTER = "held-out loss before", "held-out loss after"
STATISTICS = "statistics, own expert forced"
OWN_LOSS = "held-out loss, own expert forced"
SCALE = "held-out loss by scale"
STATES = "states under closed-form gates"
LOSSES = "losses with every expert"
STATES_MODES = frozenset({"logistic", "regret"})  # these need single states; the others only sums
HELD_OUT_DATA, HELD_OUT_PROMPTS = 0.1, 0.25
TRIES, ROUGH_TRIES = 4, 3  # usual tries of the scale, and where it need not be exact
ROUGH = 3  # the scale of gates that others follow is searched on every ROUGH-th held-out block
ONE_IN = 3  # of the blocks that `regret` reads with every expert
CHARACTERS = 4  # a token has about as many


@dataclass(frozen=True, slots=True)
class TextSize:
    """Tokens of a text that goes to the expert at `path`: fitted, held out, and held out but fitted in the end."""

    path: RouterPath
    kept: float
    held: float
    unseen: float = 0
    negative: bool = False


@dataclass(frozen=True, slots=True)
class FitForecast:
    """`tokens` of text at most, and the forward passes over it that the method needs."""

    method: str
    tokens: int
    forward_passes: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def fit_steps(
    method: str, texts: Sequence[TextSize], routers: Mapping[RouterPath, int], *, layers: float, compare: bool
) -> dict[str, float]:
    """Step -> tokens through the whole model. `routers` are the experts of each, `layers` the share of the layers."""
    own = [text for text in texts if not text.negative]
    held = sum(text.held for text in own)
    fitted = sum(text.kept + text.unseen for text in texts)
    # held-out prompts are read for their loss and statistics at once
    steps = {BEFORE: held if compare else 0, STATISTICS: layers * sum(text.kept for text in texts), OWN_LOSS: held}
    if method not in STATES_MODES:
        return steps | {SCALE: TRIES * held}
    followed = 2 if method == "regret" else 1  # gates that others follow
    steps |= {SCALE: (followed * ROUGH_TRIES / ROUGH + TRIES) * held, STATES: layers * fitted}
    if method == "regret":
        steps[LOSSES] = sum(
            experts * (text.kept + text.unseen) / ONE_IN
            for path, experts in routers.items()
            for text in own
            if SHARED not in (path, text.path) and len(text.path) > len(path) and text.path[: len(path)] == path
        )
    return steps


def fit_forecast(made: Plan, settings: FitSettings) -> FitForecast | None:
    """What fitting the routers of a plan will cost; None if its gate mode fits none or they come from a file."""
    method = settings.method or str(made.recipe.gate_mode)
    if method not in FIT_MODES or made.routers_file is not None:
        return None
    texts = []
    for _, path, expert in named_experts(made.recipe.experts):
        if expert.data:
            tokens = min(settings.tokens, _tokens(expert.data, folder=made.recipe.folder) or settings.tokens)
            texts.append(TextSize(path, tokens * (1 - HELD_OUT_DATA), tokens * HELD_OUT_DATA))
        elif prompts := written(expert.positive_prompts):
            tokens = -(-sum(map(len, prompts)) // CHARACTERS)
            held = tokens * HELD_OUT_PROMPTS
            texts.append(TextSize(path, tokens - held, held, held))
    total = sum(text.kept + text.held for text in texts)
    if not total:
        return None
    steps = fit_steps(method, texts, gate_paths(made.nodes), layers=1 - head_share(made), compare=False)
    return FitForecast(method, round(total), round(sum(steps.values()) / total, 2))


def head_share(made: Plan) -> float:
    """The share of the head among the weights that one token is multiplied with."""
    config = made.base.config
    head = int(config["vocab_size"]) * int(config["hidden_size"])
    tied = all(write.name not in ("lm_head.weight", "embed_out.weight") for write in made.backbone)
    layers = made.bill.active - head * (1 if tied else 2)
    return head / max(head + layers, head)


def _tokens(names: Sequence[str], *, folder: Path) -> int | None:
    """About how many tokens local files have; None if some text is not a local file."""
    files = [Path(user_path(name, folder=folder)) for name in names]
    if not all(file.is_absolute() and file.is_file() for file in files):
        return None
    return sum(file.stat().st_size for file in files) // CHARACTERS
