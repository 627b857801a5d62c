"""Rows of float32 -> the bytes of a GGUF type, by llama.cpp's own code.

The code is `ggml_quantize_chunk` in the library of the xllamacpp wheel, a C function of seven plain arguments. It runs
without Python's lock, so threads work in parallel. Without that wheel gguf's numpy code makes the older types, with the
same bytes, and K-quants are rejected.

Shape suffixes: R rows, C columns.
"""

import ctypes
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from frankenmoe.checkpoint.cast import Bytes, Floats, encode
from frankenmoe.errors import PlanError

PLAIN = ("F32", "F16", "BF16")
IN_NUMPY = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")
INSTALL = "pip install 'frankenmoe[gguf]'"

Quantize = Callable[[Floats, str, Floats | None], Bytes]
"""(rows [R, C], type, importance of the columns [C] or None) -> bytes."""


def quantize(block_RC: Floats, kind: str, importance_C: Floats | None = None) -> Bytes:
    """The bytes of the rows in a type. C must be a multiple of the type's block. `importance_C` weighs columns' errors.

    Raises PlanError if no quantizer for the type is installed.
    """
    if kind in PLAIN:
        return encode(np.ascontiguousarray(block_RC).ravel(), dtype=kind)
    found = native()
    if found is not None:
        return found(block_RC, kind, importance_C)
    require(kind, importance=importance_C is not None)
    import gguf

    return np.asarray(gguf.quants.quantize(block_RC, gguf.GGMLQuantizationType[kind])).view(np.uint8).ravel()


def require(kind: str, *, importance: bool = False) -> None:
    """Raises PlanError if this type, or an importance matrix, needs llama.cpp's code and it is not installed."""
    if kind in PLAIN or native() is not None or (kind in IN_NUMPY and not importance):
        return
    what = "an importance matrix" if importance else f"the type {kind}"
    raise PlanError(f"{what} needs llama.cpp's quantizer, which is not installed", hint=INSTALL)


@cache
def native() -> Quantize | None:
    """llama.cpp's quantizer; None if it cannot be called or fails a check of its output."""
    file = _library()
    if file is None:
        return None
    try:
        function = ctypes.CDLL(str(file)).ggml_quantize_chunk
    except (OSError, AttributeError):  # Windows wheels export nothing
        return None
    function.restype = ctypes.c_size_t
    integers = (ctypes.c_int64,) * 3
    function.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *integers, ctypes.c_void_p)

    def run(block_RC: Floats, kind: str, importance_C: Floats | None) -> Bytes:
        import gguf

        rows, columns = block_RC.shape
        number = gguf.GGMLQuantizationType[kind]
        block, size = gguf.GGML_QUANT_SIZES[number]
        source = np.ascontiguousarray(block_RC, np.float32)
        out = np.empty(rows * columns // block * size, np.uint8)
        weights = None if importance_C is None else np.ascontiguousarray(importance_C, np.float32)
        at = None if weights is None else weights.ctypes.data
        written = function(int(number), source.ctypes.data, out.ctypes.data, 0, rows, columns, at)
        if written != out.size:
            raise PlanError(
                f"llama.cpp's quantizer wrote {written} bytes of {kind}, expected {out.size}",
                hint="try another version of xllamacpp, and please report this one",
            )
        return out

    return run if _answers_rightly(run) else None


def _answers_rightly(run: Quantize) -> bool:
    """Compares one row with gguf's numpy code, which reveals a changed signature before anything is written."""
    import gguf

    row_RC: NDArray[np.float32] = np.linspace(-1, 1, 64, dtype=np.float32).reshape(1, 64) ** 3
    expected = gguf.quants.quantize(row_RC, gguf.GGMLQuantizationType.Q8_0)
    return bool(np.array_equal(run(row_RC, "Q8_0", None), expected.ravel()))


def _library() -> Path | None:
    spec = find_spec("xllamacpp")
    folders = [Path(folder) for folder in (spec.submodule_search_locations or [])] if spec else []
    return next((file for folder in folders for file in sorted(folder.glob("xllamacpp*.so"))), None)
