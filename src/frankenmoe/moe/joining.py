"""Makes one cache of several, so that sequences of different lengths are continued at once, and takes it apart again.

Shape suffixes: B sequences, C columns of the longest one.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from frankenmoe.families.rotary import CONTEXT, MOVING, TURNING, with_nested

JOINED = (DynamicLayer, DynamicSlidingWindowLayer)  # they hold a column of keys and values per token, and replace both


def can_join(cache: Any) -> bool:
    """Whether this cache of one sequence can become a part of a larger one."""
    layers = getattr(cache, "layers", ())
    return bool(layers) and all(type(layer) in JOINED and layer.is_initialized for layer in layers)


def moves(config: Any) -> bool:
    """Whether the rotary angles of a token depend on the length of the whole input, so on who is beside it."""
    return any(each.get("rope_type") in MOVING for each in _rotary(config))


def turns(config: Any) -> tuple[int, ...]:
    """The lengths beyond which all rotary angles are others: a cache of fewer tokens is then of no use."""
    return tuple(each[CONTEXT] for each in _rotary(config) if each.get("rope_type") == TURNING)


def _rotary(config: Any) -> tuple[Mapping[str, Any], ...]:
    return with_nested(getattr(config.get_text_config(), "rope_parameters", None) or {})


def branch(cache: Any) -> Any:
    """The same cache of one sequence, which can be continued without a change of the given one."""
    return _with_layers(cache, map(copy.copy, cache.layers)) if can_join(cache) else copy.deepcopy(cache)


def joined(caches: Sequence[Any], lengths: Sequence[int]) -> Any:
    """The cache of several sequences of so many tokens; the shorter ones are padded on their left."""
    if len(caches) == 1:
        return caches[0]
    layers = zip(*(cache.layers for cache in caches), strict=True)
    return _with_layers(caches[0], (_stacked(each, seen=max(lengths)) for each in layers))


def parted(cache: Any, lengths: Sequence[int]) -> list[Any]:
    """The caches of the sequences in a joined one, within its memory."""
    if len(lengths) == 1:
        return [cache]

    def part(row: int, size: int) -> Any:
        return _each(cache, lambda states: states[row, None, :, -size:], seen=size)

    return [part(row, size) for row, size in enumerate(lengths)]


def compact(cache: Any) -> Any:
    """The cache of one sequence in memory of its own, so that what it was a part of can be freed."""
    return _each(cache, torch.clone, seen=cache.get_seq_length()) if can_join(cache) else cache


def padding(lengths: Sequence[int], device: torch.device) -> torch.Tensor | None:
    """[B, C + 1]: which columns of a joined cache, and of the token behind it, hold a token. None if all do."""
    if min(lengths) == max(lengths):
        return None
    absent_B1 = max(lengths) - torch.tensor(lengths, device=device)[:, None]
    return (torch.arange(max(lengths) + 1, device=device) >= absent_B1).long()


def _with_layers(cache: Any, layers: Any) -> Any:
    new = copy.copy(cache)
    new.layers = list(layers)
    return new


def _each(cache: Any, change: Callable[[torch.Tensor], torch.Tensor], *, seen: int) -> Any:
    return _with_layers(cache, (_layer(one, change(one.keys), change(one.values), seen=seen) for one in cache.layers))


def _stacked(layers: Sequence[Any], *, seen: int) -> Any:
    width = max(layer.keys.shape[2] for layer in layers)

    def stack(parts: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.cat([nn.functional.pad(part, (0, 0, width - part.shape[2], 0)) for part in parts])

    keys, values = stack([layer.keys for layer in layers]), stack([layer.values for layer in layers])
    return _layer(layers[0], keys, values, seen=seen)


def _layer(like: Any, keys: torch.Tensor, values: torch.Tensor, *, seen: int) -> Any:
    new = copy.copy(like)
    new.keys, new.values = keys, values
    if isinstance(new, DynamicSlidingWindowLayer):
        new.cumulative_length = seen
    return new
