"""What an expert stores for backward. test_grouping checks the gradients."""

from collections.abc import Sequence

import pytest
import torch
from test_grouping import SIZES, adapted, make_mlp
from torch import nn

from frankenmoe.moe.experts import dispatch
from frankenmoe.moe.linear import to_int8
from oracles.moe_reference import FFN, HIDDEN, naive

TOKENS, EXPERTS, TOP_K = 24, 4, 2


def routing() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """hidden_TD and weights_TK, which want gradients, and ids_TK."""
    weights_TK, ids_TK = torch.rand(TOKENS, EXPERTS).topk(TOP_K, dim=1)
    return torch.randn(TOKENS, HIDDEN, requires_grad=True), weights_TK.requires_grad_(), ids_TK


def frozen(kind: str) -> nn.ModuleList:
    mlp = make_mlp()
    experts = [adapted(mlp, tuple(SIZES)) if kind == "adapters" else make_mlp() for _ in range(EXPERTS)]
    return nn.ModuleList(experts).requires_grad_(False)


def remembered(hidden_TD: torch.Tensor, weights_TK: torch.Tensor, ids_TK: torch.Tensor, experts: nn.ModuleList) -> int:
    """Numbers as wide as the FFN that a forward keeps for backward."""
    kept: dict[int, int] = {}
    weights = {parameter.untyped_storage().data_ptr() for parameter in experts.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        address = tensor.untyped_storage().data_ptr()
        if tensor.is_floating_point() and tensor.shape[1:] == (FFN,) and address not in weights:
            kept[address] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out_TD = dispatch(hidden_TD, weights_TK, ids_TK, experts)
    out_TD.sum().backward()
    return sum(kept.values())


def test_gate_and_up_of_every_token_are_all_that_is_remembered() -> None:
    assert remembered(*routing(), frozen("adapters")) == 2 * TOKENS * FFN


def gradients(mix: object, inputs: Sequence[torch.Tensor], experts: nn.ModuleList) -> list[torch.Tensor]:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out_TD = mix(*inputs, experts)  # type: ignore[operator]
    learning = [*inputs[:2], *(part for part in experts.parameters() if part.requires_grad)]
    return [out_TD.detach(), *torch.autograd.grad(out_TD.float().square().sum(), learning)]


@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("kind", ["adapters", "different"])
def test_autocast_computes_again_what_it_computed(kind: str, learns: bool) -> None:
    """Backward computes again in bfloat16. In float32 its gradients would belong to another forward."""
    torch.manual_seed(0)
    experts, inputs = frozen(kind), routing()
    for name, parameter in experts.named_parameters():
        parameter.requires_grad_(learns and name.endswith((".a", ".b", "down_proj.weight")))
    for ours, reference in zip(*(gradients(mix, inputs, experts) for mix in (dispatch, naive)), strict=True):
        torch.testing.assert_close(ours.float(), reference.float(), rtol=0.05, atol=0.03 * float(reference.abs().max()))


def test_int8_experts_under_autocast_and_adapters() -> None:
    """Their products stay float32, the adapters' updates do not."""
    torch.manual_seed(0)
    experts, (hidden_TD, weights_TK, ids_TK) = frozen("adapters"), routing()
    to_int8(experts)
    with torch.no_grad():
        wanted = dispatch(hidden_TD, weights_TK, ids_TK, experts)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = dispatch(hidden_TD, weights_TK, ids_TK, experts)
    torch.testing.assert_close(found, wanted, rtol=0.03, atol=0.03 * float(wanted.abs().max()))
