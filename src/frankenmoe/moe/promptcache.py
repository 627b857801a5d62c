"""Keeps the keys and values of earlier sequences, so that a prompt that continues one is not computed again."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch

SEQUENCES = 4  # kept at once, such as conversations in several windows
BYTES = 2**30  # of all but the latest, which is kept whatever its size
ENOUGH = 0.5  # of a kept prompt a new one must share this much; a smaller part is computed again, and both are kept


@dataclass(frozen=True)
class Kept:
    """A sequence with the cache of its tokens, the first of which, the `prompt`, were not generated.

    Only what is computed in the same `way` may use it.
    """

    ids: tuple[int, ...]
    prompt: int
    cache: Any
    way: Hashable


class PromptCache:
    """The latest sequences of one model with their caches, those of transformers.

    `turns` are the lengths beyond which the model computes all tokens in another way.
    """

    def __init__(self, *, sequences: int = SEQUENCES, turns: Sequence[int] = ()) -> None:
        self._kept: list[Kept] = []
        self._most, self._turns = sequences, turns

    def take(self, ids: Sequence[int], *, way: Hashable = None) -> tuple[Any, int]:
        """(a cache of the first of `ids`, how many they are); (None, 0) if no kept sequence begins like `ids`.

        At least one of `ids` is left to compute. The cache is no longer kept here, because generation changes it.
        """
        found = [
            (common(each.ids, ids[:-1]), each) for each in self._kept if each.way == way and self._alike(each.ids, ids)
        ]
        length, best = max(found, key=lambda pair: pair[0], default=(0, None))
        if best is None or length < 1 or length < ENOUGH * best.prompt:
            return None, 0
        self._kept = [each for each in self._kept if each is not best]
        try:
            if length < len(best.ids):
                best.cache.crop(length - len(best.ids))
        except (RuntimeError, ValueError):  # linear attention, or beyond a window: not to be undone
            return None, 0
        return best.cache, length

    def keep(self, ids: Sequence[int], cache: Any, *, prompt: int, way: Hashable = None) -> None:
        """Keeps the cache of exactly `ids`. One of other length, or of a kind that cannot be measured, is not kept."""
        if cache is not None and hasattr(cache, "crop") and cache.get_seq_length() == len(ids) > 0:
            self._kept = [*self._kept, Kept(tuple(ids), prompt, cache, way)][-self._most :]
            while len(self._kept) > 1 and sum(size(each.cache) for each in self._kept) > BYTES:
                del self._kept[0]

    def _alike(self, one: Sequence[int], other: Sequence[int]) -> bool:
        return all((len(one) > turn) == (len(other) > turn) for turn in self._turns)

    def clear(self) -> None:
        """Forgets all sequences, after the weights have changed."""
        self._kept = []


def size(cache: Any) -> int:
    """Bytes of the tensors in a cache of transformers."""
    held = (part for layer in getattr(cache, "layers", ()) for part in vars(layer).values())
    parts = (one for part in held for one in (part.values() if isinstance(part, dict) else (part,)))
    return sum(part.nbytes for part in parts if isinstance(part, torch.Tensor))


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """The number of tokens with which both sequences begin."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
