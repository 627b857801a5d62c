"""Suggestions for misspelt names."""

import difflib
from collections.abc import Iterable


def nearest(word: str, choices: Iterable[str]) -> str | None:
    """The most similar choice, ignoring case; None if nothing is close."""
    by_lower = {choice.lower(): choice for choice in choices}
    matches = difflib.get_close_matches(word.lower(), by_lower, n=1)
    return by_lower[matches[0]] if matches else None


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """A hint for an unknown name: the nearest choice, or all choices if nothing is close."""
    known = list(choices)
    match = nearest(word, known)
    return f"did you mean '{match}'?" if match else f"choose one of {', '.join(known)}"
