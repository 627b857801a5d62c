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
    order = sorted(range(len(sequences)), key=lambda index: tuple(sequences[index]))
    shared = [0, *(_common(sequences[a], sequences[b]) for a, b in pairwise(order))]
    return _trunk(sequences, order, shared, 0, len(order), depth=0, start=0, row_tokens=row_tokens)


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


def _trunk(
    sequences: Sequence[Sequence[int]],
    order: Sequence[int],
    shared: Sequence[int],
    low: int,
    high: int,
    *,
    depth: int,
    start: int,
    row_tokens: int,
) -> Trunk:
    """The trunk from `start` to `depth` of order[low:high], which agree up to `depth`."""
    families: list[tuple[int, int]] = []
    trunks: list[Trunk] = []
    waiting = list(_children(sequences, order, shared, low, high, depth))
    while waiting:
        first, last = waiting.pop()
        size = _size(sequences, order, shared, first, last, depth)
        if size == 0:  # a sequence that ends with the trunk
            continue
        if size <= row_tokens or last - first == 1:
            families.append((first, last))
            continue
        common = min([len(sequences[order[first]]), *shared[first + 1 : last]])
        if common - depth >= LEAST_TRUNK:
            below = _trunk(sequences, order, shared, first, last, depth=common, start=depth, row_tokens=row_tokens)
            trunks.append(below)
        else:
            waiting += _children(sequences, order, shared, first, last, common)
    forests = tuple(
        _forest(sequences, [order[at] for family in group for at in range(*family)], depth)
        for group in _packed(
            families, lambda each: _size(sequences, order, shared, each[0], each[1], depth), row_tokens
        )
    )
    through = tuple(order[low:high]) if depth > start else ()
    tokens = tuple(sequences[order[low]][start:depth]) if depth > start else ()
    return Trunk(start, tokens, forests, tuple(reversed(trunks)), through)


def _children(
    sequences: Sequence[Sequence[int]], order: Sequence[int], shared: Sequence[int], low: int, high: int, depth: int
) -> Iterator[tuple[int, int]]:
    """Ranges of order[low:high] that agree beyond `depth`."""
    first = low
    for at in range(low + 1, high + 1):
        if at == high or shared[at] <= depth:
            yield first, at
            first = at


def _size(
    sequences: Sequence[Sequence[int]], order: Sequence[int], shared: Sequence[int], low: int, high: int, depth: int
) -> int:
    """Tokens to read for order[low:high] behind the first `depth`."""
    first = len(sequences[order[low]]) - depth
    return first + sum(len(sequences[order[at]]) - max(shared[at], depth) for at in range(low + 1, high))


def _packed(
    families: Sequence[tuple[int, int]], size: Callable[[tuple[int, int]], int], row_tokens: int
) -> list[list[tuple[int, int]]]:
    """Families grouped into rows, the largest first, each in the first row with room."""
    groups: list[list[tuple[int, int]]] = []
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
