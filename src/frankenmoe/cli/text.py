"""Makes text from models and files safe to print in a terminal."""

import json
import re
from typing import Any

from rich.cells import set_cell_size
from rich.markup import escape

STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """The text on one line, with control characters escaped; names in a source may contain any."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def spelled_out(text: str) -> str:
    """The text with control characters escaped, except line ends and tabs: a model's words must not steer a terminal.

    Marks that reverse the direction of text count too; joiners of emoji and scripts do not.
    """
    return STEERING.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def json_text(data: Any, *, indent: int | None = 2, **options: Any) -> str:
    """Data as JSON in which control characters have JSON's own escapes; `options` are those of `json.dumps`."""
    return json_safe(json.dumps(data, indent=indent, ensure_ascii=False, **options))


def json_safe(text: str) -> str:
    """The same JSON, with its control characters as JSON's own escapes."""
    return STEERING.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def cell(text: object) -> str:
    """`printable` text for a table of rich, which does not read it as markup."""
    return escape(printable(str(text)))


def in_cells(text: str, width: int) -> str:
    """`printable` text, cut or padded to `width` terminal columns; a character may take two columns or none."""
    return set_cell_size(printable(text), width)


def is_unicode(text: str) -> bool:
    """Whether a text is valid Unicode: no lone surrogates, which Python makes from bytes that are not UTF-8."""
    return not any("\ud800" <= each <= "\udfff" for each in text)
