"""Opens checkpoint and adapter folders and maps their tensors into memory."""

import mmap
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from frankenmoe.checkpoint.header import read_header
from frankenmoe.checkpoint.jsonfile import read_object
from frankenmoe.checkpoint.links import check_links
from frankenmoe.checkpoint.tensors import TensorRef
from frankenmoe.checkpoint.weights import ADAPTER, Weights, refuse_pickles, unfinished, weights_of
from frankenmoe.errors import SourceError

_MAP_NORESERVE = 0x4000 if sys.platform == "linux" else 0  # `mmap` does not name it before Python 3.13
_MAPPED_FILES = 256  # each holds a file descriptor, and 1024 is a common limit


@dataclass(frozen=True)
class Checkpoint:
    """A dense model on disk; `tensors` and `files` are empty if the folder has no weights.

    `notes` says which other weights in the folder are not used, and which are links. `outer` is the config of the model
    that it is nested in, if it is.
    """

    folder: Path
    config: dict[str, Any]
    tensors: Mapping[str, TensorRef]
    files: tuple[Path, ...]
    notes: tuple[str, ...] = ()
    outer: Mapping[str, Any] | None = None

    @property
    def has_weights(self) -> bool:
        return bool(self.files)


@dataclass(frozen=True)
class Adapter:
    """A LoRA in PEFT format on disk; `config` is its adapter_config.json."""

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, TensorRef]


def open_checkpoint(folder: Path, *, whole: bool = True) -> Checkpoint:
    """Reads the config and the safetensors headers of `folder`.

    Weights are what transformers would load, or a single file of any name (see checkpoint/weights.py). Without
    `whole`, an incomplete download counts as a folder without weights. Raises SourceError if anything is missing,
    malformed or a link out of the folder, or if there are only pickled weights.
    """
    links = check_links(folder) if folder.is_dir() else ()
    config = _config(folder, "config.json")
    found = weights_of(folder, config) if whole or not unfinished(folder) else Weights({}, ())
    return Checkpoint(folder, config, found.tensors, found.files, (*links, *found.notes))


def open_adapter(folder: Path) -> Adapter:
    """Reads adapter_config.json and the header of adapter_model.safetensors in `folder`.

    Raises SourceError if either is missing or malformed, or if there are only pickled weights.
    """
    if folder.is_dir():
        check_links(folder)
    config = _config(folder, "adapter_config.json")
    file = folder / ADAPTER
    if not file.is_file():
        refuse_pickles(folder)
        raise SourceError(f"{folder} has no {ADAPTER}", hint="point to the folder that PEFT's save_pretrained wrote")
    return Adapter(folder, config, read_header(file))


def map_bytes(ref: TensorRef) -> NDArray[np.uint8]:
    """The bytes of a tensor [nbytes], mapped from its file and not copied.

    The pages are private: writing to the array changes all views of the file in this process, but never the file.
    Raises SourceError if the file is missing or has become too short. A file that was replaced is mapped again.
    """
    state = state_of(ref)
    try:
        return _map(*state)[ref.start : ref.end]
    except OSError as error:
        raise _unmapped(ref, error) from error


def state_of(ref: TensorRef) -> tuple[Path, int, int]:
    """(real path, bytes, time of the last change in ns) of a tensor's file: another file under its name differs.

    Raises SourceError if the file is missing or has become too short.
    """
    try:
        real = Path(os.path.realpath(ref.file))
        status = real.stat()
    except OSError as error:
        raise _unmapped(ref, error) from error
    if ref.end > status.st_size:
        raise SourceError(
            f"{ref.file} has only {status.st_size} bytes left, but tensor {ref.name!r} ends at byte {ref.end}",
            hint="the source changed meanwhile; start again",
        )
    return real, status.st_size, status.st_mtime_ns


def _unmapped(ref: TensorRef, error: OSError) -> SourceError:
    return SourceError(
        f"{ref.file} cannot be mapped: {error.strerror}", hint="the source changed meanwhile; start again"
    )


def unmap() -> None:
    """Forgets all mapped files, so that those which nobody uses are closed."""
    _map.cache_clear()


@lru_cache(maxsize=_MAPPED_FILES)
def _map(real: Path, size: int, mtime_ns: int) -> NDArray[np.uint8]:
    """One mapping per state of a file, so that a source used sixteen times is in memory once."""
    with real.open("rb") as file:
        if hasattr(mmap, "MAP_PRIVATE"):
            # like ACCESS_COPY, plus NORESERVE: without it Linux refuses to map files larger than the memory
            flags = mmap.MAP_PRIVATE | _MAP_NORESERVE
            mapped = mmap.mmap(file.fileno(), size, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        else:  # Windows
            mapped = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)
    return np.frombuffer(mapped, np.uint8)


def _config(folder: Path, name: str) -> dict[str, Any]:
    if not folder.is_dir():
        raise SourceError(f"{folder} is not a folder, expected one with a {name}", hint="check the path in the recipe")
    return read_object(
        folder / name, hint=f"point to a folder that save_pretrained wrote; it has {name} beside the weights"
    )
