"""Appending past the page cache and around it: the same bytes for every size, on every kind of file system."""

import errno
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from frankenmoe.checkpoint import direct, reading
from frankenmoe.checkpoint.direct import BLOCK, appending, create, is_direct
from frankenmoe.checkpoint.reading import Reader

BUFFER = 2 * BLOCK  # so that small files have many
SIZES = (0, 1, 511, BLOCK - 1, BLOCK, BLOCK + 1, BUFFER - 1, BUFFER, BUFFER + 1, 3 * BUFFER, 5 * BUFFER + 511)


@pytest.fixture(autouse=True)
def small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "BUFFER", BUFFER)


@pytest.fixture(params=["disk", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A folder on a disk, and one on a real tmpfs."""
    if request.param == "disk":
        yield tmp_path
        return
    if not os.access("/dev/shm", os.W_OK):
        pytest.skip("there is no /dev/shm")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        yield Path(name)


def append(path: Path, *pieces: bytes) -> bytes:
    """What a file holds after `pieces` were appended."""
    descriptor = create(path)
    try:
        with appending(descriptor) as out:
            for piece in pieces:
                out.append(piece)
            assert out.position == sum(map(len, pieces))
    finally:
        os.close(descriptor)
    return path.read_bytes()


def without_direct(*, when: Callable[[int], bool]) -> Callable[..., int]:
    """An os.open that answers as file systems without O_DIRECT do, for the flags that `when` picks."""
    real = os.open

    def refuse(path: str, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_DIRECT and when(flags):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(path, flags, mode)

    return refuse


@pytest.mark.parametrize("size", SIZES)
def test_every_size(folder: Path, size: int) -> None:
    data = os.urandom(size)
    assert append(folder / "file", data) == data
    assert append(folder / "file", b"over", data) == b"over" + data  # the longer file before leaves nothing


@pytest.mark.parametrize("size", SIZES)
def test_a_file_system_without_it(tmp_path: Path, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "open", without_direct(when=lambda flags: True))
    data = os.urandom(size)
    assert append(tmp_path / "file", data) == data
    descriptor = create(tmp_path / "file")
    assert not is_direct(descriptor)
    os.close(descriptor)


@pytest.mark.parametrize("size", SIZES)
def test_refused_only_when_written(tmp_path: Path, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a disk whose blocks are larger than ours."""
    real = os.pwrite

    def refuse(descriptor: int, data: memoryview, offset: int) -> int:
        if is_direct(descriptor):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", refuse)
    data = os.urandom(size)
    assert append(tmp_path / "file", data) == data


def test_writes_cut_short_go_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda descriptor, data, offset: real(descriptor, data[:BLOCK], offset))
    data = os.urandom(3 * BUFFER + 77)
    assert append(folder / "file", data) == data


@settings(deadline=None, max_examples=60)
@given(sizes=st.lists(st.integers(0, 3 * BUFFER), max_size=8), seed=st.randoms())
def test_any_pieces(tmp_path_factory: pytest.TempPathFactory, sizes: list[int], seed: object) -> None:
    pieces = [os.urandom(size) for size in sizes]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(direct, "BUFFER", BUFFER)
        assert append(tmp_path_factory.mktemp("pieces") / "file", *pieces) == b"".join(pieces)


def test_it_is_direct_where_this_disk_takes_it(tmp_path: Path) -> None:
    path = tmp_path / "file"
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_DIRECT))
    except OSError:
        pytest.skip("this disk has no O_DIRECT")
    descriptor = create(path)
    assert is_direct(descriptor)
    os.close(descriptor)


def test_what_is_readable_is_there(folder: Path) -> None:
    descriptor = create(folder / "file")
    data = os.urandom(2 * BUFFER + 5)
    with appending(descriptor) as out:
        out.append(data)
        assert out.readable() == 2 * BUFFER
        assert (folder / "file").read_bytes()[: 2 * BUFFER] == data[: 2 * BUFFER]
    os.close(descriptor)


def test_an_error_of_the_thread_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", fail)
    with pytest.raises(OSError, match="No space left"):
        append(tmp_path / "file", bytes(20 * BUFFER))


@pytest.mark.parametrize("once", [True, False])
@pytest.mark.parametrize("evicted", [True, False])
@settings(deadline=None, max_examples=40)
@given(start=st.integers(0, 3 * BUFFER), count=st.integers(1, 3 * BUFFER), bounce=st.sampled_from([BLOCK, 5 * BLOCK]))
def test_any_stretch_is_read(
    tmp_path_factory: pytest.TempPathFactory, once: bool, evicted: bool, start: int, count: int, bounce: int
) -> None:
    data = os.urandom(3 * BUFFER + 77)
    file = tmp_path_factory.mktemp("read") / "file"
    file.write_bytes(data)
    if evicted:
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "_BOUNCE", bounce)
        assert read(file, start, count, once=once) == data[start : start + count]


def read(file: Path, start: int, count: int, *, once: bool) -> bytes:
    room, done = memoryview(bytearray(count)), 0
    with reading.reading() as reader:
        while got := reader.read(file, room[done:], start + done, once=once):
            done += got
            if done == count:
                break
    return bytes(room[:done])


@pytest.mark.parametrize("what", ["open", "nowait", "direct"])
def test_reading_where_something_is_not_offered(tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = os.urandom(3 * BUFFER + 77)
    (tmp_path / "file").write_bytes(data)
    real = os.preadv

    def refuse(descriptor: int, rooms: list, offset: int, flags: int = 0) -> int:
        if flags or is_direct(descriptor):
            raise OSError(errno.EAGAIN if flags and what == "direct" else errno.EOPNOTSUPP, "no")
        return real(descriptor, rooms, offset)

    if what == "open":
        monkeypatch.setattr(os, "open", without_direct(when=lambda flags: True))
    else:
        monkeypatch.setattr(os, "preadv", refuse)
    assert read(tmp_path / "file", 5, 2 * BUFFER, once=True) == data[5 : 5 + 2 * BUFFER]


def test_a_disk_that_fails_is_not_asked_another_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"data")

    def fail(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", fail)
    reader = Reader()
    with pytest.raises(OSError, match="Input/output"):
        reader.read(tmp_path / "file", memoryview(bytearray(4)), 0, once=True)
    reader.close()
