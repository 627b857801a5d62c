"""The name of a checkpoint in a recipe, in mergekit's short and long form."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from frankenmoe.checkpoint.hub import is_folder
from frankenmoe.recipe.refusals import found, refusal, refuse_unknown_keys
from frankenmoe.recipe.yaml import Location

SOURCE_KEYS = ("model", "lora", "expert", "override_architecture")
PATH_KEYS = ("path", "revision")
SHARED_PART = "shared"  # the shared expert of a mixture
PART = re.compile(rf"(?P<head>[^+]*)#(?P<part>\d+|{SHARED_PART})(?P<tail>(?:\+.*)?)", re.DOTALL | re.ASCII)


def _text_or_object(required: str, **properties: Any) -> dict[str, Any]:
    """The JSON schema of a text, or of an object with these keys."""
    table = {"type": "object", "properties": properties, "required": [required], "additionalProperties": False}
    return {"anyOf": [TEXT, table]}


TEXT = {"type": "string"}
PATH_SCHEMA = _text_or_object("path", path=TEXT, revision=TEXT)
PART_SCHEMA = {"anyOf": [{"type": "integer", "minimum": 0}, {"const": SHARED_PART}]}
SOURCE_SCHEMA = _text_or_object(
    "model", model=PATH_SCHEMA, lora=PATH_SCHEMA, expert=PART_SCHEMA, override_architecture=TEXT
)


@dataclass(frozen=True)
class SourceName:
    """A hub id or folder, as written, with an optional revision and an optional LoRA.

    `part` is an expert of a mixture: its number from 0, or `shared`.
    """

    path: str
    revision: str | None = None
    adapter: str | None = None
    adapter_revision: str | None = None
    part: str | None = None

    def __str__(self) -> str:
        """`path@revision#part+adapter@revision`, as written in a recipe."""
        name = _joined(self.path, self.revision) + (f"#{self.part}" if self.part is not None else "")
        return name if self.adapter is None else f"{name}+{_joined(self.adapter, self.adapter_revision)}"

    def to_data(self) -> str | dict[str, Any]:
        """Plain data that reads back as this name: text, or mergekit's long form where a mark is part of a name."""
        parts = (self.path, self.revision, self.adapter, self.adapter_revision)
        marked = any(mark in part for part in parts if part for mark in "@+")
        if not marked and not PART.fullmatch(_joined(self.path, self.revision)):
            return str(self)
        table: dict[str, Any] = {"model": _path_table(self.path, self.revision)}
        if self.part is not None:
            table["expert"] = self.part if self.part == SHARED_PART else int(self.part)
        if self.adapter is not None:
            table["lora"] = _path_table(self.adapter, self.adapter_revision)
        return table


def _joined(path: str, revision: str | None) -> str:
    return path if revision is None else f"{path}@{revision}"


def _path_table(path: str, revision: str | None) -> dict[str, str]:
    return {"path": path} if revision is None else {"path": path, "revision": revision}


def parse_source(value: object, *, folder: Path) -> SourceName:
    """Reads either form. Relative paths start at `folder`; the name of an existing folder is never cut."""
    match value:
        case SourceName():
            return value
        case str():
            return _from_text(value, folder=folder)
        case dict():
            return _from_table(value, folder=folder)
    raise refusal(
        f"must be a hub id or a folder, found {found(value)}",
        hint="write `org/name`, `org/name@revision`, `org/name+adapter`, or a folder relative to the recipe",
    )


def _from_text(text: str, *, folder: Path) -> SourceName:
    match = PART.fullmatch(text)
    if match and match["head"] and not is_folder(f"{match['head']}#{match['part']}", folder=folder):
        return replace(_from_text(match["head"] + match["tail"], folder=folder), part=match["part"])
    path, revision, rest = _cut(text, folder=folder, marks="@+")
    if not rest:
        return SourceName(path=path, revision=revision)
    adapter, adapter_revision, rest = _cut(rest[1:], folder=folder, marks="@+")
    if rest:
        raise _malformed(text)
    return SourceName(path=path, revision=revision, adapter=adapter, adapter_revision=adapter_revision)


def _from_table(table: Mapping[str, object], *, folder: Path) -> SourceName:
    """mergekit's long form: {model: {path, revision}, lora: {path, revision}}; `expert` is ours."""
    _check_keys(table, known=SOURCE_KEYS, required="model")
    path, revision = _entry(table["model"], at=("model",), folder=folder)
    part = _part(table.get("expert"))
    if table.get("lora") is None:
        return SourceName(path=path, revision=revision, part=part)
    adapter, adapter_revision = _entry(table["lora"], at=("lora",), folder=folder)
    return SourceName(path=path, revision=revision, adapter=adapter, adapter_revision=adapter_revision, part=part)


def _part(value: object) -> str | None:
    if value is None or value == SHARED_PART:
        return None if value is None else SHARED_PART
    if type(value) is int and value >= 0:
        return str(value)
    raise refusal(
        f"must be the number of an expert from 0, or {SHARED_PART}, found {found(value)}",
        hint="write `expert: 0` for the first one",
        at=("expert",),
    )


def _entry(value: object, *, at: Location, folder: Path) -> tuple[str, str | None]:
    match value:
        case str():
            path, revision, _ = _cut(value, folder=folder, marks="@", at=at)
            return path, revision
        case dict():
            _check_keys(value, known=PATH_KEYS, required="path", at=at)
            path = _text(value["path"], at=(*at, "path"))
            given = value.get("revision")
            return path, None if given is None else _text(given, at=(*at, "revision"))
    raise refusal(f"must be a path, found {found(value)}", hint="write `path: org/name` below it", at=at)


def _check_keys(table: Mapping[str, object], *, known: tuple[str, ...], required: str, at: Location = ()) -> None:
    refuse_unknown_keys(table, known=known, at=at)
    if table.get(required) is None:
        raise refusal(f"must have the key '{required}', found none", hint=f"add `{required}: ...` below it", at=at)


def _text(value: object, *, at: Location) -> str:
    if not isinstance(value, str) or not value.strip():
        hint = "put quotes around a value that YAML takes for something else"
        raise refusal(f"must be text, found {found(value)}", hint=hint, at=at)
    return value


def _cut(text: str, *, folder: Path, marks: str, at: Location = ()) -> tuple[str, str | None, str]:
    """Splits `text` into path, revision, and the rest from the next '+' on."""
    ends = [index for index, letter in enumerate(text) if letter in marks] + [len(text)]
    # an existing folder may have '@' and '+' in its name: the longest existing one is the path
    end = max((end for end in ends if end and is_folder(text[:end], folder=folder)), default=ends[0])
    path, rest = text[:end], text[end:]
    if not rest.startswith("@"):
        revision = None
    else:
        revision, plus, tail = rest[1:].partition("+")
        rest = plus + tail
    if not path.strip() or revision == "" or "@" in (revision or ""):
        raise _malformed(text, at=at)
    return path, revision, rest


def _malformed(text: str, *, at: Location = ()) -> Exception:
    return refusal(
        f"must read path, path@revision or path+adapter, found {found(text)}",
        hint="if '@' or '+' is part of a name, write `model: {path: ...}` instead",
        at=at,
    )
