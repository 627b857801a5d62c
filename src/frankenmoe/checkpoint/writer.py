"""Writes safetensors shards, whole or not at all, moving unchanged bytes inside the kernel; knows no model."""

import errno
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from frankenmoe.checkpoint.header import header_bytes
from frankenmoe.checkpoint.tensors import TensorRef, TensorWrite
from frankenmoe.checkpoint.values import blocks, check_finite
from frankenmoe.errors import ArtifactError, SourceError

_CHUNK = 64 * 2**20  # bytes per system call: progress moves and Ctrl-C is answered within a fraction of a second
_BUFFER = 2**20  # bytes of the slow path's buffer
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
# What kernels, file systems and sandboxes answer where a call does not work between these two files.
_UNSUPPORTED = frozenset({errno.ENOSYS, errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EPERM})


def write_shard(
    path: Path,
    writes: Sequence[TensorWrite],
    *,
    metadata: Mapping[str, str],
    on_bytes: Callable[[int], None],
    scanned: set[TensorRef],
) -> None:
    """Write `writes`, in this order, as the safetensors file `path`; `on_bytes` hears of every byte, header included.

    Sources that are not yet in `scanned` are checked for NaN and infinities first, and added to it. Memory does not
    grow with the tensors. `path` appears complete and synced or not at all; kill -9 leaves at most its `.partial`.
    Raises SourceError, NumericsError, and ArtifactError when the disk is full.
    """
    header = header_bytes([(write.name, write.dtype, write.shape) for write in writes], metadata=metadata)
    with replacing(path, size=len(header) + sum(write.nbytes for write in writes)) as target:
        write_all(target, header)
        on_bytes(len(header))
        computed: dict[object, TensorRef] = {}
        for run in _runs(writes):
            _scan(run, scanned)
            if run[0].is_copy:
                copy_run(target, run, on_bytes=on_bytes)
            else:
                _compute_once(target, run[0], partial=_partial(path), computed=computed, on_bytes=on_bytes)


def write_atomic(path: Path, data: bytes) -> None:
    """Put `data` into the file `path`, which at any moment holds the old or the new; ArtifactError on a full disk."""
    with replacing(path, size=len(data)) as target:
        write_all(target, data)


def free_bytes(folder: Path) -> int:
    """Bytes that this user can still write to the disk that holds `folder`."""
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize


def _runs(writes: Sequence[TensorWrite]) -> Iterator[list[TensorWrite]]:
    """Group copies whose sources lie side by side, up to a chunk together; any other write is a run of its own."""
    run: list[TensorWrite] = []
    for write in writes:
        if run and not _continues(run, write):
            yield run
            run = []
        run.append(write)
    if run:
        yield run


def _continues(run: Sequence[TensorWrite], write: TensorWrite) -> bool:
    if not (run[-1].is_copy and write.is_copy):
        return False
    first, last, source = run[0].inputs[0], run[-1].inputs[0], write.inputs[0]
    return source.file == last.file and source.start == last.end and source.end - first.start <= _CHUNK


def _scan(run: Sequence[TensorWrite], scanned: set[TensorRef]) -> None:
    for ref in (ref for write in run for ref in write.sources):
        if ref not in scanned:
            check_finite(ref)
            scanned.add(ref)


def copy_run(target: int, run: Sequence[TensorWrite], *, on_bytes: Callable[[int], None]) -> None:
    """Append the bytes from the first source's start to the last one's end."""
    file, offset, end = run[0].inputs[0].file, run[0].inputs[0].start, run[-1].inputs[0].end
    with _opened(file) as source:
        while offset < end:
            copied = _copy_chunk(source, target, offset=offset, count=min(end - offset, _CHUNK))
            if copied == 0:
                raise SourceError(
                    f"{file} ended {end - offset} bytes before tensor {run[-1].inputs[0].name!r} was copied",
                    hint="the source changed meanwhile; start again",
                )
            offset += copied
            on_bytes(copied)


def _compute_once(
    target: int,
    write: TensorWrite,
    *,
    partial: Path,
    computed: dict[object, TensorRef],
    on_bytes: Callable[[int], None],
) -> None:
    """Append a computed write; where the file already holds an equal one (one source, many experts), copy that."""
    what = (write.inputs, write.steps, write.dtype, write.shape)
    if what in computed:
        copy_run(target, [replace(write, inputs=(computed[what],), steps=())], on_bytes=on_bytes)
        return
    start = os.lseek(target, 0, os.SEEK_CUR)
    _compute(target, write, on_bytes=on_bytes)
    computed[what] = TensorRef(write.name, write.dtype, write.shape, partial, start, start + write.nbytes)


def _compute(target: int, write: TensorWrite, *, on_bytes: Callable[[int], None]) -> None:
    for block in blocks(write):
        write_all(target, block.data)
        on_bytes(block.size)


def _copy_chunk(source: int, target: int, *, offset: int, count: int) -> int:
    """Append up to `count` bytes of `source` to `target` by the fastest way that works; 0 at the end of the source."""
    for copy in (_copy_in_file_system, _copy_in_kernel):
        try:
            return copy(source, target, offset, count)
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
    return _copy_by_hand(source, target, offset, count)


def _copy_in_file_system(source: int, target: int, offset: int, count: int) -> int:
    return os.copy_file_range(source, target, count, offset_src=offset)


def _copy_in_kernel(source: int, target: int, offset: int, count: int) -> int:
    return os.sendfile(target, source, offset, count)


def _copy_by_hand(source: int, target: int, offset: int, count: int) -> int:
    data = os.pread(source, min(count, _BUFFER), offset)
    write_all(target, data)
    return len(data)


def write_all(target: int, data: bytes | memoryview) -> None:
    """Append all of `data` to an open file, however often the system takes only a part of it."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(target, rest) :]


@contextmanager
def _opened(file: Path) -> Iterator[int]:
    try:
        descriptor = os.open(file, os.O_RDONLY)
    except OSError as error:
        raise SourceError(
            f"{file} cannot be read: {error.strerror}", hint="the source changed meanwhile; start again"
        ) from error
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _partial(path: Path) -> Path:
    return path.with_name(f"{path.name}.partial")


@contextmanager
def replacing(path: Path, *, size: int) -> Iterator[int]:
    """A file descriptor whose `size` bytes become `path` once the block ends well; else nothing is left of them."""
    partial = _partial(path)
    try:
        with partial.open("wb", buffering=0) as file:
            _reserve(file.fileno(), size)
            yield file.fileno()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException as error:  # Ctrl-C included
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in _FULL:
            raise _disk_full(path, size) from error
        raise
    _sync_folder(path.parent)


def _reserve(target: int, size: int) -> None:
    """Claim the disk space now, so that a full disk is met before the first byte and not after the last hour."""
    try:
        if size:
            os.posix_fallocate(target, 0, size)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise


def _disk_full(path: Path, size: int) -> ArtifactError:
    missing = size - free_bytes(path.parent)
    reason = f"{missing} bytes more are needed" if missing > 0 else "the disk or the quota is full"
    return ArtifactError(
        f"{path} with its {size} bytes does not fit into {path.parent}: {reason}",
        hint="free some space, or choose an output folder on another disk",
    )


def _sync_folder(folder: Path) -> None:
    """Make a rename last: until its folder is synced, a power cut can undo it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
