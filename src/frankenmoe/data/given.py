"""What a user names: paths, hub datasets and `EXPERT=FILE`. Reads no file.

A text names a hub dataset if it has the form `org/name`, `org/name@revision`, `org/name:split` or
`org/name:config:split`, does not end like a text file, and nothing of that name is on the disk. Every other text is a
path.
"""

import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from frankenmoe.checkpoint.hub import local_path
from frankenmoe.errors import RecipeError

DATASET = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*/[\w.-]+)(?:@(?P<revision>[^:@]+))?(?::(?P<rest>[^@]+))?", re.ASCII)
FILE_ENDINGS = (".txt", ".md", ".text", ".json", ".jsonl", ".ndjson", ".csv", ".parquet", ".gz", ".zst")

Pair = tuple[str | None, str]
"""(label or None, value)"""
Texts = Mapping[str, Sequence[str]]
"""Name of an expert or a domain -> files or hub datasets."""


def user_path(text: str, *, folder: Path) -> str:
    """An absolute path, with `~` expanded and relative paths joined to `folder`; or a hub dataset's name, unchanged.

    The result is a dataset exactly if it is not absolute. Calling this again on the result returns the same.
    """
    path = local_path(text, folder=folder)
    if DATASET.fullmatch(text) and not text.endswith(FILE_ENDINGS) and not os.path.exists(path):
        return text
    return str(path)


def located(texts: object) -> dict[str, tuple[str, ...]]:
    """The `data` argument of a stage with absolute paths; relative ones start at the working directory.

    One text may stand for a list, and a Path for its text. Raises RecipeError for anything else.
    """
    if not isinstance(texts, Mapping):
        raise RecipeError(
            f"data must map the names of experts to files, found {type(texts).__name__}",
            hint="write data={'maths': ['maths.txt']}",
        )
    return {
        name: tuple(user_path(text, folder=Path.cwd()) for text in _texts(given, name=name))
        for name, given in texts.items()
    }


def pairs(
    texts: Iterable[str],
    *,
    flag: str,
    names: Collection[str] = (),
    unlabelled: bool = False,
    folder: Path | None = None,
    form: str = "EXPERT=FILE",
) -> list[Pair]:
    """`EXPERT=FILE` texts as (label, value), in the order given. `flag` and `form` are for messages.

    With `folder`, values are files or datasets and come back as from `user_path`. With `unlabelled`, a text without
    `=` and a text that names an existing file are values without a label. Any other text is split at an `=`: at the
    last one whose left side is in `names`, else at the first. Raises RecipeError if label or value is missing.
    """
    found: list[Pair] = []
    for text in texts:
        label, value = _split(text, names=names, unlabelled=unlabelled, folder=folder)
        if label == "" or not value or (label is None and not unlabelled):
            expected = f"{form} or {form.partition('=')[2]}" if unlabelled else form
            raise RecipeError(f"{flag} must be {expected}, found {text!r}", hint="write something on both sides of `=`")
        found.append((label, value if folder is None else user_path(value, folder=folder)))
    return found


def _split(text: str, *, names: Collection[str], unlabelled: bool, folder: Path | None) -> Pair:
    if "=" not in text or (unlabelled and folder is not None and os.path.isfile(local_path(text, folder=folder))):
        return None, text
    signs = [index for index, letter in enumerate(text) if letter == "="]
    at = max((index for index in signs if text[:index] in names), default=signs[0])
    return text[:at], text[at + 1 :]


def by_label(found: Iterable[Pair]) -> dict[str, list[str]]:
    """Label -> its values, both in the order given; pairs without a label are left out."""
    grouped: dict[str, list[str]] = {}
    for label, value in found:
        if label is not None:
            grouped.setdefault(label, []).append(value)
    return grouped


def _texts(given: object, *, name: object) -> tuple[str, ...]:
    texts = [given] if isinstance(given, str | Path) else given
    if not isinstance(texts, Sequence) or not all(isinstance(each, str | Path) for each in texts):
        raise RecipeError(
            f"data of {name!r} must be a list of files or hub datasets, found {given!r}"[:200],
            hint="write data={'maths': ['maths.txt']}",
        )
    return tuple(map(str, texts))
