"""The errors that users see: one sentence each, and a hint. What they quote of input is cut to a readable length."""

import errno
import os
import re
from collections.abc import Mapping

QUOTED = 200  # characters of input that a message quotes
LONGEST = 1500  # characters of a message; the longest lists of choices have half of it
_LONG_WORD = re.compile(rf"\S{{{QUOTED + 1},}}")
# between quotation marks, which apostrophes are not: they have a letter before or behind them
_LONG_QUOTE = re.compile(rf"(?<![^\s(\[=:])(?P<mark>['\"])(?P<text>[^'\"]{{{QUOTED + 1},}})(?P=mark)(?![^\s.,;:)\]])")


# system error -> (what it means, what to do)
_CAUSES: Mapping[int, tuple[str, str]] = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), ("the disk or the quota is full", "free some space")),
    **dict.fromkeys(
        (errno.EACCES, errno.EPERM),
        ("this user may not do that there", "check its permissions, or choose another"),
    ),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), ("too many files are open", "raise the limit: `ulimit -n 4096`")),
    errno.EFBIG: (
        "a file would become larger than the shell or the file system allows",
        "raise the limit with `ulimit -f unlimited`, or choose another disk",
    ),
    errno.ENAMETOOLONG: (
        "a name or a path is longer than the file system allows",
        "choose a shorter one: names have at most 255 bytes",
    ),
    errno.EROFS: ("the disk is mounted read-only", "choose a folder on another disk"),
    errno.EIO: ("the disk failed", "check the disk, then run the same command again"),
}
_NO_CAUSE = "check permissions, free space and the output path"


class FrankenMoEError(Exception):
    """An error that the user can fix. `message`: what, where, expected, found. `hint`: what to do."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        self.message = bounded(message)
        self.hint = hint and bounded(hint)
        super().__init__(self.message)

    def __str__(self) -> str:
        return f"{self.message}\n  hint: {self.hint}" if self.hint else self.message


class FrankenMoEWarning(UserWarning):
    """Something was left out or done in another way; the result can be used."""


class RecipeError(FrankenMoEError):
    """The recipe cannot be read or is not valid."""


class SourceError(FrankenMoEError):
    """A source is missing, malformed, unsafe or does not fit the others."""


class PlanError(FrankenMoEError):
    """The recipe and its sources are valid, but the request cannot be fulfilled."""


class ArtifactError(FrankenMoEError):
    """An artifact folder is unfinished, changed, in the way, or not an artifact."""


class NumericsError(FrankenMoEError):
    """A value is NaN, infinite, or out of range of the type it is stored in."""


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or the name of its class if it has none."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def brief(text: str, most: int = QUOTED) -> str:
    """The text for a message. Of one with more than `most` characters, the beginning and the end."""
    if len(text) <= most:
        return text
    tail = most // 4
    return f"{text[: most - tail - 3]}...{text[-tail:]}"


def bounded(message: str) -> str:
    """The message with long words and long texts between quotation marks cut, and of at most LONGEST characters.

    This catches what was not cut where it was quoted.
    """
    message = _LONG_QUOTE.sub(lambda quote: f"{quote['mark']}{brief(quote['text'])}{quote['mark']}", message)
    return brief(_LONG_WORD.sub(lambda word: brief(word[0]), message), LONGEST)


def explained(error: OSError) -> FrankenMoEError:
    """A system error that nothing else explains, as a sentence with its cause."""
    if error.filename is None and not _has_current_folder():
        return FrankenMoEError("the current folder no longer exists", hint="change to a folder that exists: `cd`")
    where = f"{error.filename}: " if error.filename else ""
    cause, hint = _CAUSES.get(error.errno or 0, (str(error.strerror or error), _NO_CAUSE))
    return FrankenMoEError(f"{where}{cause}", hint=hint)


def _has_current_folder() -> bool:
    try:
        return bool(os.getcwd())
    except OSError:
        return False
