"""Reads text files, JSON, JSONL and parquet files and hub datasets as documents."""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from frankenmoe.checkpoint.hub import RELATIVE_PATHS, backslash_hint, parquet_rows, stream_rows
from frankenmoe.data.given import DATASET, user_path
from frankenmoe.data.rows import Document, document
from frankenmoe.errors import SourceError

PIECE = 2**20  # characters of a text file per document, so that files of any size are streamed
LINES = (".jsonl", ".ndjson")  # endings of files with a row per line
LONGEST_LINE = 2**26  # characters of a row in a JSONL file


def read_documents(names: Sequence[str], *, folder: Path) -> Iterator[Document]:
    """The documents of all names in order; `data.given` says which names are paths, from `folder`, and which datasets.

    `.jsonl` and `.ndjson` files have one JSON object per line, `.json` files a list of them, `.parquet` files rows: see
    data/rows.py. Endings may be in capitals. Hub datasets have such rows, and are streamed. Any other file is text, in
    pieces of bounded size. Raises SourceError during iteration for files that are missing, empty, broken or not UTF-8.
    """
    for name in names:
        found = False
        for each in _read(name, folder):
            found = found or bool(each.turns or each.text.strip())
            yield each
        if not found:
            raise SourceError(f"{name} holds no text", hint="remove it from the data, or name another file")


def check_data(names: Sequence[str], *, folder: Path) -> None:
    """Raises SourceError for a name that is neither a file nor a hub dataset. Reads nothing."""
    for name in names:
        _place(name, folder)


def _read(name: str, folder: Path) -> Iterator[Document]:
    path = _place(name, folder)
    ending = path.suffix.lower() if path else ""
    if path is None:
        yield from _documents(_hub_rows(name), origin=f"dataset {name}", unit="row")
    elif ending in LINES:
        yield from _documents(_lines(path), origin=str(path), unit="line")
    elif ending == ".json":
        yield from _documents(_list(path), origin=str(path), unit="entry")
    elif ending == ".parquet":
        yield from _documents(enumerate(parquet_rows(path), 1), origin=str(path), unit="row")
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
        hint=backslash_hint(name, folder=folder) or f"{RELATIVE_PATHS}; a hub dataset is written org/name",
    )


def _hub_rows(name: str) -> Iterator[tuple[int, Any]]:
    match = DATASET.fullmatch(name)
    assert match is not None
    *config, split = (match["rest"] or "train").split(":")
    rows = stream_rows(match["id"], revision=match["revision"], config=config[0] if config else None, split=split)
    yield from enumerate(rows, 1)


def _text(path: Path, *, longest: int = PIECE) -> Iterator[str]:
    """A file's text in pieces that end at the end of a line, or within one after `longest` more characters."""
    try:
        with path.open(encoding="utf-8-sig", newline=None) as file:
            while piece := file.read(PIECE):
                yield piece + file.readline(longest)
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
    for piece in _text(path, longest=LONGEST_LINE):
        if len(piece) > LONGEST_LINE:
            raise SourceError(
                f"{path} has a line of more than {LONGEST_LINE:,} characters",
                hint="every line must be a row of its own",
            )
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
        yield document(row, where=f"{origin}:{number}" if unit == "line" else f"{unit} {number} of {origin}")
