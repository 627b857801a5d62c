"""Reads text files, JSON and JSONL files and hub datasets as documents."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from frankenmoe.checkpoint.hub import stream_rows
from frankenmoe.data.given import DATASET, user_path
from frankenmoe.errors import SourceError

PIECE = 2**20  # characters of a text file per document, so that files of any size are streamed
# speakers in ShareGPT files and in chat `messages` -> role
ROLES: Mapping[str, str] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
}


class Turn(TypedDict):
    """One message, as chat templates take it; `role` is system, user or assistant."""

    role: str
    content: str


@dataclass(frozen=True)
class Document:
    """Either a text or a conversation of `turns`. `closed` is False if the next document continues this one."""

    text: str = ""
    turns: tuple[Turn, ...] = ()
    closed: bool = True


def read_documents(names: Sequence[str], *, folder: Path) -> Iterator[Document]:
    """The documents of all names in order; `data.given` says which names are paths, from `folder`, and which datasets.

    `.jsonl` files have one JSON object per line, `.json` files a list of them, with `text`, ShareGPT `conversations` or
    chat `messages`. Hub datasets have such rows, and are streamed. Any other file is text. Raises SourceError during
    iteration for files that are missing, empty, broken or not UTF-8.
    """
    for name in names:
        found = False
        for document in _read(name, folder):
            found = found or bool(document.turns or document.text.strip())
            yield document
        if not found:
            raise SourceError(f"{name} holds no text", hint="remove it from the data, or name another file")


def check_data(names: Sequence[str], *, folder: Path) -> None:
    """Raises SourceError for a name that is neither a file nor a hub dataset. Reads nothing."""
    for name in names:
        _place(name, folder)


def _read(name: str, folder: Path) -> Iterator[Document]:
    path = _place(name, folder)
    if path is None:
        yield from _documents(_hub_rows(name), origin=f"dataset {name}", unit="row")
    elif path.suffix == ".jsonl":
        yield from _documents(_lines(path), origin=str(path), unit="line")
    elif path.suffix == ".json":
        yield from _documents(_list(path), origin=str(path), unit="entry")
    else:
        yield from _pieces(path)


def _place(name: str, folder: Path) -> Path | None:
    """The file of a name, or None for a hub dataset."""
    place = user_path(name, folder=folder)
    if not os.path.isabs(place):
        return None
    path = Path(place)
    if os.path.isfile(path):  # not path.is_file(), which raises for a name too long for the disk
        return path
    if os.path.isdir(path):
        raise SourceError(f"data {name!r} is the folder {path}, expected a file", hint="name the files in it")
    raise SourceError(
        f"data {name!r} does not exist, looked for at {path}",
        hint="a relative path counts from the folder of the recipe; a hub dataset is written org/name",
    )


def _hub_rows(name: str) -> Iterator[tuple[int, Any]]:
    match = DATASET.fullmatch(name)
    assert match is not None
    *config, split = (match["rest"] or "train").split(":")
    rows = stream_rows(match["id"], revision=match["revision"], config=config[0] if config else None, split=split)
    yield from enumerate(rows, 1)


def _text(path: Path) -> Iterator[str]:
    """A file's text in pieces that end at the end of a line."""
    try:
        with path.open(encoding="utf-8-sig", newline=None) as file:
            while piece := file.read(PIECE):
                yield piece + file.readline()
    except UnicodeDecodeError as error:
        raise SourceError(
            f"{path}:{_odd_line(path)} is not UTF-8: byte 0x{error.object[error.start]:02x} cannot be read "
            f"({error.reason})",
            hint="convert it, for example with `iconv -f latin1 -t utf-8`",
        ) from error
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror}", hint="check its permissions") from error


def _odd_line(path: Path) -> int:
    """The number of the first line that is not UTF-8."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return number
    return 0  # the file has changed meanwhile


def _pieces(path: Path) -> Iterator[Document]:
    for piece in _text(path):
        yield Document(text=piece, closed=False)


def _lines(path: Path) -> Iterator[tuple[int, Any]]:
    number = 0
    for piece in _text(path):
        # not splitlines(), which splits at U+2028 inside JSON strings
        for line in piece.removesuffix("\n").split("\n"):
            number += 1
            if not line.strip():
                continue
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                raise SourceError(
                    f"{path}:{number} is not JSON: {error}", hint="every line must be a JSON object of its own"
                ) from error


def _list(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        rows = json.loads("".join(_text(path)))
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{path} is not JSON: {error}", hint="one object a line belongs in a .jsonl file") from error
    if not isinstance(rows, list):
        raise SourceError(
            f"{path} holds a JSON {type(rows).__name__}, expected a list of objects", hint="wrap the object in [ ]"
        )
    yield from enumerate(rows, 1)


def _documents(rows: Iterable[tuple[int, Any]], *, origin: str, unit: str) -> Iterator[Document]:
    for number, row in rows:
        yield _document(row, where=f"{origin}:{number}" if unit == "line" else f"{unit} {number} of {origin}")


def _document(row: Any, *, where: str) -> Document:
    if not isinstance(row, Mapping):
        raise SourceError(
            f"{where} is a JSON {type(row).__name__}, expected an object", hint='write {"text": "..."} on the line'
        )
    if isinstance(row.get("text"), str):
        return Document(text=_whole(row["text"], where=where))
    for key, speaker, said in (("conversations", "from", "value"), ("messages", "role", "content")):
        if isinstance(row.get(key), list):
            return Document(turns=_turns(row[key], speaker=speaker, said=said, where=where))
    raise SourceError(
        f"{where} has neither `text` nor `conversations` nor `messages`, found {', '.join(map(str, row)) or 'no keys'}",
        hint="rename the column that holds the text to `text`",
    )


def _whole(text: str, *, where: str) -> str:
    """The same text. Raises SourceError for half of a character (a lone surrogate)."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise SourceError(
            f"{where} holds half a character, \\u{ord(text[error.start]):04x} without its other half",
            hint="the text is truncated there: repair or remove it",
        ) from error
    return text


def _turns(entries: Sequence[Any], *, speaker: str, said: str, where: str) -> tuple[Turn, ...]:
    turns = []
    for entry in entries:
        who = entry.get(speaker, entry.get("role")) if isinstance(entry, Mapping) else None
        text = entry.get(said, entry.get("content")) if isinstance(entry, Mapping) else None
        if not isinstance(text, str) or not isinstance(who, str) or who not in ROLES:
            raise SourceError(
                f"{where} has a turn {str(entry)[:60]!r}, expected `{speaker}` and `{said}`",
                hint=f"repair or remove that conversation; speakers are {', '.join(ROLES)}",
            )
        turns.append(Turn(role=ROLES[who], content=_whole(text, where=where)))
    if not any(turn["role"] == "assistant" and turn["content"].strip() for turn in turns):
        raise SourceError(
            f"{where} is a conversation without a reply, so nothing can be learnt from it",
            hint="remove that conversation",
        )
    return tuple(turns)
