"""Opens checkpoint and adapter folders and maps their tensors into memory."""

import mmap
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from frankenmoe.checkpoint.header import parse_object, read_header
from frankenmoe.checkpoint.tensors import TensorRef
from frankenmoe.errors import SourceError

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_ADAPTER = "adapter_model.safetensors"
_PICKLES = ("*.bin", "*.pt", "*.pth")
_MAP_NORESERVE = 0x4000 if sys.platform == "linux" else 0  # `mmap` does not name it before Python 3.13
_MAPPED_FILES = 256  # each holds a file descriptor, and 1024 is a common limit


@dataclass(frozen=True)
class Checkpoint:
    """A dense model on disk; `tensors` and `files` are empty if the folder has no weights."""

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, TensorRef]
    files: tuple[Path, ...]

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

    Weights are the tensors of the index if there is one, else model.safetensors, else a single file of any name.
    Without `whole`, an incomplete download counts as a folder without weights.
    Raises SourceError if anything is missing, malformed or outside the folder, or if there are only pickled weights.
    """
    config = _config(folder, "config.json")
    tensors, files = _weights(folder) if whole or not _unfinished(folder) else ({}, ())
    return Checkpoint(folder, config, tensors, files)


def open_adapter(folder: Path) -> Adapter:
    """Reads adapter_config.json and the header of adapter_model.safetensors in `folder`.

    Raises SourceError if either is missing or malformed, or if there are only pickled weights.
    """
    config = _config(folder, "adapter_config.json")
    file = folder / _ADAPTER
    if not file.is_file():
        _refuse_pickles(folder)
        raise SourceError(f"{folder} has no {_ADAPTER}", hint="point to the folder that PEFT's save_pretrained wrote")
    return Adapter(folder, config, read_header(file))


def map_bytes(ref: TensorRef) -> NDArray[np.uint8]:
    """The bytes of a tensor [nbytes], mapped from its file and not copied.

    The pages are private: writing to the array changes all views of the file in this process, but never the file.
    Raises SourceError if the file is missing or has become too short. A file that was replaced is mapped again.
    """
    try:
        real = Path(os.path.realpath(ref.file))
        status = real.stat()
        if ref.end > status.st_size:
            raise SourceError(
                f"{ref.file} has only {status.st_size} bytes left, but tensor {ref.name!r} ends at byte {ref.end}",
                hint="the source changed meanwhile; start again",
            )
        return _map(real, status.st_size, status.st_mtime_ns)[ref.start : ref.end]
    except OSError as error:
        raise SourceError(
            f"{ref.file} cannot be mapped: {error.strerror}", hint="the source changed meanwhile; start again"
        ) from error


@lru_cache(maxsize=_MAPPED_FILES)
def _map(real: Path, size: int, mtime_ns: int) -> NDArray[np.uint8]:
    """One mapping per state of a file, so that a source used sixteen times is in memory once."""
    # like ACCESS_COPY, plus NORESERVE: without it Linux refuses to map files larger than the memory
    flags = mmap.MAP_PRIVATE | _MAP_NORESERVE
    with real.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), size, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    return np.frombuffer(mapped, np.uint8)


def _config(folder: Path, name: str) -> dict[str, Any]:
    if not folder.is_dir():
        raise SourceError(f"{folder} is not a folder, expected one with a {name}", hint="check the path in the recipe")
    return _read_object(
        folder / name, hint=f"point to a folder that save_pretrained wrote; it has {name} beside the weights"
    )


def _read_object(file: Path, *, hint: str) -> dict[str, Any]:
    if file.exists() and not file.is_file():  # reading a pipe would never return
        raise SourceError(f"{file} is not a file", hint=hint)
    try:
        return parse_object(file.read_bytes())
    except FileNotFoundError:
        raise SourceError(f"{file.parent} has no {file.name}", hint=hint) from None
    except OSError as error:
        raise SourceError(f"{file} cannot be read: {error.strerror}", hint="check its permissions") from error
    except ValueError as error:
        raise SourceError(f"{file} is not a JSON object: {error}", hint=hint) from error


def _weights(folder: Path) -> tuple[dict[str, TensorRef], tuple[Path, ...]]:
    if os.path.lexists(folder / _INDEX):
        return _indexed(folder)
    file = _lone_file(folder)
    if file is None:
        _refuse_pickles(folder)
        return {}, ()
    return read_header(file), (file,)


def _unfinished(folder: Path) -> bool:
    """Whether shards are missing, or the index of several shards."""
    if os.path.lexists(folder / _INDEX):
        return not all((folder / name).is_file() for name in set(_weight_map(folder / _INDEX).values()))
    return not os.path.lexists(folder / _SINGLE) and len(_shards_beside(folder)) > 1


def _shards_beside(folder: Path) -> list[Path]:
    return sorted(file for file in folder.glob("*.safetensors") if file.name != _ADAPTER)


def _lone_file(folder: Path) -> Path | None:
    if os.path.lexists(folder / _SINGLE):
        return folder / _SINGLE
    files = _shards_beside(folder)
    if len(files) > 1:
        raise SourceError(
            f"{folder} has {len(files)} safetensors files and no {_INDEX} that says which tensor is in which",
            hint="fetch the index of the sharded model, or remove the files that do not belong to it",
        )
    return files[0] if files else None


def _refuse_pickles(folder: Path) -> None:
    pickles = sorted(file.name for pattern in _PICKLES for file in folder.glob(pattern))
    if pickles:
        raise SourceError(
            f"{folder} has only pickled weights ({', '.join(pickles[:3])}), expected safetensors; "
            "a pickle can run code when it is opened, so it was not",
            hint="if you trust it, load it with transformers (or PEFT), "
            "then save_pretrained(folder, safe_serialization=True)",
        )


def _indexed(folder: Path) -> tuple[dict[str, TensorRef], tuple[Path, ...]]:
    index = folder / _INDEX
    weight_map = _weight_map(index)
    shards = _shards(folder, set(weight_map.values()))
    for name, shard in weight_map.items():
        if name not in shards[shard]:
            raise SourceError(
                f"{index} says that tensor {name!r} is in {shard}, which does not have it",
                hint="the index and the shards are from different versions of the model; fetch them again",
            )
    tensors = {name: shards[shard][name] for name, shard in weight_map.items()}
    return tensors, tuple(folder / shard for shard in shards)


def _shards(folder: Path, names: Iterable[str]) -> dict[str, dict[str, TensorRef]]:
    """File name -> tensors of every shard, sorted by file name."""
    shards = {}
    for name in sorted(names):
        if not (folder / name).is_file():
            raise SourceError(
                f"{folder / _INDEX} names {name}, which is not there",
                hint="the download was cut off; fetch the missing shard",
            )
        shards[name] = read_header(folder / name)
    return shards


def _weight_map(index: Path) -> dict[str, str]:
    hint = "fetch the index again, or save the model again with transformers"
    weight_map = _read_object(index, hint=hint).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise SourceError(f"{index} has no weight_map from tensor names to file names", hint=hint)
    for name, file in weight_map.items():
        if not _is_bare(file):
            raise SourceError(
                f"{index} puts tensor {name!r} in {file!r:.200}, expected the bare name of a .safetensors file",
                hint="do not use this source unless you know why its index points elsewhere",
            )
    return weight_map


def _is_bare(file: object) -> bool:
    """Whether `file` is a bare file name.

    Checks only the name: in the Hugging Face cache the file itself is a link to ../../blobs.
    """
    return (
        isinstance(file, str) and file.endswith(".safetensors") and not any(mark in file for mark in ("/", "\\", "\0"))
    )
