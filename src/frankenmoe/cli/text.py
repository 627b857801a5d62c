"""Text that others wrote, made fit for a terminal; knows nothing of what it says."""


def printable(text: str) -> str:
    """The text on one line, with control characters spelt out: names in a source may hold any, escape codes too."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)
