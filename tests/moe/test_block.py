"""The block against the dense MLP (oracles 1 to 4) and by hand."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from frankenmoe.errors import ArtifactError
from frankenmoe.moe.adapter import with_adapter
from frankenmoe.moe.block import MoEBlock
from frankenmoe.moe.router import Router
from oracles.moe_reference import HIDDEN, SwiGLU

# T tokens, D hidden, E experts, K top-k


def random_router(experts: int, *, top_k: int = 2, renormalize: bool = True) -> Router:
    return Router(torch.randn(experts, HIDDEN), top_k=top_k, renormalize=renormalize)


@settings(deadline=None, max_examples=30)
@given(data=st.data(), seed=st.integers(0, 2**31), experts=st.integers(1, 8))
def test_identical_experts_are_the_dense_mlp_whatever_the_gate(data: st.DataObject, seed: int, experts: int) -> None:
    top_k = data.draw(st.integers(1, experts), label="top_k")
    torch.manual_seed(seed)
    mlp, hidden = SwiGLU(), torch.randn(2, 3, HIDDEN)
    block = MoEBlock(random_router(experts, top_k=top_k), [mlp] * experts)
    torch.testing.assert_close(block(hidden), mlp(hidden), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("renormalize", [True, False])
def test_one_expert_is_the_dense_mlp(renormalize: bool) -> None:
    mlp, hidden = SwiGLU(), torch.randn(2, 5, HIDDEN)
    block = MoEBlock(random_router(1, top_k=1, renormalize=renormalize), [mlp])
    torch.testing.assert_close(block(hidden), mlp(hidden), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("renormalize", [True, False])
def test_permuting_experts_with_their_gate_rows_changes_nothing(renormalize: bool) -> None:
    gate_ED, mlps, order = torch.randn(5, HIDDEN), [SwiGLU() for _ in range(5)], [3, 0, 4, 1, 2]
    hidden = torch.randn(2, 6, HIDDEN)
    block = MoEBlock(Router(gate_ED, top_k=2, renormalize=renormalize), mlps)
    permuted = MoEBlock(Router(gate_ED[order], top_k=2, renormalize=renormalize), [mlps[i] for i in order])
    torch.testing.assert_close(permuted(hidden), block(hidden), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("leading", [(), (4,), (2, 3), (2, 1, 3)])
def test_any_leading_shape(leading: tuple[int, ...]) -> None:
    block = MoEBlock(random_router(3), [SwiGLU() for _ in range(3)])
    hidden = torch.randn(*leading, HIDDEN)
    assert block(hidden).shape == hidden.shape
    torch.testing.assert_close(block(hidden).reshape(-1, HIDDEN), block(hidden.reshape(-1, HIDDEN)))


def test_input_that_is_not_contiguous() -> None:
    block = MoEBlock(random_router(3), [SwiGLU() for _ in range(3)])
    hidden = torch.randn(3, 2, HIDDEN).transpose(0, 1)
    torch.testing.assert_close(block(hidden), block(hidden.contiguous()))


def test_shared_expert_is_added_in_full_without_a_gate() -> None:
    router, mlps, shared, hidden = random_router(2), [SwiGLU(), SwiGLU()], SwiGLU(), torch.randn(5, HIDDEN)
    block = MoEBlock(router, mlps, shared=shared)
    torch.testing.assert_close(block(hidden), MoEBlock(router, mlps)(hidden) + shared(hidden))


def test_shared_expert_is_scaled_by_the_sigmoid_of_its_gate() -> None:
    router, mlps, shared, hidden = random_router(2), [SwiGLU(), SwiGLU()], SwiGLU(), torch.randn(5, HIDDEN)
    gate_1D = torch.randn(1, HIDDEN)
    block = MoEBlock(router, mlps, shared=shared, shared_gate=gate_1D)
    scale_T1 = 1 / (1 + (-(hidden * gate_1D).sum(dim=1, keepdim=True)).exp())
    torch.testing.assert_close(block(hidden), MoEBlock(router, mlps)(hidden) + scale_T1 * shared(hidden))
    assert block.shared_gate.weight.data_ptr() == gate_1D.data_ptr()


def test_nested_blocks_multiply_their_probabilities() -> None:
    """Two levels of top-k = all, so that out = sum_g p(g) sum_i p(i|g) mlp_gi(x)."""
    outer_ED, inner_ED = torch.randn(2, HIDDEN), [torch.randn(3, HIDDEN), torch.randn(2, HIDDEN)]
    mlps = [[SwiGLU() for _ in gate_ED] for gate_ED in inner_ED]
    inner = [
        MoEBlock(Router(gate_ED, top_k=len(gate_ED), renormalize=True), row)
        for gate_ED, row in zip(inner_ED, mlps, strict=True)
    ]
    block = MoEBlock(Router(outer_ED, top_k=2, renormalize=True), inner)
    hidden_TD = torch.randn(6, HIDDEN)
    expected_TD = torch.zeros(6, HIDDEN)
    for g, row in enumerate(mlps):
        p_g = (hidden_TD @ outer_ED.T).softmax(dim=1)[:, g, None]
        for i, mlp in enumerate(row):
            p_i = (hidden_TD @ inner_ED[g].T).softmax(dim=1)[:, i, None]
            expected_TD += p_g * p_i * mlp(hidden_TD)
    torch.testing.assert_close(block(hidden_TD), expected_TD, rtol=1e-5, atol=1e-5)


def test_only_the_chosen_branch_of_a_nested_block_runs() -> None:
    """Top-1 outside and inside: one MLP per token, the one that both routers name."""
    outer_ED = torch.zeros(2, HIDDEN)
    outer_ED[1, 0] = 5.0
    mlps = [SwiGLU() for _ in range(4)]
    inner = [
        MoEBlock(random_router(2, top_k=1), mlps[:2]),
        MoEBlock(Router(-outer_ED, top_k=1, renormalize=True), mlps[2:]),
    ]
    block = MoEBlock(Router(outer_ED, top_k=1, renormalize=True), inner)
    hidden_TD = torch.ones(3, HIDDEN)
    torch.testing.assert_close(block(hidden_TD), mlps[2](hidden_TD))
    assert [mlp.calls for mlp in mlps] == [0, 0, 2, 0]


@pytest.mark.parametrize(("policy", "survivor"), [("order", 0), ("weight", 2)])
def test_a_dropped_token_gets_exactly_zero(policy: str, survivor: int) -> None:
    """Three tokens want expert 0, ever more strongly; ceil(0.5 * 3 / 2) = 1 seat."""
    gate_ED = torch.zeros(2, HIDDEN)
    gate_ED[0, 0] = 1.0
    hidden_TD = torch.tensor([1.0, 2.0, 3.0])[:, None].expand(3, HIDDEN)
    router = Router(gate_ED, top_k=1, renormalize=False)
    experts = [SwiGLU(), SwiGLU()]
    block = MoEBlock(router, experts, capacity_factor=0.5, drop_policy=policy)
    out_TD, free_TD = block(hidden_TD), MoEBlock(router, experts)(hidden_TD)
    for token in range(3):
        if token == survivor:
            torch.testing.assert_close(out_TD[token], free_TD[token])
            assert out_TD[token].abs().max() > 0
        else:
            assert torch.equal(out_TD[token], torch.zeros(HIDDEN))


def test_a_roomy_capacity_changes_nothing() -> None:
    router, experts, hidden = random_router(4), [SwiGLU() for _ in range(4)], torch.randn(9, HIDDEN)
    roomy = MoEBlock(router, experts, capacity_factor=4.0)
    assert torch.equal(roomy(hidden), MoEBlock(router, experts)(hidden))


def test_gradient_reaches_gates_shared_expert_and_adapters_but_not_a_frozen_base() -> None:
    base = SwiGLU().requires_grad_(False)
    loras = [{"up_proj": (torch.randn(2, HIDDEN), torch.randn(12, 2), 0.5)} for _ in range(2)]
    experts = [with_adapter(base, lora) for lora in loras]
    block = MoEBlock(random_router(2), experts, shared=SwiGLU(), shared_gate=torch.randn(1, HIDDEN))
    block(torch.randn(6, HIDDEN)).square().sum().backward()
    moved = {
        name for name, parameter in block.named_parameters() if parameter.grad is not None and parameter.grad.any()
    }
    adapters = {f"experts.{expert}.up_proj.{part}" for expert in range(2) for part in "ab"}
    shared = {f"shared.{part}.weight" for part in ("gate_proj", "up_proj", "down_proj")}
    assert moved == {"router.weight", "shared_gate.weight"} | adapters | shared


def test_state_dict_names() -> None:
    block = MoEBlock(random_router(2), [SwiGLU(), SwiGLU()], shared=SwiGLU(), shared_gate=torch.randn(1, HIDDEN))
    parts = ["gate_proj.weight", "up_proj.weight", "down_proj.weight"]
    mlps = [f"{mlp}.{part}" for mlp in ("experts.0", "experts.1", "shared") for part in parts]
    assert list(block.state_dict()) == ["router.weight", *mlps, "shared_gate.weight"]


def test_one_source_used_many_times_is_held_once() -> None:
    mlp = SwiGLU()
    block = MoEBlock(random_router(16), [mlp] * 16)
    assert sum(parameter.numel() for parameter in block.parameters()) == 16 * HIDDEN + 3 * HIDDEN * 12


@pytest.mark.parametrize(
    ("experts", "options", "message"),
    [
        (3, {}, "router scores 2 experts, found 3"),
        (2, {"shared_gate": torch.zeros(1, HIDDEN)}, "shared_gate but no shared expert"),
        (2, {"shared": SwiGLU(), "shared_gate": torch.zeros(2, HIDDEN)}, r"shape \(1, 8\), found \(2, 8\)"),
        (2, {"capacity_factor": 0.0}, "positive number, found 0.0"),
        (2, {"capacity_factor": float("nan")}, "positive number, found nan"),
        (2, {"drop_policy": "wieght"}, "order, weight, found 'wieght'"),
    ],
)
def test_refuses_what_makes_no_sense(experts: int, options: dict[str, object], message: str) -> None:
    with pytest.raises(ArtifactError, match=message) as error:
        MoEBlock(random_router(2), [SwiGLU() for _ in range(experts)], **options)
    assert error.value.hint
