"""Appends unchanged bytes of one file to another, inside the kernel if possible."""

import errno
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from frankenmoe.checkpoint.tensors import TensorWrite
from frankenmoe.checkpoint.writer import write_all
from frankenmoe.errors import SourceError

_CHUNK = 64 * 2**20  # bytes per system call, so that progress and Ctrl-C are not delayed
_BUFFER = 2**20  # bytes of a copy outside the kernel
# errors of kernels, file systems and sandboxes that do not support the call for these two files
_UNSUPPORTED = frozenset({errno.ENOSYS, errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EPERM})


def copy_run(target: int, run: Sequence[TensorWrite], *, on_bytes: Callable[[int], None]) -> None:
    """Appends the bytes from the first source's start to the last one's end to the open file `target`."""
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
    """Appends up to `count` bytes of `source` to `target`. Returns their number, 0 at the end of the source."""
    try:
        return os.copy_file_range(source, target, count, offset_src=offset)
    except AttributeError:  # macOS
        pass
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
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
