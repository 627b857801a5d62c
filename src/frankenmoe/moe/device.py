"""Where a model runs: names of devices, their free memory, and whether a model fits before it is loaded."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn

from frankenmoe import system
from frankenmoe.errors import PlanError
from frankenmoe.moe.processes import local_rank

AUTO = "auto"
CPU = torch.device("cpu")
Model = TypeVar("Model", bound=nn.Module)
KEPT_FREE = 0.05  # of a device's free memory, for activations and a block whose experts are being packed
OUT_OF_MEMORY = ("allocate memory", "MPS backend out of memory")  # what torch says of CPUs and of Apple's GPUs
UNITS = {"GiB": 2**30, "MiB": 2**20}


@dataclass(frozen=True)
class Weights:
    """What a model's weights take: their bytes as stored, and their type."""

    stored: int
    dtype: torch.dtype

    def bytes(self, dtype: torch.dtype | None = None, *, int8: bool = False) -> int:
        """Their bytes in another type. int8 rounds everything except the routers, which are small."""
        width = 1 if int8 else (dtype or self.dtype).itemsize
        return self.stored * width // self.dtype.itemsize


def resolve(device: str = AUTO) -> torch.device:
    """The device of a name such as cpu, cuda, cuda:1 or mps, or of AUTO: the accelerator if there is one, else the CPU.

    Each of torchrun's processes gets a GPU of its own for AUTO and for a name without a number. Raises PlanError for a
    device that torch does not have here; the message says which it has.
    """
    if device == AUTO:
        return _numbered(torch.device(next((kind for kind in _ACCELERATORS if _present(kind)), "cpu")))
    try:
        asked = torch.device(device)
    except (RuntimeError, TypeError):
        asked = None
    offered = ["cpu", *(each for kind in _ACCELERATORS for each in _present(kind))]
    known = {str(torch.device(each)) for each in offered} | {torch.device(each).type for each in offered}
    if asked is None or (asked.type if asked.type == "cpu" else str(asked)) not in known:
        raise PlanError(
            f"there is no device {device!r} for this torch ({torch.__version__}), which offers {', '.join(offered)}",
            hint="choose one of these with --device; a GPU needs a driver and a torch that was built for it",
        )
    return _numbered(asked)


def _numbered(device: torch.device) -> torch.device:
    """A device with its number: by default the process's own GPU, else the first one."""
    if device.type != "cuda" or device.index is not None:
        return torch.device(device.type) if device.type != "cuda" else device
    return torch.device("cuda", local_rank() % torch.cuda.device_count())


def _cuda() -> Iterator[str]:
    if torch.cuda.is_available():
        yield from (f"cuda:{index}" for index in range(torch.cuda.device_count()))


def _mps() -> Iterator[str]:
    if torch.backends.mps.is_available():
        yield "mps"


_ACCELERATORS: Mapping[str, Callable[[], Iterator[str]]] = {"cuda": _cuda, "mps": _mps}


def _present(kind: str) -> list[str]:
    return list(_ACCELERATORS[kind]())


def free_memory(device: torch.device | str = "cpu") -> int:
    """Free bytes on a device, with those that torch has reserved but does not use; of the CPU, without swapping."""
    place = torch.device(device)
    if place.type == "cuda":
        reserved = torch.cuda.memory_reserved(place) - torch.cuda.memory_allocated(place)
        return int(torch.cuda.mem_get_info(place)[0]) + reserved
    if place.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    return system.free_memory()


def usable(free: int) -> int:
    """The bytes of a device's free memory that weights may take."""
    return int(free * (1 - KEPT_FREE))


def check_room(weights: Weights, device: torch.device, *, dtype: torch.dtype | None = None, int8: bool = False) -> None:
    """Raises PlanError if a device has too little memory for these weights in `dtype`; the hint says what would fit.

    On the CPU, weights stay mapped from their files, so only converted ones take memory.
    """
    same = dtype in (None, weights.dtype) and not int8
    if device.type == "cpu" and same:
        return
    needed, free = weights.bytes(dtype, int8=int8), free_memory(device)
    if needed <= usable(free):
        return
    kind = "int8" if int8 else str(dtype or weights.dtype).removeprefix("torch.")
    raise PlanError(
        f"{device} has {amount(free)} of memory free, but the weights need {amount(needed)} as {kind}",
        hint="what fits: " + ", or ".join(_fitting(weights, device, needed, usable(free))),
    )


def _fitting(weights: Weights, device: torch.device, needed: int, room: int) -> Iterator[str]:
    """Options with which the weights fit; at least one, because the CPU need not copy them."""
    if weights.bytes(torch.bfloat16) < needed and weights.bytes(torch.bfloat16) <= room:
        yield f"--dtype bfloat16 ({amount(weights.bytes(torch.bfloat16))})"
    if weights.bytes(int8=True) < needed and weights.bytes(int8=True) <= room:
        yield f"--int8 of `chat` ({amount(weights.bytes(int8=True))})"
    others = [each for kind in _ACCELERATORS for each in _present(kind) if torch.device(each) != device]
    yield from (
        f"--device {each} ({amount(free)} free)" for each in others if needed <= usable(free := free_memory(each))
    )
    if device.type == "cpu":
        yield "no --dtype, which keeps weights mapped as they are stored"
    else:
        yield "--device cpu, which keeps weights mapped from their files"


def place(model: Model, device: torch.device) -> Model:
    """The same model, moved to a device. On the CPU nothing moves, so mapped weights stay mapped.

    Raises PlanError if its memory is full after all.
    """
    if device.type == "cpu":
        return model
    try:
        return model.to(device)
    except RuntimeError as error:  # of which torch.OutOfMemoryError is one
        if not ran_out(error):
            raise
        raise PlanError(
            f"the model does not fit into the memory of {device}, of which {amount(free_memory(device))} are free",
            hint="use --dtype bfloat16, or --device cpu, which keeps weights mapped from their files",
        ) from error


def in_float64(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor in float64, on its own device if that has the type; Apple's has not."""
    return where_float64_is(tensor).double()


def where_float64_is(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor on its own device, or on the CPU if its own has no float64, as Apple's."""
    return tensor.cpu() if tensor.device.type == "mps" else tensor


def ran_out(error: BaseException) -> bool:
    """Whether an error says that memory ran out; torch has a class for it on CUDA only."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY)


def amount(count: int) -> str:
    """A number of bytes such as 6.4 GiB or 12.0 MiB."""
    unit = "GiB" if count >= UNITS["GiB"] else "MiB"
    return f"{count / UNITS[unit]:.1f} {unit}"
