"""The types of tensors: on disk (TensorRef) and to be written (TensorWrite)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class DType:
    """Bytes per element and the name torch gives the type."""

    itemsize: int
    name: str


DTYPES: Mapping[str, DType] = {
    "F64": DType(8, "float64"),
    "F32": DType(4, "float32"),
    "F16": DType(2, "float16"),
    "BF16": DType(2, "bfloat16"),
    "I64": DType(8, "int64"),
    "I32": DType(4, "int32"),
    "I16": DType(2, "int16"),
    "I8": DType(1, "int8"),
    "U64": DType(8, "uint64"),
    "U32": DType(4, "uint32"),
    "U16": DType(2, "uint16"),
    "U8": DType(1, "uint8"),
    "BOOL": DType(1, "bool"),
    "F8_E4M3": DType(1, "float8_e4m3fn"),
    "F8_E5M2": DType(1, "float8_e5m2"),
}

FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
"""The types that can be computed with and cast into one another."""

_SMALLEST_SUM = 1e-8  # of the weights of an average; mergekit's limit for sums that it divides by

_ALIASES: Mapping[str, str] = (
    {dtype.name: key for key, dtype in DTYPES.items()}
    | {key.lower(): key for key in DTYPES}
    | {"fp64": "F64", "fp32": "F32", "fp16": "F16"}
)


def safetensors_dtype(name: str) -> str:
    """The safetensors name of a type: `bfloat16`, `bf16` and `BF16` all give `BF16`.

    Raises ValueError with the choices for an unknown name.
    """
    try:
        return _ALIASES[name.lower()]
    except KeyError:
        choices = ", ".join(dtype.name for dtype in DTYPES.values())
        raise ValueError(f"unknown dtype {name!r}, expected one of {choices}") from None


@dataclass(frozen=True, slots=True)
class TensorRef:
    """A tensor on disk: the bytes `start` to `end` (exclusive) of `file`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


MERGES: Mapping[str, bool] = {
    "average": False,
    "task_arithmetic": True,
    "ties": True,
    "dare_linear": True,
    "dare_ties": True,
    "slerp": False,
}
"""Method -> whether its first input is the base, which the parents are compared with."""


@dataclass(frozen=True, slots=True)
class Merge:
    """Merge all inputs elementwise; required as the first step if there are several. See `checkpoint.merging`.

    `weights` has one number per parent; the base has none. `scale` (lambda) multiplies the merged difference from the
    base. `density` is the share of each difference that is kept (ties, dare). `t` is the place between the two parents
    of slerp: 0 is the first, 1 the second. `seed` (0 to 2**64 - 1) is dare's; every tensor needs its own.
    Methods ignore the settings that are not theirs. Slerp ignores its two weights.
    Raises ValueError for an unknown method and for settings out of range.
    """

    method: str
    weights: tuple[float, ...]
    scale: float = 1.0
    density: float = 1.0
    t: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in MERGES:
            raise ValueError(f"unknown merge method {self.method!r}, expected one of {', '.join(MERGES)}")
        if not self.weights or not all(map(math.isfinite, self.weights)):
            raise ValueError(f"{self.method}: weights are {self.weights}, expected one finite number per parent")
        if self.method == "average" and abs(sum(self.weights)) < _SMALLEST_SUM:
            raise ValueError(f"average: weights add up to {sum(self.weights):g}, expected another sum than zero")
        if self.method == "slerp" and len(self.weights) != 2:
            raise ValueError(f"slerp: {len(self.weights)} parents, expected 2")
        if not math.isfinite(self.scale):
            raise ValueError(f"{self.method}: scale is {self.scale}, expected a finite number")
        if not 0 < self.density <= 1:
            raise ValueError(f"{self.method}: density is {self.density}, expected more than 0 and at most 1")
        if not 0 <= self.t <= 1:
            raise ValueError(f"{self.method}: t is {self.t}, expected 0 to 1")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"{self.method}: seed is {self.seed}, expected 0 to 2**64 - 1")

    @property
    def count(self) -> int:
        """The number of inputs: the parents, and the base if the method needs one."""
        return len(self.weights) + MERGES[self.method]


@dataclass(frozen=True, slots=True)
class LowRank:
    """Add the low-rank term `scale * b @ a`, where `a` is [rank, in] and `b` is [out, rank]."""

    a: TensorRef
    b: TensorRef
    scale: float


@dataclass(frozen=True, slots=True)
class Noise:
    """Add normal noise of standard deviation `std`.

    With `relative`, `std` is multiplied by the tensor's population standard deviation before this step.
    The same `seed` (0 to 2**64 - 1) gives the same numbers for every tensor, so every tensor needs its own.
    """

    std: float
    relative: bool
    seed: int


@dataclass(frozen=True, slots=True)
class Scale:
    """Multiply by `factor`."""

    factor: float


@dataclass(frozen=True, slots=True)
class Constant:
    """Every element is `value`; the first step of a tensor without inputs."""

    value: float


@dataclass(frozen=True, slots=True)
class Shift:
    """Add `amount`."""

    amount: float


@dataclass(frozen=True, slots=True)
class Exp:
    """Replace every number x by e**x."""


@dataclass(frozen=True, slots=True)
class Join:
    """Stack the inputs along the first axis; only as the first step."""


@dataclass(frozen=True, slots=True)
class Part:
    """The elements of the only input from `start` on, in row-major order; only as the first step."""

    start: int


@dataclass(frozen=True, slots=True)
class Permute:
    """Reorder rows in groups of `len(order)`: row i of a group becomes row order[i]; only as the first step."""

    order: tuple[int, ...]

    def __post_init__(self) -> None:
        if sorted(self.order) != list(range(len(self.order))):
            raise ValueError(f"{self.order} is not an order of {len(self.order)} rows")

    @property
    def inverse(self) -> "Permute":
        """The order that undoes this one."""
        return Permute(tuple(self.order.index(row) for row in range(len(self.order))))


@dataclass(frozen=True, slots=True)
class Turn:
    """Stack the inputs, matrices with equal columns, along their rows and exchange rows and columns; a first step."""


Step = Merge | LowRank | Noise | Scale | Shift | Exp | Constant | Join | Part | Permute | Turn
FIRST = (Merge, Constant, Join, Part, Permute, Turn)
"""The steps that can only be the first one."""


@dataclass(frozen=True, slots=True)
class TensorWrite:
    """A tensor to be written: `inputs` after `steps` in order, stored as `dtype`.

    Inputs may have another shape than the output, with as many elements. An input may itself be a write, such as a
    parent with an adapter: its numbers are computed block by block and not rounded to its own `dtype`.
    Raises ValueError for invalid combinations, such as two inputs without a Merge.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    inputs: tuple["TensorRef | TensorWrite", ...]
    steps: tuple[Step, ...] = ()

    def __post_init__(self) -> None:
        first = self.steps[0] if self.steps else None
        if isinstance(first, Constant) == bool(self.inputs):
            raise ValueError(f"{self.name}: a write has either inputs or a Constant as its first step")
        if len(self.inputs) > 1 and not isinstance(first, Merge | Join | Turn):
            raise ValueError(f"{self.name}: {len(self.inputs)} inputs need a Merge, Join or Turn as their first step")
        if isinstance(first, Merge) and len(self.inputs) != first.count:
            parents = f"{len(first.weights)} parents{' and the base' if MERGES[first.method] else ''}"
            raise ValueError(f"{self.name}: {first.method} of {parents} with {len(self.inputs)} inputs")
        if any(isinstance(step, FIRST) for step in self.steps[1:]):
            raise ValueError(f"{self.name}: Merge, Constant, Join, Part, Permute and Turn can only be the first step")
        self._check_sizes(first)
        for step in self.steps:
            if isinstance(step, LowRank):
                self._check_lora(step)

    def _check_sizes(self, first: "Step | None") -> None:
        sizes = [each.numel for each in self.inputs]
        match first:
            case Join():
                fits = sum(sizes) == self.numel
            case Part(start):
                fits = 0 <= start <= sizes[0] - self.numel
            case Permute(order):
                fits = sizes == [self.numel] and self.shape[0] % len(order) == 0
            case Turn():
                shapes = [each.shape for each in self.inputs]
                whole = all(len(shape) == 2 and shape[1] == self.shape[0] for shape in shapes)
                fits = whole and self.shape[1:] == (sum(shape[0] for shape in shapes),)
            case _:
                fits = all(size == self.numel for size in sizes)
        if not fits:
            raise ValueError(
                f"{self.name}: inputs of {sizes} elements, expected {self.numel} elements for {list(self.shape)}"
            )

    def _check_lora(self, step: LowRank) -> None:
        ranks = (step.a.shape[:1], step.b.shape[1:])
        if len(ranks[0]) != 1 or ranks[0] != ranks[1] or self.shape != step.b.shape[:1] + step.a.shape[1:]:
            found = f"{list(step.b.shape)} @ {list(step.a.shape)}"
            raise ValueError(f"{self.name}: the low-rank term {found} does not give {list(self.shape)}")

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * DTYPES[self.dtype].itemsize

    @property
    def is_copy(self) -> bool:
        """Whether the output has the bytes of its only input."""
        return self.copied is not None

    @property
    def copied(self) -> TensorRef | None:
        """The tensor whose bytes the output has; None if they are computed."""
        if len(self.inputs) != 1 or self.steps:
            return None
        (only,) = self.inputs
        return only if isinstance(only, TensorRef) and only.dtype == self.dtype else None

    @property
    def joined(self) -> tuple[TensorRef, ...]:
        """The tensors whose bytes follow one another in the output; empty if it is not such a join."""
        if self.steps != (Join(),):
            return ()
        refs = [each.copied if isinstance(each, TensorWrite) else each for each in self.inputs]
        found = tuple(ref for ref in refs if ref is not None and ref.dtype == self.dtype)
        return found if len(found) == len(refs) else ()

    @property
    def turned(self) -> tuple[TensorRef, ...]:
        """The matrices whose bytes the output has, with rows and columns exchanged; empty if it has other ones."""
        if self.steps != (Turn(),) or self.dtype not in FLOATS:
            return ()
        found = tuple(each for each in self.inputs if isinstance(each, TensorRef) and each.dtype == self.dtype)
        return found if len(found) == len(self.inputs) else ()

    @property
    def chained(self) -> tuple["TensorWrite", ...]:
        """The turned matrices whose bytes follow one another in the output; empty if it is not such a join."""
        parts = tuple(each for each in self.inputs if isinstance(each, TensorWrite) and each.turned)
        same = len(parts) == len(self.inputs) and all(part.dtype == self.dtype for part in parts)
        return parts if self.steps == (Join(),) and same else ()

    @property
    def sources(self) -> tuple[TensorRef, ...]:
        """Every tensor this write reads, at any depth: its inputs and the factors of its low-rank terms."""
        inputs = (each.sources if isinstance(each, TensorWrite) else (each,) for each in self.inputs)
        own = (ref for step in self.steps if isinstance(step, LowRank) for ref in (step.a, step.b))
        return (*(ref for refs in inputs for ref in refs), *own)

    @property
    def factors(self) -> tuple[TensorRef, ...]:
        """The factors of its low-rank terms, at any depth."""
        inner = (ref for each in self.inputs if isinstance(each, TensorWrite) for ref in each.factors)
        return (*inner, *(ref for step in self.steps if isinstance(step, LowRank) for ref in (step.a, step.b)))
