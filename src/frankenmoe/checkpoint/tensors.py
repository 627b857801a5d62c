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


@dataclass(frozen=True, slots=True)
class Mean:
    """The elementwise mean of all inputs; required as the first step if there are several."""


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


Step = Mean | LowRank | Noise | Scale | Constant


@dataclass(frozen=True, slots=True)
class TensorWrite:
    """A tensor to be written: `inputs` after `steps` in order, stored as `dtype`.

    Inputs may have another shape than the output, with as many elements. Raises ValueError for invalid combinations,
    such as two inputs without a Mean.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    inputs: tuple[TensorRef, ...]
    steps: tuple[Step, ...] = ()

    def __post_init__(self) -> None:
        first = self.steps[0] if self.steps else None
        if isinstance(first, Constant) == bool(self.inputs):
            raise ValueError(f"{self.name}: a write has either inputs or a Constant as its first step")
        if len(self.inputs) > 1 and not isinstance(first, Mean):
            raise ValueError(f"{self.name}: {len(self.inputs)} inputs need a Mean as their first step")
        if any(isinstance(step, Mean | Constant) for step in self.steps[1:]):
            raise ValueError(f"{self.name}: Mean and Constant can only be the first step")
        if any(ref.numel != self.numel for ref in self.inputs):
            raise ValueError(f"{self.name}: every input must have the {self.numel} elements of {list(self.shape)}")
        for step in self.steps:
            if isinstance(step, LowRank):
                self._check_lora(step)

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
        return len(self.inputs) == 1 and not self.steps and self.inputs[0].dtype == self.dtype

    @property
    def sources(self) -> tuple[TensorRef, ...]:
        """Every tensor this write reads: its inputs and the factors of its low-rank terms."""
        factors = (ref for step in self.steps if isinstance(step, LowRank) for ref in (step.a, step.b))
        return (*self.inputs, *factors)
