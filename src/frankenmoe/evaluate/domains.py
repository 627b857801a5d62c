"""Loss by domain and block, so that models can be compared on the same blocks.

Shape suffixes: B blocks in a batch, T tokens.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from frankenmoe.data.blocks import Block, Span, hold_out, text_blocks
from frankenmoe.data.documents import read_documents
from frankenmoe.errors import NumericsError
from frankenmoe.evaluate.bootstrap import Interval, weighted
from frankenmoe.evaluate.memory import Budget
from frankenmoe.evaluate.scorer import check_ids, scored
from frankenmoe.evaluate.store import Store, request_key
from frankenmoe.moe.processes import from_main, share_out, world
from frankenmoe.progress import SILENT, Progress
from frankenmoe.recipe.train import TrainSettings

TRAINING = TrainSettings()  # by default the same cut as in training, which keeps trained text out
MOST_BLOCKS = 200  # per domain, unless a limit says otherwise
BATCH = 8
GENERAL = "general text"  # text that no parent was tuned on; it does not count in means over domains
GENERAL_FILE = Path(__file__).with_name("general.txt")


@dataclass(frozen=True)
class DomainText:
    """A domain's texts: files or hub datasets, relative to `folder`. `held_out`: only the held-out part is read.

    `fitted` are the places in the stream of their tokens that the model was fitted to, which are not held out.
    """

    name: str
    files: tuple[str, ...]
    folder: Path
    held_out: bool
    block: int = TRAINING.block
    share: float = TRAINING.hold_out
    fitted: tuple[Span, ...] = ()


@dataclass(frozen=True)
class Losses:
    """The loss of every block in nats, the number of tokens it sums over, and the text's size in bytes."""

    nats: tuple[float, ...]
    targets: tuple[int, ...]
    bytes: int

    @property
    def mean(self) -> float:
        """Nats per token."""
        return sum(self.nats) / sum(self.targets)

    @cached_property
    def interval(self) -> Interval:
        """Nats per token with a 95 % confidence interval over blocks."""
        return weighted([(self.nats, [float(count) for count in self.targets], 1.0)])

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte of text, comparable between tokenizers."""
        return sum(self.nats) / math.log(2) / max(1, self.bytes)


def read_domain(source: DomainText, tokenizer: Any, *, limit: int | None) -> list[Block]:
    """The blocks of a domain. Of an expert's own data, only those that training holds out and that were not fitted.

    Fits with another block length hold out other text. Where no block is left, those of training are read.
    """
    most = limit or MOST_BLOCKS
    enough = math.ceil(most / source.share) + 1 if source.held_out else most
    blocks = text_blocks(
        read_documents(source.files, folder=source.folder), tokenizer, length=source.block, limit=enough
    )
    if source.held_out:
        blocks = hold_out(blocks, share=source.share)[1]
        blocks = [block for block in blocks if not any(_overlap(block.span, span) for span in source.fitted)] or blocks
    return blocks[:most]


def _overlap(one: Span, other: Span) -> bool:
    return one[0] < other[1] and other[0] < one[1]


def domain_losses(
    model: Any,
    tokenizer: Any,
    domains: Mapping[str, Sequence[Block]],
    *,
    plain_head: bool,
    budget: Budget,
    store: Store | None = None,
    progress: Progress = SILENT,
) -> dict[str, Losses]:
    """The losses of a model by domain.

    Raises SourceError for a tokenizer of another model, NumericsError for NaN, PlanError for too little memory.
    """
    progress.start("loss", sum(map(len, domains.values())), "blocks")
    found = {}
    for name, blocks in domains.items():
        check_ids(model, (block.ids for block in blocks))
        nats = _nats(model, blocks, plain_head=plain_head, budget=budget, store=store, progress=progress)
        if any(math.isnan(value) for value in nats):
            at = next(index for index, value in enumerate(nats) if math.isnan(value))
            raise NumericsError(f"block {at} of {name}: the model computes NaN", hint="check the model's weights")
        targets = tuple(block.targets for block in blocks)
        found[name] = Losses(tuple(nats), targets, sum(_bytes(block, tokenizer) for block in blocks))
    return found


def _nats(
    model: Any, blocks: Sequence[Block], *, plain_head: bool, budget: Budget, store: Store | None, progress: Progress
) -> list[float]:
    keys = [request_key("loss", [list(block.ids), list(block.learn)]) for block in blocks]
    known = store.found if store is not None else {}
    # another process may see losses that were written in between
    nats = from_main({at: float(known[key]) for at, key in enumerate(keys) if key in known})
    progress.advance(len(nats))
    order = sorted(set(range(len(blocks))) - set(nats), key=lambda at: len(blocks[at].ids))

    def work(own: Sequence[int]) -> list[float]:
        found: dict[int, float] = {}
        for some in _read(model, blocks, own, plain_head=plain_head, budget=budget, progress=progress):
            found |= some
            if store is not None:
                store.add((keys[at], loss) for at, loss in some.items())
        return [found[at] for at in own]

    nats |= zip(order, share_out(order, work), strict=True)
    return [nats[at] for at in range(len(blocks))]


def _read(
    model: Any, blocks: Sequence[Block], order: Sequence[int], *, plain_head: bool, budget: Budget, progress: Progress
) -> Iterator[dict[int, float]]:
    """The losses of the blocks numbered `order`, which are sorted by length, batch by batch."""
    for length, group in groupby(order, key=lambda at: len(blocks[at].ids)):
        same = list(group)
        while same:
            batch = same[: budget.most(min(BATCH, len(same)), length)]
            with budget.shrinking(len(batch), length):
                sums = _batch(model, [blocks[at] for at in batch], length, plain_head)
                same = same[len(batch) :]
            yield dict(zip(batch, sums, strict=True))
            progress.advance(len(batch) * world())  # the others read as fast


def _batch(model: Any, blocks: Sequence[Block], length: int, plain_head: bool) -> list[float]:
    ids_BT = torch.tensor([block.ids for block in blocks], device=model.device)
    places = [
        (line * length + at - 1, block.ids[at], line, at)
        for line, block in enumerate(blocks)
        for at in range(1, length)
        if block.learn[at]
    ]
    sums = [0.0] * len(blocks)
    with torch.inference_mode():
        for some, logprobs, _ in scored(model, ids_BT, places, plain_head=plain_head, use_cache=False):
            for (_, _, line, _), logprob in zip(some, logprobs, strict=True):
                sums[line] -= logprob
    return sums


def _bytes(block: Block, tokenizer: Any) -> int:
    learnt = [token for token, learn in zip(block.ids, block.learn, strict=True) if learn]
    return len(tokenizer.decode(learnt, skip_special_tokens=True).encode())
