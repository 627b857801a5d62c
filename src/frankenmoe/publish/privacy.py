"""Finds private names in an artifact's files: local paths, user and host. Replaces paths with public names.

A path in a field is shortened. In running text, only paths that also occur in a field are shortened: a prompt that
happens to mention /etc/passwd stays unchanged.
"""

import getpass
import html
import json
import os
import platform
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from frankenmoe.artifact.folder import Artifact
from frankenmoe.checkpoint.header import PREFIX
from frankenmoe.checkpoint.hub import local_path
from frankenmoe.publish.rewrite import Rewriter

RECIPE_FOLDER = "recipe-folder"
LABELLED = re.compile(r"([^/~=]*=)((?:/|~|\.\./).*)", re.DOTALL)  # EXPERT=FILE
# a known path is only found if no name continues before or after it; \n before it is a line end, as in JSON
BEFORE, AFTER = r"(?:(?<![\w.-])|(?<=\\[nrt]))", r"(?![\w-]|\.\w)"
HEAD = 2**26  # bytes; vocabularies and metadata of GGUF files are smaller, and what follows are numbers
# names that do not identify a person or a place
COMMON = frozenset(
    {
        *("admin", "app", "data", "home", "jovyan", "model", "models", "nobody", "root", "runner"),
        *("test", "ubuntu", "user", "users", "work", "worker"),
    }
)


@dataclass(frozen=True)
class LocalNames:
    """Absolute local path -> its public name. The recipe's relative paths start at `folder`.

    `roots` are folders inside which names are kept, the longest first: the sources and the artifact. `spelled` are
    paths as they were written if that differs, such as ../models/base.
    """

    folder: Path
    known: Mapping[str, str]
    roots: tuple[str, ...]
    spelled: Mapping[str, str]

    @property
    def rewriter(self) -> Rewriter:
        """Replaces local paths in files and plain data."""
        return Rewriter(self.folder, self.short, self.text)

    def short(self, path: str) -> str:
        """The public name of a path. A hub id stays, and so does a relative path within the recipe's folder."""
        labelled = LABELLED.fullmatch(path)
        if labelled:
            return labelled[1] + self.short(labelled[2])
        if not is_local(path):
            return path.removeprefix("./")
        whole = whole_path(path, folder=self.folder)
        if whole in self.known:
            return self.known[whole]
        root = next((root for root in self.roots if whole.startswith(f"{root}/")), None)
        return self.known[root] + whole.removeprefix(root) if root else os.path.basename(whole)

    def text(self, text: str) -> str:
        """Shortens every known path in running text, also if it is escaped as in JSON or HTML."""
        return self._pattern.sub(self._shortened, text)

    def leaks(self, data: bytes) -> Iterator[tuple[str, int]]:
        """(description, position in bytes) of every local path, home folder, user and host in `data`."""
        for what, needle, pattern in self._needles:
            match = pattern.search(data) if needle in data else None
            if match:
                yield what, match.start()

    def _shortened(self, match: re.Match[str]) -> str:
        path, rest = match[1], match[2] or ""
        name, inside = self._spellings[path]
        return name + rest if inside or not rest else os.path.basename(rest)

    @cached_property
    def _spellings(self) -> dict[str, tuple[str, bool]]:
        """A path in every spelling, longest first -> its name, and whether names inside it are kept."""
        names = {**self.known, **self.spelled}
        if Path.home() != Path("/"):
            names.setdefault(str(Path.home()), "~")
        found = {
            escape(path): (escape(name), path in self.roots or path in self.spelled)
            for path, name in names.items()
            for escape in (html.escape, _json_ascii, _json, str)
        }
        return dict(sorted(found.items(), key=lambda item: len(item[0]), reverse=True))

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        paths = "|".join(map(re.escape, self._spellings))
        return re.compile(rf"{BEFORE}({paths}){AFTER}((?:/[^/\s\"'<>|,;:()\\]+)+)?")

    @cached_property
    def _needles(self) -> tuple[tuple[str, bytes, re.Pattern[bytes]], ...]:
        """(description, bytes to look for first, pattern that decides) of everything that must not be published."""
        before, after = BEFORE.encode(), AFTER.encode()
        user, host = _user(), platform.node().split(".")[0]
        paths = [path for path in self._spellings if path.startswith("/") and path.strip("/").count("/")]
        found = [(f"the path {path}", path, before + b"%s" + after) for path in paths]
        found.append((f"the home folder {Path.home()}", f"{str(Path.home()).rstrip('/')}/", before + rb"%s(?=[\w.])"))
        if user.lower() not in COMMON and len(user) > 2:
            found.append((f"the user {user}", f"/{user}", rb"(?<![\w.:/-])(?:/[\w.+-]+){0,8}%s" + after))
        if len(host) > 5 and re.search(r"[\d-]", host):
            found.append((f"the host {host}", host, rb"(?<![\w-])%s(?![\w-])"))
        return tuple(
            (what, raw, re.compile(pattern % re.escape(raw)))
            for what, needle, pattern in found
            if (raw := needle.encode("utf-8", "surrogateescape")).strip(b"/")
        )


def _json(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _json_ascii(text: str) -> str:
    return json.dumps(text)[1:-1]


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container whose user has no name
        return ""


def is_local(path: str) -> bool:
    """Whether a path is private to this machine: it is absolute, or leaves the recipe's folder."""
    return path.startswith(("/", "~")) or os.path.normpath(path).split("/")[0] == ".."


def whole_path(path: str, *, folder: Path) -> str:
    """A path as an absolute one; relative paths start at `folder`."""
    return str(local_path(path, folder=folder))


def local_names(artifact: Artifact) -> LocalNames:
    """Every local path in the artifact's files, with its public name."""
    record, own = artifact.record, artifact.folder.resolve()
    folder = Path(record["recipe_folder"])
    roots = (str(own), *(str(Path(source["file"]).parent) for source in record["sources"]))
    roots = tuple(sorted({root for root in roots if root.strip("/")}, key=len, reverse=True))
    wanted = {path: os.path.basename(path) for path in (*roots, str(own.parent))}
    wanted[str(folder)] = RECIPE_FOLDER
    spelled: dict[str, str] = {}
    for path in _paths_in(artifact, folder):
        whole = whole_path(path, folder=folder)
        if path != whole and path.strip("./~"):
            spelled[path] = whole
        if not whole.startswith(tuple(f"{root}/" for root in roots)):
            wanted.setdefault(whole, os.path.basename(whole))
    known: dict[str, str] = {}
    for path, name in wanted.items():
        if path.strip("/") and (path != str(Path.home()) or path in roots):
            known[path] = _unlike(name, known.values())
    names = LocalNames(folder, known, roots, {})
    return replace(names, spelled={path: names.short(whole) for path, whole in spelled.items()})


def _unlike(name: str, taken: Collection[str]) -> str:
    """A name that is not taken: model, model-2 ..."""
    numbered = (f"{name}-{number}" for number in range(2, len(taken) + 3))
    return name if name not in taken else next(each for each in numbered if each not in taken)


def _paths_in(artifact: Artifact, folder: Path) -> list[str]:
    """The local paths in the fields of every file of the artifact that can be published."""
    found: dict[str, None] = {}

    def note(path: str) -> str:
        labelled = LABELLED.fullmatch(path)
        file = labelled[2] if labelled else path
        if is_local(file):
            found[file] = None
        return path

    reader = Rewriter(folder, note, lambda text: text)
    for file in sorted(artifact.folder.rglob("*")):
        if file.is_file():
            reader.file(file, path=file.relative_to(artifact.folder).as_posix())
    return list(found)


def as_published(file: Path, *, path: str, names: LocalNames) -> str | bytes:
    """What to send for the file at `path` in the repository: its own path, or other bytes."""
    return names.rewriter.file(file, path=path) or str(file)


def first_leak(file: Path, *, path: str, names: LocalNames) -> str | None:
    """What the published form of a file still reveals about this machine, and in which field; None if nothing."""
    sent = as_published(file, path=path, names=names)
    data = sent if isinstance(sent, bytes) else _looked_at(file)
    for what, at in names.leaks(data):
        keys = re.findall(rb'"([^"\\]{1,80})"\s*:', data[max(0, at - 4096) : at])
        place = f"the field {keys[-1].decode(errors='replace')!r}" if keys else f"byte {at}"
        return f"{what} in {place}"
    return None


def _looked_at(file: Path) -> bytes:
    """The part of a file that can hold text: of a safetensors file its header."""
    with file.open("rb") as opened:
        size = HEAD
        if file.suffix == ".safetensors":
            size = min(size, int.from_bytes(opened.read(PREFIX), "little"))
        return opened.read(size)
