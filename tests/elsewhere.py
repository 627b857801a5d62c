"""A second device without a GPU: its tensors compute on the CPU, but refuse to meet the CPU's, as a GPU's do.

Values are the CPU's, so a stage must give the same results there. A tensor that was made without a device fails where
it meets the model's.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

import tiny

DEVICE = torch.device("mps")  # a type that this torch has no code for
KINDS = ("is_cpu", "is_cuda", "is_mps", "device")
COPIES = {torch.Tensor.copy_, torch.Tensor.__setitem__}  # may take tensors of both devices
AWAY = {torch.Tensor.numpy, torch.Tensor.__array__}
# where a stage runs and in which type: float32, which both devices compute alike
HERE = {"device": "cpu", "dtype": "float32"}
THERE = {"device": "auto", "dtype": "float32"}
TEXTS = {"e0": "ABCDEFGH ", "e1": "123456789+="}


class Elsewhere(torch.Tensor):
    """A tensor on DEVICE; `inner` holds its values."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> "Elsewhere":
        made: Elsewhere = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=DEVICE
        )
        made.inner = inner
        return made

    def __init__(self, inner: torch.Tensor) -> None:
        pass

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} reached a tensor on {DEVICE} outside of second_device()")


class _Mode(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.Tensor.to, torch.Tensor.cpu):
            return _moved(func, args, kwargs)
        if getattr(func, "__name__", "") == "__get__" and getattr(func.__self__, "__name__", "") in KINDS:
            return func(*args)
        if func is torch._has_compatible_shallow_copy_type:
            return False  # a module gets new parameters
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
        there = [each for each in given if isinstance(each, Elsewhere)]
        strangers = [each for each in given if not isinstance(each, Elsewhere) and each.dim()]
        # indices may be on the CPU, what they index may not
        indexed = func is torch.Tensor.__getitem__ and isinstance(args[0], Elsewhere)
        if there and (func in AWAY or (strangers and not indexed and func not in COPIES)):
            raise RuntimeError(f"{func} met tensors on {DEVICE} and on cpu, of shapes {[each.shape for each in given]}")
        wrap = bool(there)
        if kwargs.get("device") is not None:
            wrap = torch.device(kwargs["device"]).type == DEVICE.type
            kwargs["device"] = "cpu" if wrap else kwargs["device"]
        known = {id(each.inner): each for each in there}
        out = func(*tree_map(_inner, args), **tree_map(_inner, kwargs))
        return tree_map(lambda each: known[id(each)] if id(each) in known else _wrapped(each), out) if wrap else out


def _inner(value: Any) -> Any:
    return value.inner if isinstance(value, Elsewhere) else value


def _wrapped(value: Any) -> Any:
    return Elsewhere(value) if isinstance(value, torch.Tensor) and not isinstance(value, Elsewhere) else value


def _moved(func: Any, args: Any, kwargs: dict[str, Any]) -> torch.Tensor:
    """tensor.to(...) or tensor.cpu(): the values change their type first, then the device."""
    tensor, *rest = args
    target = torch.device("cpu") if func is torch.Tensor.cpu else None
    others = []
    for each in [*rest, kwargs.get("device"), kwargs.get("dtype")]:
        if isinstance(each, str | torch.device):
            target = torch.device(each)
        elif isinstance(each, torch.Tensor):
            target, others = each.device, [*others, each.dtype]
        elif isinstance(each, torch.dtype):  # not whether to copy or to wait
            others.append(each)
    here = _inner(tensor)
    inner = here.to(*others) if others else here
    if (target or tensor.device).type == tensor.device.type:
        return tensor if inner is here else _wrapped(inner) if isinstance(tensor, Elsewhere) else inner
    moved = inner.clone() if inner is here else inner  # the memory of another device is another
    return moved if isinstance(tensor, Elsewhere) else Elsewhere(moved)


@contextmanager
def second_device(patch: pytest.MonkeyPatch, *, free: int = 10**12) -> Iterator[torch.device]:
    """Within the context torch has DEVICE, with so many free bytes."""
    patch.setattr(torch.backends.mps, "is_available", lambda: True)
    patch.setattr(torch.mps, "recommended_max_memory", lambda: free)
    patch.setattr(torch.mps, "current_allocated_memory", lambda: 0)
    # transformers would wait for a real one
    patch.setattr("transformers.generation.utils.DeferredStopCheck.is_supported", lambda *_, **__: False)
    with _Mode():
        yield DEVICE


def recipe_with_texts(folder: Path, parents: Sequence[Path], **keys: Any) -> Path:
    """A recipe, in `folder`, of a base and two experts that have a text each; its routers are random."""
    base, *others = parents
    experts = []
    for (name, letters), parent in zip(TEXTS.items(), others, strict=True):
        (folder / f"{name}.txt").write_text("".join(letters[at * at % 31 % len(letters)] for at in range(300)))
        experts.append({"source_model": str(parent), "name": name, "data": f"{name}.txt"})
    return tiny.write_recipe(folder / "r.yml", base, [], experts=experts, gate_mode="random", **keys)
