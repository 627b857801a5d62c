"""How many tokens fit into one forward pass, estimated from the model's sizes."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from frankenmoe.errors import PlanError
from frankenmoe.moe.device import free_memory, ran_out
from frankenmoe.moe.processes import neighbours

CPU_TOKENS = 512  # more are no faster on a CPU and take more memory
GPU_TOKENS = 16384
SHARE = {"cpu": 0.25, "cuda": 0.7}  # of the free memory, used by default
FFN_FIELDS = ("intermediate_size", "ffn_dim", "n_inner", "d_ff")
HIDDEN_COPIES = 10  # of the hidden state in memory in a layer: residual, norm, q, k, v, attention, output


@dataclass(frozen=True)
class Sizes:
    """Bytes of memory per token: `layer` while a layer runs, `kept` in the cache of all layers, `mask` per visible
    token, `logits` where it is scored."""

    layer: int
    kept: int
    mask: int
    logits: int


def sizes(model: Any) -> Sizes:
    """The sizes of a model, from its config. A token of an MoE goes through top-k FFNs."""
    config = model.config.get_text_config()
    width = torch.finfo(model.dtype).bits // 8
    hidden = config.hidden_size
    ffn = next((value for name in FFN_FIELDS if (value := getattr(config, name, None))), 4 * hidden)
    chosen = max(
        (top_k for module in model.modules() if isinstance(top_k := getattr(module, "top_k", 1), int)), default=1
    )
    # layers of one model may have heads of different sizes
    several = getattr(config, "is_heterogeneous", False)
    layers = [config.per_layer_config[layer] if several else config for layer in range(config.num_hidden_layers)]
    keys = [2 * _keys(layer, hidden) * width for layer in layers]
    return Sizes(
        layer=width * (HIDDEN_COPIES * hidden + 3 * ffn * chosen) + 2 * max(keys),
        kept=sum(keys),
        mask=width,
        logits=2 * 4 * config.vocab_size,
    )


def _keys(config: Any, hidden: int) -> int:
    """How many numbers the keys of one token have, in a layer with this config."""
    all_heads = getattr(config, "num_attention_heads", None) or 1
    heads = getattr(config, "num_key_value_heads", None) or all_heads
    return int(heads * (getattr(config, "head_dim", None) or hidden // all_heads))


@dataclass
class Budget:
    """The memory and tokens that one forward pass may use. Shrinks when memory runs out anyway."""

    sizes: Sizes
    bytes: int
    tokens: int
    rows: int | None = None

    def fits(self, rows: int, tokens: int, shared: int) -> bool:
        """Whether one pass may read `rows` rows of `tokens` tokens behind `shared` common ones."""
        if self.rows is not None and rows > self.rows:
            return False
        return (self.rows is not None or rows * tokens <= self.tokens) and self.cost(rows, tokens, shared) <= self.bytes

    def cost(self, rows: int, tokens: int, shared: int) -> int:
        """Bytes of such a pass, with the cache of the common tokens."""
        seen = shared + tokens
        per_row = tokens * self.sizes.layer + tokens * seen * self.sizes.mask + self.sizes.logits
        return rows * (per_row + seen * self.sizes.layer // HIDDEN_COPIES) + seen * self.sizes.kept

    def most(self, rows: int, tokens: int, shared: int = 0) -> int:
        """How many of `rows` rows one pass may read. Raises PlanError if a single row does not fit."""
        self.check(tokens, shared)
        return next((count for count in range(1, rows) if not self.fits(count + 1, tokens, shared)), rows)

    def check(self, tokens: int, shared: int = 0) -> None:
        """Raises PlanError if a single row of `tokens` tokens behind `shared` ones does not fit."""
        if self.cost(1, tokens, shared) > self.bytes:
            raise PlanError(
                f"too little memory for a single sequence of {shared + tokens} tokens: it takes about "
                f"{self.cost(1, tokens, shared) / 1e6:.3g} MB, allowed are {self.bytes / 1e6:.3g} MB",
                hint="allow more with --memory, load the model with --dtype bfloat16, or free memory",
            )

    @contextmanager
    def shrinking(self, rows: int, tokens: int) -> Iterator[None]:
        """Halves the budget if memory runs out in the block, which the caller then repeats with fewer rows.

        Raises PlanError for a single row.
        """
        try:
            yield
        except Exception as error:
            if not ran_out(error):
                raise
            if rows <= 1:
                raise PlanError(
                    f"too little memory for a single sequence of {tokens} tokens",
                    hint="free memory, load the model with --dtype bfloat16, or use a larger machine",
                ) from error
            self.rows = max(1, rows // 2)
            self.tokens = max(1, rows * tokens // 2)


def budget(model: Any, *, bytes_at_most: int | None = None, rows: int | None = None) -> Budget:
    """A share of the free memory of the model's device, or `bytes_at_most`. `rows` fixes the rows of a pass instead."""
    device = model.device
    together = neighbours() if device.type == "cpu" else 1  # processes that share this memory
    share = SHARE.get(device.type, 0.5) / together
    allowed = bytes_at_most if bytes_at_most is not None else int(free_memory(device) * share)
    tokens = CPU_TOKENS if device.type == "cpu" else GPU_TOKENS
    return Budget(sizes(model), allowed, tokens, rows)
