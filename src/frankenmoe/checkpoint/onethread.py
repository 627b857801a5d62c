"""Keeps numpy's matrix library to one thread while threads of ours compute small products."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from threading import Lock
from typing import Any

_limits: list[Any] = []  # that of numpy's matrix library, once per thread of ours that is inside `one_thread`
_limiting = Lock()


@contextmanager
def one_thread() -> Iterator[None]:
    """Numpy's matrix library uses one thread; again several after the last thread of ours has left."""
    with _limiting:
        _limits.append(_limits[-1] if _limits else _blas().limit(limits=1, user_api="blas"))
    try:
        yield
    finally:
        with _limiting:
            limit = _limits.pop()
            if not _limits:
                limit.restore_original_limits()


@cache
def _blas() -> Any:
    """The threads of numpy's matrix library."""
    from threadpoolctl import ThreadpoolController  # not needed at start-up

    return ThreadpoolController()
