"""Writes safetensors shards completely or not at all; reads and checks every byte once."""

import errno
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from frankenmoe.checkpoint.cast import first_nonfinite
from frankenmoe.checkpoint.direct import Appender, appending, create
from frankenmoe.checkpoint.header import header_bytes
from frankenmoe.checkpoint.reading import Reader, reading
from frankenmoe.checkpoint.tensors import DTYPES, FLOATS, TensorRef, TensorWrite
from frankenmoe.checkpoint.values import blocks, check_finite
from frankenmoe.counted import counted
from frankenmoe.errors import ArtifactError, SourceError
from frankenmoe.system import OPEN, reserve, sync_folder

_AGAIN = "the source changed meanwhile; start again"
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
# errors of file systems and sandboxes that cannot reserve space
_UNSUPPORTED = frozenset({errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EPERM})


def write_shard(
    path: Path,
    writes: Sequence[TensorWrite],
    *,
    metadata: Mapping[str, str],
    on_bytes: Callable[[int], None],
    scanned: set[TensorRef],
) -> None:
    """Writes `writes` in this order as the safetensors file `path`; reports bytes, header included, to `on_bytes`.

    Sources that are not in `scanned` are checked for NaN and infinities, and added to it. Memory does not grow with the
    tensors. `path` appears complete and synced or not at all; a killed process leaves at most `path`.partial.
    Raises SourceError, NumericsError, and ArtifactError when the disk is full.
    """
    header = header_bytes([(write.name, write.dtype, write.shape) for write in writes], metadata=metadata)
    size = len(header) + sum(write.nbytes for write in writes)
    uses = Counter(ref for write in writes for ref in write.sources)
    with (
        reading() as sources,
        replacing(path, size=size, opened=create) as target,
        appending(target) as out,
    ):
        out.append(header)
        on_bytes(len(header))
        shard = _Shard(partial_of(path), out, sources, uses=uses, scanned=scanned, on_bytes=on_bytes)
        for write in writes:
            if write.copied is not None:
                shard.copy(write.copied)
            else:
                shard.compute(write)


def write_atomic(path: Path, data: bytes) -> None:
    """Replaces the content of `path` atomically. Raises ArtifactError on a full disk."""
    with replacing(path, size=len(data)) as target:
        write_all(target, data)


def free_bytes(folder: Path) -> int:
    """Free bytes for this user on the disk of `folder`."""
    return shutil.disk_usage(folder).free


class _Shard:
    """A shard being written, with what is known of its sources."""

    def __init__(
        self,
        partial: Path,
        out: Appender,
        sources: Reader,
        *,
        uses: Mapping[TensorRef, int],
        scanned: set[TensorRef],
        on_bytes: Callable[[int], None],
    ) -> None:
        self._partial = partial
        self._out = out
        self._sources = sources
        self._uses = uses
        self._scanned = scanned
        self._on_bytes = on_bytes
        self._computed: dict[object, TensorRef] = {}

    def copy(self, source: TensorRef) -> None:
        """Appends a source's bytes, and checks them in the buffer unless that was done before."""
        check = source not in self._scanned and source.dtype in FLOATS
        if check and self._out.position % DTYPES[source.dtype].itemsize:  # a number may be split between two buffers
            check_finite(source)
            check = False
        offset = source.start
        while offset < source.end:
            room = self._out.room()[: source.end - offset]
            self._fill(room, source, offset=offset)
            if check and first_nonfinite(np.frombuffer(room, np.uint8), dtype=source.dtype) is not None:
                check_finite(source)
                raise SourceError(f"tensor {source.name!r} in {source.file} changed while it was read", hint=_AGAIN)
            self._out.filled(len(room))
            offset += len(room)
            self._on_bytes(len(room))
        self._scanned.add(source)

    def compute(self, write: TensorWrite) -> None:
        """Appends a computed write; copies an equal one that is already in the file (one source, many experts)."""
        what = (write.inputs, write.steps, write.dtype, write.shape)
        known = self._computed.get(what)
        if known is not None and known.end <= self._out.readable():
            self.copy(known)
            return
        for factor in write.factors:
            if factor not in self._scanned:  # the product may hide a NaN of its factors
                check_finite(factor)
        start = self._out.position
        for block in blocks(write):
            self._out.append(block.data)
            self._on_bytes(block.size)
        made = TensorRef(write.name, write.dtype, write.shape, self._partial, start, start + write.nbytes)
        self._computed.setdefault(what, made)
        self._scanned.update((*write.sources, made))

    def _fill(self, room: memoryview, source: TensorRef, *, offset: int) -> None:
        """Fills `room` with bytes of the source's file from `offset` on."""
        while room:
            try:
                count = self._sources.read(source.file, room, offset, once=self._uses.get(source) == 1)
            except OSError as error:
                raise SourceError(f"{source.file} cannot be read: {error.strerror}", hint=_AGAIN) from error
            if count == 0:
                missing = source.end - offset
                raise SourceError(
                    f"{source.file} ended {counted(missing, 'byte')} before tensor {source.name!r} was copied",
                    hint=_AGAIN,
                )
            room, offset = room[count:], offset + count


def write_all(target: int, data: bytes | memoryview) -> None:
    """Appends all of `data` to an open file, in as many calls as necessary."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(target, rest) :]


def partial_of(path: Path) -> Path:
    """The path of an unfinished file, which a killed process leaves behind."""
    return path.with_name(f"{path.name}.partial")


def _create(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | OPEN, 0o666)


@contextmanager
def replacing(path: Path, *, size: int, opened: Callable[[Path], int] = _create) -> Iterator[int]:
    """A file descriptor to write `size` bytes to. They become `path` when the block succeeds, else they are removed."""
    partial = partial_of(path)
    try:
        target = opened(partial)
        try:
            _reserve(target, size)
            yield target
            os.fsync(target)
        finally:
            os.close(target)
        partial.replace(path)
    except BaseException as error:  # Ctrl-C included
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in _FULL:
            raise _disk_full(path, size) from error
        raise
    sync_folder(path.parent)


def _reserve(target: int, size: int) -> None:
    """Reserves the disk space, so that a full disk is noticed before the first byte."""
    try:
        reserve(target, size)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise


def _disk_full(path: Path, size: int) -> ArtifactError:
    missing = size - free_bytes(path.parent)
    reason = f"{counted(missing, 'more byte')} needed" if missing > 0 else "the disk or the quota is full"
    return ArtifactError(
        f"{path} with its {size} bytes does not fit into {path.parent}: {reason}",
        hint="free some space, or choose an output folder on another disk",
    )
