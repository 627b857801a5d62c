"""Regular expressions in files that somebody else may have made: only those that cannot run for long are used."""

import re
from collections.abc import Iterable
from functools import lru_cache

# a pattern that cannot take long: no repeated group, and few repetitions
PLAIN = re.compile(r"(?:[\w\-|()^$\[\]. ]|\\[\w.\-]|(?<![)*+?])[*+?])*", re.ASCII)
LONGEST = 500
MOST_REPEATS = 3
MOST_REPEATS_OF_ALL = 32  # of the patterns of a file, each of which is tried on every module


@lru_cache(2**14)  # an adapter may have a pattern for every module, and re keeps only 512 of them
def plain_pattern(pattern: str, form: str = "{}") -> re.Pattern[str] | None:
    """The pattern as an expression, put into `form`; None if it is broken or could run for long."""
    if len(pattern) > LONGEST or repeats([pattern]) > MOST_REPEATS or not PLAIN.fullmatch(pattern):
        return None
    try:
        re.compile(pattern)  # alone, as parentheses could match those around it
        return re.compile(form.format(pattern))
    except re.error:
        return None


def repeats(patterns: Iterable[str]) -> int:
    """How often these patterns repeat a part as often as it fits."""
    return sum(pattern.count(mark) for pattern in patterns for mark in "*+")
