"""Compares the bytes of files and tensors, by samples or completely."""

import hashlib
import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import numpy as np

from frankenmoe.checkpoint.header import PREFIX, raw_header
from frankenmoe.checkpoint.reader import map_bytes
from frankenmoe.checkpoint.tensors import TensorRef
from frankenmoe.errors import SourceError

_SAMPLE = 4096  # bytes
_FILE_SAMPLES = 64
_TENSOR_SAMPLES = 16
_CHUNK = 2**20  # bytes


def fingerprint(file: Path) -> str:
    """32 hexadecimal digits that identify the content of a safetensors file, the same on every machine.

    BLAKE2b over the size, the header and 64 evenly spread blocks of 4 KiB (or all data if it is shorter). It detects
    another model, precision or training run, not a few changed bytes: for proof use `sha256`.
    Raises SourceError if the file cannot be read or has no header.
    """
    real = Path(os.path.realpath(file))
    try:
        status = real.stat()
    except OSError as error:
        raise SourceError(f"{file} cannot be read: {error.strerror}", hint="check the path") from error
    return _fingerprint(real, status.st_size, status.st_mtime_ns)


@cache
def _fingerprint(real: Path, size: int, mtime_ns: int) -> str:
    header, _ = raw_header(real)
    digest = hashlib.blake2b(size.to_bytes(8, "little") + header, digest_size=16)
    data_start = PREFIX + len(header)
    with real.open("rb") as file:
        for offset in _sample_offsets(size - data_start, samples=_FILE_SAMPLES):
            file.seek(data_start + offset)
            digest.update(file.read(_SAMPLE))
    return digest.hexdigest()


def sha256(file: Path, *, on_bytes: Callable[[int], None] | None = None) -> str:
    """The SHA-256 of the whole file in hexadecimal; reports bytes read to `on_bytes`."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(_CHUNK))
    with file.open("rb", buffering=0) as source:
        while count := source.readinto(buffer):
            digest.update(buffer[:count])
            if on_bytes:
                on_bytes(count)
    return digest.hexdigest()


def same_values(a: TensorRef, b: TensorRef, *, limit: int | None) -> bool:
    """Whether two tensors have the same type, shape and bytes, whatever their names.

    Compares only 16 evenly spread blocks of 4 KiB and the first `limit` bytes (None: all).
    """
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    if same_place(a, b):
        return True
    most = a.nbytes if limit is None else min(a.nbytes, limit)
    first, second = map_bytes(a), map_bytes(b)
    samples = ((offset, offset + _SAMPLE) for offset in _sample_offsets(a.nbytes, samples=_TENSOR_SAMPLES))
    whole = ((start, min(start + _CHUNK, most)) for start in range(0, most, _CHUNK))
    spans = (span for group in (samples, whole) for span in group)
    return all(np.array_equal(first[start:stop], second[start:stop]) for start, stop in spans)


def only_zeros(ref: TensorRef) -> bool:
    """Whether all bytes of a tensor are zero; False without weights. Reads on only as long as they are."""
    raw = map_bytes(ref) if ref.nbytes else np.ones(1, np.uint8)
    starts = range(0, len(raw), _CHUNK)
    return not raw[:_SAMPLE].any() and not any(raw[start : start + _CHUNK].any() for start in starts)


def same_place(a: TensorRef, b: TensorRef) -> bool:
    """Whether two tensors are the same bytes of the same file, links resolved."""
    return (a.start, a.end) == (b.start, b.end) and os.path.realpath(a.file) == os.path.realpath(b.file)


def _sample_offsets(size: int, *, samples: int) -> Iterator[int]:
    """Offsets of `samples` evenly spread blocks, or of as many as cover a smaller `size`."""
    if size <= samples * _SAMPLE:
        yield from range(0, size, _SAMPLE)
    else:
        yield from (index * (size - _SAMPLE) // (samples - 1) for index in range(samples))
