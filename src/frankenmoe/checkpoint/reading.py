"""Reads parts of files into given memory: from the page cache if they are there, else past it.

Bytes that are read only once gain nothing from the page cache.
"""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from frankenmoe.checkpoint.direct import BLOCK, REFUSED, aligned
from frankenmoe.system import DIRECT, NOWAIT, OPEN, read_at

_BOUNCE = 2**19  # bytes
_UNWILLING = REFUSED | {errno.EAGAIN}


@dataclass(slots=True)
class _Opened:
    """Two descriptors of one file; `direct` is None without O_DIRECT."""

    cached: int
    direct: int | None


class Reader:
    """Opens each file once and keeps it open."""

    def __init__(self) -> None:
        self._files: dict[Path, _Opened] = {}
        self._bounce = memoryview(b"")

    def read(self, file: Path, room: memoryview, offset: int, *, once: bool) -> int:
        """Fills `room` with bytes of `file` from `offset` on. Returns their number, 0 only at the end of the file.

        With `once`, bytes that are not cached stay uncached. Raises OSError.
        """
        opened = self._files.get(file) or self._open(file)
        if once and opened.direct is not None and NOWAIT:
            try:
                return read_at(opened.cached, room, offset, NOWAIT)
            except OSError as error:
                if error.errno not in _UNWILLING:
                    raise
            try:
                return self._read_direct(opened.direct, room, offset)
            except OSError as error:
                if error.errno not in _UNWILLING:
                    raise
        return read_at(opened.cached, room, offset)

    def close(self) -> None:
        """Closes every file."""
        for opened in self._files.values():
            os.close(opened.cached)
            if opened.direct is not None:
                os.close(opened.direct)
        self._files.clear()

    def _open(self, file: Path) -> _Opened:
        opened = self._files[file] = _Opened(os.open(file, os.O_RDONLY | OPEN), None)
        if DIRECT:
            try:
                opened.direct = os.open(file, os.O_RDONLY | OPEN | DIRECT)
            except OSError as error:
                if error.errno not in REFUSED:
                    raise
        return opened

    def _read_direct(self, descriptor: int, room: memoryview, offset: int) -> int:
        """Reads whole blocks and copies the wanted part."""
        if not self._bounce:
            self._bounce = aligned(_BOUNCE + BLOCK)
        before = offset % BLOCK
        wanted = min(len(room), len(self._bounce) - before)
        whole = -(-(before + wanted) // BLOCK) * BLOCK
        count = read_at(descriptor, self._bounce[:whole], offset - before) - before
        count = max(0, min(count, wanted))
        room[:count] = self._bounce[before : before + count]
        return count


@contextmanager
def reading() -> Iterator[Reader]:
    """A Reader whose files are closed at the end."""
    reader = Reader()
    try:
        yield reader
    finally:
        reader.close()
