"""Text per domain -> which blocks a step learns from, as a pure function of the step; knows nothing of losses.

Since item i of the whole run is always the same block, a run that is killed goes on mid-epoch without any saved state.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from frankenmoe.data.blocks import Block, hold_out, text_blocks
from frankenmoe.data.documents import read_documents
from frankenmoe.errors import PlanError, SourceError
from frankenmoe.recipetrain import Train
from frankenmoe.suggest import did_you_mean

MOST_BLOCKS = 4096  # of a domain that are read at least where there are so many; more only if the run needs them


@dataclass(frozen=True)
class Domain:
    """One kind of text: its blocks to learn from and those for the guard. `owner` is its expert, -1 for none."""

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
    settings: Train,
    experts: Sequence[str],
    vocab: int,
) -> tuple[Domain, ...]:
    """Every domain's text in whole blocks, a share held out. A domain named like an expert is owned by it.

    Raises PlanError where there is no data or a weight is for no domain, SourceError for text that cannot be read, is
    shorter than two blocks, or has tokens that the model does not know.
    """
    if not data:
        raise PlanError(
            "there is nothing to learn from: neither --data nor data in the recipe",
            hint="say --data NAME=FILE for each kind of text, where NAME is the expert that it belongs to",
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
                f"the data of {name} is one block of {settings.block} tokens, expected two at least: one to learn "
                "from, and one held out to measure with",
                hint="give more text, or shorter blocks (--block)",
            )
        highest = max(max(block.ids) for block in blocks)
        if highest >= vocab:
            raise SourceError(
                f"the tokenizer makes token {highest} of the data of {name}, but the model has {vocab} tokens",
                hint="put the model's own tokenizer beside the base's weights",
            )
        kept, held = hold_out(blocks, share=settings.hold_out)
        owner = experts.index(name) if name in experts else -1
        found.append(Domain(name, owner, weight, tuple(kept), tuple(held[: settings.guard_blocks])))
    return tuple(found)


def order(domains: Sequence[Domain], *, items: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(domain, block within it) of every item of a run.

    Domains come in fixed proportion to their weights, spread evenly (a stride schedule, so that any stretch of items
    holds its share of each), and every domain is gone through in a new seeded order each time it begins again.
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
    """`count` numbers below `blocks`, each permutation of all of them used up before the next begins."""
    rounds = -(-count // blocks)
    drawn = [np.random.default_rng((*seed, number)).permutation(blocks) for number in range(rounds)]
    return np.concatenate([*drawn, np.empty(0, np.int64)])[:count]


class Mixture(Dataset[dict[str, torch.Tensor]]):
    """Every item of a run in order; item i is the same whatever was drawn before it.

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


def as_tensors(block: Block) -> dict[str, torch.Tensor]:
    """`input_ids` and `labels` [T] of a block; the label of a token that is not learnt is -100."""
    ids = torch.tensor(block.ids)
    return {"input_ids": ids, "labels": ids.masked_fill(~torch.tensor(block.learn), -100)}
