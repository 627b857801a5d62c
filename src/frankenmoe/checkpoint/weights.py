"""Which of a folder's files are its weights: those that transformers would load."""

import os
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from frankenmoe.checkpoint.header import read_header
from frankenmoe.checkpoint.jsonfile import read_object
from frankenmoe.checkpoint.tensors import TensorRef
from frankenmoe.counted import counted
from frankenmoe.errors import SourceError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ADAPTER = "adapter_model.safetensors"
NAMED = "transformers_weights"  # the config field that names the file to load
# what transformers loads if neither SINGLE nor INDEX is there
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
PICKLES = ("*.bin", "*.pt", "*.pth")
LONGEST_NAME = 255  # characters; no file system allows more
SHARD = re.compile(r"-\d+-of-0*(?P<count>\d+)\.safetensors$")


@dataclass(frozen=True, slots=True)
class Weights:
    """Tensors by name, the files they are in, and a sentence for every other set of weights that is not used."""

    tensors: Mapping[str, TensorRef]
    files: tuple[Path, ...]
    notes: tuple[str, ...] = ()


def weights_of(folder: Path, config: Mapping[str, Any]) -> Weights:
    """The weights that transformers would load from a folder; none if there are none.

    The order is transformers': the file that the config names, a whole model.safetensors, the shards of the index. A
    single file of any other name counts too, which transformers does not load. Raises SourceError if weights are
    malformed, incomplete or outside the folder, or if only pickles are there.
    """
    named = config.get(NAMED)
    if named is not None:
        return _named(folder, named)
    if os.path.lexists(folder / SINGLE):
        return Weights(read_header(folder / SINGLE), (folder / SINGLE,), tuple(_other_shards(folder)))
    if os.path.lexists(folder / INDEX):
        return _indexed(folder / INDEX)
    file = _lone_file(folder)
    if file is None:
        refuse_pickles(folder)
        return Weights({}, ())
    return Weights(read_header(file), (file,))


def unfinished(folder: Path) -> bool:
    """Whether shards are missing, or the index of several shards."""
    if os.path.lexists(folder / SINGLE):
        return False
    if os.path.lexists(folder / INDEX):
        return not all((folder / name).is_file() for name in set(_weight_map(folder / INDEX).values()))
    files = _files_beside(folder)
    return len(files) > 1 or any(_shards(file) != 1 for file in files)


def refuse_pickles(folder: Path) -> None:
    """Raises SourceError if a folder has pickled weights."""
    pickles = sorted(file.name for pattern in PICKLES for file in folder.glob(pattern))
    if pickles:
        raise SourceError(
            f"{folder} has only pickled weights ({', '.join(pickles[:3])}), expected safetensors; "
            "a pickle can run code when it is opened, so it was not",
            hint="if you trust it, load it with transformers (or PEFT), "
            "then save_pretrained(folder, safe_serialization=True)",
        )


def _named(folder: Path, named: object) -> Weights:
    if isinstance(named, str) and _is_bare(named.removesuffix(".index.json")):
        file = folder / named
        return _indexed(file) if named.endswith(".index.json") else Weights(read_header(file), (file,))
    raise SourceError(
        f"{folder / 'config.json'} has {NAMED} {named!r:.200}, expected the bare name of a .safetensors file or of an "
        "index of such files",
        hint="fetch config.json again, or delete the setting",
    )


def _other_shards(folder: Path) -> Iterable[str]:
    """A sentence if an index beside the whole file names other files, which transformers does not look at."""
    names: set[str] = set()
    with suppress(SourceError):  # a broken index that nobody reads
        names = set(_weight_map(folder / INDEX).values()) - {SINGLE}
    if names:
        there = sum((folder / name).is_file() for name in names)
        what = counted(len(names), "other file" if there else "missing file")
        yield (
            f"{folder} has two sets of weights: {SINGLE}, which is used, as in transformers, and {INDEX}, which names "
            f"{what}; if you mean those, move {SINGLE} away"
        )


def _files_beside(folder: Path) -> list[Path]:
    return sorted(file for file in folder.glob("*.safetensors") if file.name != ADAPTER)


def _lone_file(folder: Path) -> Path | None:
    files = _files_beside(folder)
    if not files:
        return None
    pickled = next((name for name in PICKLED if (folder / name).is_file()), None)
    if pickled is not None:
        raise SourceError(
            f"{folder} has two sets of weights: {pickled}, which transformers would load, and {files[0].name}, which "
            "it would not",
            hint=f"if you mean {files[0].name}, rename it to {SINGLE}; a pickle can run code when it is opened, so "
            "none is read here",
        )
    if len(files) > 1:
        raise SourceError(
            f"{folder} has {len(files)} safetensors files and no {INDEX} that says which tensor is in which",
            hint="fetch the index of the sharded model, or remove the files that do not belong to it",
        )
    if (count := _shards(files[0])) != 1:
        raise SourceError(
            f"{folder} has {files[0].name} alone, one of {count} files, and no {INDEX}",
            hint="the download was cut off; fetch the other files and the index",
        )
    return files[0]


def _shards(file: Path) -> int:
    """The number of files that a file's name says there are."""
    shard = SHARD.search(file.name)
    return int(shard["count"][:9]) if shard else 1


def _indexed(index: Path) -> Weights:
    folder, weight_map = index.parent, _weight_map(index)
    shards = {}
    for name in sorted(set(weight_map.values())):
        if not (folder / name).is_file():
            raise SourceError(
                f"{index} names {name}, which is not there", hint="the download was cut off; fetch the missing shard"
            )
        shards[name] = read_header(folder / name)
    for name, shard in weight_map.items():
        if name not in shards[shard]:
            raise SourceError(
                f"{index} says that tensor {name!r} is in {shard}, which does not have it",
                hint="the index and the shards are from different versions of the model; fetch them again",
            )
    tensors = {name: shards[shard][name] for name, shard in weight_map.items()}
    return Weights(tensors, tuple(folder / shard for shard in shards))


def _weight_map(index: Path) -> dict[str, str]:
    hint = "fetch the index again, or save the model again with transformers"
    weight_map = read_object(index, hint=hint).get("weight_map")
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
        isinstance(file, str)
        and file.endswith(".safetensors")
        and len(file) <= LONGEST_NAME
        and not any(mark in file for mark in ("/", "\\", "\0"))
    )
