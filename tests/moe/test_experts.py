"""Dispatch against the per-token loop (oracle 6), capacity against counts by hand."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from frankenmoe.moe.experts import apply_capacity, dispatch
from oracles.moe_reference import HIDDEN, SwiGLU, naive

# T tokens, D hidden, E experts, K top-k


def random_routing(tokens: int, experts: int, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    weights_TK, ids_TK = torch.rand(tokens, experts).topk(top_k, dim=1)
    return weights_TK, ids_TK


def assert_equals_naive(
    hidden_TD: torch.Tensor, weights_TK: torch.Tensor, ids_TK: torch.Tensor, experts: nn.ModuleList
) -> None:
    """Same output; same gradient of tokens, weights and every expert parameter (zero where an expert had no tokens)."""
    results = []
    probe_TD = torch.randn(hidden_TD.shape)
    for mix in (dispatch, naive):
        hidden, weights = hidden_TD.clone().requires_grad_(), weights_TK.clone().requires_grad_()
        out_TD = mix(hidden, weights, ids_TK, experts)
        inputs = (hidden, weights, *experts.parameters())
        # the second term keeps a graph where every assignment was dropped
        loss = (out_TD * probe_TD).sum() + 0 * hidden.sum()
        grads = torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)
        results.append((out_TD.detach(), *grads))
    for ours, reference in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-5)


@settings(deadline=None, max_examples=30)
@given(data=st.data(), seed=st.integers(0, 2**31), experts=st.integers(1, 6), tokens=st.integers(1, 9))
def test_equals_the_per_token_loop(data: st.DataObject, seed: int, experts: int, tokens: int) -> None:
    top_k = data.draw(st.integers(1, experts), label="top_k")
    dropped = data.draw(st.sampled_from([0.0, 0.3, 1.0]), label="dropped")
    torch.manual_seed(seed)
    weights_TK, ids_TK = random_routing(tokens, experts, top_k)
    ids_TK = ids_TK.masked_fill(torch.rand(ids_TK.shape) < dropped, -1)
    modules = nn.ModuleList(SwiGLU() for _ in range(experts))
    assert_equals_naive(torch.randn(tokens, HIDDEN), weights_TK, ids_TK, modules)


@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(1, 4, 2), (40, 33, 2), (5, 4, 4), (3, 33, 33)])
def test_equals_the_per_token_loop_at_the_edges(tokens: int, experts: int, top_k: int) -> None:
    modules = nn.ModuleList(SwiGLU() for _ in range(experts))
    assert_equals_naive(torch.randn(tokens, HIDDEN), *random_routing(tokens, experts, top_k), modules)


def test_all_tokens_to_one_expert_runs_it_once_and_no_other() -> None:
    experts = nn.ModuleList(SwiGLU() for _ in range(3))
    hidden_TD = torch.randn(7, HIDDEN)
    out_TD = dispatch(hidden_TD, torch.ones(7, 1), torch.full((7, 1), 1), experts)
    assert [expert.calls for expert in experts] == [0, 1, 0]
    torch.testing.assert_close(out_TD, experts[1](hidden_TD))


def test_takes_input_that_is_not_contiguous() -> None:
    experts = nn.ModuleList(SwiGLU() for _ in range(3))
    hidden_TD = torch.randn(HIDDEN, 10).T[::2]
    weights_TK, ids_TK = random_routing(5, 3, 2)
    assert not hidden_TD.is_contiguous()
    torch.testing.assert_close(
        dispatch(hidden_TD, weights_TK, ids_TK, experts), naive(hidden_TD, weights_TK, ids_TK, experts)
    )


def test_one_module_in_two_places_gets_both_shares() -> None:
    expert = SwiGLU()
    hidden_TD = torch.randn(4, HIDDEN)
    out_TD = dispatch(hidden_TD, torch.tensor([[0.25, 0.5]] * 4), torch.tensor([[0, 1]] * 4), [expert, expert])
    torch.testing.assert_close(out_TD, 0.75 * expert(hidden_TD))


def test_experts_see_their_tokens_in_ascending_order() -> None:
    seen = []

    class Spy(nn.Module):
        def forward(self, hidden_ND: torch.Tensor) -> torch.Tensor:
            seen.append(hidden_ND[:, 0].tolist())
            return hidden_ND

    dispatch(
        torch.arange(4.0)[:, None],
        torch.ones(4, 2),
        torch.tensor([[1, 0], [0, 1], [2, 1], [1, 2]]),
        [Spy(), Spy(), Spy()],
    )
    assert seen == [[0, 1], [0, 1, 2, 3], [2, 3]]


def test_no_tokens_give_no_output() -> None:
    out_TD = dispatch(torch.empty(0, HIDDEN), torch.empty(0, 2), torch.empty(0, 2, dtype=torch.long), [SwiGLU()])
    assert out_TD.shape == (0, HIDDEN)


# Three tokens, two choices, two experts: capacity_factor 2/3 gives ceil(2/3 * 3 * 2 / 2) = 2 seats each.
WEIGHTS_TK = torch.tensor([[0.6, 0.4], [0.7, 0.3], [0.9, 0.1]])
IDS_TK = torch.tensor([[0, 1], [0, 1], [0, 1]])


def test_order_drops_the_last_tokens() -> None:
    kept_TK = apply_capacity(WEIGHTS_TK, IDS_TK, experts=2, capacity_factor=2 / 3, policy="order")
    assert kept_TK.tolist() == [[0, 1], [0, 1], [-1, -1]]


def test_weight_drops_the_lowest_weights() -> None:
    kept_TK = apply_capacity(WEIGHTS_TK, IDS_TK, experts=2, capacity_factor=2 / 3, policy="weight")
    assert kept_TK.tolist() == [[-1, 1], [0, 1], [0, -1]]


def test_order_serves_first_choices_before_second_choices() -> None:
    ids_TK = torch.tensor([[1, 0], [0, 1]])  # token 0 names expert 0 before token 1 does, but only as its second choice
    kept_TK = apply_capacity(torch.rand(2, 2), ids_TK, experts=2, capacity_factor=0.5, policy="order")
    assert kept_TK.tolist() == [[1, -1], [0, -1]]


def test_equal_weights_go_by_order() -> None:
    _, ids_TK = random_routing(200, 4, 2)
    by_weight_TK, by_order_TK = (
        apply_capacity(torch.full((200, 2), 0.5), ids_TK, experts=4, capacity_factor=0.5, policy=policy)
        for policy in ("weight", "order")
    )
    assert torch.equal(by_weight_TK, by_order_TK)


def test_capacity_is_the_decimal_ceiling() -> None:
    """1.1 * 200 / 4 is 55; in binary 1.1 * 200 is 220.00000000000003, which would make it 56."""
    ids_TK = torch.zeros(200, 1, dtype=torch.long)
    kept_TK = apply_capacity(torch.rand(200, 1), ids_TK, experts=4, capacity_factor=1.1, policy="order")
    assert int((kept_TK == 0).sum()) == 55


@settings(deadline=None, max_examples=50)
@given(
    data=st.data(),
    seed=st.integers(0, 2**31),
    experts=st.integers(1, 5),
    tokens=st.integers(1, 12),
    quarters=st.integers(1, 12),
    policy=st.sampled_from(["order", "weight"]),
)
def test_capacity_is_filled_and_never_exceeded(
    data: st.DataObject, seed: int, experts: int, tokens: int, quarters: int, policy: str
) -> None:
    top_k = data.draw(st.integers(1, experts), label="top_k")
    torch.manual_seed(seed)
    weights_TK, ids_TK = random_routing(tokens, experts, top_k)
    before_TK = ids_TK.clone()
    kept_TK = apply_capacity(weights_TK, ids_TK, experts=experts, capacity_factor=quarters / 4, policy=policy)
    capacity = math.ceil(quarters * tokens * top_k / (4 * experts))
    wanted, kept = Counter(ids_TK.flatten().tolist()), Counter(kept_TK[kept_TK != -1].tolist())
    assert kept == {expert: min(count, capacity) for expert, count in wanted.items()}
    assert torch.equal(kept_TK[kept_TK != -1], ids_TK[kept_TK != -1])
    assert torch.equal(ids_TK, before_TK)
    if policy == "weight":
        for expert in wanted:
            served = weights_TK[kept_TK == expert]
            refused = weights_TK[(ids_TK == expert) & (kept_TK == -1)]
            assert not len(refused) or refused.max() <= served.min()
