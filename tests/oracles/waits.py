"""Notices where a GPU would make the host wait, without a GPU; shares no code with frankenmoe."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

LOOKS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
MASKS = (torch.bool, torch.uint8)


class WaitsError(Exception):
    """An operation that needs a number from the device, or brings one to it from the host."""


class NoWaits(TorchDispatchMode):
    """Raises WaitsError at what reads a value or a shape from the data (item, nonzero, unique, masks) or copies from
    the host (torch.tensor), which no CUDA graph can hold either."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        waits = bool(LOOKS & set(func.tags)) or func is torch.ops.aten.lift_fresh.default
        if func in (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default, torch.ops.aten.index_put.default):
            # by positions it has a shape that is known
            waits = any(index is not None and index.dtype in MASKS for index in args[1])
        if waits:
            raise WaitsError(str(func))
        return func(*args, **(kwargs or {}))
