"""Products with stored weights equal torch's up to rounding, with and without the kernels."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from frankenmoe.moe import linear as module
from frankenmoe.moe.adapter import with_adapter
from frankenmoe.moe.grouping import group_experts
from frankenmoe.moe.linear import Int8Linear, StoredLinear, is_linear, keep_stored, linear, quantized, to_int8

# T tokens, I inputs, O outputs

LOW = (torch.bfloat16, torch.float16)
SIZES = st.one_of(st.integers(1, 9), st.sampled_from([63, 64, 65, 127, 200]))


@pytest.fixture(params=["kernels", "torch"], autouse=True)
def who(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every test with the compiled kernels and without, on a CPU that has no 16-bit products of its own."""
    monkeypatch.setattr(module, "_has_instructions", lambda dtype: False)
    monkeypatch.setattr(module, "SMALL", 0)
    if request.param == "torch":
        monkeypatch.setattr(module, "kernels", lambda: None)
    elif module.kernels() is None:
        pytest.skip("no kernels here: numba or OpenMP is missing")
    return str(request.param)


def draw(*shape: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def far(found: torch.Tensor, exact: torch.Tensor) -> float:
    """The distance between two tensors, of the length of the exact one."""
    return ((found.double() - exact.double()).norm() / exact.double().norm().clamp_min(1e-30)).item()


@settings(max_examples=40, deadline=None)
@given(tokens=SIZES, inputs=SIZES, outputs=SIZES, dtype=st.sampled_from(LOW), bias=st.booleans())
def test_products_are_those_of_float64_to_rounding(
    tokens: int, inputs: int, outputs: int, dtype: torch.dtype, bias: bool
) -> None:
    hidden_TI, weight_OI = draw(tokens, inputs, dtype=dtype, seed=0), draw(outputs, inputs, dtype=dtype, seed=1)
    bias_O = draw(outputs, dtype=dtype, seed=2) if bias else None
    exact = nn.functional.linear(hidden_TI.double(), weight_OI.double(), None if bias_O is None else bias_O.double())
    found = linear(hidden_TI, weight_OI, bias_O)
    assert found.dtype == dtype
    assert far(found, exact) < torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("shape", [(200,), (1, 200), (3, 200), (2, 7, 200), (0, 200)])
def test_gradients_and_shapes_are_torchs(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    weight_OI = draw(77, 200, dtype=dtype, seed=1)
    ours, torchs = (draw(*shape, dtype=dtype, seed=0).requires_grad_() for _ in range(2))
    outs = linear(ours, weight_OI), nn.functional.linear(torchs, weight_OI)
    assert outs[0].shape == outs[1].shape
    for out in outs:
        out.float().square().sum().backward()
    assert ours.grad is not None
    assert torchs.grad is not None
    assert far(ours.grad, torchs.grad) < 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("tokens", [1, 5])
def test_extreme_numbers_stay_what_they_are(tokens: int) -> None:
    """The smallest and the largest numbers of each type, zeros, infinity and NaN."""
    for dtype in LOW:
        info = torch.finfo(dtype)
        numbers = torch.tensor([0.0, -0.0, info.tiny, info.smallest_normal / 8, info.max, -info.max], dtype=dtype)
        weight_OI = torch.zeros(len(numbers), 80, dtype=dtype)
        weight_OI[:, 3] = numbers
        hidden_TI = torch.zeros(tokens, 80, dtype=dtype)
        hidden_TI[:, 3] = 1
        assert torch.equal(linear(hidden_TI, weight_OI), numbers.expand(tokens, -1))
        weight_OI[0, 3], weight_OI[1, 3] = torch.inf, torch.nan
        found = linear(hidden_TI, weight_OI)
        assert found[:, 0].isinf().all()
        assert found[:, 1].isnan().all()


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("tokens", [1, 5])
def test_sums_are_rounded_as_torch_rounds(who: str, tokens: int, dtype: torch.dtype) -> None:
    """Two numbers of every exponent, whose sum lies between two numbers of the type, halfway between, or past them."""
    info = torch.finfo(dtype)
    exponents = torch.arange(-149, 128, dtype=torch.float64)
    large_N = (1.5 * 2**exponents).to(dtype)
    large_N = large_N[large_N.isfinite() & (large_N != 0)].repeat(3)
    steps_N = torch.tensor([0.5, 0.75, 0.25]).repeat_interleave(len(large_N) // 3)
    small_N = (steps_N * (large_N.double() * info.eps)).to(dtype)
    weight_OI = torch.zeros(len(large_N), 80, dtype=dtype)
    weight_OI[:, 0], weight_OI[:, 70] = large_N, small_N
    hidden_TI = torch.zeros(tokens, 80, dtype=dtype)
    hidden_TI[:, [0, 70]] = 1
    if who == "torch":  # CPUs with bf16 instructions flush subnormal numbers to zero
        normal_N = (large_N.abs() >= info.tiny) & (small_N.abs() >= info.tiny)
        weight_OI, large_N, small_N = weight_OI[normal_N], large_N[normal_N], small_N[normal_N]
    assert torch.equal(linear(hidden_TI, weight_OI)[0], (large_N.float() + small_N.float()).to(dtype))


@pytest.mark.parametrize("tokens", [2, 9])
def test_strided_inputs_and_weights(tokens: int) -> None:
    hidden_TI, weight_OI = (
        draw(200, tokens, dtype=torch.bfloat16, seed=0).T,
        draw(200, 33, dtype=torch.bfloat16, seed=1).T,
    )
    assert far(linear(hidden_TI, weight_OI), hidden_TI.double() @ weight_OI.double().T) < 0.004


@pytest.mark.parametrize("tokens", [1, 2, 70])
def test_several_threads_give_what_one_gives(tokens: int) -> None:
    hidden_TI, weight_OI = (
        draw(tokens, 300, dtype=torch.bfloat16, seed=0),
        draw(1001, 300, dtype=torch.bfloat16, seed=1),
    )
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = linear(hidden_TI, weight_OI)
        torch.set_num_threads(3)
        assert torch.equal(linear(hidden_TI, weight_OI), one)
    finally:
        torch.set_num_threads(before)


def test_what_learns_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("a product that is torch's")

    monkeypatch.setattr(module, "_product", refuse)
    low = draw(6, 70, dtype=torch.bfloat16, seed=0)
    linear(low, nn.Parameter(draw(4, 70, dtype=torch.bfloat16, seed=1)))
    linear(low, low, nn.Parameter(draw(6, dtype=torch.bfloat16, seed=1)))
    linear(low.float(), low.float())
    with monkeypatch.context() as patch:
        patch.setattr(module, "_has_instructions", lambda dtype: True)
        linear(low, low)
    monkeypatch.setattr(module, "SMALL", 6 * 6 * 70 + 1)
    linear(low, low)
    monkeypatch.setattr(module, "SMALL", 6 * 6 * 70)
    with pytest.raises(AssertionError):
        linear(low, low)


def test_autocast_casts_what_is_float32() -> None:
    weight_OI, hidden_TI = draw(8, 70, dtype=torch.bfloat16, seed=0), draw(9, 70, dtype=torch.float32, seed=1)
    with pytest.raises(RuntimeError, match="dtype"):
        linear(hidden_TI, weight_OI)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = linear(hidden_TI, weight_OI)
    assert found.dtype == torch.bfloat16
    assert far(found, hidden_TI.double() @ weight_OI.double().T) < 0.004


@settings(max_examples=40, deadline=None)
@given(tokens=SIZES, inputs=SIZES, outputs=SIZES, seed=st.integers(0, 99))
def test_int8_is_its_own_rounded_weights(tokens: int, inputs: int, outputs: int, seed: int) -> None:
    layer = nn.Linear(inputs, outputs).requires_grad_(False)
    layer.weight.copy_(draw(outputs, inputs, dtype=torch.float32, seed=seed))
    hidden_TI = draw(tokens, inputs, dtype=torch.float32, seed=seed + 100)
    before = layer.weight.clone()
    weight_OI, scale_O = quantized(layer.weight)
    assert torch.equal(layer.weight, before)
    assert (weight_OI * scale_O[:, None] - layer.weight).abs().max() <= scale_O.max() * 0.5001
    exact = hidden_TI.double() @ (weight_OI.double() * scale_O[:, None]).T + layer.bias.double()
    # one token's inputs are rounded too, to at least eleven bits
    assert far(Int8Linear(layer)(hidden_TI), exact) < 2e-3


def test_int8_sums_do_not_overflow() -> None:
    """The largest input and weight everywhere: the sum of products is the largest there is."""
    layer = nn.Linear(40_000, 3, bias=False).requires_grad_(False)
    layer.weight.fill_(2.0)
    for tokens in (1, 5):
        assert torch.allclose(Int8Linear(layer)(torch.full((tokens, 40_000), 3.0)), torch.tensor(240_000.0))


def test_int8_rows_and_inputs_of_zeros_give_zeros() -> None:
    layer = nn.Linear(70, 3, bias=False).requires_grad_(False)
    layer.weight.zero_()
    found = Int8Linear(layer)
    assert torch.equal(found(torch.ones(1, 70)), torch.zeros(1, 3))
    layer.weight.fill_(1)
    assert torch.equal(Int8Linear(layer)(torch.zeros(1, 70)), torch.zeros(1, 3))


@pytest.mark.parametrize("odd", [torch.nan, torch.inf])
@pytest.mark.parametrize("tokens", [1, 5])
def test_int8_does_not_hide_what_is_no_number(odd: float, tokens: int) -> None:
    hidden_TI = torch.ones(tokens, 70)
    hidden_TI[:, 7] = odd
    assert not Int8Linear(nn.Linear(70, 3).requires_grad_(False))(hidden_TI).isfinite().any()


def test_int8_has_a_gradient_for_its_input() -> None:
    layer = nn.Linear(70, 30).requires_grad_(False)
    hidden_TI = draw(6, 70, dtype=torch.float32, seed=0).requires_grad_()
    Int8Linear(layer)(hidden_TI).square().sum().backward()
    weight_OI, scale_O = quantized(layer.weight)
    wide_OI = weight_OI * scale_O[:, None]
    out_TO = hidden_TI.detach() @ wide_OI.T + layer.bias
    assert hidden_TI.grad is not None
    assert far(hidden_TI.grad, 2 * out_TO @ wide_OI) < 1e-4


def test_to_int8_keeps_what_is_shared_and_gates_of_one_output() -> None:
    shared, gate = nn.Linear(8, 8), nn.Linear(8, 1)
    model = nn.ModuleDict({"a": nn.Sequential(shared), "b": nn.Sequential(shared), "gate": gate})
    to_int8(model.requires_grad_(False))
    assert isinstance(model["a"][0], Int8Linear)
    assert model["a"][0] is model["b"][0]
    assert model["gate"] is gate


def test_int8_adapters_still_share_their_base() -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaMLP

    mlp = keep_stored(LlamaMLP(LlamaConfig(hidden_size=8, intermediate_size=16, num_attention_heads=2))).requires_grad_(
        False
    )
    experts = nn.ModuleList(
        with_adapter(mlp, {"up_proj": (draw(2, 8, dtype=torch.float32, seed=s), torch.zeros(16, 2), 1.0)})
        for s in range(3)
    )
    to_int8(experts)
    assert len(group_experts(experts)) == 1
    assert all(type(part) is not StoredLinear for part in experts.modules())


def test_keep_stored_changes_linear_layers_and_nothing_else() -> None:
    class Special(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(2, 2), Special(2, 2), nn.LayerNorm(2))
    kept = list(model)
    assert keep_stored(model) is model
    assert [type(part) for part in model] == [StoredLinear, Special, nn.LayerNorm]
    assert list(model) == kept
    assert is_linear(model[0])
    assert not is_linear(model[1])


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("inputs", [100, 400])
def test_what_does_not_fit_is_an_error(tokens: int, inputs: int) -> None:
    """And not a look at memory beyond the end."""
    with pytest.raises(RuntimeError, match="shape"):
        linear(torch.ones(tokens, inputs).bfloat16(), torch.ones(77, 200).bfloat16())
    with pytest.raises(RuntimeError, match="shape"):
        Int8Linear(nn.Linear(200, 77).requires_grad_(False))(torch.ones(tokens, inputs))


@pytest.mark.parametrize("tokens", [1, 5])
def test_one_bias_for_all_outputs_is_repeated(tokens: int) -> None:
    """As torch does, and not read as if there were one for each."""
    hidden_TI, weight_OI = draw(tokens, 70, dtype=torch.bfloat16, seed=0), draw(77, 70, dtype=torch.bfloat16, seed=1)
    bias_1 = torch.tensor([40.0]).bfloat16()
    assert far(linear(hidden_TI, weight_OI, bias_1), hidden_TI.double() @ weight_OI.double().T + 40) < 0.004


@pytest.mark.parametrize("tokens", [1, 5])
def test_int8_scales_of_another_type_are_read_as_such(tokens: int) -> None:
    layer, hidden_TI = Int8Linear(nn.Linear(70, 30)), draw(tokens, 70, dtype=torch.float32, seed=0)
    before = layer(hidden_TI)
    layer.scale = layer.scale.double()
    assert far(layer(hidden_TI), before) < 1e-3


def test_shapes_of_fewer_dimensions_are_torchs() -> None:
    hidden_TI = draw(5, 70, dtype=torch.bfloat16, seed=0)
    assert torch.equal(linear(hidden_TI, hidden_TI[0]), nn.functional.linear(hidden_TI, hidden_TI[0]))
    with pytest.raises(RuntimeError):
        linear(hidden_TI[0, 0], hidden_TI)


@pytest.mark.parametrize("layer", [StoredLinear(70, 3).bfloat16(), Int8Linear(nn.Linear(70, 3))])
def test_tensors_without_numbers_are_not_read(layer: nn.Module) -> None:
    from torch._subclasses import FakeTensorMode

    layer.requires_grad_(False)
    dtype = torch.float32 if isinstance(layer, Int8Linear) else torch.bfloat16
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert layer(torch.ones(5, 70, dtype=dtype)).shape == (5, 3)
    if isinstance(layer, Int8Linear):
        assert copy.deepcopy(layer).to("meta")(torch.ones(5, 70, device="meta")).shape == (5, 3)


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("layer", [StoredLinear(70, 3).bfloat16(), Int8Linear(nn.Linear(70, 3))])
def test_nothing_is_written_where_results_have_no_numbers(layer: nn.Module, tokens: int) -> None:
    from torch._subclasses import FakeTensorMode

    layer.requires_grad_(False)
    hidden_TI = torch.ones(tokens, 70, dtype=torch.float32 if isinstance(layer, Int8Linear) else torch.bfloat16)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert layer(hidden_TI).shape == (tokens, 3)


@pytest.mark.parametrize("tokens", [1, 5])
def test_who_counts_operations_sees_them(tokens: int) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counted:
        linear(torch.ones(tokens, 70).bfloat16(), torch.ones(30, 70).bfloat16())
    assert counted.get_total_flops() == 2 * tokens * 70 * 30


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layer", [StoredLinear(70, 3).bfloat16(), Int8Linear(nn.Linear(70, 3))])
def test_traces_and_batches_compute(layer: nn.Module) -> None:
    layer.requires_grad_(False)
    dtype = torch.float32 if isinstance(layer, Int8Linear) else torch.bfloat16
    hidden_BTI = draw(2, 5, 70, dtype=dtype, seed=0)
    traced = torch.jit.trace(layer, (torch.zeros(5, 70, dtype=dtype),), check_trace=False)
    assert far(traced(hidden_BTI[0]), layer(hidden_BTI[0])) < 0.005
    assert far(torch.vmap(layer)(hidden_BTI), layer(hidden_BTI)) < 0.005


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("auto", LOW)
def test_autocast_decides_the_type(dtype: torch.dtype, auto: torch.dtype) -> None:
    hidden_TI, weight_OI = draw(9, 70, dtype=dtype, seed=1), draw(8, 70, dtype=dtype, seed=0)
    with torch.autocast("cpu", dtype=auto):
        assert linear(hidden_TI, weight_OI).dtype == nn.functional.linear(hidden_TI, weight_OI).dtype


def test_autocast_does_not_round_int8_sums() -> None:
    layer = Int8Linear(nn.Linear(70, 30).requires_grad_(False))
    hidden_TI = draw(6, 70, dtype=torch.float32, seed=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = layer(hidden_TI)
    assert far(found, layer(hidden_TI)) < 1e-6


def test_half_does_not_round_int8_scales() -> None:
    layer = nn.Linear(70, 30).requires_grad_(False)
    layer.weight.mul_(1e-4)  # scales below the normal numbers of fp16
    found = Int8Linear(layer)
    before = found.scale.clone()
    for cast in (found.half, found.bfloat16, found.float, lambda: found.to(torch.float16)):
        assert torch.equal(cast().scale, before)
    assert found.to("meta").to_empty(device="cpu").scale.dtype == torch.float32


def test_one_large_input_does_not_drown_the_others_of_int8() -> None:
    """Such as the massive activations of arXiv 2402.17762, before a wide down projection."""
    layer = nn.Linear(12_288, 50, bias=False).requires_grad_(False)
    layer.weight.copy_(draw(50, 12_288, dtype=torch.float32, seed=0))
    found = Int8Linear(layer)
    hidden_TI = draw(1, 12_288, dtype=torch.float32, seed=1)
    hidden_TI[0, 5] = 3000
    exact = hidden_TI.double() @ (found.weight.double() * found.scale[:, None].double()).T
    assert far(found(hidden_TI), exact) < 2e-3


def test_int8_weights_are_never_taken_for_others() -> None:
    """Not when they are saved and loaded into a common layer, nor by tying another weight to them."""
    layer = nn.Linear(70, 30).requires_grad_(False)
    found = Int8Linear(layer)
    with pytest.raises(RuntimeError, match="Missing"):
        layer.load_state_dict(found.state_dict(), strict=True)
    assert "weight" not in found.state_dict()
    with pytest.raises((KeyError, AttributeError)):
        found.weight = layer.weight
    again = Int8Linear(nn.Linear(70, 30))
    again.load_state_dict(found.state_dict())
    hidden_TI = draw(5, 70, dtype=torch.float32, seed=0)
    assert torch.equal(again(hidden_TI), found(hidden_TI))


def test_a_weight_is_rounded_on_its_own_device() -> None:
    layer = nn.Linear(8, 4, bias=False, device="meta")
    assert Int8Linear(layer).scale.device == layer.weight.device
