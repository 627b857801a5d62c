"""Text per domain -> the blocks that a step learns from, as a pure function of the step's number."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from frankenmoe.counted import counted
from frankenmoe.data.blocks import Block, check_vocabulary, hold_out, text_blocks
from frankenmoe.data.documents import read_documents
from frankenmoe.errors import PlanError, SourceError
from frankenmoe.recipe.train import TrainSettings
from frankenmoe.suggest import did_you_mean

MOST_BLOCKS = 4096  # blocks read per domain, unless the run needs more


@dataclass(frozen=True)
class Domain:
    """One kind of text: its blocks for training and those held out. `owner` is the index of its expert, or -1."""

    name: str
    owner: int
    weight: float
    blocks: tuple[Block, ...]
    held: tuple[Block, ...]


def read_domains(
    data: Mapping[str, Sequence[str]],
    tokenizer: Any,
    *,
    folder: Path,
    settings: TrainSettings,
    experts: Sequence[str],
    vocab: int,
) -> tuple[Domain, ...]:
    """Every domain's text in whole blocks, with a share held out. A domain named like an expert is owned by it.

    Raises PlanError if there is no data or a weight names no domain. Raises SourceError for text that cannot be read,
    is shorter than two blocks, or has tokens outside the model's vocabulary.
    """
    if not data:
        raise PlanError(
            "there is nothing to learn from: neither --data nor data in the recipe",
            hint="give --data NAME=FILE for each kind of text; NAME is the expert that it belongs to",
        )
    for name in settings.weights:
        if name not in data:
            raise PlanError(f"a weight is given for {name}, which has no data", hint=did_you_mean(name, list(data)))
    total = sum(settings.weights.get(name, 1.0) for name in data)
    found = []
    for name, files in data.items():
        weight = settings.weights.get(name, 1.0)
        needed = math.ceil(settings.steps * settings.batch * weight / total / (1 - settings.hold_out))
        try:
            blocks = text_blocks(
                read_documents(files, folder=folder), tokenizer, length=settings.block,
                limit=max(MOST_BLOCKS, needed), whole=True,
            )  # fmt: skip
        except SourceError as error:
            raise SourceError(f"the data of {name}: {error.message}", hint=error.hint) from error
        if len(blocks) < 2:
            raise SourceError(
                f"the data of {name} is one block of {counted(settings.block, 'token')}, expected two at "
                "least: one to train on and one to measure on",
                hint="give more text, or use shorter blocks (--block)",
            )
        ids = chain.from_iterable(block.ids for block in blocks)
        check_vocabulary(ids, vocab, tokenizer, what=f"the data of {name}")
        kept, held = hold_out(blocks, share=settings.hold_out)
        owner = experts.index(name) if name in experts else -1
        found.append(Domain(name, owner, weight, tuple(kept), tuple(held[: settings.guard_blocks])))
    return tuple(found)


def order(domains: Sequence[Domain], *, items: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(domain, block within it) of every item of a run.

    Domains appear in proportion to their weights, evenly spread (a stride schedule): any stretch of items holds its
    share of each. Each pass over a domain has a new seeded order.
    """
    weights = np.array([domain.weight for domain in domains])
    counts = [math.ceil(items * share) + 1 for share in weights / weights.sum()]
    due = np.concatenate([(np.arange(count) + 0.5) / weight for count, weight in zip(counts, weights, strict=True)])
    which = np.concatenate([np.full(count, index) for index, count in enumerate(counts)])
    first = np.lexsort((which, due))[:items]
    domain_N = which[first]
    block_N = np.zeros(items, np.int64)
    for index, domain in enumerate(domains):
        places = np.flatnonzero(domain_N == index)
        block_N[places] = _shuffled(len(domain.blocks), len(places), seed=(seed, index))
    return domain_N, block_N


def _shuffled(blocks: int, count: int, *, seed: tuple[int, int]) -> NDArray[np.int64]:
    """`count` numbers below `blocks`: seeded permutations of all of them, one after another."""
    rounds = -(-count // blocks)
    drawn = [np.random.default_rng((*seed, number)).permutation(blocks) for number in range(rounds)]
    return np.concatenate([*drawn, np.empty(0, np.int64)])[:count]


class Mixture:
    """Every item of a run in order. Item i is always the same, so a killed run resumes without any saved state.

    `teachers` maps a domain's index to (log-probabilities, ids) of its parent, [block, T, M].
    """

    def __init__(
        self,
        domains: Sequence[Domain],
        *,
        items: int,
        seed: int,
        teachers: Mapping[int, tuple[torch.Tensor, torch.Tensor]] | None = None,
    ) -> None:
        self.domains = domains
        self.domain_N, self.block_N = order(domains, items=items, seed=seed)
        self.teachers = teachers or {}

    def __len__(self) -> int:
        return len(self.domain_N)

    def __getitem__(self, item: int) -> dict[str, torch.Tensor]:
        index, at = int(self.domain_N[item]), int(self.block_N[item])
        found = as_tensors(self.domains[index].blocks[at]) | {"owner": torch.tensor(self.domains[index].owner)}
        if index in self.teachers:
            log_probs, ids = self.teachers[index]
            found |= {"teacher": log_probs[at], "teacher_ids": ids[at]}
        return found

    def batch(self, items: Iterable[int], *, device: torch.device) -> dict[str, torch.Tensor]:
        """These items, stacked along a new first dimension."""
        rows = [self[item] for item in items]
        return {key: torch.stack([row[key] for row in rows]).to(device) for key in rows[0]}

    def targets(self, items: Iterable[int]) -> int:
        """How many tokens of these items the loss is taken over; a block's first token has none before it."""
        places = ((int(self.domain_N[item]), int(self.block_N[item])) for item in items)
        return sum(sum(self.domains[index].blocks[at].learn[1:]) for index, at in places)


def as_tensors(block: Block) -> dict[str, torch.Tensor]:
    """`input_ids` and `labels` [T] of a block; the label of a token outside the loss is -100."""
    ids = torch.tensor(block.ids)
    return {"input_ids": ids, "labels": ids.masked_fill(~torch.tensor(block.learn), -100)}
