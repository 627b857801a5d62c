"""How many tokens fit into one forward pass: bytes counted from the model's own sizes; knows nothing of scores."""

import os
from dataclasses import dataclass
from typing import Any

import torch

from frankenmoe.errors import PlanError

CPU_TOKENS = 512  # more at once is no faster on a CPU, and only takes memory
GPU_TOKENS = 16384
SHARE = {"cpu": 0.25, "cuda": 0.7}  # of what is free, taken by default
FFN_FIELDS = ("intermediate_size", "ffn_dim", "n_inner", "d_ff")
HIDDEN_COPIES = 10  # of the hidden state that are alive at once in a layer: residual, norm, q, k, v, attention, output


@dataclass(frozen=True)
class Sizes:
    """What one token costs in a model, in bytes: `layer` while a layer runs, `kept` in the cache of all layers,
    `mask` per token that it may see, `logits` where it is scored."""

    layer: int
    kept: int
    mask: int
    logits: int


def sizes(model: Any) -> Sizes:
    """From the model's config; an MoE's tokens go through as many FFNs as its routers choose."""
    config = model.config.get_text_config()
    width = torch.finfo(model.dtype).bits // 8
    hidden = config.hidden_size
    ffn = next((value for name in FFN_FIELDS if (value := getattr(config, name, None))), 4 * hidden)
    chosen = max(
        (top_k for module in model.modules() if isinstance(top_k := getattr(module, "top_k", 1), int)), default=1
    )
    all_heads = getattr(config, "num_attention_heads", None) or 1
    heads = getattr(config, "num_key_value_heads", None) or all_heads
    head = getattr(config, "head_dim", None) or hidden // all_heads
    keys = 2 * heads * head * width
    return Sizes(
        layer=width * (HIDDEN_COPIES * hidden + 3 * ffn * chosen) + 2 * keys,
        kept=keys * config.num_hidden_layers,
        mask=width,
        logits=2 * 4 * config.vocab_size,
    )


def free_memory(device: torch.device) -> int:
    """Bytes that can be had on a device now."""
    if device.type == "cuda":
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + reserved
    with open("/proc/meminfo") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


@dataclass
class Budget:
    """How much one forward pass may take; shrinks when memory runs out all the same."""

    sizes: Sizes
    bytes: int
    tokens: int
    rows: int | None = None

    def fits(self, rows: int, tokens: int, shared: int) -> bool:
        """Whether `rows` rows of `tokens` tokens behind `shared` common ones may be read at once."""
        if self.rows is not None and rows > self.rows:
            return False
        return (self.rows is not None or rows * tokens <= self.tokens) and self.cost(rows, tokens, shared) <= self.bytes

    def cost(self, rows: int, tokens: int, shared: int) -> int:
        """Bytes of such a pass, the shared stretch's cache included."""
        seen = shared + tokens
        per_row = tokens * self.sizes.layer + tokens * seen * self.sizes.mask + self.sizes.logits
        return rows * (per_row + seen * self.sizes.layer // HIDDEN_COPIES) + seen * self.sizes.kept

    def check(self, tokens: int, shared: int = 0) -> None:
        """PlanError where not even one row of `tokens` tokens behind `shared` ones may be read."""
        if self.cost(1, tokens, shared) > self.bytes:
            raise PlanError(
                f"too little memory for a single sequence of {shared + tokens} tokens: it takes about "
                f"{self.cost(1, tokens, shared) / 1e6:.3g} MB, allowed are {self.bytes / 1e6:.3g} MB",
                hint="allow more with --memory, load the model with --dtype bfloat16, or free memory",
            )

    def shrink(self, rows: int, tokens: int) -> None:
        """Memory ran out for a pass of that size: from now on half of it. PlanError where that was a single row."""
        if rows <= 1:
            raise PlanError(
                f"too little memory for a single sequence of {tokens} tokens",
                hint="free memory, load the model with --dtype bfloat16, or use a larger machine",
            )
        self.rows = max(1, rows // 2)
        self.tokens = max(1, rows * tokens // 2)


def budget(model: Any, *, bytes_at_most: int | None = None, rows: int | None = None) -> Budget:
    """A share of what is free on the model's device, or `bytes_at_most`; `rows` fixes the rows of a pass instead."""
    device = model.device
    allowed = bytes_at_most if bytes_at_most is not None else int(free_memory(device) * SHARE.get(device.type, 0.5))
    tokens = CPU_TOKENS if device.type == "cpu" else GPU_TOKENS
    return Budget(sizes(model), allowed, tokens, rows)


def ran_out(error: BaseException) -> bool:
    """Whether an error is the allocator's."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "allocate memory" in str(error)


def threads() -> int:
    """How many threads torch computes with."""
    return torch.get_num_threads() or os.cpu_count() or 1
