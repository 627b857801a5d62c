"""Python imports this at its start if the folder is on its path: then our package finds nothing that only Linux has.

Other packages keep what they need: they have their own versions for other systems, which are not ours to test. What is
taken away for all is what they only use if it is there. `frankenmoe` gets no fcntl, resource or other Unix modules, no
/proc, no statvfs, and an error for every text file that is opened without naming its encoding.
"""

import builtins
import importlib
import io
import mmap
import os
import sys
import types
import warnings

MODULES = {"fcntl", "resource", "termios", "tty", "pty", "pwd", "grp", "syslog", "posix"}
CALLS = (
    *("O_DIRECT", "O_CLOEXEC", "RWF_NOWAIT", "posix_fallocate", "posix_fadvise", "POSIX_FADV_WILLNEED"),
    *("POSIX_FADV_DONTNEED", "copy_file_range", "sendfile", "splice", "preadv", "pwritev", "pread", "pwrite"),
    *("sched_getaffinity", "sched_setaffinity", "killpg", "getpgid", "setsid", "memfd_create", "fdatasync"),
)
OURS = {"statvfs", "sysconf", "getloadavg", "uname", "getuid", "geteuid", "fork", "sync", "readv", "writev"}

for name in CALLS:
    if hasattr(os, name):
        delattr(os, name)
MMAP = types.SimpleNamespace(mmap=mmap.mmap, ACCESS_READ=mmap.ACCESS_READ, ACCESS_COPY=mmap.ACCESS_COPY)
warnings.filterwarnings("error", category=EncodingWarning, module=r"frankenmoe\b.*")


def _caller(depth=2):
    return sys._getframe(depth).f_globals.get("__name__", "")


def _ours(depth=3):
    return _caller(depth).partition(".")[0] == "frankenmoe"


_import, _import_module = builtins.__import__, importlib.import_module
import fcntl as _fcntl  # noqa: E402


def _no_import(name, globals=None, locals=None, fromlist=(), level=0):
    if (globals or {}).get("__name__", "").partition(".")[0] == "frankenmoe":
        if name in MODULES:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        if name == "mmap":  # torch asks by the system's name whether this one has flags
            return MMAP
    return _import(name, globals, locals, fromlist, level)


def _locking(descriptor, mode, count):
    """Windows' lock: a byte range that belongs to the open file, and a permission error for the second one."""
    try:
        _fcntl.flock(descriptor, _fcntl.LOCK_EX | _fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise PermissionError(13, "Permission denied") from error


_msvcrt = types.SimpleNamespace(LK_NBLCK=2, locking=_locking)


def _no_import_module(name, package=None):
    if _ours():
        if name == "msvcrt":
            return _msvcrt
        if name in MODULES:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    return _import_module(name, package)


builtins.__import__ = _no_import
importlib.import_module = _no_import_module

_open = builtins.open


def _no_proc(file, *args, **kwargs):
    if isinstance(file, str | os.PathLike) and os.fspath(file).startswith("/proc") and _caller() != "psutil._common":
        raise FileNotFoundError(2, "No such file or directory", os.fspath(file))
    return _open(file, *args, **kwargs)


builtins.open = io.open = _no_proc


def _refused(name, real):
    def call(*args):
        if _ours():
            raise AttributeError(f"module 'os' has no attribute {name!r}")
        return real(*args)

    return call


for name in OURS & set(dir(os)):
    setattr(os, name, _refused(name, getattr(os, name)))

_rename, _replace = os.rename, os.replace


def _held(folder):
    """The open files of this process below a folder, which Windows would not let be renamed."""
    found = (os.path.join("/proc/self/fd", name) for name in os.listdir("/proc/self/fd"))
    with _open("/proc/self/maps", encoding="utf-8") as lines:
        mapped = {line.split(maxsplit=5)[-1].strip() for line in lines}
    opened = {os.path.realpath(link) for link in found if os.path.lexists(link)}
    start = os.path.realpath(folder) + os.sep
    return sorted(file for file in opened | mapped if file.startswith(start))


def _as_windows(real):
    def move(old, new, *args, **kwargs):
        if os.path.isdir(old) and _held(old):
            raise PermissionError(13, f"The process cannot access the file: {_held(old)}", os.fspath(old))
        return real(old, new, *args, **kwargs)

    return move


os.rename, os.replace = _as_windows(_rename), _as_windows(_replace)
