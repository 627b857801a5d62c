"""Makes text from models and files safe to print in a terminal."""

from rich.cells import set_cell_size


def printable(text: str) -> str:
    """The text on one line, with control characters escaped; names in a source may contain any."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def in_cells(text: str, width: int) -> str:
    """`printable` text, cut or padded to `width` terminal columns; a character may take two columns or none."""
    return set_cell_size(printable(text), width)


def is_unicode(text: str) -> bool:
    """Whether a text is valid Unicode: no lone surrogates, which Python makes from bytes that are not UTF-8."""
    return not any("\ud800" <= each <= "\udfff" for each in text)
