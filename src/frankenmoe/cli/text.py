"""Text that others wrote, made fit for a terminal; knows nothing of what it says."""

from rich.cells import set_cell_size


def printable(text: str) -> str:
    """The text on one line, with control characters spelt out: names in a source may hold any, escape codes too."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def in_cells(text: str, width: int) -> str:
    """The text as `printable`, cut or filled to `width` columns of a terminal, where a letter may take two or none."""
    return set_cell_size(printable(text), width)


def is_unicode(text: str) -> bool:
    """Whether a text came in as whole characters, and not in part as bytes that are none."""
    return not any("\ud800" <= each <= "\udfff" for each in text)
