"""Products of float32 rows with bf16, fp16 or int8 matrices on a CPU, compiled by numba; knows nothing of torch.

Weights are widened in registers: a matrix is read once, as it is stored, and nothing of its size is allocated. Needs
numba, and OpenMP in the process; a kernel is compiled when it is first used on a machine.
"""

import ctypes
import threading
from functools import cache
from typing import Any

import numpy as np
from numba import carray, cfunc, njit, types
from numba.extending import overload

# T tokens, I inputs, O outputs

TILE_T, TILE_O = 4, 3  # twelve sums, three weights and one input: the sixteen vector registers of AVX2
PANEL = 1 << 18  # numbers of the tokens that stay in the cache while all weights pass
BLOCK = 512  # products of an int8 and an int16 whose sum is sure to fit an int32
GRAIN = 1 << 17  # multiplications that are worth another thread
FLAGS = {"reassoc", "contract", "nsz"}  # sums in any order, as a vector needs; infinities and NaN stay what they are

_lock = threading.Lock()
# torch's own threads do the work: a second pool would fight with them for the cores
_process = ctypes.CDLL(None)
try:
    _parallel, _ = _process.GOMP_parallel, (_process.omp_get_thread_num, _process.omp_get_num_threads)
except AttributeError as error:
    raise ImportError("this torch has no OpenMP threads to run kernels on") from error
_thread = types.ExternalFunction("omp_get_thread_num", types.int32())
_threads = types.ExternalFunction("omp_get_num_threads", types.int32())


def _can_store() -> bool:
    """Whether numba finds a folder for what it compiles; else every process compiles again."""
    try:
        njit(cache=True)(_from_int8)
    except RuntimeError:
        return False
    return True


def widened(number: Any) -> Any:
    """The float32 that bits stand for: uint16 those of a bf16, int16 those of an fp16, int8 a number."""
    raise NotImplementedError("for compiled code")


@overload(widened)
def _widened(number: Any) -> Any:
    return {types.uint16: _from_bf16, types.int16: _from_fp16, types.int8: _from_int8}[number]


def _from_bf16(number: Any) -> Any:
    return np.uint32(np.uint32(number) << np.uint32(16)).view(np.float32)


def _from_fp16(number: Any) -> Any:
    # exponent and fraction moved to their places in a float32; the factor is the difference of the two biases
    bits = np.uint32(np.uint16(number))
    sign, rest = np.uint32(bits & np.uint32(0x8000)), np.uint32(bits & np.uint32(0x7FFF))
    endless = np.uint32(0x7F800000) if rest >= np.uint32(0x7C00) else np.uint32(0)  # infinity and NaN
    moved = np.uint32(np.uint32(np.uint32(sign << np.uint32(16)) | np.uint32(rest << np.uint32(13))) | endless)
    return moved.view(np.float32) * np.float32(2.0**112)


def _from_int8(number: Any) -> Any:
    return np.float32(number)


STORE = _can_store()


@njit(fastmath=FLAGS, nogil=True, cache=STORE)
def _rows(weight_OI: Any, hidden_TI: Any, out_TO: Any, begin: int, end: int) -> None:
    """out_TO[:, begin:end] = hidden_TI @ weight_OI[begin:end].T"""
    tokens, inputs = hidden_TI.shape
    whole = begin + (end - begin) // TILE_O * TILE_O
    panel = max(TILE_T, PANEL // inputs // TILE_T * TILE_T)
    for first in range(0, tokens, panel):
        last = min(tokens, first + panel)
        tiled = first + (last - first) // TILE_T * TILE_T
        for o in range(begin, whole, TILE_O):
            for t in range(first, tiled, TILE_T):
                _tile(weight_OI, hidden_TI, out_TO, o, t)
        for o in range(whole, end):
            for t in range(first, tiled):
                out_TO[t, o] = _dot(weight_OI[o], hidden_TI[t])
        # row after row: memory is fastest when it is read from front to back
        for o in range(begin, end):
            for t in range(tiled, last):
                out_TO[t, o] = _dot(weight_OI[o], hidden_TI[t])


@njit(fastmath=FLAGS, nogil=True, cache=STORE)
def _tile(weight_OI: Any, hidden_TI: Any, out_TO: Any, o: int, t: int) -> None:
    """Three outputs of four tokens: every weight is widened once for four products."""
    u, v, w = weight_OI[o], weight_OI[o + 1], weight_OI[o + 2]
    a, b, c, d = hidden_TI[t], hidden_TI[t + 1], hidden_TI[t + 2], hidden_TI[t + 3]
    ua = ub = uc = ud = va = vb = vc = vd = wa = wb = wc = wd = np.float32(0)
    for i in range(len(a)):
        x, y, z = widened(u[i]), widened(v[i]), widened(w[i])
        ua += x * a[i]
        va += y * a[i]
        wa += z * a[i]
        ub += x * b[i]
        vb += y * b[i]
        wb += z * b[i]
        uc += x * c[i]
        vc += y * c[i]
        wc += z * c[i]
        ud += x * d[i]
        vd += y * d[i]
        wd += z * d[i]
    out_TO[t, o], out_TO[t, o + 1], out_TO[t, o + 2] = ua, va, wa
    out_TO[t + 1, o], out_TO[t + 1, o + 1], out_TO[t + 1, o + 2] = ub, vb, wb
    out_TO[t + 2, o], out_TO[t + 2, o + 1], out_TO[t + 2, o + 2] = uc, vc, wc
    out_TO[t + 3, o], out_TO[t + 3, o + 1], out_TO[t + 3, o + 2] = ud, vd, wd


@njit(fastmath=FLAGS, nogil=True, cache=STORE)
def _dot(weight_I: Any, hidden_I: Any) -> Any:
    total = np.float32(0)
    for i in range(len(hidden_I)):
        total += widened(weight_I[i]) * hidden_I[i]
    return total


@njit(fastmath=FLAGS, nogil=True, cache=STORE)
def _one_int8(weight_OI: Any, hidden_I: Any, out_O: Any, begin: int, end: int) -> None:
    """One token in integers: int16 inputs, summed in int32 a block at a time, so that none need be coarser."""
    inputs = len(hidden_I)
    largest = poison = np.float32(0)
    for i in range(inputs):
        largest = max(largest, abs(hidden_I[i]))
        poison += hidden_I[i] * np.float32(0)  # NaN if one of them is no number, which integers cannot tell
    step = largest / np.float32(32767)
    whole_I = np.empty(inputs, np.int16)
    for i in range(inputs):
        whole_I[i] = np.int16(np.rint(hidden_I[i] / step)) if step > 0 else np.int16(0)
    for o in range(begin, end):
        row = weight_OI[o]
        total = np.float32(0)
        for first in range(0, inputs, BLOCK):
            part = np.int32(0)
            for i in range(first, min(inputs, first + BLOCK)):
                part = np.int32(part + np.int32(np.int32(row[i]) * np.int32(whole_I[i])))
            total += np.float32(part)
        out_O[o] = total * step + poison


@njit(nogil=True, cache=STORE)
def _share(outputs: int) -> Any:
    """(begin, end) of this thread's outputs."""
    threads, thread = _threads(), _thread()
    each = (outputs + threads - 1) // threads
    each = (each + 11) // 12 * 12
    return min(outputs, thread * each), min(outputs, (thread + 1) * each)


def _bf16(task: Any) -> None:
    tokens, outputs, inputs = carray(task[3], 3, np.int64)
    begin, end = _share(outputs)
    weight_OI = carray(task[0], (outputs, inputs), np.uint16)
    _rows(weight_OI, *_operands(task, tokens, outputs, inputs), begin, end)


def _fp16(task: Any) -> None:
    tokens, outputs, inputs = carray(task[3], 3, np.int64)
    begin, end = _share(outputs)
    weight_OI = carray(task[0], (outputs, inputs), np.int16)
    _rows(weight_OI, *_operands(task, tokens, outputs, inputs), begin, end)


def _int8(task: Any) -> None:
    tokens, outputs, inputs = carray(task[3], 3, np.int64)
    begin, end = _share(outputs)
    weight_OI = carray(task[0], (outputs, inputs), np.int8)
    hidden_TI, out_TO = _operands(task, tokens, outputs, inputs)
    if tokens < TILE_T:
        for t in range(tokens):
            _one_int8(weight_OI, hidden_TI[t], out_TO[t], begin, end)
    else:
        _rows(weight_OI, hidden_TI, out_TO, begin, end)


@njit(nogil=True, cache=STORE)
def _operands(task: Any, tokens: int, outputs: int, inputs: int) -> Any:
    return carray(task[1], (tokens, inputs), np.float32), carray(task[2], (tokens, outputs), np.float32)


KERNELS = {"bfloat16": _bf16, "float16": _fp16, "int8": _int8}


def _compiled(kind: str) -> Any:
    with _lock:  # of two threads that compile at once, one result would be freed while it is used
        return _cfunc(kind)


@cache
def _cfunc(kind: str) -> Any:
    return cfunc(types.void(types.CPointer(types.voidptr)), cache=STORE)(KERNELS[kind])


def product(kind: str, weight: int, hidden: int, out: int, *, sizes: tuple[int, int, int], threads: int) -> None:
    """Writes hidden @ weight.T to `out`.

    The three are addresses of rows without gaps: weights [O, I] of a `kind` in KERNELS, hidden [T, I] and out [T, O] in
    float32. `sizes` are (T, O, I); at most `threads` threads work, fewer where there is little to do.
    """
    tokens, outputs, inputs = sizes
    team = max(1, min(threads, tokens * outputs * inputs // GRAIN))
    size = (ctypes.c_int64 * 3)(*sizes)
    task = (ctypes.c_void_p * 4)(weight, hidden, out, ctypes.addressof(size))
    if team == 1:  # no team at all: one of another size would send torch's threads away
        _alone(_compiled(kind).address)(task)
    else:
        _parallel(ctypes.c_void_p(_compiled(kind).address), task, ctypes.c_uint(team), ctypes.c_uint(0))


@cache
def _alone(address: int) -> Any:
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address)
