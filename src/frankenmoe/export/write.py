"""Writes one or several GGUF files at once as a stream: every source is read once, and no file is in memory.

Shape suffixes: R rows, C columns.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from frankenmoe.checkpoint.cast import Bytes, Floats, decode, first_nonfinite
from frankenmoe.checkpoint.quantize import quantize
from frankenmoe.checkpoint.tensors import DTYPES, TensorRef, TensorWrite
from frankenmoe.checkpoint.values import blocks, check_finite, materialize
from frankenmoe.checkpoint.writer import partial_of, replacing, write_all
from frankenmoe.counted import counted
from frankenmoe.errors import NumericsError, SourceError
from frankenmoe.planning.gguf import GgufTensor, aligned, nbytes

CHUNK = 2**18  # elements that one thread encodes at a time
COPIED = 2**20  # bytes read at a time where nothing is computed
AHEAD = 4  # chunks per thread that may wait to be encoded
WAITING = 2**25  # bytes that may wait to be written

Importance = Mapping[str, Floats]
"""Tensor name -> importance of its columns [parts, C]."""


@dataclass(frozen=True)
class Target:
    """A file to write: its head and the type of each tensor."""

    path: Path
    head: bytes
    types: Mapping[str, str]
    tensor_bytes: int

    @property
    def size(self) -> int:
        return len(self.head) + self.tensor_bytes


@dataclass
class _Sink:
    """A file being written, by a thread of its own: where the disk makes it wait, chunks are still encoded.

    `position` is where the next bytes will be. `kept` says where in the file the parts of the current tensor are.
    """

    fd: int
    target: Target
    writer: Executor
    position: int = 0
    kept: dict[object, TensorRef] = field(default_factory=dict)
    _waiting: deque[tuple[int, Future[None]]] = field(default_factory=deque)
    _held: int = 0

    def append(self, data: bytes | memoryview) -> None:
        """Hands bytes to the writer. Raises what writing earlier ones raised."""
        self._waiting.append((len(data), self.writer.submit(write_all, self.fd, data)))
        self._held += len(data)
        self.position += len(data)
        self._wait(WAITING)

    def flush(self) -> None:
        """Waits until all bytes are in the file."""
        self._wait(0)

    def _wait(self, most: int) -> None:
        while self._held > most:
            size, done = self._waiting.popleft()
            done.result()
            self._held -= size


def write_files(
    targets: Sequence[Target],
    tensors: Sequence[GgufTensor],
    *,
    threads: int,
    importance: Importance | None = None,
    on_bytes: Callable[[int], None],
) -> None:
    """Writes every target whole or not at all. `on_bytes` is called with the number of bytes just written.

    Raises SourceError, NumericsError (a source is not finite, or the type cannot hold a value), ArtifactError (the disk
    is full). Memory is a few chunks per thread, and one matrix if its rows are reordered or computed.
    """
    with ExitStack() as stack, ThreadPoolExecutor(1) as writer, ThreadPoolExecutor(threads) as pool:
        sinks = [
            _Sink(stack.enter_context(replacing(target.path, size=target.size)), target, writer) for target in targets
        ]
        for sink in sinks:
            sink.append(sink.target.head)
        for tensor in tensors:
            _write_tensor(tensor, sinks, pool, threads * AHEAD, (importance or {}).get(tensor.name), on_bytes)
        for sink in sinks:
            sink.flush()


def _write_tensor(
    tensor: GgufTensor,
    sinks: Sequence[_Sink],
    pool: Executor,
    ahead: int,
    weights_PC: Floats | None,
    on_bytes: Callable[[int], None],
) -> None:
    for sink in sinks:
        sink.kept.clear()
    if tensor.values:
        for sink in sinks:
            sink.append(np.array(tensor.values, np.float32).tobytes())
    for number, part in enumerate(tensor.parts):
        key = (part.inputs, part.steps, part.dtype, number if weights_PC is not None else 0)
        rest = [sink for sink in sinks if not _moved(sink, tensor, part, key)]
        if rest:
            starts = [sink.position for sink in rest]
            weights_C = None if weights_PC is None else weights_PC[number]
            _compute(tensor, part, rest, pool, ahead, weights_C)
            for sink, start in zip(rest, starts, strict=True):
                sink.kept[key] = _stored(sink, tensor, start)
    for sink in sinks:
        size = nbytes(tensor.shape, sink.target.types[tensor.name])
        sink.append(b"\0" * (aligned(size) - size))
        on_bytes(aligned(size))


def _moved(sink: _Sink, tensor: GgufTensor, part: TensorWrite, key: object) -> bool:
    """Copies a part if it needs no encoding: from its source, or from an equal part in this file. Else False."""
    if key in sink.kept:
        sink.flush()
        _copy(sink, sink.kept[key])
        return True
    rows, columns = _matrix(part.shape)
    as_is = tensor.factor == 1 and not tensor.heads and _matrix(_part_shape(tensor)) == (rows, columns)
    if part.copied is None or not as_is or sink.target.types[tensor.name] != part.dtype:
        return False
    check_finite(part.copied)
    _copy(sink, part.copied)
    return True


def _copy(sink: _Sink, ref: TensorRef) -> None:
    """Appends the bytes of a tensor."""
    left = ref.nbytes
    with ref.file.open("rb", buffering=0) as source:
        source.seek(ref.start)
        while left and (data := source.read(min(left, COPIED))):
            sink.append(data)
            left -= len(data)
    if left:
        raise SourceError(
            f"{ref.file} ended {counted(left, 'byte')} before tensor {ref.name!r} was copied",
            hint="the source changed meanwhile; start again",
        )


def _stored(sink: _Sink, tensor: GgufTensor, start: int) -> TensorRef:
    """A reference to the bytes that were just written."""
    partial = partial_of(sink.target.path)
    return TensorRef(tensor.name, "U8", (sink.position - start,), partial, start, sink.position)


def _compute(
    tensor: GgufTensor,
    part: TensorWrite,
    sinks: Sequence[_Sink],
    pool: Executor,
    ahead: int,
    weights_C: Floats | None,
) -> None:
    """Encodes one part chunk by chunk in the pool and writes it in order to every sink."""
    rows, columns = _matrix(_part_shape(tensor))
    kinds = [sink.target.types[tensor.name] for sink in sinks]
    waiting: deque[Future[list[Bytes]]] = deque()

    def put() -> None:
        for sink, data in zip(sinks, waiting.popleft().result(), strict=True):
            sink.append(data.data)

    done = 0
    for raw_RC in _row_chunks(part, pool, ahead, heads=tensor.heads):
        waiting.append(pool.submit(_encode, raw_RC, part, tensor.factor, columns, kinds, weights_C))
        done += len(raw_RC)
        while len(waiting) >= ahead:
            put()
    while waiting:
        put()
    if done < rows:
        zeros_RC = np.zeros((rows - done, columns), np.float32)
        for sink, kind in zip(sinks, kinds, strict=True):
            sink.append(quantize(zeros_RC, kind, weights_C).data)


def _encode(
    raw_RC: Bytes, part: TensorWrite, factor: float, columns: int, kinds: Sequence[str], weights_C: Floats | None
) -> list[Bytes]:
    """The bytes of a chunk of stored rows in every type, padded with zeros to `columns`."""
    block_RC = decode(raw_RC.ravel(), dtype=part.dtype).reshape(len(raw_RC), -1)
    if first_nonfinite(block_RC.ravel().view(np.uint8), dtype="F32") is not None:
        for ref in part.sources:
            check_finite(ref)
        raise NumericsError(f"tensor {part.name!r} has numbers too large for float32", hint="use another source")
    if factor != 1:
        block_RC = block_RC * np.float32(factor)
    if block_RC.shape[1] < columns:
        block_RC = np.pad(block_RC, ((0, 0), (0, columns - block_RC.shape[1])))
    found = []
    for kind in kinds:
        data = quantize(block_RC, kind, weights_C)
        if kind == "F16" and np.isinf(data.view(np.float16)).any():
            raise NumericsError(
                f"tensor {part.name!r} has values up to {np.abs(block_RC).max():g}, but f16 holds at most 65504",
                hint="use bf16, f32 or q8_0",
            )
        found.append(data)
    return found


def _row_chunks(part: TensorWrite, pool: Executor, ahead: int, *, heads: int) -> Iterator[Bytes]:
    """The stored bytes of a part in chunks of whole rows, [R, bytes of a row]."""
    _, columns = _matrix(part.shape)
    width = columns * DTYPES[part.dtype].itemsize
    step = max(1, CHUNK // columns) * width
    if heads:
        pieces: Iterable[Bytes] = [_interleaved(materialize(part), part.shape, heads)]
    else:
        pieces = [materialize(part)] if part.is_copy else blocks(part, pool, ahead=ahead)
    rest = np.empty(0, np.uint8)
    for piece in pieces:
        rest = np.concatenate([rest, piece]) if rest.size else piece
        whole = len(rest) // step * step
        yield from (rest[start : start + step].reshape(-1, width) for start in range(0, whole, step))
        rest = rest[whole:]
    if rest.size:
        yield rest.reshape(-1, width)


def _interleaved(raw: Bytes, shape: tuple[int, ...], heads: int) -> Bytes:
    """Reorders the rows of q or k: in checkpoints the two halves of a rotary pair are apart, in ggml side by side."""
    outputs = shape[0]
    halves = raw.reshape(heads, 2, outputs // heads // 2, -1)
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(-1)


def _part_shape(tensor: GgufTensor) -> tuple[int, ...]:
    """The shape of one part of the tensor: without the axis of stacked experts."""
    return tensor.shape[1:] if len(tensor.shape) == 3 else tensor.shape


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns; a vector is one row."""
    return math.prod(shape[:-1]), shape[-1]
