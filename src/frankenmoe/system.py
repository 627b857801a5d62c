"""What differs among operating systems: file names, opening, reading and writing, locks, syncing, cores, memory.

Linux's calls are used where they are, and portable ones elsewhere. No other file asks which system this is.
"""

import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import cache
from importlib import import_module
from io import FileIO
from pathlib import Path
from typing import Any

# bytes as they are (Windows would change line ends), and not open in child processes
OPEN: int = getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
DIRECT: int = getattr(os, "O_DIRECT", 0)  # past the page cache; Linux only
LONGEST = 60  # characters of a part of a file's name: with four bytes each, still below what every system takes
# names that Windows keeps for devices, with any ending
DEVICE = re.compile(r"(con|prn|aux|nul|com\d|lpt\d|com[¹²³]|lpt[¹²³]|conin\$|conout\$)(\..*)?", re.IGNORECASE)
NOWAIT: int = getattr(os, "RWF_NOWAIT", 0)  # read only what is in the page cache; Linux only
PROC, GROUPS = Path("/proc"), Path("/sys/fs/cgroup")
# files of a cgroup, of version 1 and 2: the limit of its memory, what is used, and what of that are pages of files
GROUP_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_active_file", "total_inactive_file"))
GROUP_V2 = ("memory.max", "memory.current", ("active_file", "inactive_file"))

KEPT = 2**26  # bytes of freed memory that glibc may keep
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # numbers of options in glibc's malloc.h


def read_at(descriptor: int, room: memoryview, offset: int, flags: int = 0) -> int:
    """Fills the start of `room` from a file's bytes at `offset`; returns their number. Other threads must not read."""
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [room], offset, flags)
    os.lseek(descriptor, offset, os.SEEK_SET)
    return FileIO(descriptor, closefd=False).readinto(room) or 0


def write_at(descriptor: int, data: memoryview, offset: int) -> int:
    """Writes the start of `data` to a file at `offset`; returns the number of bytes. Other threads must not write."""
    if hasattr(os, "pwrite"):
        return os.pwrite(descriptor, data, offset)
    os.lseek(descriptor, offset, os.SEEK_SET)
    return os.write(descriptor, data)


def reserve(descriptor: int, size: int) -> None:
    """Reserves room for `size` bytes on the disk, where the system can."""
    if size and hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)


def read_ahead(descriptor: int, offset: int, size: int) -> None:
    """Tells the system which bytes will be read next, where that is possible."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, offset, size, os.POSIX_FADV_WILLNEED)


def is_direct(descriptor: int) -> bool:
    """Whether an open file is read and written past the page cache."""
    if not DIRECT:
        return False
    fcntl = import_module("fcntl")
    return bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & DIRECT)


def leave_direct(descriptor: int) -> None:
    """From now on, a file is written through the page cache, also if it was opened with DIRECT."""
    if not DIRECT:
        return
    fcntl = import_module("fcntl")
    fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) & ~DIRECT)


def moves_open_files() -> bool:
    """Whether a folder can be renamed while a file in it is open. Not on Windows, the one system without fcntl."""
    return _module("fcntl") is not None


def lock(descriptor: int) -> None:
    """Locks an open file until it is closed. BlockingIOError: another process has it. OSError: there are no locks."""
    fcntl, msvcrt = _module("fcntl"), _module("msvcrt")
    if fcntl is not None:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    elif msvcrt is not None:
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except PermissionError as error:
            raise BlockingIOError(error.errno, error.strerror) from error
    else:
        raise OSError("this Python has no locks")


def sync_folder(folder: Path) -> None:
    """Makes a rename durable: before its folder is synced, a power failure can undo it. Windows cannot open folders."""
    if os.name != "nt":
        _sync(folder)


def sync_all(folder: Path) -> None:
    """Makes the files of a folder durable, and their names."""
    for file in folder.iterdir():
        _sync(file)
    sync_folder(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, OPEN | (os.O_RDONLY if path.is_dir() or os.name != "nt" else os.O_RDWR))
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def cores() -> int:
    """The processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def free_memory() -> int:
    """Bytes of memory that can be used without swapping: of this machine, and within the limits of a container."""
    return min([int(import_module("psutil").virtual_memory().available), *_free_in_groups()])


def _free_in_groups() -> Iterator[int]:
    """What every memory limit of this process leaves: of its cgroup, and of those around it. Linux only.

    Pages of files do not count as used, because the kernel drops them when memory is needed.
    """
    with suppress(OSError, ValueError):
        for line in (PROC / "self" / "cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "memory" not in controllers.split(","):
                continue
            root, names = (GROUPS / "memory", GROUP_V1) if controllers else (GROUPS, GROUP_V2)
            # without a namespace of its own, a container sees its path on the host, and its group at the root
            inner = root / path.strip("/")
            for folder in (inner, *(each for each in inner.parents if each.is_relative_to(root))):
                yield from _free_in(folder, *names)


def _free_in(folder: Path, limit: str, used: str, files: Sequence[str]) -> Iterator[int]:
    """What the limit of one cgroup leaves, at least 0; nothing if it has none."""
    with suppress(OSError, ValueError):  # "max" is no number
        most, now = (int((folder / name).read_text(encoding="utf-8")) for name in (limit, used))
        lines = (folder / "memory.stat").read_text(encoding="utf-8").splitlines()
        facts = dict(line.split() for line in lines)
        yield max(0, most - now + sum(int(facts.get(name, 0)) for name in files))


def relative(path: Path, start: Path) -> str:
    """The way from `start` to `path`, with slashes; the path itself if they are on different drives of Windows."""
    try:
        return Path(os.path.relpath(path, start)).as_posix()
    except ValueError:
        return str(path)


def file_name(text: str, *, default: str) -> str:
    """A text as a part of a file's name that every system takes: no separators, spaces, ending dots or device names."""
    plain = re.sub(r"[^\w.-]+", "-", unicodedata.normalize("NFC", text))[:LONGEST].strip("-.") or default
    return f"_{plain}" if DEVICE.fullmatch(plain) else plain


def file_names(texts: Iterable[str], *, default: str) -> list[str]:
    """A file name for each text, in order. No two are equal, also where capitals do not count."""
    found: dict[str, str] = {}
    for text in texts:
        plain, number = file_name(text, default=default), 1
        name = plain
        while name.casefold() in found:
            number += 1
            name = f"{plain}-{number}"
        found[name.casefold()] = name
    return list(found.values())


def disk_bytes(file: Path) -> int:
    """Bytes that a file takes on the disk, 0 if it does not exist; its size where the system does not say."""
    if not file.is_file():
        return 0
    status = file.stat()
    return status.st_blocks * 512 if hasattr(status, "st_blocks") else status.st_size


def _module(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError:
        return None


def give_back_memory() -> None:
    """Returns freed memory to the system if the C library can: glibc keeps that of arrays of odd sizes until asked."""
    trim = _of_c_library("malloc_trim")
    if trim:
        trim(0)


@cache
def keep_freed_memory() -> None:
    """Lets glibc keep up to 64 MB of freed memory for the next arrays.

    Otherwise it returns arrays of some megabytes to the system at once. To get them back costs a page fault for every
    4 KiB, which took a third of the time of computed tensors.
    """
    set_option = _of_c_library("mallopt")
    if set_option:
        set_option(_TRIM_THRESHOLD, KEPT)
        set_option(_MMAP_THRESHOLD, KEPT // 2)  # the most that glibc takes


@cache
def _of_c_library(name: str) -> Callable[..., int] | None:
    """A function of the process's C library; None where it has none of this name."""
    try:
        ctypes = import_module("ctypes")  # not at start-up
        return getattr(ctypes.CDLL(None), name, None)
    except (OSError, TypeError):  # Windows has no library of the process itself
        return None
