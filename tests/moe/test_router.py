"""Routing against the formulas by hand."""

import pytest
import torch

from frankenmoe.errors import ArtifactError
from frankenmoe.families.spec import RouterRule
from frankenmoe.moe.router import Router
from oracles.moe_reference import choices

LOGITS_TE = torch.tensor([[1.0, 3.0, 2.0], [0.5, -1.0, 0.0]])


def identity_router(**options: object) -> Router:
    """Its logits are its input."""
    return Router(torch.eye(3), **options)


def test_unnormalized_weights_are_the_softmax_over_all_experts() -> None:
    weights_TK, ids_TK, logits_TE = identity_router(top_k=2, renormalize=False)(LOGITS_TE)
    exp_TE = LOGITS_TE.exp()
    probs_TE = exp_TE / exp_TE.sum(dim=1, keepdim=True)
    assert ids_TK.tolist() == choices(LOGITS_TE.tolist(), 2)
    torch.testing.assert_close(weights_TK, probs_TE.gather(1, ids_TK))
    assert torch.equal(logits_TE, LOGITS_TE)


def test_renormalized_weights_are_the_softmax_over_the_chosen() -> None:
    weights_TK, ids_TK, _ = identity_router(top_k=2, renormalize=True)(LOGITS_TE)
    torch.testing.assert_close(weights_TK, LOGITS_TE.gather(1, ids_TK).softmax(dim=1))


@pytest.mark.parametrize(("round_weights", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_bf16_softmax_is_computed_in_float32(round_weights: bool, dtype: torch.dtype) -> None:
    gate_ED, hidden_TD = torch.randn(5, 8).bfloat16(), torch.randn(7, 8).bfloat16()
    routing = Router(gate_ED, top_k=2, renormalize=False, rule=RouterRule(rounds_weights=round_weights))(hidden_TD)
    expected_TE = routing.logits_TE.double().softmax(dim=1).float()
    assert routing.logits_TE.dtype == torch.bfloat16
    assert routing.weights_TK.dtype == dtype
    torch.testing.assert_close(routing.weights_TK, expected_TE.gather(1, routing.ids_TK).to(dtype))


def test_takes_the_gate_without_a_copy_and_names_it_weight() -> None:
    gate_ED = torch.randn(4, 8)
    router = Router(gate_ED, top_k=1, renormalize=True)
    assert router.weight.data_ptr() == gate_ED.data_ptr()
    assert list(router.state_dict()) == ["weight"]


def test_gradient_reaches_the_gate_only_if_the_weights_can_move() -> None:
    hidden_TD = torch.randn(6, 8)
    for top_k, renormalize, moves in [(2, True, True), (1, False, True), (1, True, False)]:
        router = Router(torch.randn(4, 8), top_k=top_k, renormalize=renormalize)
        weights_TK = router(hidden_TD).weights_TK
        (weights_TK * torch.rand(6, top_k)).sum().backward()
        assert (router.weight.grad.abs().max() > 1e-6) == moves


@pytest.mark.parametrize("top_k", [0, 4, -1])
def test_refuses_a_top_k_that_the_experts_cannot_serve(top_k: int) -> None:
    with pytest.raises(ArtifactError, match=f"3 experts .* between 1 and 3 .* top_k = {top_k}"):
        Router(torch.randn(3, 8), top_k=top_k, renormalize=True)


def test_refuses_a_gate_that_is_no_matrix() -> None:
    with pytest.raises(ArtifactError, match=r"matrix .* found shape \(3,\)"):
        Router(torch.randn(3), top_k=1, renormalize=True)
