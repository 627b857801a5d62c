"""Appends unchanged bytes of one file to another inside the kernel, where it can; knows no format."""

import errno
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from frankenmoe.checkpoint.tensors import TensorWrite
from frankenmoe.checkpoint.writer import write_all
from frankenmoe.errors import SourceError

_CHUNK = 64 * 2**20  # bytes per system call: progress moves and Ctrl-C is answered within a fraction of a second
_BUFFER = 2**20  # bytes of the slow path's buffer
# What kernels, file systems and sandboxes answer where a call does not work between these two files.
_UNSUPPORTED = frozenset({errno.ENOSYS, errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EPERM})


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
