"""The kernel for one token: it equals the experts one by one, and is not used where it must not be."""

import copy
import io
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from frankenmoe.moe import linear as linear_module
from frankenmoe.moe.adapter import LoraLinear, with_adapter
from frankenmoe.moe.block import MoEBlock
from frankenmoe.moe.cpu import onetoken
from frankenmoe.moe.cpu.onetoken import OneToken
from frankenmoe.moe.experts import dispatch
from frankenmoe.moe.grouping import group_experts
from frankenmoe.moe.linear import keep_stored, to_int8
from frankenmoe.moe.router import Router

LOW = (torch.bfloat16, torch.float16)
LORA_TYPES = (*LOW, torch.float32)
NAMES = ("gate_proj", "up_proj", "down_proj")


@pytest.fixture(autouse=True)
def small_ones_too(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Uses the kernel, and several threads, for small sizes too."""
    if linear_module.kernels() is None:
        pytest.skip("no kernels here: numba or OpenMP is missing")
    monkeypatch.setattr(onetoken, "SMALL", 0)
    from frankenmoe.moe.cpu import compiled

    monkeypatch.setattr(compiled, "GRAIN", 1)
    with torch.inference_mode():
        yield


def make(
    hidden: int = 64, ffn: int = 96, *, dtype: torch.dtype = torch.bfloat16, seed: int = 0, act: str = "silu"
) -> LlamaMLP:
    torch.manual_seed(seed)
    mlp = LlamaMLP(
        LlamaConfig(hidden_size=hidden, intermediate_size=ffn, hidden_act=act, num_attention_heads=1, head_dim=2)
    )
    return keep_stored(mlp.to(dtype).requires_grad_(False))  # type: ignore[return-value]


def adapted(base: nn.Module, ranks: tuple[int, int, int], *, dtype: torch.dtype, seed: int) -> nn.Module:
    """`base` under adapters of these ranks on gate, up and down; 0 for none."""
    draw = torch.Generator().manual_seed(seed)
    loras = {}
    for name, rank in zip(NAMES, ranks, strict=True):
        layer = base.get_submodule(name)
        if rank:
            a_RI = torch.randn(rank, layer.in_features, generator=draw) * 0.2
            b_OR = torch.randn(layer.out_features, rank, generator=draw) * 0.2
            loras[name] = (a_RI.to(dtype), b_OR.to(dtype), 0.5 + seed)
    return with_adapter(base, loras)


def exact(hidden_1D: torch.Tensor, weights: list[float], ids: list[int], experts: list[nn.Module]) -> torch.Tensor:
    """The same in float64, expert by expert."""
    wide = {id(expert): copy.deepcopy(expert).double() for expert in experts}
    return sum(  # type: ignore[return-value]
        (
            weight * wide[id(experts[index])](hidden_1D.double())
            for weight, index in zip(weights, ids, strict=True)
            if index >= 0
        ),
        torch.zeros(hidden_1D.shape, dtype=torch.float64),
    )


def mixed(
    hidden_1D: torch.Tensor, weights: list[float], ids: list[int], experts: list[nn.Module]
) -> torch.Tensor | None:
    return OneToken().mix(hidden_1D, torch.tensor([weights]), torch.tensor([ids]), group_experts(experts))


def far(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found.double() - wanted).norm() / wanted.norm().clamp_min(1e-30)).item()


RANKS = st.tuples(*[st.sampled_from([0, 1, 5, 16])] * 3)


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.tuples(st.sampled_from([1, 17, 64]), st.sampled_from([1, 33, 160])),
    dtype=st.sampled_from(LOW),
    lora_type=st.sampled_from(LORA_TYPES),
    ranks=st.lists(RANKS, min_size=1, max_size=4),
    choice=st.lists(st.integers(-1, 5), min_size=1, max_size=6),
    threads=st.integers(1, 3),
)
def test_experts_adapters_and_equal_ones_in_any_choice(
    sizes: tuple[int, int],
    dtype: torch.dtype,
    lora_type: torch.dtype,
    ranks: list[tuple[int, int, int]],
    choice: list[int],
    threads: int,
) -> None:
    """Two FFNs of their own, one of them twice, then adapters over the first."""
    first, second = make(*sizes, dtype=dtype, seed=1), make(*sizes, dtype=dtype, seed=2)
    experts = [first, second, second, *(adapted(first, each, dtype=lora_type, seed=k) for k, each in enumerate(ranks))]
    ids = [index % len(experts) if index >= 0 else index for index in choice]
    weights = torch.rand(len(ids), generator=torch.Generator().manual_seed(3)).tolist()
    hidden_1D = torch.randn(1, sizes[0], generator=torch.Generator().manual_seed(4)).to(dtype)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = mixed(hidden_1D, weights, ids, experts)
    finally:
        torch.set_num_threads(before)
    if all(index < 0 for index in ids):
        assert found is None
        return
    assert found is not None
    assert found.dtype == dtype
    wanted, info = exact(hidden_1D, weights, ids, experts), torch.finfo(dtype)
    # the smallest numbers of a type are no closer to each other than its smallest one is to zero
    steps = info.tiny * info.eps * wanted.numel() ** 0.5
    assert (found.double() - wanted).norm() < info.eps * wanted.norm() + steps


@pytest.mark.parametrize("dtype", LORA_TYPES)
def test_int8_under_adapters(dtype: torch.dtype) -> None:
    base = make(200, 330, seed=1)
    experts = nn.ModuleList([base, make(200, 330, seed=2), adapted(base, (4, 0, 8), dtype=torch.bfloat16, seed=1)])
    to_int8(experts)
    plain = nn.ModuleList(copy.deepcopy(list(experts)))
    for expert in plain:
        for name in NAMES:
            part = expert.get_submodule(name)
            layer = part.base if isinstance(part, LoraLinear) else part
            widened = nn.Linear(layer.in_features, layer.out_features, bias=False, dtype=torch.float64)
            widened.weight.copy_(layer.int8.double() * layer.scale[:, None])
            if isinstance(part, LoraLinear):
                part.base = widened
            else:
                setattr(expert, name, widened)
    hidden_1D = torch.randn(1, 200).to(dtype)
    found = mixed(hidden_1D, [0.5, 0.25, 0.75], [2, 1, 0], list(experts))
    assert found is not None
    assert far(found, exact(hidden_1D, [0.5, 0.25, 0.75], [2, 1, 0], list(plain))) < max(1e-4, torch.finfo(dtype).eps)


def test_not_a_number_is_not_hidden() -> None:
    experts: list[nn.Module] = [make(seed=1), make(seed=2)]
    hidden_1D = torch.randn(1, 64).bfloat16()
    nan = mixed(hidden_1D, [torch.nan, 0.5], [0, 1], experts)
    assert nan is not None
    assert nan.isnan().all()
    hidden_1D[0, 3] = torch.nan
    nan = mixed(hidden_1D, [0.5, 0.5], [0, 1], experts)
    assert nan is not None
    assert nan.isnan().all()


class Case(nn.Module):
    """A block that has used the kernel once."""

    def __init__(self, **keys: object) -> None:
        super().__init__()
        first, second = make(seed=1), make(seed=2)
        experts = [first, second, adapted(first, (4, 4, 4), dtype=torch.bfloat16, seed=1)]
        self.block = MoEBlock(Router(torch.randn(3, 64).bfloat16(), top_k=3, renormalize=True), experts)
        self.experts, self.memory = self.block.experts, OneToken()
        self.hidden_1D = torch.randn(1, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
        assert self.short() is not None

    def short(self) -> torch.Tensor | None:
        weights, ids = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0, 1, 2]])
        return self.memory.mix(self.hidden_1D, weights, ids, self.block.groups)

    def check(self) -> None:
        found = self.short()
        assert found is not None
        assert far(found, exact(self.hidden_1D, [0.5, 0.25, 0.25], [0, 1, 2], list(self.experts))) < 0.008


def replace_weight(case: Case) -> None:
    case.experts[1].up_proj.weight = nn.Parameter(torch.randn(96, 64).bfloat16(), requires_grad=False)


def move_weight(case: Case) -> None:
    case.experts[0].down_proj.weight.data = torch.randn(64, 96).bfloat16()


def write_weight(case: Case) -> None:
    case.experts[1].gate_proj.weight.zero_()


def replace_layer(case: Case) -> None:
    case.experts[1].gate_proj = copy.deepcopy(case.experts[1].up_proj)


def scale_adapter(case: Case) -> None:
    case.experts[2].up_proj.scale = 7.0


def replace_adapter(case: Case) -> None:
    case.experts[2].down_proj.b = nn.Parameter(torch.randn(64, 4).bfloat16(), requires_grad=False)


@pytest.mark.parametrize(
    "change", [replace_weight, move_weight, write_weight, replace_layer, scale_adapter, replace_adapter]
)
def test_a_change_is_seen(change: object) -> None:
    case = Case()
    change(case)  # type: ignore[operator]
    case.check()


def add_bias(case: Case) -> None:
    case.experts[1].up_proj.bias = nn.Parameter(torch.ones(96).bfloat16(), requires_grad=False)


def retype_weight(case: Case) -> None:
    """At the same address, as memory that was freed in between may be."""
    weight = case.experts[1].up_proj.weight
    weight.data = weight.data.view(torch.float16)


def narrow(case: Case) -> None:
    for name in ("gate_proj", "up_proj"):
        case.experts[1].get_submodule(name).weight.data = case.experts[1].get_submodule(name).weight.data[:48]
    case.experts[1].down_proj.weight.data = case.experts[1].down_proj.weight.data[:, :48]


def cut_adapter(case: Case) -> None:
    case.experts[2].down_proj.b = nn.Parameter(torch.randn(64, 3).bfloat16(), requires_grad=False)


def narrow_base(case: Case) -> None:
    """Of all experts, but not what adapters were made for."""
    for expert in case.experts[:2]:
        for name in ("gate_proj", "up_proj"):
            expert.get_submodule(name).weight.data = expert.get_submodule(name).weight.data[:48]
        expert.down_proj.weight.data = expert.down_proj.weight.data[:, :48].contiguous()


def make_int8(case: Case) -> None:
    """Numbers without scales, which are at no address."""
    for expert in case.experts[:2]:
        for name in NAMES:
            layer = expert.get_submodule(name)
            layer.weight = nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)


@pytest.mark.parametrize("change", [add_bias, retype_weight, narrow, narrow_base, cut_adapter, make_int8])
def test_what_no_longer_fits_is_left_to_torch(change: object) -> None:
    case = Case()
    change(case)  # type: ignore[operator]
    assert case.short() is None


def test_other_int8_scales_are_seen() -> None:
    expert, hidden_1D, memory = make(200, 330), torch.randn(1, 200), OneToken()
    to_int8(expert)
    block = MoEBlock(Router(torch.randn(1, 200), top_k=1, renormalize=True), [expert])
    weights, ids = torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.long)
    before = memory.mix(hidden_1D, weights, ids, block.groups)
    expert.down_proj.scale = 2 * expert.down_proj.scale
    found = memory.mix(hidden_1D, weights, ids, block.groups)
    assert found is not None
    assert before is not None
    torch.testing.assert_close(found, 2 * before)


def test_copies_and_files_of_a_block_keep_no_addresses() -> None:
    block = MoEBlock(Router(torch.randn(2, 64).bfloat16(), top_k=2, renormalize=True), [make(seed=1), make(seed=2)])
    hidden_1D, file = torch.randn(1, 64).bfloat16(), io.BytesIO()
    wanted = block(hidden_1D)
    copied = copy.deepcopy(block)
    assert not copied._one_token._prepared
    torch.save(block, file)
    file.seek(0)
    for found in (copied, torch.load(file, weights_only=False)):
        assert torch.equal(found(hidden_1D), wanted)


def listen_to_expert(case: Case, seen: list[object]) -> None:
    case.experts[1].register_forward_hook(lambda *found: seen.append(found))


def listen_to_layer(case: Case, seen: list[object]) -> None:
    case.experts[0].up_proj.register_forward_pre_hook(lambda *found: seen.append(found))


def give_forward(case: Case, seen: list[object]) -> None:
    layer = case.experts[1].down_proj
    kept = layer.forward

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        seen.append(hidden)
        return kept(hidden)

    layer.forward = forward


@pytest.mark.parametrize("listen", [listen_to_expert, listen_to_layer, give_forward])
def test_who_listens_is_heard(listen: object) -> None:
    case, seen = Case(), list[object]()
    listen(case, seen)  # type: ignore[operator]
    weights, ids = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0, 1, 2]])
    assert case.short() is None
    dispatch(case.hidden_1D, weights, ids, case.experts, groups=case.block.groups, one_token=case.memory)
    assert seen


def test_what_else_an_expert_may_be_is_left_to_it() -> None:
    hidden_1D = torch.randn(1, 64).bfloat16()
    biased = make(seed=3)
    biased.down_proj.bias = nn.Parameter(torch.ones(64).bfloat16())
    others = [make(act="gelu"), nn.Linear(64, 64).bfloat16(), make(dtype=torch.float32), biased]
    for other in others:
        assert mixed(hidden_1D.to(next(other.parameters()).dtype), [1.0], [0], [other]) is None
    assert mixed(hidden_1D, [0.5, 0.5], [0, 1], [make(ffn=96), make(ffn=64)]) is None
    assert mixed(hidden_1D.float(), [1.0], [0], [make()]) is None
    assert mixed(hidden_1D, [1.0], [0], [make()]) is not None


def test_training_and_autocast_are_left_to_torch() -> None:
    case = Case()
    with torch.inference_mode(False), torch.enable_grad():
        assert case.short() is None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert case.short() is None
    assert case.short() is not None


@pytest.mark.parametrize("capacity", [None, 0.5])
def test_a_block_takes_the_short_way_for_one_token_and_agrees_with_many(
    capacity: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    router = Router(torch.randn(4, 64).bfloat16(), top_k=2, renormalize=True)
    block = MoEBlock(router, [make(seed=seed) for seed in range(4)], capacity_factor=capacity)
    hidden_TD = torch.randn(6, 64).bfloat16()
    taken = []
    monkeypatch.setattr(
        OneToken, "mix", lambda self, *args, whole=OneToken.mix: taken.append(found := whole(self, *args)) or found
    )
    ones_TD = torch.cat([block(row[None]) for row in hidden_TD])
    assert len(taken) == 6
    assert all(found is not None for found in taken)
    if capacity is None:
        assert far(ones_TD, block(hidden_TD).double()) < 0.01
