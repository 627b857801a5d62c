"""Token sequences -> the order in which each shared stretch is read once; pure, knows nothing of models or scores.

A *trunk* is a stretch that many sequences begin with: its keys and values are computed once and kept while all that
follows it is read. A *row* is a small forest of what remains, laid side by side: every token sees its trunk and its own
ancestors in the row, nothing else. Shape suffix: S tokens of a row.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

LEAST_TRUNK = 16  # tokens; a shorter stretch is cheaper to read again than to keep


@dataclass(frozen=True)
class Segment:
    """A stretch of a row: `length` tokens from column `start`, behind the segment `parent` (-1: behind the trunk)."""

    start: int
    length: int
    parent: int


@dataclass(frozen=True)
class Row:
    """A forest in one line: its tokens, the position of each, its segments; `where[s]` lists the columns of sequence s
    from the trunk's end on."""

    tokens: tuple[int, ...]
    positions: tuple[int, ...]
    segments: tuple[Segment, ...]
    where: dict[int, list[int]]

    @property
    def single(self) -> bool:
        """Whether the row is one unbranched sequence, so that plain causal attention is right."""
        return len(self.segments) == 1

    def visible(self) -> NDArray[np.bool_]:
        """Which column sees which, [S, S]: itself and its ancestors."""
        seen = np.zeros((len(self.tokens), len(self.tokens)), dtype=bool)
        for segment in self.segments:
            end = segment.start + segment.length
            if segment.parent >= 0:
                parent = self.segments[segment.parent]
                seen[segment.start : end] = seen[parent.start + parent.length - 1]
            seen[segment.start : end, segment.start : end] = np.tri(segment.length, dtype=bool)
        return seen


@dataclass(frozen=True)
class Trunk:
    """`tokens` from position `start` on, what hangs below, and the numbers of the sequences that pass `through`."""

    start: int
    tokens: tuple[int, ...]
    rows: tuple[Row, ...]
    trunks: tuple["Trunk", ...]
    through: tuple[int, ...]


def plan(sequences: Sequence[Sequence[int]], *, row_tokens: int) -> Trunk:
    """The reading order of distinct sequences, none of them empty, with rows of about `row_tokens` tokens.

    The root's own stretch is empty. Only a sequence that shares nothing makes a longer row. Every token of the radix
    tree is read once, except stretches under LEAST_TRUNK where one branch is too large for a row.
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
    """The trunk from `start` to `depth` over order[low:high], all of which agree that far."""
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
    rows = tuple(
        _row(sequences, [order[at] for family in group for at in range(*family)], depth)
        for group in _packed(
            families, lambda each: _size(sequences, order, shared, each[0], each[1], depth), row_tokens
        )
    )
    through = tuple(order[low:high]) if depth > start else ()
    tokens = tuple(sequences[order[low]][start:depth]) if depth > start else ()
    return Trunk(start, tokens, rows, tuple(reversed(trunks)), through)


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
    """Tokens to read for order[low:high] behind the first `depth` ones."""
    first = len(sequences[order[low]]) - depth
    return first + sum(len(sequences[order[at]]) - max(shared[at], depth) for at in range(low + 1, high))


def _packed(
    families: Sequence[tuple[int, int]], size: Callable[[tuple[int, int]], int], row_tokens: int
) -> list[list[tuple[int, int]]]:
    """Families put together into rows, the largest first, each into the first row that has room."""
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


def _row(sequences: Sequence[Sequence[int]], members: Sequence[int], depth: int) -> Row:
    """The radix tree of what the members (sorted) have behind `depth`, depth first."""
    tokens: list[int] = []
    positions: list[int] = []
    where: dict[int, list[int]] = {}
    links: list[int] = []  # the column before each column on its path; -1 for the trunk
    before: list[int] = []
    previous: Sequence[int] = ()
    for member in sorted(members, key=lambda index: tuple(sequences[index])):
        sequence = sequences[member]
        same = max(_common(previous, sequence), depth) if before else depth
        path = before[: same - depth]
        for position in range(same, len(sequence)):
            links.append(path[-1] if path else -1)
            path.append(len(tokens))
            tokens.append(sequence[position])
            positions.append(position)
        where[member] = path
        before, previous = path, sequence
    return Row(tuple(tokens), tuple(positions), _segments(links), where)


def _segments(links: Sequence[int]) -> tuple[Segment, ...]:
    """Columns grouped into unbranched stretches; a stretch ends where a later column branches off."""
    branching = {link for column, link in enumerate(links) if link != column - 1}
    segments: list[Segment] = []
    owner: dict[int, int] = {}
    start = 0
    for column in range(1, len(links) + 1):
        if column < len(links) and links[column] == column - 1 and column - 1 not in branching:
            continue
        parent = links[start]
        segments.append(Segment(start, column - start, owner.get(parent, -1)))
        owner[column - 1] = len(segments) - 1
        start = column
    return tuple(segments)
