"""Experts that an MoE can do without, as sentences that name the command which takes them out."""

import shlex
from collections.abc import Sequence


def without(names: Sequence[str], artifact: str | None) -> str:
    """How these experts are taken out of an artifact or a mixture's folder; of a recipe if there is none."""
    it = "it" if len(names) == 1 else "them"
    if artifact is None:
        return f"the recipe can do without {it}"
    return f"`{shlex.join(['frankenmoe', 'remove-expert', artifact, 'OUT', *names])}` takes {it} out"


def one_of_each(left: int, artifact: str | None) -> str:
    """How copies are taken out, so that `left` experts stay."""
    if artifact is None:
        return "the recipe needs one of each"
    return f"`{shlex.join(['frankenmoe', 'prune', artifact, 'OUT', '--experts', str(left)])}` leaves one of each"
