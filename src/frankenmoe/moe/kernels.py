"""What numba compiles for CPUs: float32 rows through matrices as they are stored; does not know torch, nor who calls.

A matrix is read once and widened in registers; memory is C's and nothing is raised, so it runs without numba.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.extending import intrinsic

from frankenmoe.moe.numbers import FLAGS, PLAIN, exponential, rounded, widened

# T tokens, I inputs, O outputs, J pairs of inputs
# G FFNs, M members (each an FFN under adapters or without), D hidden, F ffn, R rank, X: gate, up and down

TILE_T, TILE_O = 4, 3  # twelve sums, three weights and one input: the sixteen vector registers of AVX2
PANEL = 1 << 18  # numbers of the tokens that stay in the cache while all weights pass
ROWS = 64  # of a matrix that stay in the cache while a few tokens pass
# processors look ahead too, but not as far as memory takes to answer: it is a tenth faster when it is asked early
LINE, AHEAD = 64, 2048  # bytes
# a part is a slice of its own: of a range that begins elsewhere LLVM may not see that no index counts from the end
# bytes that are asked for together, since asking within a loop keeps it from being vectorized; also how many products
# of an int8 and an int16 have a sum that is sure to fit an int32
AT_ONCE = 512
FIXED = 11  # addresses of a task of `ffns` before those of its members
_thread = types.ExternalFunction("omp_get_thread_num", types.int32())
_threads = types.ExternalFunction("omp_get_num_threads", types.int32())
_malloc = types.ExternalFunction("malloc", types.voidptr(types.int64))
_free = types.ExternalFunction("free", types.void(types.voidptr))
_barrier = types.ExternalFunction("GOMP_barrier", types.void())


@intrinsic
def _pointer(typing: Any, address: Any) -> Any:
    """The pointer that an int64 is."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())

    return types.voidptr(types.int64), generate


@intrinsic
def _prefetch(typing: Any, numbers_N: Any, place: Any) -> Any:
    """Asks for the memory of a number that will be read soon, and may lie behind the end: asking never fails."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        byte, whole = ir.IntType(8).as_pointer(), ir.IntType(32)
        address = builder.bitcast(builder.gep(array.data, [arguments[1]]), byte)
        asked = ir.FunctionType(ir.VoidType(), [byte, whole, whole, whole])
        read, near, data = (ir.Constant(whole, value) for value in (0, 3, 1))
        builder.call(builder.module.declare_intrinsic("llvm.prefetch", [byte], asked), [address, read, near, data])
        return context.get_dummy_value()

    return types.void(numbers_N, place), generate


@njit(**PLAIN)
def _share(outputs: int) -> Any:
    """(begin, end) of this thread's outputs."""
    threads, thread = _threads(), _thread()
    each = (outputs + threads - 1) // threads
    each = (each + 11) // 12 * 12
    return min(outputs, thread * each), min(outputs, (thread + 1) * each)


@njit(fastmath=FLAGS, **PLAIN)
def _dot(weight_I: Any, hidden_I: Any) -> Any:
    total = np.float32(0)
    for i in range(len(hidden_I)):
        total += widened(weight_I[i]) * hidden_I[i]
    return total


@njit(fastmath=FLAGS, **PLAIN)
def _whole(hidden_I: Any, whole_I: Any) -> Any:
    """Writes int16 numbers for float32 ones; gives (step, NaN or 0), as integers cannot tell that one was no number."""
    inputs = len(hidden_I)
    largest = poison = np.float32(0)
    for i in range(inputs):
        largest = max(largest, abs(hidden_I[i]))
        poison += hidden_I[i] * np.float32(0)
    step = largest / np.float32(32767)
    for i in range(inputs):
        whole_I[i] = np.int16(np.rint(hidden_I[i] / step)) if step > 0 else np.int16(0)
    return step, poison


@njit(fastmath=FLAGS, **PLAIN)
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


@njit(fastmath=FLAGS, **PLAIN)
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


def many_bfloat16(task: Any) -> None:
    tokens, outputs, inputs = carray(task[0], 3, np.int64)
    _many(carray(task[1], (outputs, inputs), np.uint16), task, tokens)


def many_float16(task: Any) -> None:
    tokens, outputs, inputs = carray(task[0], 3, np.int64)
    _many(carray(task[1], (outputs, inputs), np.int16), task, tokens)


def many_int8(task: Any) -> None:
    tokens, outputs, inputs = carray(task[0], 3, np.int64)
    _many(carray(task[1], (outputs, inputs), np.int8), task, tokens)


@njit(**PLAIN)
def _many(weight_OI: Any, task: Any, tokens: int) -> None:
    outputs, inputs = weight_OI.shape
    hidden_TI, out_TO = carray(task[2], (tokens, inputs), np.float32), carray(task[3], (tokens, outputs), np.float32)
    begin, end = _share(outputs)
    _rows(weight_OI, hidden_TI, out_TO, begin, end)


@njit(**PLAIN)
def _matvec(kind: int, weight: int, scale: int, hidden_I: Any, out_O: Any, begin: int, end: int) -> None:
    """out_O += W[begin:end] @ hidden_I, given the addresses of W, of a kind in compiled.CODES, and of its scales."""
    inputs = len(hidden_I)
    room = _malloc(inputs * 4)
    if kind == 3:
        weight_OI, scale_O = carray(_pointer(weight), (end, inputs), np.int8), carray(_pointer(scale), end, np.float32)
        whole_I = carray(room, inputs, np.int16)
        step, poison = _whole(hidden_I, whole_I)
        _int8_rows(weight_OI, scale_O, whole_I, step, poison, out_O, begin)
    elif kind == 2:
        _dot_rows(carray(_pointer(weight), (end, inputs), np.int16), hidden_I, out_O, begin)
    elif kind == 1 and inputs % 2 == 0:
        pair_OJ = carray(_pointer(weight), (end, inputs // 2), np.uint32)
        apart_XJ = carray(room, (2, inputs // 2), np.float32)
        _apart(hidden_I, apart_XJ)
        _pair_rows(pair_OJ, apart_XJ[0], apart_XJ[1], out_O, begin)
    elif kind == 1:
        _dot_rows(carray(_pointer(weight), (end, inputs), np.uint16), hidden_I, out_O, begin)
    else:
        _dot_rows(carray(_pointer(weight), (end, inputs), np.float32), hidden_I, out_O, begin)
    _free(room)


@njit(**PLAIN)
def _apart(hidden_I: Any, apart_XJ: Any) -> None:
    """The numbers at even and at odd places."""
    for j in range(len(hidden_I) // 2):
        apart_XJ[0, j], apart_XJ[1, j] = hidden_I[2 * j], hidden_I[2 * j + 1]


# loops where numpy has words, since numba takes seconds to compile what those do with other shapes
@njit(**PLAIN)
def _clear(out_N: Any) -> None:
    for n in range(len(out_N)):
        out_N[n] = 0


@njit(**PLAIN)
def _scaled(scale: Any, numbers_N: Any, out_N: Any) -> Any:
    for n in range(len(out_N)):
        out_N[n] = scale * numbers_N[n]
    return out_N


@njit(**PLAIN)
def _dot_rows(weight_OI: Any, hidden_I: Any, out_O: Any, begin: int) -> None:
    for o in range(begin, len(weight_OI)):
        out_O[o - begin] += _dot(weight_OI[o], hidden_I)


@njit(fastmath=FLAGS, **PLAIN)
def _pair_rows(pair_OJ: Any, even_J: Any, odd_J: Any, out_O: Any, begin: int) -> None:
    """bf16 two at a time: a mask widens the second of a pair, so that half as many pass through the shifter."""
    pairs = len(even_J)
    for o in range(begin, len(pair_OJ)):
        pair_J, evens, odds = pair_OJ[o], np.float32(0), np.float32(0)
        for first in range(0, pairs, AT_ONCE // 4):
            for line in range(first, first + AT_ONCE // 4, LINE // 4):
                _prefetch(pair_J, line + AHEAD // 4)
            part = slice(first, first + AT_ONCE // 4)
            pair_P, even_P, odd_P = pair_J[part], even_J[part], odd_J[part]
            for p in range(len(pair_P)):
                evens += np.uint32(pair_P[p] << np.uint32(16)).view(np.float32) * even_P[p]
                odds += np.uint32(pair_P[p] & np.uint32(0xFFFF0000)).view(np.float32) * odd_P[p]
        out_O[o - begin] += evens + odds


@njit(fastmath=FLAGS, **PLAIN)
def _whole_dot(weight_I: Any, whole_I: Any) -> Any:
    """int8 times int16, summed in int32 a part of a row at a time, so that none need be coarser."""
    inputs, total = len(whole_I), np.float32(0)
    for first in range(0, inputs, AT_ONCE):
        for line in range(first, first + AT_ONCE, LINE):
            _prefetch(weight_I, line + AHEAD)
        weight_P, whole_P = weight_I[first : first + AT_ONCE], whole_I[first : first + AT_ONCE]
        part = np.int32(0)
        for p in range(len(whole_P)):
            part = np.int32(part + np.int32(np.int32(weight_P[p]) * np.int32(whole_P[p])))
        total += np.float32(part)
    return total


@njit(**PLAIN)
def _int8_rows(weight_OI: Any, scale_O: Any, whole_I: Any, step: Any, poison: Any, out_O: Any, begin: int) -> None:
    for o in range(begin, len(weight_OI)):
        total = _whole_dot(weight_OI[o], whole_I)
        out_O[o - begin] += (total * step + poison) * scale_O[o]


def few(task: Any) -> None:
    """A few tokens through one matrix: out_TO = hidden_TI @ W.T + bias_O.

    task[0] has T, O, I and the kinds of W, of hidden_TI and out_TO, and of bias_O (-1: there is none); then come the
    addresses of W, its scales, hidden_TI, out_TO and bias_O.
    """
    tokens, outputs, inputs, kind, hidden_kind, bias_kind = carray(task[0], 6, np.int64)
    weight, scale = carray(task[1], 2, np.int64)
    room = _malloc(4 * tokens * inputs)
    hidden_TI = carray(room, (tokens, inputs), np.float32)
    for t in range(tokens):
        _read(hidden_kind, task[2], t * inputs, hidden_TI[t])
    begin, end = _share(outputs)
    step = ROWS if tokens > 1 else max(1, end - begin)
    sum_room = _malloc(4 * step)
    sum_O = carray(sum_room, step, np.float32)
    for first in range(begin, end, step):
        last = min(first + step, end)
        for t in range(tokens):
            _clear(sum_O)
            if bias_kind >= 0:
                _read(bias_kind, task[4], first, sum_O[: last - first])
            _matvec(kind, weight, scale, hidden_TI[t], sum_O, first, last)
            _write(hidden_kind, task[3], t * outputs + first, sum_O[: last - first])
    _free(sum_room)
    _free(room)


@njit(**PLAIN)
def _read(kind: int, numbers: Any, first: int, out_N: Any) -> None:
    """The float32 that the numbers at an address stand for, from the `first` of them on."""
    size = first + len(out_N)
    if kind == 0:
        _widen(carray(numbers, size, np.float32)[first:], out_N)
    elif kind == 1:
        _widen(carray(numbers, size, np.uint16)[first:], out_N)
    else:
        _widen(carray(numbers, size, np.int16)[first:], out_N)


@njit(**PLAIN)
def _widen(stored_N: Any, out_N: Any) -> None:
    for n in range(len(out_N)):
        out_N[n] = widened(stored_N[n])


@njit(**PLAIN)
def _write(kind: int, numbers: Any, first: int, found_N: Any) -> None:
    """What `_read` reads, rounded."""
    size = first + len(found_N)
    if kind == 0:
        _round(found_N, carray(numbers, size, np.float32)[first:])
    elif kind == 1:
        _round(found_N, carray(numbers, size, np.uint16)[first:])
    else:
        _round(found_N, carray(numbers, size, np.int16)[first:])


@njit(**PLAIN)
def _round(found_N: Any, out_N: Any) -> None:
    for n in range(len(out_N)):
        out_N[n] = rounded(found_N[n], out_N[n])


@njit(**PLAIN)
def _low(kind: int, member: Any, x: int, hidden_I: Any, low_R: Any) -> None:
    """This thread's share of low_R = A @ hidden_I for one of a member's adapters, if it has that."""
    table = carray(member, 18, np.int64)
    begin, end = _share(table[8 + 3 * x])
    _clear(low_R[begin:end])
    _matvec(kind, table[6 + 3 * x], 0, hidden_I, low_R[begin:end], begin, end)


@njit(**PLAIN)
def _update(kind: int, member: Any, x: int, low_R: Any, out_O: Any, begin: int, end: int) -> None:
    """out_O += scale * B[begin:end] @ low_R for one of a member's adapters, if it has that."""
    table, scale = carray(member, 18, np.int64), np.float32(carray(member, 18, np.float64)[15 + x])
    rank = table[8 + 3 * x]
    if rank > 0:
        room = _malloc(4 * rank)
        scaled_R = _scaled(scale, low_R, carray(room, rank, np.float32))
        _matvec(kind, table[7 + 3 * x], 0, scaled_R, out_O, begin, end)
        _free(room)


@njit(fastmath=FLAGS, **PLAIN)
def _activate(gate_F: Any, up_F: Any, weight: Any, inner_F: Any, mixed_F: Any) -> None:
    """inner_F = weight * silu(gate_F) * up_F, which mixed_F gets more."""
    for f in range(len(inner_F)):
        gate = gate_F[f]
        inner_F[f] = gate / (np.float32(1) + exponential(-gate)) * up_F[f] * weight
        mixed_F[f] += inner_F[f]


def ffns(task: Any) -> None:
    """One token through gated FFNs under adapters: out_D = sum over M of weight_M * down(silu(gate x) * up x).

    task[0] has G, M, D, F, the largest rank, the kinds of the FFNs, of the adapters and of hidden_D and out_D, and each
    member's FFN; then come the addresses of weight_M, hidden_D and out_D, of room for seven intermediate results, of
    the members' tables, and for each FFN that of the table of one of its members.
    """
    ffns, members, width, ffn, rank, kind, low_kind, hidden_kind = carray(task[0], 8, np.int64)
    ffn_M, weight_M = carray(task[0], 8 + members, np.int64)[8:], carray(task[1], members, np.float32)
    gate_GF, up_GF = carray(task[4], (ffns, ffn), np.float32), carray(task[5], (ffns, ffn), np.float32)
    mixed_GF, inner_MF = carray(task[6], (ffns, ffn), np.float32), carray(task[7], (members, ffn), np.float32)
    gate_MF, up_MF = carray(task[8], (members, ffn), np.float32), carray(task[9], (members, ffn), np.float32)
    low_MXR = carray(task[10], (members, 3, rank), np.float32)
    room = _malloc(4 * width)
    hidden_D = carray(room, width, np.float32)
    _read(hidden_kind, task[2], 0, hidden_D)
    begin, end = _share(ffn)
    if rank > 0:
        for m in range(members):
            for x in range(2):
                _low(low_kind, task[FIXED + m], x, hidden_D, low_MXR[m, x])
    for g in range(ffns):
        table = carray(task[FIXED + members + g], 6, np.int64)
        gate_F, up_F = gate_GF[g, begin:end], up_GF[g, begin:end]
        _clear(gate_F)
        _clear(up_F)
        _clear(mixed_GF[g, begin:end])
        _matvec(kind, table[0], table[1], hidden_D, gate_F, begin, end)
        _matvec(kind, table[2], table[3], hidden_D, up_F, begin, end)
    if rank > 0:  # else a thread goes on with what it made itself
        _barrier()
    for m in range(members):
        gate_F, up_F = gate_GF[ffn_M[m], begin:end], up_GF[ffn_M[m], begin:end]
        if rank > 0:
            gate_F = _scaled(np.float32(1), gate_F, gate_MF[m, begin:end])
            up_F = _scaled(np.float32(1), up_F, up_MF[m, begin:end])
            _update(low_kind, task[FIXED + m], 0, low_MXR[m, 0], gate_F, begin, end)
            _update(low_kind, task[FIXED + m], 1, low_MXR[m, 1], up_F, begin, end)
        _activate(gate_F, up_F, weight_M[m], inner_MF[m, begin:end], mixed_GF[ffn_M[m], begin:end])
    _barrier()
    if rank > 0:
        for m in range(members):
            _low(low_kind, task[FIXED + m], 2, inner_MF[m], low_MXR[m, 2])
        _barrier()
    begin, end = _share(width)
    out_D = hidden_D[: max(0, end - begin)]  # which no one reads from here on
    _clear(out_D)
    for g in range(ffns):
        table = carray(task[FIXED + members + g], 6, np.int64)
        _matvec(kind, table[4], table[5], mixed_GF[g], out_D, begin, end)
    for m in range(members):
        _update(low_kind, task[FIXED + m], 2, low_MXR[m, 2], out_D, begin, end)
    _write(hidden_kind, task[3], begin, out_D)
    _free(room)
