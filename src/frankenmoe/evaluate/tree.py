"""Plans how to read token sequences so that each shared stretch is read once. Does not import torch.

A *trunk* is a stretch at the beginning of many sequences. Its keys and values are computed once and kept while
everything behind it is read. A *forest* is a row of what remains of some sequences, their branches side by side: every
token sees its trunk and its own ancestors in the row. Shape suffix: S tokens of a row.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

LEAST_TRUNK = 16  # tokens; reading a shorter stretch again is cheaper than a pass of its own


@dataclass(frozen=True)
class Forest:
    """Branches in one row: tokens, their positions, and the column `before` each on its branch (-1: the trunk).

    `where[s]` lists the columns of sequence s behind the trunk.
    """

    tokens: tuple[int, ...]
    positions: tuple[int, ...]
    before: tuple[int, ...]
    where: dict[int, list[int]]

    @property
    def single(self) -> bool:
        """Whether the row is one unbranched sequence, for which plain causal attention is right."""
        return all(before == column - 1 for column, before in enumerate(self.before))

    def visible(self) -> NDArray[np.bool_]:
        """Which columns each column sees, [S, S]: itself and its ancestors."""
        seen = np.eye(len(self.tokens), dtype=bool)
        for column, before in enumerate(self.before):
            if before >= 0:
                seen[column] |= seen[before]
        return seen


@dataclass(frozen=True)
class Trunk:
    """`tokens` from position `start` on, the forests and trunks behind it, and the sequences (numbers) `through` it."""

    start: int
    tokens: tuple[int, ...]
    forests: tuple[Forest, ...]
    trunks: tuple["Trunk", ...]
    through: tuple[int, ...]


def plan(sequences: Sequence[Sequence[int]], *, row_tokens: int) -> Trunk:
    """The reading plan of distinct, non-empty sequences, with rows of at most `row_tokens` tokens.

    The root's own stretch is empty. Only a sequence that shares nothing makes a longer row. Every token of the prefix
    tree is read once, except stretches shorter than LEAST_TRUNK before branches that are too large for a row.
    """
    return _Sorted(sequences, row_tokens).trunk(range(len(sequences)), depth=0, start=0)


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    length = min(len(a), len(b))
    if a[:length] == b[:length]:
        return length
    low, high = 0, length  # the first `low` agree, the first `high` do not
    while high - low > 1:
        middle = (low + high) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle
    return low


class _Sorted:
    """Sequences in lexical order. A range of places in it stands for the sequences there, which share a beginning."""

    def __init__(self, sequences: Sequence[Sequence[int]], row_tokens: int) -> None:
        self.sequences, self.row_tokens = sequences, row_tokens
        self.order = sorted(range(len(sequences)), key=lambda index: tuple(sequences[index]))
        # how many tokens each shares with the one before
        self.shared = [0, *(_common(sequences[a], sequences[b]) for a, b in pairwise(self.order))]

    def trunk(self, places: range, *, depth: int, start: int) -> Trunk:
        """The trunk from `start` to `depth` of sequences that agree up to `depth`."""
        families: list[range] = []
        trunks: list[Trunk] = []
        waiting = list(self.children(places, depth))
        while waiting:
            some = waiting.pop()
            size = self.size(some, depth)
            if size == 0:  # a sequence that ends with the trunk
                continue
            if size <= self.row_tokens or len(some) == 1:
                families.append(some)
                continue
            common = min([len(self.at(some[0])), *(self.shared[place] for place in some[1:])])
            if common - depth >= LEAST_TRUNK:
                trunks.append(self.trunk(some, depth=common, start=depth))
            else:
                waiting += self.children(some, common)
        forests = tuple(
            _forest(self.sequences, [self.order[place] for family in group for place in family], depth)
            for group in _packed(families, lambda family: self.size(family, depth), self.row_tokens)
        )
        through = tuple(self.order[place] for place in places) if depth > start else ()
        tokens = tuple(self.at(places[0])[start:depth]) if depth > start else ()
        return Trunk(start, tokens, forests, tuple(reversed(trunks)), through)

    def at(self, place: int) -> Sequence[int]:
        return self.sequences[self.order[place]]

    def children(self, places: range, depth: int) -> Iterator[range]:
        """The ranges of sequences that agree beyond `depth`."""
        first = places.start
        for place in range(first + 1, places.stop + 1):
            if place == places.stop or self.shared[place] <= depth:
                yield range(first, place)
                first = place

    def size(self, places: range, depth: int) -> int:
        """Tokens to read behind the first `depth`."""
        rest = sum(len(self.at(place)) - max(self.shared[place], depth) for place in places[1:])
        return len(self.at(places[0])) - depth + rest


def _packed(families: Sequence[range], size: Callable[[range], int], row_tokens: int) -> list[list[range]]:
    """Families grouped into rows, the largest first, each in the first row with room."""
    groups: list[list[range]] = []
    room: list[int] = []
    open_rows: list[int] = []
    for family in sorted(families, key=lambda each: -size(each)):
        need = size(family)
        at = next((index for index in open_rows if room[index] >= need), None)
        if at is None:
            groups.append([family])
            room.append(row_tokens - need)
            open_rows.append(len(groups) - 1)
        else:
            groups[at].append(family)
            room[at] -= need
        open_rows = [index for index in open_rows[-64:] if room[index] > 0]
    return groups


def _forest(sequences: Sequence[Sequence[int]], members: Sequence[int], depth: int) -> Forest:
    """The members' tokens behind `depth`, shared ones once, depth first."""
    tokens: list[int] = []
    positions: list[int] = []
    before: list[int] = []
    where: dict[int, list[int]] = {}
    last: Sequence[int] = ()
    path: list[int] = []
    for member in sorted(members, key=lambda index: tuple(sequences[index])):
        sequence = sequences[member]
        same = max(_common(last, sequence), depth)
        path = path[: same - depth]
        for position in range(same, len(sequence)):
            before.append(path[-1] if path else -1)
            path.append(len(tokens))
            tokens.append(sequence[position])
            positions.append(position)
        where[member], last = path, sequence
    return Forest(tuple(tokens), tuple(positions), tuple(before), where)
