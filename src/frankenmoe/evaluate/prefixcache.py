"""A transformers cache that begins with the keys and values of a prefix that many sequences share.

Shape suffixes: B rows, H key heads, P tokens of the shared prefix, T new tokens, D head size.
"""

from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin


class SharedLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer's keys and values [1, H, P, D], visible to every row of a batch. `keep` stores new ones too."""

    is_sliding = False

    def __init__(
        self, keys: torch.Tensor | None = None, values: torch.Tensor | None = None, *, keep: bool = True, **_: Any
    ) -> None:
        super().__init__()
        self.keys, self.values, self.keep = keys, values, keep
        self.is_initialized = keys is not None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Puts the shared states before the new ones [B, H, T, D] of each row: [B, H, P + T, D]."""
        keys, values = _behind(self.keys, key_states), _behind(self.values, value_states)
        if self.keep:
            self.keys, self.values, self.is_initialized = keys, values, True
        return keys, values

    def get_seq_length(self, *_: Any) -> int:
        return 0 if self.keys is None else int(self.keys.shape[-2])

    def get_mask_sizes(self, query_length: int, *_: Any) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1


def _behind(shared: torch.Tensor | None, new: torch.Tensor) -> torch.Tensor:
    if shared is None:
        return new
    return torch.cat([shared.expand(len(new), -1, -1, -1), new], dim=-2)


def shared_cache(past: Cache | None, *, keep: bool) -> Cache:
    """A cache that begins with the states of `past` and does not change `past`. With `keep` it stores new states."""
    if past is None:
        return Cache(layer_class_to_replicate=SharedLayer)
    return Cache(layers=[SharedLayer(layer.keys, layer.values, keep=keep) for layer in past.layers])
