"""Adds LoRA adapters to linear layers and MLPs without merging them."""

import copy
from collections.abc import Mapping

import torch
from torch import nn

from frankenmoe.errors import ArtifactError
from frankenmoe.moe.linear import linear, torch_is_fast

# R rank, I inputs, O outputs

Lora = tuple[torch.Tensor, torch.Tensor, float]  # A_RI, B_OR, scale (alpha / R, or alpha / sqrt(R) with rsLoRA)


class LoraLinear(nn.Module):
    """base(x) + scale * B A x (arXiv 2106.09685, eq. 3), kept low-rank. Base, A and B are not copied.

    Computes in the adapter's dtype and returns the base's dtype, as PEFT does.
    Raises ArtifactError if the shapes do not fit.
    """

    def __init__(self, base: nn.Linear, a_RI: torch.Tensor, b_OR: torch.Tensor, scale: float) -> None:
        super().__init__()
        expected_a, expected_b = (a_RI.shape[0], base.in_features), (base.out_features, a_RI.shape[0])
        if a_RI.shape != expected_a or b_OR.shape != expected_b:
            raise ArtifactError(
                f"an adapter on a {base.in_features} -> {base.out_features} layer must have A {expected_a} and B "
                f"{expected_b}, found A {tuple(a_RI.shape)} and B {tuple(b_OR.shape)}",
                hint="the adapter was trained on another model",
            )
        self.base = base
        self.a = nn.Parameter(a_RI)
        self.b = nn.Parameter(b_OR)
        self.scale = scale

    def fits(self) -> bool:
        """Whether A and B still fit each other and the base. Compiled code asks before it reads their memory."""
        (outputs, inputs), rank = self.base.weight.shape, self.a.shape[0]
        return self.a.shape == (rank, inputs) and self.b.shape == (outputs, rank)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., I] to [..., O]."""
        return with_update(self.base(hidden), self, hidden)

    def update(self, hidden: torch.Tensor) -> torch.Tensor:
        """scale * B A x, [..., I] to [..., O], in the adapter's dtype, or in float32 where that is faster."""
        if _widens(self, hidden):
            # autocast would round these to 16 bits again, for a slower product
            with torch.autocast(hidden.device.type, enabled=False):
                a_RI, b_OR = self.a.float(), self.b.float()
                return nn.functional.linear(self.scale * nn.functional.linear(hidden.float(), a_RI), b_OR)
        return linear(self.scale * linear(hidden.to(self.a.dtype), self.a), self.b)

    def extra_repr(self) -> str:
        return f"rank={self.a.shape[0]}, scale={self.scale}"


def wrap_linear(model: nn.Module, name: str, a_RI: torch.Tensor, b_OR: torch.Tensor, scale: float) -> LoraLinear:
    """Wraps the linear layer `name` of `model` in a LoraLinear, in place. Returns the LoraLinear."""
    owner, _, leaf = name.rpartition(".")
    wrapped = LoraLinear(_linear(model, name), a_RI, b_OR, scale)
    setattr(model.get_submodule(owner), leaf, wrapped)
    return wrapped


def with_update(
    base: torch.Tensor, lora: LoraLinear | None, hidden: torch.Tensor, *, in_place: bool = False
) -> torch.Tensor:
    """`base`, the base layer's output [..., O] for `hidden`, plus the adapter's update, in the dtype of `base`.

    Returns `base` itself if `lora` is None. `in_place`: `base` may be overwritten.
    """
    if lora is None:
        return base
    if base.dim() == 2 and base.dtype == hidden.dtype == lora.a.dtype and not _widens(lora, hidden):
        # one pass over [T, O] instead of three
        # autocast does not cast where `out` is given
        in_place = in_place and not torch.is_autocast_enabled(hidden.device.type)
        return torch.addmm(
            base, nn.functional.linear(hidden, lora.a), lora.b.T, alpha=lora.scale, out=base if in_place else None
        )
    return (base + lora.update(hidden)).to(base.dtype)


def _widens(lora: LoraLinear, hidden: torch.Tensor) -> bool:
    """Whether float32 is faster: torch on a CPU is slow at 16-bit products, and at all small products of one token."""
    if hidden.device.type != "cpu" or (lora.a.dtype.itemsize > 2 and hidden.dtype.itemsize > 2):
        return False
    return hidden.shape[:-1].numel() == 1 or not torch_is_fast(hidden.shape, torch.bfloat16)


def with_adapter(mlp: nn.Module, loras: Mapping[str, Lora]) -> nn.Module:
    """A second expert that shares every parameter of `mlp` and wraps some of its `nn.Linear` in a LoraLinear.

    `loras` maps a submodule's name ("up_proj") to (A_RI, B_OR, scale). `mlp` does not change.
    Raises ArtifactError if a name is not a linear layer of `mlp`, or if the shapes do not fit.
    """
    expert = _twin(mlp)
    for name, (a_RI, b_OR, scale) in loras.items():
        base = _linear(mlp, name)
        *parents, leaf = name.split(".")
        owner = expert
        for parent in parents:
            setattr(owner, parent, _twin(owner.get_submodule(parent)))
            owner = owner.get_submodule(parent)
        setattr(owner, leaf, LoraLinear(base, a_RI, b_OR, scale))
    return expert


def _twin(module: nn.Module) -> nn.Module:
    """A module with the same class, parameters and children. Its children can be replaced independently."""
    twin = copy.copy(module)
    # copy.copy shares torch's registries (parameters, children, hooks), so a child set on one would appear on the other
    vars(twin).update({name: copy.copy(value) for name, value in vars(module).items() if isinstance(value, dict)})
    return twin


def _linear(mlp: nn.Module, name: str) -> nn.Linear:
    linears = {name: module for name, module in mlp.named_modules() if isinstance(module, nn.Linear)}
    if name not in linears:
        raise ArtifactError(
            f"an adapter must be on a linear layer of its expert's {type(mlp).__name__} "
            f"({', '.join(linears)}), found one on {name!r}",
            hint="keep only the adapter's MLP layers; the others belong to the backbone",
        )
    return linears[name]
