"""Reads safetensors headers, also of hostile files, and writes ours.

A file is an 8-byte little-endian length N, N bytes of JSON, then the data, from where `data_offsets` count.
"""

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

from frankenmoe.checkpoint.tensors import DTYPES, TensorRef
from frankenmoe.counted import counted
from frankenmoe.errors import SourceError, brief

PREFIX = 8  # bytes of the length before the JSON
_MAX_HEADER = 100_000_000  # limit of the reference implementation; real headers have a few megabytes at most
_LONGEST_NAME = 1000  # characters; patterns are matched against names, and real ones have a tenth of it
_MAX_DIMENSIONS = 32  # numpy 1.x holds no more
_ALIGNMENT = 4096  # data on a page boundary can be mapped, and shared by file systems with extents
_DAMAGED = "the file is damaged or was not written by a safetensors library; download or save it again"


def read_header(path: Path) -> dict[str, TensorRef]:
    """Every tensor of a safetensors file by name, in byte order. Reads only the header.

    Raises SourceError unless the header is well-formed and its tensors cover the rest of the file exactly.
    """
    raw, size = raw_header(path)
    data_start = PREFIX + len(raw)
    entries = _parse(path, raw)
    _check_metadata(path, entries.pop("__metadata__", {}))
    refs = [_tensor(path, name, entry, data_start=data_start) for name, entry in entries.items()]
    refs.sort(key=lambda ref: (ref.start, ref.end))
    _check_cover(path, refs, data_start=data_start, size=size)
    return {ref.name: ref for ref in refs}


def read_metadata(path: Path) -> dict[str, str]:
    """The texts that a safetensors file carries beside its tensors. Raises SourceError for a damaged header."""
    found: dict[str, str] = _parse(path, raw_header(path)[0]).get("__metadata__", {})
    _check_metadata(path, found)
    return found


def raw_header(path: Path) -> tuple[bytes, int]:
    """The header's JSON bytes, unparsed, and the size of the file in bytes.

    Raises SourceError if the file cannot be read or is shorter than its header.
    """
    if not path.is_file():
        raise SourceError(f"{path} is not a file, expected safetensors weights", hint="check the path")
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(PREFIX), "little")
            _check_length(path, length=length, size=size)
            raw = file.read(length)
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror}", hint="check its permissions") from error
    return raw, size


def parse_object(raw: bytes, *, pairs_hook: Callable[[list[tuple[str, Any]]], Any] | None = None) -> dict[str, Any]:
    """A JSON object from UTF-8 bytes. Raises ValueError, and nothing else, for anything else."""
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=pairs_hook)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"it is a {type(value).__name__}, not an object")
    return value


def header_bytes(entries: Sequence[tuple[str, str, tuple[int, ...]]], *, metadata: Mapping[str, str]) -> bytes:
    """The bytes of a file before its first tensor, for `entries` (name, dtype, shape) in the given order.

    Padded with spaces so that the data starts at a multiple of 4096. Raises ValueError if a name occurs twice.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, dtype, shape in entries:
        if name in header or name == "__metadata__":
            raise ValueError(f"two tensors cannot both be called {name!r}")
        end = offset + math.prod(shape) * DTYPES[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": (offset, end)}
        offset = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    padded = raw + b" " * (-(PREFIX + len(raw)) % _ALIGNMENT)
    return len(padded).to_bytes(PREFIX, "little") + padded


def _check_length(path: Path, *, length: int, size: int) -> None:
    if size < PREFIX:
        raise SourceError(
            f"{path} has {counted(size, 'byte')}, expected at least {PREFIX} for a safetensors file", hint=_DAMAGED
        )
    if length > _MAX_HEADER:
        raise SourceError(
            f"{path} announces a header of {counted(length, 'byte')}, expected at most {_MAX_HEADER:,}",
            hint=_DAMAGED,
        )
    if length > size - PREFIX:
        raise SourceError(
            f"{path} announces a header of {counted(length, 'byte')}, but only {counted(size - PREFIX, 'byte')} follow",
            hint=_DAMAGED,
        )


def _parse(path: Path, raw: bytes) -> dict[str, Any]:
    try:
        return parse_object(raw, pairs_hook=_unique)
    except ValueError as error:
        raise SourceError(f"{path} has a header that is not a JSON object: {error}", hint=_DAMAGED) from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        key.encode()  # raises ValueError for a lone surrogate, which only JSON allows
        if key in found:
            raise ValueError(f"the key {brief(key)!r} occurs twice")
        found[key] = value
    return found


def _check_metadata(path: Path, metadata: object) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise SourceError(f"{path} has a __metadata__ that is not a map from text to text", hint=_DAMAGED)


def _tensor(path: Path, name: str, entry: object, *, data_start: int) -> TensorRef:
    def wrong(text: str, *, hint: str = _DAMAGED) -> SourceError:
        return SourceError(f"tensor {brief(name)!r} in {path} {text}", hint=hint)

    if len(name) > _LONGEST_NAME:
        raise wrong(f"has a name of {len(name):,} characters, expected at most {_LONGEST_NAME:,}")
    fields = ("dtype", "shape", "data_offsets")
    if not isinstance(entry, dict) or entry.keys() != set(fields):
        raise wrong("is not described by exactly dtype, shape and data_offsets")
    dtype, shape, offsets = (entry[field] for field in fields)
    if not isinstance(dtype, str) or dtype not in DTYPES:
        hint = "convert the source to bfloat16 with transformers first"
        raise wrong(f"has dtype {dtype!r:.40}, expected one of {', '.join(DTYPES)}", hint=hint)
    if not _are_counts(shape) or len(shape) > _MAX_DIMENSIONS:
        raise wrong(f"has shape {shape!r:.100}, expected up to {_MAX_DIMENSIONS} sizes from 0 up")
    if not _are_counts(offsets) or len(offsets) != 2:
        raise wrong(f"has data_offsets {offsets!r:.100}, expected a start and an end")
    start, end = offsets
    nbytes = math.prod(shape) * DTYPES[dtype].itemsize
    if end - start != nbytes:
        raise wrong(f"spans {end - start} bytes, but {dtype} {shape} takes {nbytes}")
    return TensorRef(name, dtype, tuple(shape), path, data_start + start, data_start + end)


def _are_counts(value: object) -> TypeGuard[list[int]]:
    """Whether `value` is a list of integers that fit a file offset; `true`, an int in Python, does not count."""
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def _check_cover(path: Path, refs: Sequence[TensorRef], *, data_start: int, size: int) -> None:
    """Checks that `refs`, in byte order, cover the file from the header to its end without gaps."""
    cursor = data_start
    for ref in refs:
        if ref.start != cursor:
            what = "overlaps the tensor before it by" if ref.start < cursor else "leaves a hole before it of"
            raise SourceError(
                f"tensor {brief(ref.name)!r} in {path} {what} {counted(abs(ref.start - cursor), 'byte')}", hint=_DAMAGED
            )
        cursor = ref.end
    if cursor > size:
        raise SourceError(
            f"{path} is truncated: {cursor - size} of its {cursor} bytes are missing",
            hint="the download or copy was cut off; fetch the file again",
        )
    if cursor < size:
        raise SourceError(f"{path} has {counted(size - cursor, 'byte')} after its last tensor", hint=_DAMAGED)
