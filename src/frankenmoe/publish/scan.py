"""Looks for private names in every byte that would be sent: local paths, the home folder, user and host.

What counts, with few false alarms:
- every path that the artifact's records name, in every spelling; the home folder; the user's name in a path; the
  host's name if it has a digit or a hyphen. Short and usual user names such as root or app are names of nobody.
- in text, also any other absolute path of a file or folder that exists here, except folders of the system such as /usr.
- in numbers (tensors, pictures), only names of at least LEAST bytes: shorter ones occur there by chance.

Files are read in pieces, so memory does not grow with their size.
"""

import getpass
import io
import os
import platform
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path

from frankenmoe.checkpoint.header import PREFIX
from frankenmoe.publish.privacy import AFTER, BEFORE, WINDOWS, LocalNames, as_published
from frankenmoe.publish.rewrite import Spliced

PIECE = 2**24  # bytes
OVERLAP = 2**14  # bytes of the piece before, for names that begin there and for the field around them
LEAST = 8  # bytes of a name in numbers; in 100 GB of random ones, 8 given bytes occur with a chance of 1 in 10**8
HEAD = 2**26  # bytes of a GGUF file that can hold text: vocabularies and metadata are smaller
NUMBERS = (".png",)
# names that do not identify a person or a place
COMMON = frozenset(
    {
        *("admin", "app", "data", "home", "jovyan", "model", "models", "nobody", "root", "runner"),
        *("test", "ubuntu", "user", "users", "work", "worker"),
    }
)
# folders of Linux, of its package managers, and of macOS that are alike on many machines
SYSTEM = frozenset(
    {
        *("bin", "boot", "dev", "etc", "lib", "lib32", "lib64", "libx32", "opt", "proc", "run", "sbin", "sys", "usr"),
        *("var", "nix", "snap", "Applications", "Library", "System", "private"),
    }
)
WORD = rb"[\w.+@\x80-\xff-]*[\w+@\x80-\xff-]"  # a full stop after it ends a sentence
WORDS = WORD + rb"(?: " + WORD + rb"){0,4}"  # a name with spaces, or a name and the words behind it
ABSOLUTE = re.compile(rb"(?:(?<![\w./~<\\\x80-\xff-])|(?<=\\[nrt])|(?<=file://))(/" + WORDS + rb"/)(" + WORDS + rb")")
FIELD = re.compile(rb'"([^"\\]{1,80})"\s*:')


@dataclass(frozen=True)
class Needle:
    """A private name: what it is, its bytes, and the pattern that decides whether it stands for itself."""

    what: str
    raw: bytes
    pattern: re.Pattern[bytes]


def first_leak(
    file: Path, *, path: str, names: LocalNames, on_bytes: Callable[[int], None] = lambda amount: None
) -> str | None:
    """What the published form of a file still reveals about this machine, and in which field; None if nothing."""
    with _opened(as_published(file, path=path, names=names)) as stream:
        for what, place in leaks(stream, names, text=_text(stream, file.suffix), on_bytes=on_bytes):
            return f"{what} in {place}"
    return None


def _opened(sent: str | bytes | Spliced) -> io.BufferedIOBase:
    if isinstance(sent, str):
        return open(sent, "rb")
    return io.BytesIO(sent) if isinstance(sent, bytes) else sent


def leaks(
    stream: io.BufferedIOBase,
    names: LocalNames,
    *,
    text: int | None = None,
    on_bytes: Callable[[int], None] = lambda amount: None,
) -> Iterator[tuple[str, str]]:
    """(what, where) of the private names in a stream, of which the first `text` bytes are text, by default all."""
    found = needles(names)
    long, short = ([each for each in found if (len(each.raw) >= LEAST) == wanted] for wanted in (True, False))
    openings = {needle.raw[: max(LEAST, _second(needle.raw))] for needle in long}  # few, where there are many sources
    kept, start, piece = b"", 0, b"?"
    while piece:
        piece = stream.read(PIECE)
        on_bytes(len(piece))
        window = kept + piece
        letters = window if text is None else window[: max(0, text - start)]
        known = long if any(opening in window for opening in openings) else []
        for what, match in chain(_named(known, window), _named(short, letters), _paths(letters)):
            # at an end of the window, what stands beside the name is in another one
            if (match.start() or not start) and (match.end() < len(window) or not piece):
                yield what, _place(window, match.start(), start)
        kept = window[-OVERLAP:]
        start += len(window) - len(kept)


def _named(wanted: list[Needle], window: bytes) -> Iterator[tuple[str, re.Match[bytes]]]:
    for needle in wanted:
        if needle.raw in window:
            yield from ((needle.what, match) for match in needle.pattern.finditer(window))


def _paths(text: bytes) -> Iterator[tuple[str, re.Match[bytes]]]:
    """The absolute paths that exist here, with spaces in their names if need be."""
    for match in ABSOLUTE.finditer(text):
        words = match[2].split(b" ")
        paths = (match[1] + b" ".join(words[:count]) for count in range(1, len(words) + 1))
        path = next(filter(is_here, paths), None)
        if path is not None:
            yield f"the path {path.decode(errors='replace')}", match


def needles(names: LocalNames) -> list[Needle]:
    """The private names that must not be published."""
    before, after = BEFORE.encode(), AFTER.encode()
    user, host = _user(), platform.node().split(".")[0]
    paths = [path for path in names.spellings if path.startswith(("/", "..", "~/")) or WINDOWS.match(path)]
    paths = [path for path in paths if re.search(r"[/\\]", path.strip("./~"))]
    found = [(f"the path {path}", path, before + b"%s" + after) for path in paths]
    found.append((f"the home folder {Path.home()}", f"{str(Path.home()).rstrip('/')}/", before + rb"%s(?=[\w.])"))
    if user.lower() not in COMMON and len(user) > 2:
        found.append((f"the user {user}", f"/{user}", rb"(?<![\w.:/-])(?:/[\w.+-]+){0,8}%s" + after))
    if len(host) > 5 and re.search(r"[\d-]", host):
        found.append((f"the host {host}", host, rb"(?<![\w-])%s(?![\w-])"))
    return [
        Needle(what, raw, re.compile(pattern % re.escape(raw)))
        for what, needle, pattern in found
        if (raw := needle.encode("utf-8", "surrogateescape")).strip(b"/")
    ]


@lru_cache(maxsize=2**16)
def is_here(path: bytes) -> bool:
    """Whether the first two parts of an absolute path exist on this machine, outside the folders of the system."""
    top = path.split(b"/", 2)[1].decode(errors="replace")
    return top not in SYSTEM and os.path.lexists(path)


def _second(path: bytes) -> int:
    """Where the second part of an absolute path ends."""
    end = path.find(b"/", path.find(b"/", 1) + 1)
    return len(path) if end < 0 else end


def _text(stream: io.BufferedIOBase, suffix: str) -> int | None:
    """How many of the first bytes of a file can be text; None if all. The stream is at its beginning again."""
    if suffix == ".safetensors":
        size = PREFIX + int.from_bytes(stream.read(PREFIX), "little")
        stream.seek(0)
        return size
    return HEAD if suffix == ".gguf" else 0 if suffix in NUMBERS else None


def _place(window: bytes, at: int, start: int) -> str:
    keys = FIELD.findall(window[max(0, at - 4096) : at])
    return f"the field {keys[-1].decode(errors='replace')!r}" if keys else f"byte {start + at}"


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container whose user has no name
        return ""
