"""Runs the CPU kernels on torch's own OpenMP threads. Takes addresses and sizes. Does not import torch.

Raises ImportError if numba or OpenMP is missing. numba compiles a kernel when it is first used.
"""

import ctypes
import threading
from collections.abc import Callable, Sequence
from functools import cache, partial
from itertools import chain
from typing import Any, NamedTuple

import numba

from frankenmoe.jit import compiled, require
from frankenmoe.moe.cpu import kernels

# T tokens, I inputs, O outputs, R rank

GRAIN = 1 << 17  # multiplications that are worth another thread
FEW = kernels.TILE_T  # fewer tokens than this read the weights at the speed of memory
CODES = {
    "float32": kernels.FLOAT32,
    "bfloat16": kernels.BFLOAT16,
    "float16": kernels.FLOAT16,
    "int8": kernels.INT8,
}
KERNELS = {
    "few": kernels.few,
    "ffns": kernels.ffns,
    "bfloat16": kernels.many_bfloat16,
    "float16": kernels.many_float16,
    "int8": kernels.many_int8,
}
TASK = numba.types.void(numba.types.CPointer(numba.types.voidptr))

_room = threading.local()
# torch's own threads do the work: a second pool would compete with them for the cores
try:
    _process = ctypes.CDLL(None)
    _parallel = _process.GOMP_parallel
    _parallel.argtypes = ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint
    _needed = _process.GOMP_barrier, _process.omp_get_thread_num, _process.omp_get_num_threads
except (AttributeError, TypeError) as error:  # Windows has no library of the process itself
    raise ImportError("this torch has no OpenMP threads to run kernels on") from error
require()


class Member(NamedTuple):
    """An expert as `ffns` takes it; made by `member`."""

    addresses: tuple[int, ...]
    ranks: tuple[int, ...]
    scales: tuple[float, ...]


def member(matrices: Sequence[tuple[int, int]], adapters: Sequence[tuple[int, int, int, float] | None]) -> Member:
    """An expert, from what it has on gate, up and down.

    `matrices` are (address of the weight, address of float32 scales of int8, else 0). `adapters` are (address of A
    (R, I), address of B (O, R), R, scale), or None.
    """
    lows = [(0, 0, 0, 0.0) if adapter is None else adapter for adapter in adapters]
    a_b, ranks, scales = (low[:2] for low in lows), (low[2] for low in lows), (low[3] for low in lows)
    return Member((*chain(*matrices), *chain(*a_b)), tuple(ranks), tuple(scales))


def product(
    kind: str, weight: int, scale: int, hidden: int, out: int, *, sizes: tuple[int, int, int], threads: int
) -> None:
    """Writes hidden @ weight.T to `out`, of int8 times the scale of each output.

    All are addresses of contiguous rows: weights [O, I] of a `kind` (bfloat16, float16, int8), scales [O] (0 for other
    kinds), hidden [T, I] and out [T, O] in float32. `sizes` are (T, O, I). At most `threads` threads work.
    """
    tokens, outputs, inputs = sizes
    ints = (ctypes.c_int64 * 4)(*sizes, CODES[kind])
    task = (ctypes.c_void_p * 5)(ctypes.addressof(ints), weight, scale, hidden, out)
    kernel = "few" if tokens < FEW else kind
    _run(kernel, task, multiplications=tokens * outputs * inputs, threads=threads)


def ffns(
    hidden: int,
    out: int,
    experts: Sequence[tuple[int, Member, float]],
    *,
    sizes: tuple[int, int],
    kinds: tuple[str, str],
    threads: int,
) -> None:
    """Writes the weighted sum of the experts' outputs for one token, down(silu(gate x) * up x), to `out`.

    `hidden` and `out` are addresses of `sizes[0]` float32 numbers; the FFNs are `sizes[1]` wide. An expert is a number
    that experts over the same FFN share, its matrices and its weight. `kinds` are those of the FFNs and the adapters.
    Every matrix is contiguous. At most `threads` threads work.
    """
    width, ffn = sizes
    shared, members, weights = zip(*experts, strict=True)
    first = {key: place for place, key in reversed(list(enumerate(shared)))}
    place_of = {key: place for place, key in enumerate(first)}
    few, many, rank = len(first), len(experts), max(chain(*(each.ranks for each in members)))
    codes = (CODES[kind] for kind in kinds)
    ranks = chain(*(each.ranks for each in members))
    ints = [few, many, width, ffn, rank, *codes, *(place_of[key] for key in shared), *first.values(), *ranks]
    floats = [*weights, *chain(*(each.scales for each in members))]
    ints_, floats_ = (ctypes.c_int64 * len(ints))(*ints), (ctypes.c_float * len(floats))(*floats)
    wide = 3 * (few + many) * ffn
    room = _lent(wide + 3 * many * rank)
    facts = ctypes.addressof(ints_), ctypes.addressof(floats_)
    addresses = [*facts, hidden, out, room, room + 4 * wide, *chain(*(each.addresses for each in members))]
    task = (ctypes.c_void_p * len(addresses))(*addresses)
    _run("ffns", task, multiplications=3 * few * width * ffn, threads=threads)


def compilers(kinds: Sequence[str]) -> list[Callable[[], object]]:
    """Functions that each load or compile one of the kernels for weights of these kinds."""
    return [partial(address, kernel) for kernel in ("few", "ffns", *kinds)]


def _lent(size: int) -> int:
    """The address of room for so many float32 numbers. This thread keeps it, since fresh memory is slow."""
    if getattr(_room, "size", 0) < size:
        _room.size, _room.memory = size, (ctypes.c_float * size)()
    return ctypes.addressof(_room.memory)


def _run(kernel: str, task: Any, *, multiplications: int, threads: int) -> None:
    """Runs a kernel on up to `threads` threads, of which each does its share."""
    team = max(1, min(threads, multiplications // GRAIN))
    if team == 1:  # no team at all: one of another size would end torch's threads
        _alone(kernel)(task)
    else:
        _parallel(address(kernel), task, team, 0)


@cache
def _alone(kernel: str) -> Any:
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address(kernel))


@cache
def address(kernel: str) -> int:
    """The address of a compiled kernel, which takes the address of a task."""
    return compiled(KERNELS[kernel], TASK)
