"""Shared work gives the same as every expert by itself, forward and backward."""

import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, NemotronHConfig
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMLP

from frankenmoe.moe.adapter import LoraLinear, with_adapter, wrap_linear
from frankenmoe.moe.block import MoEBlock
from frankenmoe.moe.experts import dispatch
from frankenmoe.moe.grouping import group_experts
from frankenmoe.moe.linear import keep_stored, to_int8
from frankenmoe.moe.router import Router
from oracles.moe_reference import FFN, HIDDEN, naive

SIZES = {"gate_proj": (HIDDEN, FFN), "up_proj": (HIDDEN, FFN), "down_proj": (FFN, HIDDEN)}


def make_mlp(*, bias: bool = False) -> LlamaMLP:
    return LlamaMLP(LlamaConfig(hidden_size=HIDDEN, intermediate_size=FFN, mlp_bias=bias, num_attention_heads=1))


def make_ungated() -> NemotronHMLP:
    return NemotronHMLP(NemotronHConfig(hidden_size=HIDDEN, intermediate_size=FFN))


def adapted(mlp: nn.Module, names: tuple[str, ...], *, rank: int = 2) -> nn.Module:
    loras = {}
    for name in names:
        inputs, outputs = SIZES[name]
        loras[name] = (torch.randn(rank, inputs), torch.randn(outputs, rank), 0.5)
    return with_adapter(mlp, loras) if loras else mlp


def counted(mlp: nn.Module) -> Callable[[], int]:
    """How many tokens the mlp's down projection has seen."""
    seen = []
    mlp.down_proj.register_forward_hook(lambda module, inputs, out: seen.append(inputs[0].shape[:-1].numel()))
    return lambda: sum(seen)


SOME_PROJECTIONS = st.lists(st.sampled_from(sorted(SIZES)), unique=True).map(tuple)


@settings(deadline=None, max_examples=30)
@given(
    data=st.data(),
    seed=st.integers(0, 2**31),
    kinds=st.lists(st.tuples(st.integers(0, 1), SOME_PROJECTIONS), min_size=1, max_size=7),
    tokens=st.integers(1, 9),
    dropped=st.sampled_from([0.0, 0.3, 1.0]),
    gated=st.booleans(),
)
def test_equals_every_expert_by_itself(
    data: st.DataObject, seed: int, kinds: list[tuple[int, tuple[str, ...]]], tokens: int, dropped: float, gated: bool
) -> None:
    torch.manual_seed(seed)
    top_k = data.draw(st.integers(1, len(kinds)), label="top_k")
    bases = [make_mlp() if gated else make_ungated() for _ in range(2)]
    experts = nn.ModuleList(
        adapted(bases[base], names if gated else tuple(name for name in names if name != "gate_proj"))
        for base, names in kinds
    )
    weights_TK, ids_TK = torch.rand(tokens, len(experts)).topk(top_k, dim=1)
    ids_TK = ids_TK.masked_fill(torch.rand(ids_TK.shape) < dropped, -1)
    hidden_TD, probe_TD = torch.randn(tokens, HIDDEN), torch.randn(tokens, HIDDEN)
    results = []
    for mix in (dispatch, naive):
        hidden, weights = hidden_TD.clone().requires_grad_(), weights_TK.clone().requires_grad_()
        out_TD = mix(hidden, weights, ids_TK, experts)
        # the second term keeps a graph where every assignment was dropped
        loss = (out_TD * probe_TD).sum() + 0 * hidden.sum()
        inputs = (hidden, weights, *experts.parameters())
        grads = torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)
        results.append((out_TD.detach(), *grads))
    with torch.inference_mode():  # where memory is used again
        kept_TD = hidden_TD.clone()
        results[0] = (dispatch(hidden_TD, weights_TK, ids_TK, experts), *results[0])
        results[1] = (results[1][0], *results[1])
        torch.testing.assert_close(hidden_TD, kept_TD, rtol=0, atol=0)
    for ours, reference in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-4)


def test_sixteen_equal_experts_run_once_for_a_token() -> None:
    mlp = make_mlp()
    tokens = counted(mlp)
    block = MoEBlock(Router(torch.randn(16, HIDDEN), top_k=2, renormalize=True), [mlp] * 16)
    hidden = torch.randn(1, 11, HIDDEN)
    torch.testing.assert_close(block(hidden), mlp(hidden), rtol=1e-5, atol=1e-6)
    assert tokens() == 11 + 11


@pytest.mark.parametrize(
    ("make", "names"),
    [(make_mlp, ("gate_proj", "up_proj", "down_proj")), (make_ungated, ("up_proj", "down_proj"))],
    ids=["gated", "ungated"],
)
def test_sixteen_adapters_take_their_base_once_for_a_token(
    make: Callable[[], nn.Module], names: tuple[str, ...]
) -> None:
    mlp = make()
    tokens = counted(mlp)
    experts = [adapted(mlp, names) for _ in range(16)]
    block = MoEBlock(Router(torch.randn(16, HIDDEN), top_k=3, renormalize=True), experts)
    block(torch.randn(1, 11, HIDDEN))
    assert tokens() == 11


def test_what_may_not_be_shared_is_not() -> None:
    mlp = make_mlp()
    alike = [mlp, adapted(mlp, ("up_proj",)), adapted(mlp, ())]
    assert [group.members for group in group_experts([*alike, make_mlp(), mlp])] == [(0, 1, 2, 4), (3,)]
    biased = make_mlp(bias=True)
    assert len(group_experts([biased, adapted(biased, ("up_proj",))])) == 2

    class GatedAndMore(LlamaMLP):
        """The same names, another computation."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).clamp(-1, 1)

    other = GatedAndMore(mlp.config)
    assert len(group_experts([other, adapted(other, ("up_proj",))])) == 2


def test_a_replaced_expert_is_noticed() -> None:
    mlp = make_mlp()
    block = MoEBlock(Router(torch.randn(2, HIDDEN), top_k=2, renormalize=True), [mlp, mlp])
    hidden = torch.randn(5, HIDDEN)
    before = block(hidden)
    block.experts[1] = make_mlp()
    assert not torch.allclose(before, block(hidden))


def test_offloaded_adapters_are_computed_by_their_own_modules() -> None:
    """accelerate leaves weights without numbers and brings them where a module's patched forward is called."""
    accelerate = pytest.importorskip("accelerate")
    mlp = make_mlp()
    experts = [adapted(mlp, tuple(SIZES)) for _ in range(3)]
    block = MoEBlock(Router(torch.randn(3, HIDDEN), top_k=2, renormalize=True), experts).requires_grad_(False)
    hidden = torch.randn(5, HIDDEN)
    expected = block(hidden)
    offloaded = accelerate.cpu_offload(copy.deepcopy(block), execution_device="cpu")
    torch.testing.assert_close(offloaded(hidden), expected, rtol=1e-4, atol=1e-5)


def swap_up(block: MoEBlock) -> None:
    wrap_linear(block, "experts.0.up_proj", torch.randn(2, HIDDEN), torch.randn(FFN, 2), 1.0)


def swap_lora(block: MoEBlock) -> None:
    other = LoraLinear(block.experts[0].up_proj, torch.randn(3, HIDDEN), torch.randn(FFN, 3), 2.0)
    block.experts[1].up_proj = other


def swap_base(block: MoEBlock) -> None:
    block.experts[1].up_proj.base = nn.Linear(HIDDEN, FFN, bias=False)


def swap_act(block: MoEBlock) -> None:
    block.experts[1].act_fn = nn.ReLU()


def swap_linear(block: MoEBlock) -> None:
    block.experts[1].gate_proj = nn.Linear(HIDDEN, FFN, bias=False)


def swap_weight(block: MoEBlock) -> None:
    block.experts[1].gate_proj = copy.copy(block.experts[1].gate_proj)
    block.experts[1].gate_proj.weight = nn.Parameter(torch.randn(FFN, HIDDEN))


def round_all(block: MoEBlock) -> None:
    to_int8(block)


def listen(block: MoEBlock) -> None:
    block.experts[1].register_forward_hook(lambda module, inputs, out: 2 * out)


def listen_within(block: MoEBlock) -> None:
    block.experts[1].up_proj.register_forward_hook(lambda module, inputs, out: 2 * out)


def swap_what_peft_swaps(block: MoEBlock) -> None:
    get_peft_model(block, LoraConfig(r=2, target_modules=["up_proj.base", "0.up_proj"], init_lora_weights=False))


CHANGES = [
    *(swap_up, swap_lora, swap_base, swap_act, swap_linear, swap_weight, round_all, listen, listen_within),
    swap_what_peft_swaps,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("tokens", [1, 5])
def test_a_change_within_an_adapter_expert_is_noticed(change: Callable[[MoEBlock], None], tokens: int) -> None:
    """After a forward, which has found out what is shared."""
    torch.manual_seed(0)
    base = make_mlp().requires_grad_(False)
    experts = [base, *(adapted(base, ("up_proj",)) for _ in range(2))]
    block = MoEBlock(Router(torch.randn(3, HIDDEN), top_k=3, renormalize=True), experts).eval()
    hidden = torch.randn(tokens, HIDDEN)
    with torch.no_grad():
        before = block(hidden)
        assert len(block.groups) == 1
        change(block)
        after = block(hidden)
        weights_TK, ids_TK, _ = block.router(hidden)
        assert not torch.allclose(before, after, atol=1e-5)
        torch.testing.assert_close(after, naive(hidden, weights_TK, ids_TK, block.experts), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_at_the_ffn_width_of_open_llama_3b(dtype: torch.dtype, most: float) -> None:
    """8640 is no multiple of 128. The hidden size is a tenth of 3200. One expert is an adapter over the other."""
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=320, intermediate_size=8640, num_attention_heads=32)
    base = keep_stored(LlamaMLP(config).to(dtype).requires_grad_(False))
    low = {"up_proj": (torch.randn(4, 320) * 0.02, torch.randn(8640, 4) * 0.02, 0.5)}
    experts = [base, with_adapter(base, {name: (a.to(dtype), b.to(dtype), s) for name, (a, b, s) in low.items()})]
    block = MoEBlock(Router(torch.randn(2, 320).to(dtype), top_k=2, renormalize=True), experts).eval()
    with torch.no_grad():
        wide = [copy.deepcopy(expert).double() for expert in experts]
        for tokens in (1, 5):
            hidden = torch.randn(tokens, 320).to(dtype)
            weights_TK, ids_TK, _ = block.router(hidden)
            exact = naive(hidden.double(), weights_TK.double(), ids_TK, wide)
            assert (block(hidden).double() - exact).norm() <= most * exact.norm()
