"""What a fit of routers costs, in forward passes over its text. Does not import torch.

One forward pass is every token of the text, fitted and held out, through the whole model once. A reading that stops
before the head counts as the part of a token's multiplications that it does: the weights of the layers as a share of
those of layers and head, without embeddings, which are looked up. Of every MoE block the chosen experts count.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from frankenmoe.data.blocks import hold_out
from frankenmoe.data.given import user_path
from frankenmoe.planning.groups import group_of
from frankenmoe.planning.layout import SHARED, RouterPath, gate_paths
from frankenmoe.planning.names import named_experts
from frankenmoe.planning.plan import Plan
from frankenmoe.recipe.backbone import HEAD
from frankenmoe.recipe.gatemodes import FIT_MODES
from frankenmoe.recipe.sections import FitSettings
from frankenmoe.recipe.text import written

BEFORE, AFTER = "held-out loss before", "held-out loss after"
STATISTICS = "statistics, own expert forced"
OWN_LOSS = "held-out loss, own expert forced"
SCALE = "held-out loss by scale"
STATES = "states under closed-form gates"
LOSSES = "losses with every expert"
SOLVING = "gates from states"  # reads nothing
STATES_MODES = frozenset({"logistic", "regret"})  # these need single states; the others only sums
HELD_OUT_DATA, HELD_OUT_PROMPTS = 0.1, 0.25
TRIES = 3  # usual tries of a scale
SEARCHED = 3  # scales are searched on one in SEARCHED of the held-out blocks
ENOUGH = 64  # tokens; of a text with few held-out blocks, at least so much is read for that
ONE_IN = 3  # of the blocks that `regret` reads with every expert
CUTS = (1, 4, 16)  # a third of the blocks is read whole, one in quarters, one in sixteenths
SHORTEST = 16  # tokens of the shortest pieces
CHARACTERS = 4  # a token has about as many


@dataclass(frozen=True, slots=True)
class TextSize:
    """Tokens of a text that goes to the expert at `path`.

    `kept` are fitted, `held` held out, `unseen` held out but fitted in the end. `searched` of the held-out ones are
    read for every scale that is tried. `cut` are the fitted ones in short pieces, `lost` those that are read with every
    expert.
    """

    path: RouterPath
    kept: float
    held: float
    unseen: float
    searched: float
    cut: float
    lost: float
    negative: bool = False


@dataclass(frozen=True, slots=True)
class FitForecast:
    """`tokens` of text at most, and the forward passes over it that the method needs."""

    method: str
    tokens: int
    forward_passes: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def text_size(
    path: RouterPath,
    kept: Sequence[int],
    held: Sequence[int],
    unseen: Sequence[int],
    *,
    head: int,
    negative: bool = False,
) -> TextSize:
    """The size of a text from the lengths of its blocks, of which the first `head` tokens (BOS) are in every piece."""
    pieces = [*_pieces(kept, head), *_pieces(unseen, head)]
    return TextSize(
        path,
        kept=sum(kept),
        held=sum(held),
        unseen=sum(unseen),
        searched=sum(held[::SEARCHED]) if len(held) >= SEARCHED else min([*held[:1], searched_length(sum(held))]),
        cut=sum(map(sum, pieces)),
        lost=sum(sum(share[::ONE_IN]) for share in pieces),
        negative=negative,
    )


def searched_length(held: int) -> int:
    """The tokens of the first held-out block that stand for all `held` ones if there are fewer than SEARCHED blocks."""
    return max(ENOUGH, held // SEARCHED)


def piece_lengths(longest: int) -> list[int]:
    """The lengths that blocks are cut into: each for as many blocks as the others. `longest` is that of the blocks."""
    return [length for cut in CUTS if (length := longest // cut) >= SHORTEST or cut == 1]


def piece_ends(block: int, length: int, *, head: int) -> list[int]:
    """Where a block is cut into pieces of about `length` tokens, BOS included: the end of each.

    The pieces are of equal length, so that a batch of them has no padding.
    """
    rest = block - head
    count = max(1, round(rest / (length - head)))
    return [head + rest * (piece + 1) // count for piece in range(count)]


def _pieces(blocks: Sequence[int], head: int) -> list[list[int]]:
    """The lengths of the pieces, in ascending order, for each of `piece_lengths`."""
    lengths = piece_lengths(max(blocks, default=0))
    return [
        sorted(
            head + end - start
            for block in blocks[first :: len(lengths)]
            for start, end in pairwise([head, *piece_ends(block, length, head=head)])
        )
        for first, length in enumerate(lengths)
    ]


def fit_steps(
    method: str, texts: Sequence[TextSize], routers: Mapping[RouterPath, int], *, layers: float, compare: bool
) -> dict[str, float]:
    """Step -> tokens through the whole model. `routers` are the experts of each, `layers` the share of the layers."""
    own = [text for text in texts if not text.negative]
    held = sum(text.held for text in own)
    scales = {"logistic": 2, "regret": 3}.get(method, 1)  # those of the gates that these start from, and their own
    # held-out prompts are read for their loss and statistics at once
    steps = {BEFORE: held if compare else 0, STATISTICS: layers * sum(text.kept for text in texts), OWN_LOSS: held}
    steps |= {SCALE: scales * TRIES * sum(text.searched for text in own), AFTER: held}
    if method in STATES_MODES:
        steps[STATES] = layers * sum(text.cut for text in texts)
    if method == "regret":
        steps[LOSSES] = sum(
            experts * text.lost
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
    head = int(made.base.config.get("bos_token_id") is not None)
    texts = []
    for _, path, expert in named_experts(made.recipe.experts):
        if expert.data:
            tokens = min(settings.tokens, _tokens(expert.data, folder=made.recipe.folder) or settings.tokens)
            kept, held = hold_out([settings.block] * max(1, tokens // settings.block), share=HELD_OUT_DATA)
            texts.append(text_size(path, kept, held, (), head=head))
        elif written_prompts := written(expert.positive_prompts):
            prompts = [head + -(-len(prompt) // CHARACTERS) for prompt in written_prompts]
            kept, held = hold_out(prompts, share=HELD_OUT_PROMPTS)
            texts.append(text_size(path, kept, held, held if len(prompts) > 1 else (), head=head))
    total = sum(text.kept + text.held for text in texts)
    if not total:
        return None
    steps = fit_steps(method, texts, gate_paths(made.nodes), layers=1 - head_share(made), compare=False)
    return FitForecast(method, round(total), round(sum(steps.values()) / total, 2))


def head_share(made: Plan) -> float:
    """The share of the head among the weights that one token is multiplied with."""
    config = made.base.config
    head = int(config["vocab_size"]) * int(config["hidden_size"])
    tied = all(group_of(write.name) != HEAD for write in made.backbone)
    layers = made.bill.active - head * (1 if tied else 2)
    return head / max(head + layers, head)


def _tokens(names: Sequence[str], *, folder: Path) -> int | None:
    """About how many tokens local files have; None if some text is not a local file."""
    files = [Path(user_path(name, folder=folder)) for name in names]
    if not all(file.is_absolute() and file.is_file() for file in files):
        return None
    return sum(file.stat().st_size for file in files) // CHARACTERS
