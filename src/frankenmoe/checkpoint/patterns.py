"""Regular expressions in files that somebody else may have made: only those that cannot run for long are used."""

import math
import re
from collections.abc import Iterable
from functools import lru_cache

# no repeated group; beside plain groups those that only look ahead, or are not kept
PLAIN = re.compile(r"(?:\(\?[:=!]|[\w\-|()^$\[\]. ]|\\[\w.\-]|(?<![)*+?])[*+?]|(?<=\))\?)*", re.ASCII)
LONGEST = 500
NAME = 100  # characters of a long name of a module
MOST_STEPS = 3 * 10**7  # to try all patterns of a file on one name


@lru_cache(2**14)  # an adapter may have a pattern for every module, and re keeps only 512 of them
def plain_pattern(pattern: str, form: str = "{}") -> re.Pattern[str] | None:
    """The pattern as an expression, put into `form`; None if it is broken or could run for long."""
    if len(pattern) > LONGEST or steps([pattern]) > MOST_STEPS or not PLAIN.fullmatch(pattern):
        return None
    try:
        re.compile(pattern)  # alone, as parentheses could match those around it
        return re.compile(form.format(pattern))
    except re.error:
        return None


def steps(patterns: Iterable[str]) -> int:
    """How many ways there are at most for these patterns to match a name: a repetition may end at any letter."""
    return sum(map(_ways, patterns))


def _ways(pattern: str) -> int:
    repeated, optional = sum(map(pattern.count, "*+")), pattern.count("?") - pattern.count("(?")
    return math.prod([*[NAME] * repeated, *[2] * optional, *(1 + part.count("|") for part in pattern.split("("))])
