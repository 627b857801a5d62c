"""Reads stretches of files into given memory, past the page cache what is not in it; knows no tensor.

A byte that will be read once gains nothing from the page cache and pays for a page in it. One that is there already
comes from there.
"""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from frankenmoe.checkpoint.direct import BLOCK, DIRECT, REFUSED, aligned

_NOWAIT: int = getattr(os, "RWF_NOWAIT", 0)  # Linux's own
_BOUNCE = 2**19  # bytes
_UNWILLING = REFUSED | {errno.EAGAIN}


@dataclass(slots=True)
class _Opened:
    """Two descriptors of one file; `direct` is None where the file system has no O_DIRECT."""

    cached: int
    direct: int | None


class Reader:
    """Opens each file once, and keeps it open."""

    def __init__(self) -> None:
        self._files: dict[Path, _Opened] = {}
        self._bounce = memoryview(b"")

    def read(self, file: Path, room: memoryview, offset: int, *, once: bool) -> int:
        """Fill `room` from its start with bytes of `file` from `offset` on; how many, 0 at the end of the file only.

        With `once` they will not be needed again, so what is not cached is not cached now either.
        Raises OSError.
        """
        opened = self._files.get(file) or self._open(file)
        if once and opened.direct is not None and _NOWAIT:
            try:
                return os.preadv(opened.cached, [room], offset, _NOWAIT)
            except OSError as error:
                if error.errno not in _UNWILLING:
                    raise
            try:
                return self._read_direct(opened.direct, room, offset)
            except OSError as error:
                if error.errno not in _UNWILLING:
                    raise
        return os.preadv(opened.cached, [room], offset)

    def close(self) -> None:
        """Close every file."""
        for opened in self._files.values():
            os.close(opened.cached)
            if opened.direct is not None:
                os.close(opened.direct)
        self._files.clear()

    def _open(self, file: Path) -> _Opened:
        opened = self._files[file] = _Opened(os.open(file, os.O_RDONLY | os.O_CLOEXEC), None)
        if DIRECT:
            try:
                opened.direct = os.open(file, os.O_RDONLY | os.O_CLOEXEC | DIRECT)
            except OSError as error:
                if error.errno not in REFUSED:
                    raise
        return opened

    def _read_direct(self, descriptor: int, room: memoryview, offset: int) -> int:
        """Read the whole blocks around what is wanted, and take that out of them."""
        if not self._bounce:
            self._bounce = aligned(_BOUNCE + BLOCK)
        before = offset % BLOCK
        wanted = min(len(room), len(self._bounce) - before)
        whole = -(-(before + wanted) // BLOCK) * BLOCK
        count = os.preadv(descriptor, [self._bounce[:whole]], offset - before) - before
        count = max(0, min(count, wanted))
        room[:count] = self._bounce[before : before + count]
        return count


@contextmanager
def reading() -> Iterator[Reader]:
    """A Reader whose files are closed afterwards."""
    reader = Reader()
    try:
        yield reader
    finally:
        reader.close()
