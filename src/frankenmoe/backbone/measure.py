"""The held-out loss of a backbone on every expert's text, with that text's own expert forced.

So routers, which are made later, do not matter. Differences are paired by block.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from transformers import PreTrainedModel

from frankenmoe.data.blocks import Block, hold_out
from frankenmoe.gates.forcing import forced
from frankenmoe.gates.states import Advance, next_losses, silent
from frankenmoe.gates.texts import OwnText

TOKENS = 4096  # measured per expert
SHARE = 1 / 3  # of the text that is held out, so twice as much is left for RegMean


@dataclass(frozen=True)
class Losses:
    """Nats per token of every block that was read, by expert. A candidate that was given up has fewer blocks."""

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

    def behind(self, other: "Losses") -> float:
        """This mean minus the other one, over the blocks that both have."""
        return math.fsum(math.fsum(each) / len(each) for each in self._pairs(other)) / len(self.blocks)

    def noise(self, other: "Losses") -> float:
        """The standard error of `behind`, from the spread of differences over each expert's blocks.

        A single block, whose spread is unknown, counts as exact.
        """
        variance = 0.0
        for found in self._pairs(other):
            count, mean = len(found), math.fsum(found) / len(found)
            if count > 1:
                variance += math.fsum((each - mean) ** 2 for each in found) / (count - 1) / count
        return math.sqrt(variance) / len(self.blocks)

    def __add__(self, more: "Losses") -> "Losses":
        """The losses of further blocks of the same texts appended."""
        return Losses({name: (*found, *more.blocks.get(name, ())) for name, found in self.blocks.items()})

    def _pairs(self, other: "Losses") -> Iterator[list[float]]:
        for name, found in self.blocks.items():
            yield [first - second for first, second in zip(found, other.blocks[name], strict=False)]


def divided(text: OwnText) -> OwnText:
    """The same text with a third of its blocks held out; prompts, of which there are few, stay as they are.

    What fits hold out is not kept either, so that RegMean does not read it.
    """
    if text.from_prompts:
        return text
    kept, held = hold_out((*text.kept, *text.held), share=SHARE)
    own = tuple(block for block in kept if block not in text.held)
    return OwnText(text.name, text.path, text.negative, text.origin, own, tuple(held))


def measure(
    model: PreTrainedModel, texts: Sequence[OwnText], *, part: slice = slice(None), on_tokens: Advance = silent
) -> Losses:
    """The losses of a model on a part of every text's held-out blocks, each with its own expert forced."""
    found = {}
    for text in texts:
        # in the order in which `next_losses` reads them
        blocks = sorted(text.held, key=lambda block: len(block.ids))[part]
        if not blocks:
            continue
        with forced(model, text.path):
            found[text.name] = block_losses(model, blocks, on_tokens=on_tokens)
    return Losses(found)


def block_losses(
    model: PreTrainedModel, blocks: Sequence[Block], *, together: bool = False, on_tokens: Advance = silent
) -> tuple[float, ...]:
    """Nats per token of every block, in their order, which must be that of `next_losses`: sorted by length."""
    losses_N = next_losses(model, blocks, together=together, on_tokens=on_tokens)
    ends = list(accumulate(len(block.ids) for block in blocks))
    parts = losses_N.double().tensor_split(ends[:-1])
    return tuple(float(part.sum()) / max(1, sum(block.learn[1:])) for part, block in zip(parts, blocks, strict=True))
