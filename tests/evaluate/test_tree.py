"""Every token of every sequence is read once at its place, and sees exactly what stands before it."""

import random

import numpy as np
import pytest

from frankenmoe.evaluate.tree import LEAST_TRUNK, Trunk, plan


def walk(trunk: Trunk, before: list[int], sequences: list[tuple[int, ...]], seen: set[int]) -> int:
    """Checks a trunk and all below it; how many tokens they read."""
    path = [*before, *trunk.tokens]
    read = len(trunk.tokens)
    for number in trunk.through:
        assert list(sequences[number][: len(path)]) == path
        if len(sequences[number]) == len(path):
            seen.add(number)
    for row in trunk.forests:
        visible = row.visible()
        read += len(row.tokens)
        for number, columns in row.where.items():
            seen.add(number)
            assert path + [row.tokens[column] for column in columns] == list(sequences[number])
            assert [row.positions[column] for column in columns] == list(range(len(path), len(sequences[number])))
            for at, column in enumerate(columns):
                assert sorted(np.flatnonzero(visible[column])) == sorted(columns[: at + 1])
    return read + sum(walk(below, path, sequences, seen) for below in trunk.trunks)


@pytest.mark.parametrize("seed", range(40))
def test_any_sequences_are_read_whole(seed: int) -> None:
    rng = random.Random(seed)
    stems = [[rng.randrange(3) for _ in range(rng.randrange(1, 60))] for _ in range(4)]
    found = set()
    for _ in range(rng.randrange(1, 40)):
        stem = rng.choice(stems)[: rng.randrange(1, 60)]
        found.add(tuple(stem + [rng.randrange(3) for _ in range(rng.randrange(12))]))
    sequences = sorted(found)
    rng.shuffle(sequences)
    for row_tokens in (4, 30, 1000):
        seen: set[int] = set()
        walk(plan(sequences, row_tokens=row_tokens), [], sequences, seen)
        assert seen == set(range(len(sequences)))


def test_what_is_shared_is_read_once() -> None:
    opening = tuple(range(100))
    documents = [(*opening, 200 + document, *range(300, 340)) for document in range(5)]
    sequences = [(*document, 400 + choice) for document in documents for choice in range(4)]
    seen: set[int] = set()
    read = walk(plan(sequences, row_tokens=50), [], sequences, seen)
    assert read == len(opening) + sum(len(document) - len(opening) + 4 for document in documents)
    assert len(opening) >= LEAST_TRUNK
