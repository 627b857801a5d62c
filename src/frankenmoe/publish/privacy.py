"""Replaces local paths in an artifact's files with public names.

A path in a field is shortened. In running text, only paths that also occur in a field are shortened: a prompt that
happens to mention /etc/passwd stays unchanged.
"""

import html
import json
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path, PureWindowsPath
from urllib.parse import quote

from frankenmoe.artifact.folder import Artifact
from frankenmoe.checkpoint.hub import local_path
from frankenmoe.publish.rewrite import Rewriter, Spliced

RECIPE_FOLDER = "recipe-folder"
LABELLED = re.compile(r"([^/~=]*=)((?:/|~|\.\./).*)", re.DOTALL)  # EXPERT=FILE
WINDOWS = re.compile(r"[A-Za-z]:[\\/]|\\\\")  # of a file that was written there
# a known path is only found if no name continues before or after it; \n before it is a line end, as in JSON
BEFORE, AFTER = r"(?:(?<![\w.-])|(?<=\\[nrt]))", r"(?![\w-]|\.\w)"


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
        if WINDOWS.match(path):
            return PureWindowsPath(path).name
        if not is_local(path):
            return path.removeprefix("./")
        whole = whole_path(path, folder=self.folder)
        if whole in self.known:
            return self.known[whole]
        root = next((root for root in self.roots if whole.startswith(f"{root}/")), None)
        return self.known[root] + whole.removeprefix(root) if root else os.path.basename(whole)

    def text(self, text: str) -> str:
        """Shortens every known path in running text, also if it is escaped as in JSON, HTML or an address."""
        return self._pattern.sub(self._shortened, text)

    def _shortened(self, match: re.Match[str]) -> str:
        path, rest = match[1], match[2] or ""
        name, inside = self.spellings[path]
        return name + rest if inside or not rest else os.path.basename(rest)

    @cached_property
    def spellings(self) -> dict[str, tuple[str, bool]]:
        """A path in every spelling, the longest first -> its name, and whether names inside it are kept."""
        names = {**self.known, **self.spelled}
        if Path.home() != Path("/"):
            names.setdefault(str(Path.home()), "~")
        found = {
            escape(path): (escape(name), path in self.roots or path in self.spelled)
            for path, name in names.items()
            for escape in (html.escape, _json_ascii, _json, quote, str)
        }
        return dict(sorted(found.items(), key=lambda item: len(item[0]), reverse=True))

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        paths = "|".join(map(re.escape, self.spellings))
        return re.compile(rf"{BEFORE}({paths}){AFTER}((?:/[^/\s\"'<>|,;:()\\]+)+)?")


def _json(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _json_ascii(text: str) -> str:
    return json.dumps(text)[1:-1]


def is_local(path: str) -> bool:
    """Whether a path is private to a machine: it is absolute, on Windows too, or leaves the recipe's folder."""
    return path.startswith(("/", "~")) or bool(WINDOWS.match(path)) or os.path.normpath(path).split("/")[0] == ".."


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
        if WINDOWS.match(path):
            spelled[path] = path
            continue
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


def as_published(file: Path, *, path: str, names: LocalNames) -> str | bytes | Spliced:
    """What to send for the file at `path` in the repository: its own path, other bytes, or the file with a new head."""
    return names.rewriter.file(file, path=path) or str(file)
