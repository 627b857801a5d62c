"""Functions that numba compiles (the extra `cpu`). The user's cache folder keeps them.

To import this without numba raises ImportError.
"""

import shutil
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numba

from frankenmoe.cache import cache_folder

PLAIN = {"nogil": True, "error_model": "numpy"}  # no Python and none of its errors

_lock = threading.Lock()


def require() -> None:
    """Raises ImportError if numba is switched off."""
    if numba.config.DISABLE_JIT:
        raise ImportError("NUMBA_DISABLE_JIT is set")


def compiled(function: Callable[..., Any], signature: Any) -> int:
    """The address of a function of C, from numba's cache or compiled. It runs without Python's lock.

    A damaged cache is removed. Without a folder nothing is kept.
    """
    with _lock:  # numba.config is one for all threads
        before = numba.config.CACHE_DIR
        try:
            numba.config.CACHE_DIR = str(cache_folder("kernels"))
            return int(numba.cfunc(signature, cache=True, **PLAIN)(function).address)
        except Exception:  # of many classes: unpickling, writing, finding a home
            with suppress(OSError, RuntimeError):
                shutil.rmtree(cache_folder("kernels"))
            return int(numba.cfunc(signature, **PLAIN)(function).address)
        finally:
            numba.config.CACHE_DIR = before
