"""Linear layers with 16-bit or int8 weights on a CPU, which are widened to float32 as they are read.

On a CPU without 16-bit instructions, torch multiplies 16-bit matrices several times slower than float32 ones. The
products here read the weights as they are stored and sum in float32. Results equal torch's up to rounding.
"""

from functools import cache
from types import ModuleType
from typing import Any, TypeGuard

import torch
from torch import nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd.function import once_differentiable

from frankenmoe.progress import SILENT, Progress

# T tokens, I inputs, O outputs

KINDS = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.int8: "int8"}  # of weights
LOW_KINDS = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}  # of adapters
# CPU features for products in a type, under the names of torch.cpu.get_capabilities()
INSTRUCTIONS = {torch.bfloat16: ("avx512_bf16", "amx_bf16", "bf16"), torch.float16: ("amx_fp16", "avx512_fp16", "fp16")}
FEW = 4  # with fewer tokens, memory bandwidth is the limit and instructions do not help
SMALL = 1 << 16  # fewer multiplications take less time than the choice of a method
SHORT = 64  # with fewer inputs, it is faster to widen the matrix first
CHUNK = 1 << 18  # numbers that are widened at a time, so that they stay in the cache


class StoredLinear(nn.Linear):
    """An nn.Linear that computes with `linear`."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return linear(hidden, self.weight, self.bias)


class Int8Linear(nn.Module):
    """A linear layer with an int8 weight and one float32 scale per output. It has no trainable parameters."""

    int8: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor | None

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        weight_OI, scale_O = quantized(layer.weight.detach())
        self.register_buffer("int8", weight_OI)  # as "weight", an nn.Linear would load it without its scale
        self.register_buffer("scale", scale_O)
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach())
        self.out_features, self.in_features = weight_OI.shape

    @property
    def weight(self) -> torch.Tensor:
        """Read-only, so that tie_weights() cannot replace it."""
        return self.int8

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., I] to [..., O] in the dtype of `hidden`."""
        return _product(hidden, self.weight, self.scale, self.bias)

    def _apply(self, fn: Any, recurse: bool = True) -> "Int8Linear":
        """Moves the scale without rounding it: half() and to(dtype) skip integers, so it is viewed as integers."""
        self.scale = self.scale.view(torch.int32)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.scale = self.scale.view(torch.float32)
        return self

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


Linear = nn.Linear | Int8Linear


def is_linear(module: object) -> TypeGuard[Linear]:
    """Whether a module is exactly an nn.Linear, StoredLinear or Int8Linear. Other subclasses may compute more."""
    return type(module) in (nn.Linear, StoredLinear, Int8Linear)


def keep_stored(module: nn.Module) -> nn.Module:
    """Makes every nn.Linear in `module` (or `module` itself) compute with `linear`. Returns the same module."""
    for part in module.modules():
        if type(part) is nn.Linear:
            part.__class__ = StoredLinear  # keeps the object, with its hooks, tied weights and references
    return module


def to_int8(model: nn.Module, progress: Progress = SILENT) -> None:
    """Replaces every linear layer with more than one output by an Int8Linear. Shared layers stay shared."""
    places = [
        (module, name, layer)
        for module in model.modules()
        for name, layer in module.named_children()
        if is_linear(layer) and isinstance(layer, nn.Linear) and layer.out_features > 1
    ]
    progress.start("rounding to int8", sum(layer.weight.nbytes for layer in {layer for _, _, layer in places}), "B")
    made: dict[nn.Module, Int8Linear] = {}
    for module, name, layer in places:
        if layer not in made:
            made[layer] = Int8Linear(layer)
            progress.advance(layer.weight.nbytes)
        setattr(module, name, made[layer])


def quantized(weight_OI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(int8 weight [O, I], float32 scale [O]). A row's largest number becomes 127; others go to the nearest step."""
    int8_OI = torch.empty_like(weight_OI, dtype=torch.int8)
    scale_O = weight_OI.new_empty(len(weight_OI), dtype=torch.float32)
    for rows in _chunks(weight_OI):
        wide = weight_OI[rows].float()
        scale_O[rows] = wide.abs().amax(dim=1) / 127
        step = scale_O[rows, None].clamp_min(torch.finfo(torch.float32).tiny)  # a row of zeros stays zeros
        int8_OI[rows] = (wide / step).round_().to(torch.int8)
    return int8_OI, scale_O


def linear(hidden: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None = None) -> torch.Tensor:
    """`torch.nn.functional.linear`, [..., I] to [..., O], but faster for a frozen 16-bit weight on a CPU."""
    if not _is_ours(hidden, weight_OI, bias_O):
        return nn.functional.linear(hidden, weight_OI, bias_O)
    return _product(hidden, weight_OI, None, bias_O)


def _is_ours(hidden: torch.Tensor, weight_OI: torch.Tensor, bias_O: torch.Tensor | None) -> bool:
    if hidden.numel() * weight_OI.shape[0] < SMALL or weight_OI.dtype not in INSTRUCTIONS:
        return False
    if hidden.shape[-1:] != weight_OI.shape[1:] or not have_addresses(hidden, weight_OI):
        return False
    if torch.is_autocast_enabled("cpu"):
        if torch.get_autocast_dtype("cpu") != weight_OI.dtype or hidden.dtype not in (weight_OI.dtype, torch.float32):
            return False
    elif hidden.dtype != weight_OI.dtype:
        return False
    if torch.is_grad_enabled() and (weight_OI.requires_grad or (bias_O is not None and bias_O.requires_grad)):
        return False
    return not torch_is_fast(hidden.shape, weight_OI.dtype)


def have_addresses(*tensors: torch.Tensor | None) -> bool:
    """Whether compiled code may read these tensors' memory now: none is sharded, traced or a wrapper."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state():
        return False
    if torch._C._len_torch_dispatch_stack():  # a mode may count operations or make tensors without data
        return False
    return all(
        tensor.is_cpu and type(tensor) in (torch.Tensor, nn.Parameter) and not is_functorch_wrapped_tensor(tensor)
        for tensor in tensors
        if tensor is not None
    )


def torch_is_fast(shape: torch.Size, dtype: torch.dtype) -> bool:
    """Whether torch is fast on this CPU at products in `dtype` with hidden states of `shape` [..., I]."""
    if dtype not in INSTRUCTIONS:
        return True
    if shape[:-1].numel() < FEW:
        return kernels() is None
    return _has_instructions(dtype)


def _product(
    hidden: torch.Tensor, weight_OI: torch.Tensor, scale_O: torch.Tensor | None, bias_O: torch.Tensor | None
) -> torch.Tensor:
    """hidden @ (scale * weight).T + bias, [..., I] to [..., O], in the weight's dtype (int8: the input's)."""
    if torch.is_grad_enabled() and hidden.requires_grad:
        found: torch.Tensor = _Product.apply(hidden, weight_OI, scale_O, bias_O)  # type: ignore[no-untyped-call]
        return found
    wide_TI = hidden.reshape(-1, hidden.shape[-1]).to(torch.float32).contiguous()
    out_TO = _sums(wide_TI, weight_OI, scale_O)
    if bias_O is not None:
        out_TO += bias_O
    return out_TO.to(weight_OI.dtype if scale_O is None else hidden.dtype).view(*hidden.shape[:-1], len(weight_OI))


class _Product(torch.autograd.Function):
    """`_product` with a gradient for `hidden`. Keeps only the weights for backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight_OI: torch.Tensor,
        scale_O: torch.Tensor | None,
        bias_O: torch.Tensor | None,
    ) -> torch.Tensor:
        ctx.stored = weight_OI, scale_O, hidden.dtype
        return _product(hidden.detach(), weight_OI, scale_O, bias_O)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        weight_OI, scale_O, dtype = ctx.stored
        wide_TO = grad.reshape(-1, grad.shape[-1]).to(torch.float32)
        if scale_O is not None:
            wide_TO = wide_TO * scale_O
        out_TI = wide_TO.new_zeros(len(wide_TO), weight_OI.shape[1])
        for rows, chunk in _widened(weight_OI):
            out_TI.addmm_(wide_TO[:, rows], chunk)
        return out_TI.to(dtype).view(*grad.shape[:-1], weight_OI.shape[1]), None, None, None


def _sums(wide_TI: torch.Tensor, weight_OI: torch.Tensor, scale_O: torch.Tensor | None) -> torch.Tensor:
    """wide_TI @ (scale * weight).T in float32."""
    out_TO = wide_TI.new_empty(len(wide_TI), len(weight_OI))
    compiled = kernels() if _readable(wide_TI, weight_OI, scale_O) else None
    if compiled is not None:
        compiled.product(
            KINDS[weight_OI.dtype],
            weight_OI.data_ptr(),
            0 if scale_O is None else scale_O.data_ptr(),
            wide_TI.data_ptr(),
            out_TO.data_ptr(),
            sizes=(len(wide_TI), *weight_OI.shape),
            threads=torch.get_num_threads(),
        )
        return out_TO
    for rows, chunk in _widened(weight_OI):
        out_TO[:, rows].addmm_(wide_TI, chunk.T, beta=0)  # in place, so that autocast does not round it to 16 bits
    return out_TO if scale_O is None else out_TO.mul_(scale_O)


def _readable(wide_TI: torch.Tensor, weight_OI: torch.Tensor, scale_O: torch.Tensor | None) -> bool:
    """Whether the kernels can compute this product, and are faster."""
    return (
        len(wide_TI) > 0
        and SHORT <= wide_TI.shape[1] == weight_OI.shape[1]
        and weight_OI.is_contiguous()
        and (scale_O is None or is_row(scale_O, weight_OI))
        and have_addresses(wide_TI, weight_OI, scale_O)
    )


def is_row(scale_O: torch.Tensor, weight_OI: torch.Tensor) -> bool:
    """Whether `scale_O` is contiguous and holds one float32 number per output."""
    return scale_O.shape == weight_OI.shape[:1] and scale_O.dtype == torch.float32 and scale_O.is_contiguous()


def _widened(weight_OI: torch.Tensor) -> Any:
    """Yields (rows, the same rows in float32) from first to last. All use one buffer."""
    buffer: torch.Tensor | None = None
    for rows in _chunks(weight_OI):
        part = weight_OI[rows]
        if buffer is None:  # allocating memory is slow
            buffer = torch.empty_like(part, dtype=torch.float32)
        yield rows, buffer[: len(part)].copy_(part)


def _chunks(weight_OI: torch.Tensor) -> Any:
    outputs, inputs = weight_OI.shape
    step = max(1, CHUNK // max(1, inputs))
    return (slice(begin, min(begin + step, outputs)) for begin in range(0, outputs, step))


def prepare_kernels(model: nn.Module, progress: Progress = SILENT) -> bool:
    """Compiles the kernels that a model needs on this CPU, once per machine. False if it needs them without numba."""
    weights = (part.weight for part in model.modules() if is_linear(part))
    kinds = {KINDS[each.dtype] for each in weights if each.dtype in KINDS and each.is_cpu and each.numel() >= SMALL}
    compiled = kernels() if kinds else None  # a model without such weights need not wait for them
    if compiled is None:
        return not kinds
    progress.start("compiling CPU kernels", len(kinds) + 2, "kernels")
    for compile_one in compiled.compilers(sorted(kinds)):
        compile_one()
        progress.advance(1)
    return True


@cache
def kernels() -> ModuleType | None:
    """The compiled kernels. None if numba (the extra `cpu`) or OpenMP cannot be used; torch computes then."""
    try:
        from frankenmoe.moe.cpu import compiled
    except ImportError:
        return None
    return compiled


@cache
def _has_instructions(dtype: torch.dtype) -> bool:
    """Whether this CPU has instructions for products in a 16-bit type."""
    found = torch.cpu.get_capabilities()
    return any(found.get(name, False) for name in INSTRUCTIONS[dtype])
