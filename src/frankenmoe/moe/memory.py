"""Returns freed memory to the system."""

import ctypes
from collections.abc import Callable
from functools import cache


def give_back_memory() -> None:
    """Returns freed memory to the system if the C library can: glibc keeps that of tensors of odd sizes until asked."""
    trim = _trim()
    if trim:
        trim(0)


@cache
def _trim() -> Callable[[int], int] | None:
    try:
        return getattr(ctypes.CDLL(None), "malloc_trim", None)
    except (OSError, TypeError):  # Windows has no library of the process itself
        return None
