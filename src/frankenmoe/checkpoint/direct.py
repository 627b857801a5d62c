"""Appends to a file past the page cache; one buffer is filled while a thread writes the other.

Finding pages for written bytes takes the kernel longer than writing them takes the disk. O_DIRECT needs no pages, but
offset, length and memory in whole blocks. File systems without O_DIRECT get the same buffers through the page cache.
"""

import errno
import mmap
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from frankenmoe.system import DIRECT, OPEN, is_direct, leave_direct, write_at

BUFFER = 2**20  # bytes; larger buffers are no faster
BUFFERS = 2  # per shard: one is filled while the other is written
BLOCK = 4096  # bytes; a multiple of the block size of common disks
REFUSED = frozenset({errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP})


def create(path: Path) -> int:
    """Creates or empties `path` for writing and reading; with O_DIRECT where the file system supports it."""
    flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | OPEN
    try:
        return os.open(path, flags | DIRECT, 0o666)
    except OSError as error:
        if not DIRECT or error.errno not in REFUSED:
            raise
    return os.open(path, flags, 0o666)


class Appender:
    """Appends to an empty open file. Errors of the writing thread are raised by the next call."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._thread = ThreadPoolExecutor(1)
        self._writing: deque[tuple[Future[None], memoryview]] = deque()
        self._made = 1
        self._buffer = aligned(BUFFER)
        self._filled = 0
        self._start = 0  # the buffer's offset in the file

    @property
    def position(self) -> int:
        """Bytes appended so far."""
        return self._start + self._filled

    def room(self) -> memoryview:
        """Memory, never empty, for the next bytes: fill it from its start, then call `filled`."""
        if self._filled == len(self._buffer):
            self._hand_over()
        return self._buffer[self._filled :]

    def filled(self, count: int) -> None:
        """Appends the first `count` bytes of `room`."""
        self._filled += count

    def append(self, data: bytes | memoryview) -> None:
        """Appends `data`; the caller may reuse its memory afterwards."""
        rest = memoryview(data)
        while rest:
            room = self.room()
            count = min(len(room), len(rest))
            room[:count] = rest[:count]
            self.filled(count)
            rest = rest[count:]

    def readable(self) -> int:
        """How many bytes from the start can be read back. Waits for pending writes."""
        self._wait()
        return self._start

    def finish(self) -> None:
        """Writes the rest, the last partial block through the page cache. Does not sync."""
        self._wait()
        whole = self._filled - self._filled % BLOCK
        self._write(self._buffer[:whole], self._start)
        if whole < self._filled:
            leave_direct(self._descriptor)
            self._write(self._buffer[whole : self._filled], self._start + whole)

    def stop(self) -> None:
        """Ends the thread after its current write."""
        self._thread.shutdown(cancel_futures=True)

    def _hand_over(self) -> None:
        """Hands the full buffer to the thread and takes a free one: a new one, or the one written longest ago."""
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
                count = write_at(self._descriptor, data, offset)
            except OSError as error:
                if error.errno not in REFUSED or not is_direct(self._descriptor):
                    raise
                # accepted when opened, rejected now: larger blocks than ours, or a short write
                leave_direct(self._descriptor)
                continue
            data, offset = data[count:], offset + count


@contextmanager
def appending(descriptor: int) -> Iterator[Appender]:
    """An Appender to an empty file. Everything is written when the block succeeds; it stops in any case."""
    out = Appender(descriptor)
    try:
        yield out
        out.finish()
    finally:
        out.stop()


def aligned(size: int) -> memoryview:
    """Private memory that starts at a page, as O_DIRECT requires."""
    if hasattr(mmap, "MAP_PRIVATE"):
        return memoryview(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
    return memoryview(mmap.mmap(-1, size))  # Windows
