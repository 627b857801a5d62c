"""The held-out loss of a backbone on every expert's text, with that text's own expert forced.

So routers, which are made later, do not matter. Differences are paired by block.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from frankenmoe.data.blocks import hold_out
from frankenmoe.gates.forcing import forced
from frankenmoe.gates.states import Advance, next_losses, silent
from frankenmoe.gates.texts import OwnText

TOKENS = 4096  # measured per expert
SHARE = 1 / 3  # of the text that is held out, so twice as much is left for RegMean


@dataclass(frozen=True)
class Losses:
    """Nats per token of every block of every expert's text."""

    blocks: Mapping[str, tuple[float, ...]]

    @property
    def by_expert(self) -> dict[str, float]:
        """The mean of each expert."""
        return {name: math.fsum(found) / len(found) for name, found in self.blocks.items()}

    @property
    def mean(self) -> float:
        """The mean over experts."""
        found = self.by_expert.values()
        return math.fsum(found) / len(found)


def noise(one: Losses, two: Losses) -> float:
    """The standard error of the difference of two means, from its spread over blocks of the same text.

    An expert with one block counts as if that block's difference had no error; its spread is unknown.
    """
    variance = 0.0
    for name, found in one.blocks.items():
        differences = [first - second for first, second in zip(found, two.blocks[name], strict=True)]
        count = len(differences)
        mean = math.fsum(differences) / count
        if count > 1:
            variance += math.fsum((each - mean) ** 2 for each in differences) / (count - 1) / count
    return math.sqrt(variance) / len(one.blocks)


def divided(text: OwnText) -> OwnText:
    """The same text with a third of its blocks held out; prompts, of which there are few, stay as they are."""
    if text.from_prompts:
        return text
    kept, held = hold_out((*text.kept, *text.held), share=SHARE)
    return OwnText(text.name, text.path, text.negative, text.origin, tuple(kept), tuple(held))


def measure(model: PreTrainedModel, texts: Sequence[OwnText], *, on_tokens: Advance = silent) -> Losses:
    """The losses of a model on held-out text, each with its own expert forced in every layer."""
    found = {}
    for text in texts:
        # `next_losses` reads blocks by length
        blocks = sorted(text.held, key=lambda block: len(block.ids))
        with forced(model, text.path):
            losses_N = next_losses(model, blocks, on_tokens=on_tokens).double()
        sums = [float(part.sum()) for part in losses_N.split([len(block.ids) for block in blocks])]
        found[text.name] = tuple(
            total / max(1, sum(block.learn[1:])) for total, block in zip(sums, blocks, strict=True)
        )
    return Losses(found)
