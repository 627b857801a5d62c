"""Has torch's own threads do what is compiled for CPUs; knows addresses and sizes, no tensors.

Needs OpenMP in the process; a kernel is compiled when it is first used on a machine.
"""

import ctypes
import threading
from collections.abc import Callable, Sequence
from functools import cache, partial
from itertools import accumulate
from typing import Any

import numpy as np

from frankenmoe.moe import machinecode

# T tokens, I inputs, O outputs, R rank

GRAIN = 1 << 17  # multiplications that are worth another thread
CODES = {"float32": 0, "bfloat16": 1, "float16": 2, "int8": 3}  # what kernels call the types of stored numbers
# one kernel for each type, since it is the largest: only what is used is compiled
MANY = {"bfloat16": "many_bfloat16", "float16": "many_float16", "int8": "many_int8"}

_lent = threading.local()
# torch's own threads do the work: a second pool would fight with them for the cores
try:
    _process = ctypes.CDLL(None)
    _parallel = _process.GOMP_parallel
    _parallel.argtypes = ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint
    _needed = _process.GOMP_barrier, _process.omp_get_thread_num, _process.omp_get_num_threads
except (AttributeError, TypeError) as error:  # Windows has no library of the process itself
    raise ImportError("this torch has no OpenMP threads to run kernels on") from error
machinecode.check()


def product(kind: str, weight: int, hidden: int, out: int, *, sizes: tuple[int, int, int], threads: int) -> None:
    """Writes hidden @ weight.T to `out`.

    The three are addresses of rows without gaps: weights [O, I] of a `kind` (bfloat16, float16, int8), hidden [T, I]
    and out [T, O] in float32. `sizes` are (T, O, I); at most `threads` threads work, fewer where there is little to do.
    """
    tokens, outputs, inputs = sizes
    ints = (ctypes.c_int64 * 3)(*sizes)
    task = (ctypes.c_void_p * 4)(ctypes.addressof(ints), weight, hidden, out)
    _run(MANY[kind], task, multiplications=tokens * outputs * inputs, threads=threads)


def few(
    weight: tuple[str, int, int],
    hidden: tuple[str, int],
    out: int,
    bias: tuple[str, int] | None,
    *,
    sizes: tuple[int, int, int],
    threads: int,
) -> None:
    """`product` for a few tokens, one best, with nothing left to do: scales and bias too, all in their own types.

    `weight` is a kind and the addresses of the numbers and, of int8 alone, of float32 scales; `hidden` and `bias` are a
    kind (float32, bfloat16, float16) and an address; `out` becomes of the kind of `hidden`.
    """
    tokens, outputs, inputs = sizes
    kind, *matrix = weight
    bias_kind, bias_address = (-1, 0) if bias is None else (CODES[bias[0]], bias[1])
    ints = (ctypes.c_int64 * 8)(*sizes, CODES[kind], CODES[hidden[0]], bias_kind, *matrix)
    first = ctypes.addressof(ints)
    task = (ctypes.c_void_p * 5)(first, first + 6 * 8, hidden[1], out, bias_address)
    _run("few", task, multiplications=tokens * outputs * inputs, threads=threads)


class Member:
    """An expert's table: for gate, up and down the addresses of weight and scales, then A, B and rank, then scales."""

    def __init__(
        self, matrices: Sequence[tuple[int, int]], adapters: Sequence[tuple[int, int, int, float] | None]
    ) -> None:
        """Of gate, up and down: (weight, float32 scales of int8 or 0), and (A (R, I), B (O, R), R, scale) or None."""
        given = [(0, 0, 0, 0.0) if adapter is None else adapter for adapter in adapters]
        scales = np.array([scale for *_, scale in given]).view(np.int64)
        table = [*(each for matrix in matrices for each in matrix), *(each for low in given for each in low[:3])]
        self.rank = max(rank for _, _, rank, _ in given)
        self._table = (ctypes.c_int64 * 18)(*table, *scales.tolist())
        self.address = ctypes.addressof(self._table)


def ffns(
    hidden: int,
    out: int,
    experts: Sequence[tuple[int, Member, float]],
    *,
    sizes: tuple[int, int],
    kinds: tuple[str, str, str],
    threads: int,
) -> None:
    """Writes the weighted sum of the experts' outputs for one token, down(silu(gate x) * up x), to `out`.

    `hidden` and `out` are addresses of `sizes[0]` numbers; the FFNs are as wide as `sizes[1]`. An expert is any number
    that is the same for those over the same FFN, its table and its weight. `kinds` are those of the FFNs, of the
    adapters, and of `hidden` and `out`; every matrix lies without gaps. At most `threads` threads work.
    """
    width, ffn = sizes
    table_of = {first: member.address for first, member, _ in experts}
    place_of = {first: place for place, first in enumerate(table_of)}
    rank = max(member.rank for _, member, _ in experts)
    few, many = len(place_of), len(experts)
    codes = [CODES[kind] for kind in kinds]
    ints = (ctypes.c_int64 * (8 + many))(few, many, *sizes, rank, *codes, *(place_of[first] for first, _, _ in experts))
    weights = (ctypes.c_float * many)(*(weight for _, _, weight in experts))
    addresses = (
        *(ctypes.addressof(ints), ctypes.addressof(weights), hidden, out),
        *_room((few * ffn, few * ffn, few * ffn, many * ffn, many * ffn, many * ffn, many * 3 * rank)),
        *(member.address for _, member, _ in experts),
        *table_of.values(),
    )
    task = (ctypes.c_void_p * len(addresses))(*addresses)
    _run("ffns", task, multiplications=3 * few * width * ffn, threads=threads)


def compilers(kinds: Sequence[str]) -> list[Callable[[], object]]:
    """What to call so that nothing is left to compile for weights of these kinds: the larger pieces, one by one."""
    return [partial(machinecode.address, kernel) for kernel in ("few", "ffns", *(MANY[kind] for kind in kinds))]


def _room(sizes: Sequence[int]) -> list[int]:
    """Addresses of room for so many float32 each, which this thread keeps: fresh memory is dear."""
    begins = [0, *accumulate(sizes)]
    if getattr(_lent, "size", 0) < begins[-1]:
        _lent.size, _lent.memory = begins[-1], (ctypes.c_float * begins[-1])()
        _lent.address = ctypes.addressof(_lent.memory)
    return [_lent.address + 4 * begin for begin in begins[:-1]]


def _run(kernel: str, task: Any, *, multiplications: int, threads: int) -> None:
    """Has a kernel do a task, an array of addresses; each of at most `threads` threads does its share."""
    team = max(1, min(threads, multiplications // GRAIN))
    if team == 1:  # no team at all: one of another size would send torch's threads away
        _alone(kernel)(task)
    else:
        _parallel(_address(kernel), task, team, 0)


_address = cache(machinecode.address)


@cache
def _alone(kernel: str) -> Any:
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(_address(kernel))
