"""Grouped products for GPUs, tested on CPU tensors: they equal the loop over experts and never wait for the device."""

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import LlamaConfig, NemotronHConfig
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMLP

import frankenmoe as fm
import tiny
from frankenmoe.moe.adapter import with_adapter
from frankenmoe.moe.block import MoEBlock
from frankenmoe.moe.experts import dispatch
from frankenmoe.moe.gpu import grouped, packing
from frankenmoe.moe.grouping import group_experts
from frankenmoe.moe.router import Router
from oracles.waits import NoWaits, WaitsError

# T tokens, D hidden, E experts, K top-k

HIDDEN, FFN = 16, 24
Experts = list[nn.Module]
EVERY = ("gate_proj", "up_proj", "down_proj")


def make_mlp(hidden: int = HIDDEN, ffn: int = FFN, **changes: Any) -> nn.Module:
    config = LlamaConfig(hidden_size=hidden, intermediate_size=ffn, num_attention_heads=1, head_dim=2, **changes)
    mlp = LlamaMLP(config)
    for parameter in mlp.parameters():
        nn.init.normal_(parameter, std=0.2)
    return mlp.requires_grad_(False)


def adapted(mlp: nn.Module, names: tuple[str, ...] = EVERY, *, rank: int = 3, scale: float = 0.5) -> nn.Module:
    loras = {}
    for name in names:
        linear = mlp.get_submodule(name)
        a_RI, b_OR = torch.randn(rank, linear.in_features), torch.randn(linear.out_features, rank)
        loras[name] = (0.3 * a_RI.to(linear.weight.dtype), 0.3 * b_OR.to(linear.weight.dtype), scale)
    return with_adapter(mlp, loras).requires_grad_(False) if loras else mlp


def make_ungated() -> nn.Module:
    mlp = NemotronHMLP(NemotronHConfig(hidden_size=HIDDEN, intermediate_size=FFN))
    for parameter in mlp.parameters():
        nn.init.normal_(parameter, std=0.2)
    return mlp.requires_grad_(False)


def ungated(count: int) -> Experts:
    return [make_ungated() for _ in range(count)]


def ungated_adapters(count: int) -> Experts:
    mlp, names = make_ungated(), (("up_proj", "down_proj"), ("up_proj",), ("down_proj",))
    return [adapted(mlp, names[number % 3]) for number in range(count)]


def distinct(count: int) -> Experts:
    return [make_mlp() for _ in range(count)]


def adapters(count: int) -> Experts:
    """Over one FFN, with ranks, scales and projections of their own; the first is the FFN itself."""
    mlp = make_mlp()
    names = ((), EVERY, ("up_proj",), ("gate_proj", "down_proj"))
    return [
        adapted(mlp, names[number % 4] if count > 1 else EVERY, rank=1 + number % 5, scale=0.5 + number % 3 / 4)
        for number in range(count)
    ]


MAKERS: dict[str, Callable[[int], Experts]] = {
    "distinct": distinct,
    "adapters": adapters,
}
UNGATED: dict[str, Callable[[int], Experts]] = {"ungated": ungated, "ungated adapters": ungated_adapters}
BOTH = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
ALL = pytest.mark.parametrize("make", [*MAKERS.values(), *UNGATED.values()], ids=[*MAKERS, *UNGATED])
WAYS = pytest.mark.parametrize("few", [0, 10**6], ids=["sorted", "few"])


def routing(tokens: int, experts: int, top_k: int, *, dropped: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    weights_TK, ids_TK = torch.rand(tokens, experts).topk(top_k, dim=1)
    return weights_TK, ids_TK.masked_fill(torch.rand(ids_TK.shape) < dropped, -1)


def block_of(experts: Experts, *, top_k: int = 2, **options: Any) -> MoEBlock:
    hidden = next(experts[0].parameters()).shape[1]
    block = MoEBlock(Router(torch.randn(len(experts), hidden), top_k=top_k, renormalize=True), experts, **options)
    return block.requires_grad_(False)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks treat a CPU as a GPU."""
    monkeypatch.setattr(packing, "DEVICES", {"cpu"})


def packed_of(experts: Experts) -> packing.Packed:
    found = packing.pack(group_experts(experts))
    assert found is not None
    return found


def gradients(out_TD: torch.Tensor, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    torch.manual_seed(1)
    loss = (out_TD * torch.randn(out_TD.shape)).sum() + 0 * inputs[0].sum()
    return list(torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True))


def assert_equals_the_loop(
    hidden_TD: torch.Tensor, weights_TK: torch.Tensor, ids_TK: torch.Tensor, experts: Experts, *, few: int
) -> None:
    """Same output, same gradients of tokens, weights and whatever learns."""
    learning = [weight for weight in nn.ModuleList(experts).parameters() if weight.requires_grad]
    found = []
    for packed in (None, packed_of(experts)):
        hidden, weights = hidden_TD.detach().clone().requires_grad_(), weights_TK.clone().requires_grad_()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(grouped, "FEW", few)
            assert packed is None or grouped.takes(packed, hidden, ids_TK)
            out_TD = dispatch(hidden, weights, ids_TK, experts, packed=packed)
        found.append([out_TD.detach(), *gradients(out_TD, [hidden, weights, *learning])])
    for loop, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, loop, rtol=1e-5, atol=1e-5)


SEVERAL = {"tokens": st.integers(1, 12), "dropped": st.sampled_from([0.0, 0.3, 1.0]), "few": st.sampled_from([0, 99])}


@settings(deadline=None, max_examples=30)
@given(data=st.data(), seed=st.integers(0, 2**31), experts=st.integers(2, 7), **SEVERAL)
def test_distinct_experts_equal_the_loop(
    data: st.DataObject, seed: int, experts: int, tokens: int, dropped: float, few: int
) -> None:
    top_k = data.draw(st.integers(1, experts), label="top_k")
    torch.manual_seed(seed)
    modules = distinct(experts)
    if data.draw(st.booleans(), label="one twice"):
        modules.insert(data.draw(st.integers(0, experts), label="where"), modules[0])
    weights_TK, ids_TK = routing(tokens, len(modules), top_k, dropped=dropped)
    assert_equals_the_loop(torch.randn(tokens, HIDDEN), weights_TK, ids_TK, modules, few=few)


@settings(deadline=None, max_examples=30)
@given(
    data=st.data(),
    seed=st.integers(0, 2**31),
    kinds=st.lists(st.lists(st.sampled_from(EVERY), unique=True).map(tuple), min_size=2, max_size=6),
    learns=st.booleans(),
    **SEVERAL,
)
def test_adapters_equal_the_loop(
    data: st.DataObject,
    seed: int,
    kinds: list[tuple[str, ...]],
    learns: bool,
    tokens: int,
    dropped: float,
    few: int,
) -> None:
    torch.manual_seed(seed)
    mlp = make_mlp()
    modules = [adapted(mlp, names, rank=data.draw(st.integers(1, 9), label="rank")) for names in (EVERY, *kinds)]
    for expert in modules if learns else ():
        for name, weight in expert.named_parameters():
            weight.requires_grad_(name.endswith((".a", ".b")))
    top_k = data.draw(st.integers(1, len(modules)), label="top_k")
    weights_TK, ids_TK = routing(tokens, len(modules), top_k, dropped=dropped)
    assert_equals_the_loop(torch.randn(tokens, HIDDEN), weights_TK, ids_TK, modules, few=few)


@ALL
@WAYS
@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(1, 4, 2), (40, 33, 2), (5, 4, 4), (3, 33, 33), (0, 3, 2)])
def test_equals_the_loop_at_the_edges(
    make: Callable[[int], Experts], few: int, tokens: int, experts: int, top_k: int
) -> None:
    weights_TK, ids_TK = routing(tokens, experts, top_k)
    assert_equals_the_loop(torch.randn(tokens, HIDDEN), weights_TK, ids_TK, make(experts), few=few)


@ALL
@WAYS
@pytest.mark.parametrize("expert", [0, 3])
def test_all_tokens_to_one_expert(make: Callable[[int], Experts], few: int, expert: int) -> None:
    ids_TK = torch.full((7, 1), expert)
    assert_equals_the_loop(torch.randn(7, HIDDEN), torch.rand(7, 1), ids_TK, make(4), few=few)


@ALL
@WAYS
def test_takes_input_that_is_not_contiguous(make: Callable[[int], Experts], few: int) -> None:
    hidden_TD = torch.randn(HIDDEN, 20).T[::2]
    assert not hidden_TD.is_contiguous()
    experts, (weights_TK, ids_TK) = make(4), routing(10, 4, 2)
    loop_TD = dispatch(hidden_TD, weights_TK, ids_TK, experts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grouped, "FEW", few)
        found_TD = grouped.mix(hidden_TD, weights_TK, ids_TK, packed_of(experts))
    torch.testing.assert_close(found_TD, loop_TD, rtol=1e-5, atol=1e-5)


@BOTH
@WAYS
def test_close_to_float32_in_bfloat16(make: Callable[[int], Experts], few: int) -> None:
    torch.manual_seed(0)
    experts, (weights_TK, ids_TK) = nn.ModuleList(make(5)).bfloat16(), routing(30, 5, 3, dropped=0.2)
    hidden_TD = torch.randn(30, HIDDEN).bfloat16()
    packed = packed_of(list(experts))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grouped, "FEW", few)
        found_TD = grouped.mix(hidden_TD, weights_TK, ids_TK, packed)
    assert found_TD.dtype == torch.bfloat16
    exact_TD = dispatch(hidden_TD.float(), weights_TK, ids_TK, list(experts.float()))
    assert (found_TD - exact_TD).abs().max() < 1e-2 * exact_TD.abs().max()


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(("hidden", "ffn"), [(9, 24), (16, 13)])
@pytest.mark.parametrize("tokens", [1, 40])
def test_odd_sizes_are_grouped_for_few_tokens_and_looped_over_for_many(hidden: int, ffn: int, tokens: int) -> None:
    experts = [make_mlp(hidden, ffn) for _ in range(4)]
    block, hidden_TD = block_of(experts), torch.randn(tokens, hidden)
    weights_TK, ids_TK, _ = block.router(hidden_TD)
    assert grouped.takes(packed_of(experts), hidden_TD, ids_TK) == (tokens == 1)
    loop_TD = dispatch(hidden_TD, weights_TK, ids_TK, experts)
    torch.testing.assert_close(block(hidden_TD), loop_TD, rtol=1e-5, atol=1e-5)


@BOTH
def test_another_dtype_or_autocast_to_one_is_left_to_the_loop(make: Callable[[int], Experts]) -> None:
    packed, (_, ids_TK), hidden_TD = packed_of(make(3)), routing(4, 3, 2), torch.randn(4, HIDDEN)
    assert grouped.takes(packed, hidden_TD, ids_TK)
    assert not grouped.takes(packed, hidden_TD.double(), ids_TK)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not grouped.takes(packed, hidden_TD, ids_TK)


@BOTH
@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("tokens", [3, 40])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_routers_learn_under_autocast_without_waiting(
    make: Callable[[int], Experts], tokens: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `frankenmoe train` does it: gates in float32, the frozen rest in bfloat16, tokens in either."""
    torch.manual_seed(0)
    block = shared_block(make(5)).bfloat16()
    block.router = block.router.float().requires_grad_()
    hidden, found = torch.randn(1, tokens, HIDDEN, dtype=dtype), []
    for devices in (set(), {"cpu"}):
        monkeypatch.setattr(packing, "DEVICES", devices)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            block(hidden)
            with NoWaits() if devices else nullcontext():
                out = block(hidden)
                out.float().pow(2).sum().backward()
        assert out.dtype == dtype
        found.append((out.detach(), block.router.weight.grad))
        block.router.weight.grad = None
    for expected, ours in zip(*found, strict=True):
        assert (ours - expected).abs().max() <= 5e-2 * expected.abs().max()  # both are off by so much in bfloat16


def biased() -> Experts:
    return [make_mlp(mlp_bias=True) for _ in range(2)]


def learning() -> Experts:
    return [make_mlp(), make_mlp().requires_grad_()]


def listened() -> Experts:
    experts = distinct(2)
    experts[1].down_proj.register_forward_pre_hook(lambda module, inputs: None)
    return experts


def nested() -> Experts:
    return [block_of(distinct(2)), make_mlp()]


def float32_adapters() -> Experts:
    mlp = make_mlp().bfloat16()
    expert = adapted(mlp)
    for name in EVERY:
        expert.get_submodule(name).a.data = expert.get_submodule(name).a.float()
    return [mlp, expert]


LOOPED = {
    "equal": lambda: [make_mlp()] * 3,
    "biased": biased,
    "learning": learning,
    "listened": listened,
    "nested": nested,
    "adapters and others": lambda: [*adapters(3), make_mlp()],
    "other sizes": lambda: [make_mlp(), make_mlp(HIDDEN, FFN + 8)],
    "other activations": lambda: [make_mlp(), make_mlp(hidden_act="gelu")],
    "float32 adapters": float32_adapters,
}


def test_a_private_mark_on_an_activation_makes_no_other_of_it() -> None:
    """transformers leaves one on what it has initialised."""
    experts = distinct(3)
    experts[0].act_fn._is_hf_initialized = True
    experts[1].eval()
    packed_of(experts)


@pytest.mark.parametrize("make", LOOPED.values(), ids=LOOPED)
def test_what_cannot_be_grouped_stays_where_it_is(make: Callable[[], Experts]) -> None:
    experts = make()
    before = [weight.data_ptr() for weight in nn.ModuleList(experts).parameters()]
    assert packing.pack(group_experts(experts)) is None
    assert [weight.data_ptr() for weight in nn.ModuleList(experts).parameters()] == before


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("make", [nested, LOOPED["adapters and others"], LOOPED["equal"]])
def test_a_block_of_such_experts_gives_what_it_gives_elsewhere(
    make: Callable[[], Experts], monkeypatch: pytest.MonkeyPatch
) -> None:
    block, hidden = block_of(make()), torch.randn(2, 9, HIDDEN)
    found = block(hidden)
    monkeypatch.setattr(packing, "DEVICES", set())
    torch.testing.assert_close(found, block(hidden), rtol=1e-5, atol=1e-5)


def storages(module: nn.Module) -> set[int]:
    return {weight.untyped_storage().data_ptr() for weight in module.parameters()}


@ALL
@pytest.mark.usefixtures("here")
def test_packing_keeps_parameters_and_state_and_takes_no_memory_of_its_own(
    make: Callable[[int], Experts], tmp_path: Path
) -> None:
    block = block_of(make(6))
    parameters = dict(block.named_parameters())
    before = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    block(torch.randn(4, HIDDEN))
    after = block.state_dict()
    assert all(weight is parameters[name] for name, weight in block.named_parameters())
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    # whatever packed holds, the modules hold too
    packed = block._packing.of(block.groups, torch.randn(1, HIDDEN))
    if isinstance(packed, packing.Distinct):
        held = [packed.into_EOI, packed.down_EOI]
    else:
        held = [tensor for low in packed.low_rank.values() for tensor in (low.a_ERI, low.b_EOR)]
    assert {tensor.untyped_storage().data_ptr() for tensor in held} <= storages(block)
    torch.save(after, tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt")
    assert all(torch.equal(before[name], loaded[name]) for name in before)


@pytest.fixture
def packings(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[object]]:
    """What every call of pack gave."""
    given: list[object] = []
    pack = packing.pack
    monkeypatch.setattr(packing, "pack", lambda groups: given.append(pack(groups)) or given[-1])
    return given


def replaced(block: MoEBlock) -> None:
    block.experts[1] = make_mlp()


def moved(block: MoEBlock) -> None:
    for weight in block.experts[1].parameters():
        weight.data = weight.data.clone() * 2


def rounded(block: MoEBlock) -> None:
    block.bfloat16().float()


def swapped(block: MoEBlock) -> None:
    block.experts[1].up_proj.weight = nn.Parameter(torch.randn(FFN, HIDDEN), requires_grad=False)


def sharper(block: MoEBlock) -> None:
    for expert in block.experts:
        expert.act_fn = nn.Softplus(beta=8)


def biased_later(block: MoEBlock) -> None:
    block.experts[1].down_proj.bias = nn.Parameter(torch.ones(HIDDEN), requires_grad=False)


def rerouted(block: MoEBlock) -> None:
    """As accelerate and others patch a module."""
    block.experts[1].forward = lambda hidden: -hidden


def edited(block: MoEBlock) -> None:
    block.experts[1].up_proj.weight.data.mul_(2)


def loaded(block: MoEBlock) -> None:
    block.load_state_dict({name: tensor * 2 for name, tensor in block.state_dict().items()})


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("change", "times"),
    [
        *[(replaced, 2), (moved, 2), (rounded, 2), (swapped, 2), (edited, 1), (loaded, 1)],
        *[(sharper, 2), (biased_later, 2), (rerouted, 2)],
    ],
)
def test_a_changed_expert_is_noticed(
    change: Callable[[MoEBlock], None], times: int, packings: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    block, hidden = block_of(distinct(3), top_k=3), torch.randn(5, HIDDEN)
    before = block(hidden)
    change(block)
    after = block(hidden)
    block(hidden)
    assert len(packings) == times
    monkeypatch.setattr(packing, "DEVICES", set())
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, block(hidden), rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("here")
def test_whoever_listens_to_an_expert_is_heard() -> None:
    block, hidden = block_of(distinct(3), top_k=3), torch.randn(5, HIDDEN)
    silent, seen = block(hidden), []
    handle = block.experts[1].down_proj.register_forward_hook(lambda module, inputs, out: seen.append(out))
    torch.testing.assert_close(block(hidden), silent, rtol=1e-5, atol=1e-5)
    assert len(seen) == 1
    handle.remove()
    assert torch.equal(block(hidden), silent)
    assert len(seen) == 1


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("where", ["", "down_proj", "act_fn"])
@pytest.mark.parametrize("listen", ["register_forward_hook", "register_full_backward_hook"])
@pytest.mark.parametrize("packed_before", [True, False])
def test_whoever_listens_anywhere_in_an_expert_is_heard(where: str, listen: str, packed_before: bool) -> None:
    block, hidden = block_of(distinct(3), top_k=3), torch.randn(5, HIDDEN, requires_grad=True)
    seen: list[int] = []
    if packed_before:
        block(hidden)
    getattr(block.experts[1].get_submodule(where), listen)(lambda *_: seen.append(1))
    block(hidden).sum().backward()
    assert seen == [1]


@pytest.mark.usefixtures("here")
def test_a_changed_adapter_is_noticed(packings: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    block, hidden = block_of(adapters(5), top_k=5), torch.randn(5, HIDDEN)
    outs = [block(hidden)]
    block.experts[1].up_proj.scale = 3.0
    outs.append(block(hidden))
    block.experts[1].up_proj.b.data.mul_(2)
    outs.append(block(hidden))
    block.experts[1].up_proj.b.requires_grad_()
    outs.append(block(hidden))
    with torch.no_grad():
        block.experts[1].up_proj.b.mul_(2)
    outs.append(block(hidden))
    assert len(packings) == 3
    monkeypatch.setattr(packing, "DEVICES", set())
    torch.testing.assert_close(outs[-1], block(hidden), rtol=1e-5, atol=1e-5)
    assert [torch.equal(one, other) for one, other in pairwise(outs)] == [False, False, True, False]


@pytest.mark.usefixtures("here")
def test_a_block_that_moves_lets_go_of_what_was_packed() -> None:
    block = block_of(distinct(3))
    block(torch.randn(5, HIDDEN))
    held = weakref.ref(block._packing._packed)
    assert held() is not None
    block.double()
    gc.collect()
    assert held() is None


@pytest.mark.usefixtures("here")
def test_two_blocks_that_share_an_expert_do_not_pack_for_ever(packings: list[object]) -> None:
    shared, hidden = make_mlp(), torch.randn(3, HIDDEN)
    blocks = [block_of([shared, *distinct(2)]) for _ in range(2)]
    first = [block(hidden) for block in blocks]
    with pytest.warns(UserWarning, match="no longer packed"):
        again = [[block(hidden) for block in blocks] for _ in range(20)][-1]
    torch.testing.assert_close(again, first, rtol=1e-5, atol=1e-5)
    assert len(packings) <= 2 * packing.OFTEN


@pytest.mark.usefixtures("here")
def test_packed_while_generating_can_be_trained_through() -> None:
    block = block_of(distinct(3))
    with torch.inference_mode():
        block(torch.randn(20, HIDDEN))
    block.router.weight.requires_grad_()
    block(torch.randn(20, HIDDEN)).sum().backward()
    assert block.router.weight.grad.abs().max() > 0


@ALL
@pytest.mark.usefixtures("here")
def test_a_packed_block_can_be_copied(make: Callable[[int], Experts]) -> None:
    block, hidden = block_of(make(4)), torch.randn(9, HIDDEN)
    expected = block(hidden)
    twin = copy.deepcopy(block)
    assert not storages(twin) & storages(block)
    torch.testing.assert_close(twin(hidden), expected)


OPTIONS = {
    "plain": {},
    "by order": {"capacity_factor": 0.7},
    "by weight": {"capacity_factor": 0.7, "drop_policy": "weight"},
}


def shared_block(experts: Experts, **options: Any) -> MoEBlock:
    return block_of(experts, shared=make_mlp(), shared_gate=torch.randn(1, HIDDEN), **options)


@ALL
@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("tokens", [1, 3, 40])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_block_never_waits(make: Callable[[int], Experts], tokens: int, options: dict[str, Any]) -> None:
    block, hidden = shared_block(make(5), **options), torch.randn(1, tokens, HIDDEN)
    block(hidden)  # packs
    with NoWaits(), torch.no_grad():
        block(hidden)
    block.router.weight.requires_grad_()
    with NoWaits():
        block(hidden).pow(2).sum().backward()
    assert block.router.weight.grad is not None


@pytest.mark.usefixtures("here")
def test_learning_adapters_and_equal_experts_never_wait() -> None:
    learning, hidden = block_of(adapters(4)), torch.randn(40, HIDDEN)
    loras = [weight for name, weight in learning.named_parameters() if name.endswith((".a", ".b"))]
    for weight in loras:
        weight.requires_grad_()
    learning(hidden)
    with NoWaits():
        learning(hidden).pow(2).sum().backward()
    assert loras
    assert all(weight.grad is not None for weight in loras)
    with NoWaits():
        block_of([make_mlp()] * 4)(hidden)


@BOTH
def test_the_loop_waits(make: Callable[[int], Experts]) -> None:
    """The two tests above would fail for the loop over experts."""
    with pytest.raises(WaitsError), NoWaits():
        block_of(make(5))(torch.randn(40, HIDDEN))


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(("make", "tokens"), [(distinct, 1), (adapters, 40)])
def test_a_block_is_traced_as_one_graph(make: Callable[[int], Experts], tokens: int) -> None:
    """In bfloat16, which torch requires for a traced grouped product."""
    torch.compiler.reset()
    block, hidden = shared_block(make(5), capacity_factor=0.7).bfloat16(), torch.randn(1, tokens, HIDDEN).bfloat16()
    with torch.no_grad():
        expected = block(hidden)  # packs
        found = torch.compile(block, backend="eager", fullgraph=True, dynamic=False)(hidden)
    torch.testing.assert_close(found, expected)


def unfrozen(block: MoEBlock) -> None:
    block.experts[1].requires_grad_()


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("change", "first"),
    [(replaced, "compiled"), (swapped, "compiled"), (unfrozen, "compiled"), (unfrozen, "changed")],
)
def test_a_compiled_block_notices_a_changed_expert(
    change: Callable[[MoEBlock], None], first: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replaced module, a replaced parameter, and a parameter that is trained from now on."""
    torch.compiler.reset()
    block, hidden = block_of(distinct(2), top_k=2).bfloat16(), torch.randn(20, HIDDEN).bfloat16().requires_grad_()
    compiled = torch.compile(block, backend="eager")
    block(hidden)  # packs
    if first == "compiled":
        compiled(hidden)
    change(block)
    for weight in block.experts.parameters():
        weight.data = weight.data.bfloat16()
    found = compiled(hidden)
    learning = [weight for weight in block.parameters() if weight.requires_grad]
    grads = torch.autograd.grad(found.sum(), learning) if learning else []
    assert all(grad.abs().max() > 0 for grad in grads)
    monkeypatch.setattr(packing, "DEVICES", set())
    torch.testing.assert_close(found, block(hidden), rtol=2e-2, atol=2e-2)


@pytest.mark.usefixtures("here")
def test_nothing_is_moved_while_a_graph_is_captured(packings: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph would record the copy without running it, and the weights' old memory would be freed."""
    block, hidden = block_of(distinct(3)), torch.randn(5, HIDDEN)
    before = storages(block)
    monkeypatch.setattr(packing, "_is_captured", lambda hidden: True)
    captured = block(hidden)
    assert storages(block) == before
    assert packings == []
    monkeypatch.setattr(packing, "_is_captured", lambda hidden: False)
    torch.testing.assert_close(block(hidden), captured, rtol=1e-5, atol=1e-5)
    assert len(packings) == 1


@WAYS
def test_an_adapter_keeps_its_scale_in_sixteen_bits(few: int) -> None:
    """1.003 is 1 in bfloat16. Weights and inputs of ones and twos make every other number exact."""
    mlp = make_mlp().bfloat16()
    for weight in mlp.parameters():
        weight.data.fill_(0)
    mlp.act_fn = nn.Identity()
    for name in ("gate_proj", "up_proj"):
        mlp.get_submodule(name).weight.data.fill_diagonal_(1)
    experts = [mlp, adapted(mlp, ("down_proj",), rank=1, scale=1.0), adapted(mlp, ("down_proj",), rank=1, scale=1.003)]
    for expert in experts[1:]:
        expert.down_proj.a.data = torch.eye(1, FFN).bfloat16()
        expert.down_proj.b.data = torch.eye(HIDDEN, 1).bfloat16()
    hidden_TD = torch.arange(1, 65)[:, None].sqrt().bfloat16().expand(64, HIDDEN)
    ones_TK, ids_TK = torch.ones(64, 1), torch.full((64, 1), 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grouped, "FEW", few)
        found_TD = grouped.mix(hidden_TD, ones_TK, ids_TK, packed_of(experts))
        plain_TD = grouped.mix(hidden_TD, ones_TK, ids_TK - 1, packed_of(experts))
    assert (found_TD[:, 0] > plain_TD[:, 0]).any()


def test_experts_without_tokens_learn_nothing_where_a_grouped_product_says_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On Blackwell it leaves the gradient of an empty group as it finds the memory (pytorch issue 172439)."""
    product = nn.functional.grouped_mm

    def blackwell(x_AI: torch.Tensor, weight_EIO: torch.Tensor, *, offs: torch.Tensor) -> torch.Tensor:
        if weight_EIO.requires_grad:
            empty_E = offs.diff(prepend=offs.new_zeros(1)) == 0
            weight_EIO = weight_EIO.clone()
            weight_EIO.register_hook(lambda grad: grad.masked_fill(empty_E[:, None, None], torch.nan))
        return product(x_AI, weight_EIO, offs=offs)

    monkeypatch.setattr(nn.functional, "grouped_mm", blackwell)
    experts = adapters(6)
    learning = [lora for name, lora in nn.ModuleList(experts).named_parameters() if name.endswith((".a", ".b"))]
    for weight in learning:
        weight.requires_grad_()
    ids_TK = torch.tensor([[1, 3]]).expand(12, 2)
    out_TD = grouped.mix(torch.randn(12, HIDDEN), torch.rand(12, 2), ids_TK, packed_of(experts))
    grads = torch.autograd.grad(out_TD.sum(), learning)
    assert all(grad.isfinite().all() for grad in grads)
    assert any(grad.abs().max() > 0 for grad in grads)


def test_learning_adapters_are_held_once() -> None:
    experts = adapters(4)
    for weight in experts[1].parameters():
        weight.requires_grad_()
    packed = packed_of(experts)
    assert isinstance(packed, packing.Adapted)
    assert packed.low_rank is None


@pytest.mark.parametrize("form", ["virtual", "built"])
def test_a_loaded_model_says_the_same(
    form: str, parents: dict[str, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny.write_recipe(tmp_path / "r.yml", parents["llama"][0], parents["llama"])
    fm.build(recipe, tmp_path / "artifact", virtual=form == "virtual")
    model = fm.load(tmp_path / "artifact").model
    found = []
    for devices in (set(), {"cpu"}):
        monkeypatch.setattr(packing, "DEVICES", devices)
        with torch.no_grad():
            logits = model(input_ids=tiny.ids()).logits
        reply = model.generate(tiny.ids(4), max_new_tokens=8, do_sample=False, pad_token_id=0)
        found.append((logits, reply.float()))
    packed = [module._packing._packed for module in model.modules() if isinstance(module, MoEBlock)]
    assert packed
    assert all(isinstance(each, packing.Distinct) for each in packed)
    for loop, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, loop, rtol=1e-4, atol=1e-4)


@BOTH
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tokens", [1, 3, 300])
def test_a_block_gives_what_its_loop_gives_on_the_same_device(
    make: Callable[[int], Experts], device: str, dtype: torch.dtype, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    block = shared_block(make(33), capacity_factor=1.5).to(device, dtype)
    hidden = torch.randn(1, tokens, HIDDEN).to(device, dtype)
    block.router.weight.requires_grad_()
    results = []
    for devices in (set(), {device}):
        monkeypatch.setattr(packing, "DEVICES", devices)
        block.router.weight.grad = None
        out = block(hidden)
        out.float().pow(2).sum().backward()
        results.append((out.detach(), block.router.weight.grad))
    assert block._packing._packed is not None
    close = 2e-2 if dtype == torch.bfloat16 else 1e-5
    for expected, found in zip(*results, strict=True):
        assert (found - expected).abs().max() <= close * expected.abs().max()


@BOTH
@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 300])
def test_a_gpu_replays_a_block_as_a_graph(make: Callable[[int], Experts], tokens: int) -> None:
    block = shared_block(make(5), capacity_factor=0.7).to("cuda", torch.bfloat16)
    first, second = torch.randn(2, tokens, HIDDEN, device="cuda", dtype=torch.bfloat16)
    fixed = first.clone()
    with torch.no_grad():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            block(fixed)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = block(fixed)
        for hidden in (second, first):
            fixed.copy_(hidden)
            graph.replay()
            torch.testing.assert_close(out, block(hidden), rtol=2e-2, atol=2e-2)
