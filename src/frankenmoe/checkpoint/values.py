"""The numbers of tensors: decode, compute, encode, check.

Works in blocks of 2**20 elements in flat (row-major) order, so memory does not grow with the tensor.
Shape suffixes: N elements of one block, O rows (out) and I columns (in) of a matrix, R rank of a low-rank term.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future
from functools import lru_cache, partial
from pathlib import Path

import numpy as np

from frankenmoe.checkpoint.cast import BITS, Bytes, Floats, decode, encode, first_nonfinite
from frankenmoe.checkpoint.merging import Blocks, merged
from frankenmoe.checkpoint.noise import AddNoise
from frankenmoe.checkpoint.onethread import one_thread
from frankenmoe.checkpoint.reader import map_bytes, state_of
from frankenmoe.checkpoint.tensors import (
    DTYPES,
    FLOATS,
    Constant,
    Exp,
    Join,
    LowRank,
    Merge,
    Noise,
    Part,
    Permute,
    Scale,
    Shift,
    Step,
    TensorRef,
    TensorWrite,
    Turn,
)
from frankenmoe.errors import NumericsError, SourceError
from frankenmoe.system import keep_freed_memory

Stage = Callable[[Floats, int], Floats]
"""A prepared step: takes a block and its number, returns the block after the step, does not change its input."""

BLOCK = 2**20  # elements; also keys the noise, so another value gives other noise
TURNED = 2**22  # elements of a turned matrix at a time
NARROW = "choose a dtype with a wider range: bfloat16 or float32"
TOO_LARGE = "numbers are computed in float32, whatever the dtype; use smaller factors, less noise or another source"


def values(ref: TensorRef) -> Floats:
    """The numbers of a small tensor in its own shape. Raises SourceError for types that are not floats."""
    _require_float(ref)
    return decode(map_bytes(ref), dtype=ref.dtype).reshape(ref.shape).copy()


def blocks(write: TensorWrite, pool: Executor | None = None, *, ahead: int = 0) -> Iterator[Bytes]:
    """The output bytes of `write` in order, one array per 2**20 elements. Read-only: copies are mapped views.

    With a pool, up to `ahead` blocks are computed at the same time. Raises while iterating: SourceError for types that
    are not floats, NumericsError for NaN or infinity in a source and for results out of the range of `write.dtype`.
    """
    if write.copied is not None:
        yield from _copied_blocks(write, write.copied)
        return
    if write.joined:
        for each in write.joined:
            yield from _copied_blocks(each, each)
        return
    if write.turned:
        yield from _finite(_turned_bytes(write.turned), write)
        return
    if write.chained:
        for part in write.chained:
            yield from blocks(part)
        return
    _require_castable(write)
    keep_freed_memory()
    if pool is None:
        yield from (job() for job in _jobs(write))
        return
    waiting: deque[Future[Bytes]] = deque()
    for job in _jobs(write):
        waiting.append(pool.submit(job))
        if len(waiting) >= ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _jobs(write: TensorWrite) -> Iterator[Callable[[], Bytes]]:
    """Functions that each compute the output bytes of one block."""
    before, stages = _prepared(write)
    match write.inputs, stages:
        case (TensorRef() as ref,), [AddNoise() as noise] if len(write.steps) == 1 and noise.in_one_pass(ref, write):
            for number, raw in enumerate(_raw(ref)):
                yield partial(_noisy, write, noise, number, raw)
        case _:
            for number, block_N in enumerate(before()):
                yield partial(_encoded, write, stages, number, block_N)


def _noisy(write: TensorWrite, noise: AddNoise, number: int, raw: Bytes) -> Bytes:
    """The same bytes as `_encoded`, in one pass over them."""
    out = noise.bfloat16(raw, number)
    return _encoded(write, [noise], number, decode(raw, dtype="BF16")) if out is None else out


def _encoded(write: TensorWrite, stages: Sequence[Stage], number: int, block_N: Floats) -> Bytes:
    """The output bytes of one block, given its numbers before the stages."""
    block_N = _staged(stages, block_N, number)
    raw = encode(block_N, dtype=write.dtype)
    bad = first_nonfinite(raw, dtype=write.dtype)
    if bad is not None:
        raise _no_number(write, value=float(block_N[bad]), flat=number * BLOCK + bad)
    return raw


def materialize(write: TensorWrite) -> Bytes:
    """The whole output of `write` [nbytes], the same bytes that `blocks` gives.

    A copy is the mapped source itself, unread and unchecked (see `check_finite`).
    """
    if write.copied is not None:
        return map_bytes(write.copied)
    out = np.empty(write.nbytes, np.uint8)
    cursor = 0
    for raw in blocks(write):
        out[cursor : cursor + raw.size] = raw
        cursor += raw.size
    return out


def check_finite(ref: TensorRef) -> None:
    """Raises NumericsError if a float tensor holds NaN or infinity. Other types pass."""
    if ref.dtype not in FLOATS:
        return
    raw = map_bytes(ref)
    flat = first_nonfinite(raw, dtype=ref.dtype)
    if flat is not None:
        value = decode(_elements(raw, flat, flat + 1, dtype=ref.dtype), dtype=ref.dtype)[0]
        raise NumericsError(
            f"tensor {ref.name!r} in {ref.file} holds {_spell(value)} at {_index(flat, ref.shape)}, "
            "expected finite numbers only",
            hint="the source is broken; fetch it again or use another one",
        )


def _copied_blocks(what: TensorWrite | TensorRef, source: TensorRef) -> Iterator[Bytes]:
    raw = map_bytes(source)
    for start in range(0, what.numel, BLOCK):
        block = _elements(raw, start, start + BLOCK, dtype=what.dtype)
        if what.dtype in FLOATS and first_nonfinite(block, dtype=what.dtype) is not None:
            check_finite(source)
        yield block


def _finite(raws: Iterable[Bytes], write: TensorWrite) -> Iterator[Bytes]:
    """The same bytes. Raises NumericsError for the first that is no finite number."""
    for raw in raws:
        if first_nonfinite(raw, dtype=write.dtype) is not None:
            for ref in write.sources:
                check_finite(ref)
        yield raw


def _require_castable(write: TensorWrite) -> None:
    for ref in write.sources:
        _require_float(ref)
    if write.dtype not in FLOATS:
        raise SourceError(
            f"tensor {write.name!r} is to be written as {write.dtype}, expected one of {', '.join(sorted(FLOATS))}",
            hint="tensors that are not floats can be copied, not computed",
        )


def _require_float(ref: TensorRef) -> None:
    if ref.dtype not in FLOATS:
        raise SourceError(
            f"tensor {ref.name!r} in {ref.file} has dtype {ref.dtype}, expected one of {', '.join(sorted(FLOATS))}",
            hint="use the unquantized checkpoint as the source",
        )


def _numbers(what: TensorRef | TensorWrite) -> Blocks:
    """The numbers of a tensor before they are rounded to its type; may be read again and again."""
    if isinstance(what, TensorRef):
        return partial(_decoded, what)
    numbers, stages = _prepared(what)
    for stage in stages:
        numbers = _after(numbers, stage)
    return numbers


def _prepared(write: TensorWrite) -> tuple[Blocks, list[Stage]]:
    """The numbers of a tensor before the steps that work block by block, and these steps.

    What a step needs of the whole tensor is computed here, once.
    """
    inputs = [_numbers(each) for each in write.inputs]
    match write.steps[:1]:
        case (Merge() as merge,):
            before, steps = merged(merge, inputs), write.steps[1:]
        case (Constant(value),):
            before, steps = partial(_constant, value, write.numel), write.steps[1:]
        case (Join(),):
            before, steps = partial(_joined, inputs), write.steps[1:]
        case (Part(start),):
            before, steps = partial(_part, inputs[0], start, write.numel), write.steps[1:]
        case (Permute(order),):
            before, steps = partial(_permuted, inputs[0], order, write.shape[0]), write.steps[1:]
        case (Turn(),):
            before, steps = partial(_turned, write.inputs), write.steps[1:]
        case _:
            (before,), steps = inputs, write.steps
    stages: list[Stage] = []
    numbers, source = before, next(iter(write.inputs), None) if steps is write.steps else None
    for step in steps:
        stages.append(_stage(step, numbers, source if isinstance(source, TensorRef) else None))
        numbers, source = _after(numbers, stages[-1]), None
    return before, stages


def _decoded(ref: TensorRef) -> Iterator[Floats]:
    return (decode(raw, dtype=ref.dtype) for raw in _raw(ref))


def _raw(ref: TensorRef) -> Iterator[Bytes]:
    """The bytes of a tensor, BLOCK elements at a time."""
    raw = map_bytes(ref)
    return (_elements(raw, start, start + BLOCK, dtype=ref.dtype) for start in range(0, ref.numel, BLOCK))


def _constant(value: float, numel: int) -> Iterator[Floats]:
    for start in range(0, numel, BLOCK):
        yield np.full(min(BLOCK, numel - start), value, np.float32)


def _joined(inputs: Sequence[Blocks]) -> Iterator[Floats]:
    """The numbers of all inputs in order, in blocks that are cut anew."""
    return _cut(block_N for each in inputs for block_N in each())


def _part(numbers: Blocks, start: int, count: int) -> Iterator[Floats]:
    """`count` numbers from `start` on."""

    def inside() -> Iterator[Floats]:
        for number, block_N in enumerate(numbers()):
            at = number * BLOCK
            if at >= start + count:
                return
            if at + block_N.size > start:
                yield block_N[max(0, start - at) : start + count - at]

    return _cut(inside())


def _permuted(numbers: Blocks, order: tuple[int, ...], rows: int) -> Iterator[Floats]:
    """Holds the whole tensor while it is cut."""
    whole_GON = np.concatenate(list(numbers())).reshape(rows // len(order), len(order), -1)
    return _cut([whole_GON[:, list(order)].reshape(-1)])


def _turned(inputs: Sequence[TensorRef | TensorWrite]) -> Iterator[Floats]:
    """Some columns of stored matrices at a time. Holds the whole matrices where numbers are computed."""
    refs = [each for each in inputs if isinstance(each, TensorRef)]
    if len(refs) == len(inputs) and len({ref.dtype for ref in refs}) == 1:
        return _cut(decode(raw, dtype=refs[0].dtype) for raw in _turned_bytes(refs))
    matrices = [np.concatenate(list(_numbers(each)())).reshape(each.shape) for each in inputs]
    return _cut([np.concatenate(matrices).T.reshape(-1)])


def _turned_bytes(refs: Sequence[TensorRef]) -> Iterator[Bytes]:
    """The bytes of matrices of one type, stacked along their rows, with rows and columns exchanged."""
    size = DTYPES[refs[0].dtype].itemsize
    matrices = [map_bytes(ref).view(f"u{size}").reshape(ref.shape) for ref in refs]
    step = max(1, TURNED // sum(ref.shape[0] for ref in refs))
    for start in range(0, refs[0].shape[1], step):
        columns = [matrix[:, start : start + step].T for matrix in matrices]
        yield np.concatenate(columns, axis=1).reshape(-1).view(np.uint8)


def _cut(pieces: Iterable[Floats]) -> Iterator[Floats]:
    """The same numbers in blocks of BLOCK, which steps that count blocks rely on."""
    rest_N = np.empty(0, np.float32)
    for piece_N in pieces:
        rest_N = np.concatenate([rest_N, piece_N]) if rest_N.size else piece_N
        whole = rest_N.size // BLOCK * BLOCK
        yield from (rest_N[start : start + BLOCK] for start in range(0, whole, BLOCK))
        rest_N = rest_N[whole:]
    if rest_N.size:
        yield rest_N


def _after(before: Blocks, stage: Stage) -> Blocks:
    """The numbers after a prepared step."""

    def start() -> Iterator[Floats]:
        for number, block_N in enumerate(before()):
            yield _staged([stage], block_N, number)

    return start


def _staged(stages: Sequence[Stage], block_N: Floats, number: int) -> Floats:
    """A block after prepared steps."""
    with np.errstate(over="ignore", invalid="ignore"):  # the result is checked, where the element is known
        for stage in stages:
            block_N = stage(block_N, number)
    return block_N


def _stage(step: Step, before: Blocks, source: TensorRef | None) -> Stage:
    """A step, prepared. `source` is the tensor whose numbers are those before the step, if they are just that."""
    match step:
        case Scale(factor):
            return lambda block_N, _: block_N * np.float32(factor)
        case Shift(amount):
            return lambda block_N, _: block_N + np.float32(amount)
        case Exp():
            return lambda block_N, _: np.exp(block_N)
        case Noise(std, relative, seed):
            if relative:
                std *= _std_of(source, state_of(source)) if source else _std(before)
            return AddNoise(std, seed)
        case LowRank(a, b, scale):
            return partial(_add_low_rank, b=b, a_RI=values(a) * np.float32(scale))
    raise AssertionError(f"{step} is a first step")


def _add_low_rank(block_N: Floats, number: int, *, b: TensorRef, a_RI: Floats) -> Floats:
    """The block plus the part of `b @ a` that it covers, computing only the rows that it touches."""
    rank, columns = a_RI.shape
    first_row, skipped = divmod(number * BLOCK, columns)
    last_row = math.ceil((number * BLOCK + block_N.size) / columns)
    raw = _elements(map_bytes(b), first_row * rank, last_row * rank, dtype=b.dtype)
    with one_thread():  # for so small a product, waking threads takes longer than computing
        rows = decode(raw, dtype=b.dtype).reshape(-1, rank) @ a_RI
    found_N = rows.ravel()[skipped : skipped + block_N.size]
    found_N += block_N
    return found_N


def _std(numbers: Blocks) -> float:
    """The population standard deviation, in one pass (Chan, Golub and LeVeque 1979)."""
    count, mean, squares = 0, 0.0, 0.0
    for block_N in numbers():
        wide_N = block_N.astype(np.float64)
        block_mean = float(wide_N.mean())
        shift = block_mean - mean
        with np.errstate(invalid="ignore"):  # infinity makes it NaN, which makes the results NaN
            inner = float(np.square(wide_N - block_mean).sum())
        squares += inner + shift**2 * count * wide_N.size / (count + wide_N.size)
        count += wide_N.size
        mean += shift * wide_N.size / count
    return math.sqrt(squares / count) if count else 0.0


@lru_cache(maxsize=2**16)
def _std_of(ref: TensorRef, _state: tuple[Path, int, int]) -> float:
    """`_std` of a stored tensor, computed once for all experts that add noise to it."""
    return _std(partial(_decoded, ref))


def _elements(raw: Bytes, start: int, stop: int, *, dtype: str) -> Bytes:
    itemsize = DTYPES[dtype].itemsize
    return raw[start * itemsize : stop * itemsize]


def _no_number(write: TensorWrite, *, value: float, flat: int) -> NumericsError:
    """The error for a non-finite element `flat`: raised if a source is not finite, else returned as an overflow."""
    for ref in write.sources:
        check_finite(ref)
    files = ", ".join(sorted({str(ref.file) for ref in write.sources})) or "a constant"
    return NumericsError(
        f"tensor {write.name!r} from {files} becomes {value:g} at {_index(flat, write.shape)}, "
        f"but {write.dtype} holds at most {BITS[write.dtype].largest:g}",
        hint=NARROW if math.isfinite(value) else TOO_LARGE,
    )


def _spell(value: np.float32) -> str:
    return "NaN" if np.isnan(value) else "-Inf" if value < 0 else "Inf"


def _index(flat: int, shape: tuple[int, ...]) -> str:
    return str([int(place) for place in np.unravel_index(flat, shape)])
