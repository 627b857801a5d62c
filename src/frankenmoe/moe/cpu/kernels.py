"""CPU kernels that numba compiles: products with stored weights, summed in float32. Does not import torch.

A kernel takes a task, which is an array of addresses, and computes one thread's share of it. It reads a weight once and
widens it in registers. Sums, inputs and results are float32.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.extending import intrinsic, overload

from frankenmoe.jit import PLAIN

# T tokens, I inputs, O outputs, J pairs of inputs, P a part of a row, N any number
# G FFNs, M members (an expert: an FFN with adapters or without), D hidden, F ffn, R rank, X: gate, up and down

FLAGS = {"reassoc", "contract", "nsz"}  # sums in any order, so that LLVM can vectorize; NaN and infinity are kept
FLOAT32, BFLOAT16, FLOAT16, INT8 = range(4)  # the codes of stored types
TILE_T, TILE_O = 4, 3  # 12 sums, 3 weights and 1 input fill the 16 vector registers of AVX2
PANEL = 1 << 18  # numbers of the tokens that stay in the cache while all weights pass
ROWS = 64  # rows of a matrix that stay in the cache while a few tokens pass
# Prefetching further ahead than the processor does makes reading a tenth faster. A prefetch inside a loop stops LLVM
# from vectorizing it, so one part of a row is prefetched at a time. A part is a slice: for a range that does not begin
# at 0, LLVM may not see that an index is never negative.
LINE, PART, AHEAD = 64, 512, 2048  # bytes
MATRICES = 12  # addresses of a member: weight and scales of gate, up and down, then A and B of gate, up and down
MEMBERS = 6  # where in a task of `ffns` the members begin
_thread = types.ExternalFunction("omp_get_thread_num", types.int32())
_threads = types.ExternalFunction("omp_get_num_threads", types.int32())
_barrier = types.ExternalFunction("GOMP_barrier", types.void())


def widened(number: Any) -> Any:
    """The float32 value of a stored number: uint16 holds the bits of a bf16, int16 those of an fp16.

    Only compiled code can call it: numba puts what `_widened` chooses in its place.
    """
    raise TypeError("only compiled code can call widened")


@overload(widened)
def _widened(number: Any) -> Any:
    return {types.uint16: _from_bf16, types.int16: _from_fp16, types.int8: _plain, types.float32: _plain}[number]


def _plain(number: Any) -> Any:
    return np.float32(number)


def _from_bf16(number: Any) -> Any:
    return np.uint32(np.uint32(number) << np.uint32(16)).view(np.float32)


def _from_fp16(number: Any) -> Any:
    # exponent and fraction move to their places in a float32; the factor is the difference of the two biases
    bits = np.uint32(np.uint16(number))
    sign, rest = np.uint32(bits & np.uint32(0x8000)), np.uint32(bits & np.uint32(0x7FFF))
    endless = np.uint32(0x7F800000) if rest >= np.uint32(0x7C00) else np.uint32(0)  # infinity and NaN
    moved = np.uint32(np.uint32(np.uint32(sign << np.uint32(16)) | np.uint32(rest << np.uint32(13))) | endless)
    return moved.view(np.float32) * np.float32(2.0**112)


# e**r = 1 + r + r**2 * polynomial(r) for r from -log(2)/2 to log(2)/2: expf of Moshier's Cephes library
FACTORS = tuple(
    map(
        np.float32, (1.98756915e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
    )
)
LOG2_E, LOG_2 = np.float32(np.log2(np.e)), np.float32(np.log(2))
LEAST, MOST = np.float32(-87), np.float32(88)  # the exponentials of these are normal numbers


@njit(**PLAIN)
def exponential(number: Any) -> Any:
    """e**number in float32, clamped to e**-87 .. e**88. LLVM can vectorize it, unlike C's expf.

    The relative error is 3e-7; near the ends it is 5e-6 on a CPU without fused multiply-add.
    """
    within = min(max(number, LEAST), MOST)
    power = np.floor(within * LOG2_E + np.float32(0.5))
    rest = within - power * LOG_2
    a, b, c, d, e, f = FACTORS
    tail = ((((a * rest + b) * rest + c) * rest + d) * rest + e) * rest + f
    scale = np.uint32(np.uint32(np.int32(power) + np.int32(127)) << np.uint32(23)).view(np.float32)
    return (tail * rest * rest + rest + np.float32(1)) * scale


@intrinsic
def _prefetch(typing: Any, numbers_N: Any, place: Any) -> Any:
    """Asks for the memory of a number that will be read soon. It may lie behind the end: a prefetch never fails."""

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
    total, size = np.float32(0), weight_I.itemsize
    for first in range(0, len(hidden_I), PART // size):
        for line in range(first, first + PART // size, LINE // size):
            _prefetch(weight_I, line + AHEAD // size)
        part = slice(first, first + PART // size)
        weight_P, hidden_P = weight_I[part], hidden_I[part]
        for p in range(len(weight_P)):
            total += widened(weight_P[p]) * hidden_P[p]
    return total


@njit(fastmath=FLAGS, **PLAIN)
def _pair_dot(pair_J: Any, even_J: Any, odd_J: Any) -> Any:
    """`_dot` for bf16, two at a time: one is widened by a shift and the other by a mask, which take turns in a CPU."""
    evens = odds = np.float32(0)
    for first in range(0, len(even_J), PART // 4):
        for line in range(first, first + PART // 4, LINE // 4):
            _prefetch(pair_J, line + AHEAD // 4)
        part = slice(first, first + PART // 4)
        pair_P, even_P, odd_P = pair_J[part], even_J[part], odd_J[part]
        for p in range(len(pair_P)):
            evens += np.uint32(pair_P[p] << np.uint32(16)).view(np.float32) * even_P[p]
            odds += np.uint32(pair_P[p] & np.uint32(0xFFFF0000)).view(np.float32) * odd_P[p]
    return evens + odds


# loops in place of numpy's own functions, which numba compiles for seconds
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
def _add_rows(weight_OI: Any, hidden_I: Any, out_O: Any, begin: int) -> None:
    for o in range(begin, len(weight_OI)):
        out_O[o - begin] += _dot(weight_OI[o], hidden_I)


@njit(**PLAIN)
def _add_pairs(pair_OJ: Any, hidden_I: Any, out_O: Any, begin: int) -> None:
    apart_XJ = np.empty((2, len(hidden_I) // 2), np.float32)
    even_J, odd_J = apart_XJ[0], apart_XJ[1]
    for j in range(len(even_J)):
        even_J[j], odd_J[j] = hidden_I[2 * j], hidden_I[2 * j + 1]
    for o in range(begin, len(pair_OJ)):
        out_O[o - begin] += _pair_dot(pair_OJ[o], even_J, odd_J)


@njit(**PLAIN)
def _add_scaled(weight_OI: Any, scale_O: Any, hidden_I: Any, out_O: Any, begin: int) -> None:
    for o in range(begin, len(weight_OI)):
        out_O[o - begin] += scale_O[o] * _dot(weight_OI[o], hidden_I)


@njit(**PLAIN)
def _matvec(kind: int, weight: Any, scale: Any, hidden_I: Any, out_O: Any, begin: int, end: int) -> None:
    """out_O += W[begin:end] @ hidden_I, given the code of W's type and the addresses of W and of int8 scales."""
    inputs = len(hidden_I)
    if kind == INT8:
        _add_scaled(carray(weight, (end, inputs), np.int8), carray(scale, end, np.float32), hidden_I, out_O, begin)
    elif kind == FLOAT16:
        _add_rows(carray(weight, (end, inputs), np.int16), hidden_I, out_O, begin)
    elif kind == FLOAT32:
        _add_rows(carray(weight, (end, inputs), np.float32), hidden_I, out_O, begin)
    elif inputs % 2 == 0:
        _add_pairs(carray(weight, (end, inputs // 2), np.uint32), hidden_I, out_O, begin)
    else:
        _add_rows(carray(weight, (end, inputs), np.uint16), hidden_I, out_O, begin)


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


@njit(**PLAIN)
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


def _many(stored: Any) -> Callable[[Any], None]:
    """`few` for at least TILE_T tokens and weights of one type: the largest kernel, so each is compiled when needed."""

    def many(task: Any) -> None:
        tokens, outputs, inputs, kind = carray(task[0], 4, np.int64)
        out_TO, scale_O = carray(task[4], (tokens, outputs), np.float32), carray(task[2], outputs, np.float32)
        begin, end = _share(outputs)
        _rows(
            carray(task[1], (outputs, inputs), stored),
            carray(task[3], (tokens, inputs), np.float32),
            out_TO,
            begin,
            end,
        )
        if kind == INT8:
            for t in range(tokens):
                for o in range(begin, end):
                    out_TO[t, o] *= scale_O[o]

    return many


many_bfloat16, many_float16, many_int8 = _many(np.uint16), _many(np.int16), _many(np.int8)


def few(task: Any) -> None:
    """A few tokens through one matrix: out_TO = hidden_TI @ W.T, of int8 times the scales of its rows.

    task[0] holds T, O, I and the code of W's type; then come the addresses of W, its scales, hidden_TI and out_TO.
    """
    tokens, outputs, inputs, kind = carray(task[0], 4, np.int64)
    hidden_TI = carray(task[3], (tokens, inputs), np.float32)
    out_TO = carray(task[4], (tokens, outputs), np.float32)
    begin, end = _share(outputs)
    step = ROWS if tokens > 1 else max(1, end - begin)
    for first in range(begin, end, step):
        last = min(first + step, end)
        for t in range(tokens):
            sum_O = out_TO[t, first:last]
            _clear(sum_O)
            _matvec(kind, task[1], task[2], hidden_TI[t], sum_O, first, last)


@njit(**PLAIN)
def _low(kind: int, a: Any, scale: Any, hidden_I: Any, low_R: Any) -> None:
    """This thread's share of low_R = scale * A @ hidden_I."""
    begin, end = _share(len(low_R))
    mine_R = low_R[begin:end]
    _clear(mine_R)
    _matvec(kind, a, a, hidden_I, mine_R, begin, end)
    _scaled(scale, mine_R, mine_R)


@njit(fastmath=FLAGS, **PLAIN)
def _activate(gate_F: Any, up_F: Any, weight: Any, inner_F: Any, mixed_F: Any) -> None:
    """inner_F = weight * silu(gate_F) * up_F, which is added to mixed_F too."""
    for f in range(len(inner_F)):
        gate = gate_F[f]
        inner_F[f] = gate / (np.float32(1) + exponential(-gate)) * up_F[f] * weight
        mixed_F[f] += inner_F[f]


def ffns(task: Any) -> None:
    """One token through gated FFNs with adapters: out_D = sum over M of weight_M * down(silu(gate x) * up x).

    task[0] holds G, M, D, F, the largest rank, the codes of the FFNs' and the adapters' types, each member's FFN, for
    each FFN one member that has it, and each member's ranks; task[1] holds weight_M and the adapters' scales. Then
    come the addresses of hidden_D, out_D, and room for intermediate results, and MATRICES addresses for each member.
    """
    ffns, members, width, ffn, rank, kind, low_kind = carray(task[0], 7, np.int64)
    ints = carray(task[0], 7 + members + ffns + 3 * members, np.int64)
    ffn_M, first_G, rank_XM = ints[7:], ints[7 + members :], ints[7 + members + ffns :]
    weight_M, scale_XM = carray(task[1], members, np.float32), carray(task[1], 4 * members, np.float32)[members:]
    hidden_D, out_D = carray(task[2], width, np.float32), carray(task[3], width, np.float32)
    room_XF = carray(task[4], (3 * (ffns + members), ffn), np.float32)
    gate_GF, up_GF, mixed_GF = room_XF[:ffns], room_XF[ffns:], room_XF[2 * ffns :]
    inner_MF, gate_MF, up_MF = room_XF[3 * ffns :], room_XF[3 * ffns + members :], room_XF[3 * ffns + 2 * members :]
    low_MXR = carray(task[5], (members, 3, rank), np.float32)
    begin, end = _share(ffn)
    if rank > 0:
        for m in range(members):
            for x in range(2):
                a, low_R = task[MEMBERS + MATRICES * m + 6 + 2 * x], low_MXR[m, x, : rank_XM[3 * m + x]]
                _low(low_kind, a, scale_XM[3 * m + x], hidden_D, low_R)
    for g in range(ffns):
        gate_F, up_F, place = gate_GF[g, begin:end], up_GF[g, begin:end], MEMBERS + MATRICES * first_G[g]
        _clear(gate_F)
        _clear(up_F)
        _clear(mixed_GF[g, begin:end])
        _matvec(kind, task[place], task[place + 1], hidden_D, gate_F, begin, end)
        _matvec(kind, task[place + 2], task[place + 3], hidden_D, up_F, begin, end)
    if rank > 0:  # without adapters a thread reads only what it made itself
        _barrier()
    for m in range(members):
        gate_F, up_F = gate_GF[ffn_M[m], begin:end], up_GF[ffn_M[m], begin:end]
        if rank > 0:
            place = MEMBERS + MATRICES * m + 6
            gate_F = _scaled(np.float32(1), gate_F, gate_MF[m, begin:end])
            up_F = _scaled(np.float32(1), up_F, up_MF[m, begin:end])
            _update(low_kind, task[place + 1], low_MXR[m, 0, : rank_XM[3 * m]], gate_F, begin, end)
            _update(low_kind, task[place + 3], low_MXR[m, 1, : rank_XM[3 * m + 1]], up_F, begin, end)
        _activate(gate_F, up_F, weight_M[m], inner_MF[m, begin:end], mixed_GF[ffn_M[m], begin:end])
    _barrier()
    if rank > 0:
        for m in range(members):
            low_R = low_MXR[m, 2, : rank_XM[3 * m + 2]]
            _low(low_kind, task[MEMBERS + MATRICES * m + 10], scale_XM[3 * m + 2], inner_MF[m], low_R)
        _barrier()
    begin, end = _share(width)
    mine_D = out_D[begin:end]
    _clear(mine_D)
    for g in range(ffns):
        place = MEMBERS + MATRICES * first_G[g] + 4
        _matvec(kind, task[place], task[place + 1], mixed_GF[g], mine_D, begin, end)
    if rank > 0:
        for m in range(members):
            low_R = low_MXR[m, 2, : rank_XM[3 * m + 2]]
            _update(low_kind, task[MEMBERS + MATRICES * m + 11], low_R, mine_D, begin, end)


@njit(**PLAIN)
def _update(kind: int, b: Any, low_R: Any, out_O: Any, begin: int, end: int) -> None:
    """out_O += B[begin:end] @ low_R, if there is an adapter."""
    if len(low_R) > 0:
        _matvec(kind, b, b, low_R, out_O, begin, end)
