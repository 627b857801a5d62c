"""Appends to a file past the page cache: one thread fills a buffer while another writes the last; knows no tensor.

The kernel spends more time on finding pages for written bytes than the disk spends on writing them. With O_DIRECT it
needs no page; what that asks for in turn (offset, length and memory in whole blocks) is met here. Where a file system
has no O_DIRECT the same buffers go through the page cache.
"""

import errno
import mmap
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from fcntl import F_GETFL, F_SETFL, fcntl
from pathlib import Path

BUFFER = 2**20  # bytes; larger ones are no faster, and there are two of them for each shard being written
BUFFERS = 2  # one is filled while the other is written
BLOCK = 4096  # bytes; every common disk has blocks of this size or a part of it
DIRECT: int = getattr(os, "O_DIRECT", 0)  # which macOS does not have
REFUSED = frozenset({errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP})


def create(path: Path) -> int:
    """A descriptor of the new or emptied file `path`, to write and read; direct where its file system takes that."""
    flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
    try:
        return os.open(path, flags | DIRECT, 0o666)
    except OSError as error:
        if not DIRECT or error.errno not in REFUSED:
            raise
    return os.open(path, flags, 0o666)


def is_direct(descriptor: int) -> bool:
    """Whether writes to an open file go past the page cache."""
    return bool(DIRECT) and bool(fcntl(descriptor, F_GETFL) & DIRECT)


class Appender:
    """Appends to an empty open file. Errors of the writing thread are raised by the next call here."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._thread = ThreadPoolExecutor(1)
        self._writing: deque[tuple[Future[None], memoryview]] = deque()
        self._made = 1
        self._buffer = aligned(BUFFER)
        self._filled = 0
        self._start = 0  # where in the file the buffer goes

    @property
    def position(self) -> int:
        """Bytes appended so far."""
        return self._start + self._filled

    def room(self) -> memoryview:
        """Memory, never empty, for the next bytes: fill it from its start, then tell `filled` how far."""
        if self._filled == len(self._buffer):
            self._hand_over()
        return self._buffer[self._filled :]

    def filled(self, count: int) -> None:
        """Append the first `count` bytes of `room`."""
        self._filled += count

    def append(self, data: bytes | memoryview) -> None:
        """Append `data`, which may be used for something else afterwards."""
        rest = memoryview(data)
        while rest:
            room = self.room()
            count = min(len(room), len(rest))
            room[:count] = rest[:count]
            self.filled(count)
            rest = rest[count:]

    def readable(self) -> int:
        """How many bytes from the start can be read back; waits for those being written."""
        self._wait()
        return self._start

    def finish(self) -> None:
        """Write what is left, the last part of a block through the page cache; not yet synced."""
        self._wait()
        whole = self._filled - self._filled % BLOCK
        self._write(self._buffer[:whole], self._start)
        if whole < self._filled:
            _leave_direct(self._descriptor)
            self._write(self._buffer[whole : self._filled], self._start + whole)

    def stop(self) -> None:
        """End the thread, with what it is writing; nobody writes to the file afterwards."""
        self._thread.shutdown(cancel_futures=True)

    def _hand_over(self) -> None:
        """Let the thread write the full buffer, and take a free one: a new one, or the one written longest ago."""
        self._writing.append((self._thread.submit(self._write, self._buffer, self._start), self._buffer))
        self._start += self._filled
        self._filled = 0
        if self._made < BUFFERS:
            self._made += 1
            self._buffer = aligned(BUFFER)
        else:
            done, self._buffer = self._writing.popleft()
            done.result()

    def _wait(self) -> None:
        for done, _ in self._writing:
            done.result()

    def _write(self, data: memoryview, offset: int) -> None:
        while data:
            try:
                count = os.pwrite(self._descriptor, data, offset)
            except OSError as error:
                if error.errno not in REFUSED or not is_direct(self._descriptor):
                    raise
                # taken when opened and refused now: larger blocks than ours, or a write that the disk cut short
                _leave_direct(self._descriptor)
                continue
            data, offset = data[count:], offset + count


@contextmanager
def appending(descriptor: int) -> Iterator[Appender]:
    """An Appender to an empty file; it has written everything when the block ends well, and has stopped in any case."""
    out = Appender(descriptor)
    try:
        yield out
        out.finish()
    finally:
        out.stop()


def _leave_direct(descriptor: int) -> None:
    fcntl(descriptor, F_SETFL, fcntl(descriptor, F_GETFL) & ~DIRECT)


def aligned(size: int) -> memoryview:
    """Memory that starts at a page, as O_DIRECT wants it, and is this process's own."""
    return memoryview(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
