"""A cache for models without an attention layer, such as those of Mamba layers alone.

transformers asks an attention layer how many tokens its cache holds. Without one it raises, in every forward with a
cache and in `generate`. Here the tokens are counted where they are read.
"""

import inspect
from typing import Any

from torch import nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin


class CountingCache(DynamicCache):  # type: ignore[misc]  # transformers has no types
    """A cache of states that have no length. `seen` is the number of tokens that were read into it."""

    def __init__(self, config: Any) -> None:
        super().__init__(config=config)
        self.seen = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        self.seen -= abs(tokens_to_remove)

    def reset(self) -> None:
        super().reset()
        self.seen = 0


def counting(model: PreTrainedModel) -> PreTrainedModel:
    """The same model. If it has no attention layer, it now takes a CountingCache wherever it would make a cache."""
    own: Any = model
    if not type(model).__module__.startswith("transformers.") or not own._supports_default_dynamic_cache():
        return model
    decoder = model.get_decoder()
    if "past_key_values" not in inspect.signature(decoder.forward).parameters:  # as in Mamba itself
        return model
    layers = DynamicCache(config=model.config.get_text_config(decoder=True)).layers
    if not layers or any(isinstance(layer, CacheLayerMixin) for layer in layers):
        return model
    own._supports_default_dynamic_cache = lambda: False  # so `generate` leaves it to the first forward
    decoder.register_forward_pre_hook(_begin, with_kwargs=True)
    decoder.register_forward_hook(_count, with_kwargs=True)
    return model


def _begin(decoder: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
    config: Any = decoder.config
    asked = options.get("use_cache")
    if (config.use_cache if asked is None else asked) and options.get("past_key_values") is None:
        options = {**options, "past_key_values": CountingCache(config)}
    return args, options


def _count(_decoder: nn.Module, args: tuple[Any, ...], options: dict[str, Any], _out: Any) -> None:
    cache = options.get("past_key_values")
    if isinstance(cache, CountingCache):
        given = (*args[:1], options.get("input_ids"), options.get("inputs_embeds"))
        cache.seen += next(each for each in given if each is not None).shape[1]
