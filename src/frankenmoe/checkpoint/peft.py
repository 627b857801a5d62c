"""Writes LoRA adapters in PEFT's format, tensor by tensor. Does not import torch."""

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from frankenmoe.checkpoint.cast import Floats, encode
from frankenmoe.checkpoint.tensors import DTYPES, TensorRef, TensorWrite
from frankenmoe.checkpoint.weights import ADAPTER
from frankenmoe.checkpoint.writer import write_atomic, write_shard

PREFIX = "base_model.model."
CONFIG, WEIGHTS = "adapter_config.json", ADAPTER
SPOOL = f"{WEIGHTS}.spool"  # the factors in the order they came, until their header is known


def adapter_config(ranks: Mapping[str, int], *, base: str | None) -> dict[str, Any]:
    """The content of adapter_config.json for layers of these ranks, with scale 1 in every layer.

    `base` is the name or path of the model that the adapter belongs to.
    """
    sizes = list(ranks.values())
    common = max(sorted(set(sizes)), key=sizes.count)
    others = {re.escape(name): rank for name, rank in ranks.items() if rank != common}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_dropout": 0.0,
        "r": common,
        "lora_alpha": common,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(ranks),
        "use_dora": False,
        "use_rslora": False,
    }


class AdapterWriter:
    """Collects factors in `folder` without keeping them in memory; `finish` makes an adapter of them.

    As a context manager it removes what it spooled.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file = (folder / SPOOL).open("wb")
        self._writes: list[TensorWrite] = []
        self._ranks: dict[str, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(OSError):
            self._file.close()
        (self._folder / SPOOL).unlink(missing_ok=True)

    def add(self, module: str, a_RI: Floats, b_OR: Floats, *, dtype: str) -> int:
        """Appends both factors of one linear layer as `dtype`, a safetensors type; returns their bytes."""
        for letter, factor in (("A", a_RI), ("B", b_OR)):
            name, start = f"{PREFIX}{module}.lora_{letter}.weight", self._file.tell()
            self._file.write(encode(factor.reshape(-1), dtype=dtype).tobytes())
            ref = TensorRef(name, dtype, factor.shape, self._folder / SPOOL, start, self._file.tell())
            self._writes.append(TensorWrite(name, dtype, factor.shape, (ref,)))
        self._ranks[module] = a_RI.shape[0]
        return sum(write.nbytes for write in self._writes[-2:])

    def finish(self, *, base: str | None) -> None:
        """Writes adapter_model.safetensors, then adapter_config.json. Raises NumericsError for NaN or infinity."""
        self._file.close()
        write_shard(
            self._folder / WEIGHTS, self._writes, metadata={"format": "pt"}, on_bytes=lambda amount: None, scanned=set()
        )
        config = adapter_config(self._ranks, base=base)
        write_atomic(self._folder / CONFIG, (json.dumps(config, indent=2) + "\n").encode())


def adapter_bytes(shapes: Sequence[tuple[int, int]], *, rank: int, dtype: str) -> int:
    """Bytes of the factors of matrices [O, I] at a rank, which no matrix exceeds with its shorter side."""
    return sum(min(rank, *shape) * sum(shape) for shape in shapes) * DTYPES[dtype].itemsize
