"""Merges: what each must give, for any shape and any blocks; nested inputs; what is refused. See also the oracles."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from frankenmoe.checkpoint import merging
from frankenmoe.checkpoint import values as values_module
from frankenmoe.checkpoint.header import read_header
from frankenmoe.checkpoint.tensors import (
    DTYPES,
    MERGES,
    Constant,
    LowRank,
    Merge,
    Noise,
    Scale,
    TensorRef,
    TensorWrite,
)
from frankenmoe.checkpoint.values import materialize
from frankenmoe.errors import NumericsError

MASK_STARTS = [False, True, False, False, False, True, False, False]
Input = TensorRef | TensorWrite


def written(write: TensorWrite) -> torch.Tensor:
    raw = torch.from_numpy(materialize(write).copy())
    return raw.view(getattr(torch, DTYPES[write.dtype].name)).view(write.shape)


def merge_of(inputs: list[Input], method: str, *, dtype: str = "F32", **settings: object) -> torch.Tensor:
    weights = settings.pop("weights", (1.0,) * (len(inputs) - MERGES[method]))
    return written(TensorWrite("out", dtype, inputs[0].shape, tuple(inputs), (Merge(method, weights, **settings),)))


@contextmanager
def cut(*, block: int, chunk: int) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(values_module, "BLOCK", block)
        patch.setattr(merging, "_CHUNK", chunk)
        yield


@pytest.fixture
def refs(save: Callable[..., dict[str, TensorRef]]) -> list[TensorRef]:
    """A base and four parents near it, in bf16."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(31, 17, generator=generator)
    tensors = [base + 0.1 * number * torch.randn(31, 17, generator=generator) for number in range(5)]
    found = save({str(number): tensor.bfloat16() for number, tensor in enumerate(tensors)})
    return [found[str(number)] for number in range(5)]


def tensor_of(ref: TensorRef) -> torch.Tensor:
    return written(TensorWrite("w", "F32", ref.shape, (ref,)))


WHOLE = st.integers(-40, 40).map(float)  # sums and differences of whole numbers are exact


@st.composite
def small(draw: st.DrawFn) -> list[torch.Tensor]:
    """Two to four tensors of any small shape."""
    shape = draw(st.lists(st.integers(1, 5), min_size=0, max_size=3))
    numel = math.prod(shape)
    count = draw(st.integers(2, 4))
    return [
        torch.tensor(draw(st.lists(WHOLE, min_size=numel, max_size=numel))).reshape(shape) / 8 for _ in range(count)
    ]


@pytest.fixture(scope="module")
def keep(tmp_path_factory: pytest.TempPathFactory) -> Callable[[list[torch.Tensor]], list[TensorRef]]:
    folder = tmp_path_factory.mktemp("merging")
    numbers = iter(range(10**9))

    def saved(tensors: list[torch.Tensor]) -> list[TensorRef]:
        file = folder / f"{next(numbers)}.safetensors"
        save_file({str(index): tensor.contiguous() for index, tensor in enumerate(tensors)}, file)
        found = read_header(file)
        return [found[str(index)] for index in range(len(tensors))]

    return saved


@settings(deadline=None, max_examples=60)
@given(tensors=small(), block=st.integers(1, 30), chunk=st.sampled_from([2, 4, 64]), density=st.floats(0.01, 1))
def test_any_shape_in_any_blocks(
    keep: Callable, tensors: list[torch.Tensor], block: int, chunk: int, density: float
) -> None:
    refs = keep(tensors)
    for method in MERGES:
        own = refs[:2] if method == "slerp" else refs
        whole = merge_of(own, method, density=1.0 if method.startswith("dare") else density, scale=0.5)
        with cut(block=block, chunk=chunk):
            pieces = merge_of(own, method, density=1.0 if method.startswith("dare") else density, scale=0.5)
        if method == "slerp":  # its sums of squares add up in another order
            torch.testing.assert_close(pieces, whole, rtol=1e-6, atol=1e-7)
        else:
            assert torch.equal(pieces, whole)


@settings(deadline=None, max_examples=40)
@given(tensors=small(), data=st.data())
def test_the_order_of_parents_does_not_matter(keep: Callable, tensors: list[torch.Tensor], data: st.DataObject) -> None:
    base, *parents = keep(tensors)
    weights = data.draw(st.lists(st.sampled_from([0.5, 1.0, 2.0]), min_size=len(parents), max_size=len(parents)))
    order = data.draw(st.permutations(range(len(parents))))
    mixed, mixed_weights = [parents[index] for index in order], tuple(weights[index] for index in order)
    for method in ("average", "task_arithmetic", "ties"):
        first = [base] if MERGES[method] else []
        one = merge_of([*first, *parents], method, weights=tuple(weights), density=0.5)
        two = merge_of([*first, *mixed], method, weights=mixed_weights, density=0.5)
        assert torch.equal(one, two)


@settings(deadline=None, max_examples=40)
@given(tensors=small(), density=st.floats(0.01, 1))
def test_ends(keep: Callable, tensors: list[torch.Tensor], density: float) -> None:
    base, *parents = keep(tensors)
    for method in (name for name, needs_base in MERGES.items() if needs_base):
        assert torch.equal(merge_of([base, *parents], method, scale=0.0, density=density), tensors[0])
        assert torch.equal(merge_of([base, parents[0]], method), tensors[1])  # one parent, all of it
        assert torch.equal(merge_of([base, base, base], method, density=density), tensors[0])
    assert torch.equal(
        merge_of([base, *parents], "dare_linear", scale=0.7), merge_of([base, *parents], "task_arithmetic", scale=0.7)
    )
    assert torch.equal(merge_of([base, parents[0]], "slerp", t=0.0), tensors[0])
    assert torch.equal(merge_of([base, parents[0]], "slerp", t=1.0), tensors[1])


@settings(deadline=None, max_examples=40)
@given(
    numbers=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=20),
    weights=st.lists(st.floats(0.01, 100), min_size=1, max_size=5),
)
def test_an_average_of_equal_parents_is_that_parent(keep: Callable, numbers: list[float], weights: list[float]) -> None:
    (ref,) = keep([torch.tensor(numbers)])
    found = merge_of([ref] * len(weights), "average", weights=tuple(weights))
    assert torch.equal(found.view(torch.int32) & 0x7FFFFFFF, torch.tensor(numbers).view(torch.int32) & 0x7FFFFFFF)


def test_formulae(refs: list[TensorRef]) -> None:
    """Against the papers' formulae in float64."""
    base, *parents = (tensor_of(ref).double() for ref in refs)
    weights = torch.tensor([1.0, 0.5, -0.25, 2.0], dtype=torch.float64)
    differences = torch.stack([parent - base for parent in parents])
    weighted = weights[:, None, None] * differences
    arithmetic = base + 0.6 * weighted.sum(0)
    found = merge_of([*refs], "task_arithmetic", weights=tuple(weights.tolist()), scale=0.6)
    torch.testing.assert_close(found.double(), arithmetic, rtol=1e-6, atol=1e-6)
    average = (weights[:, None, None] * torch.stack(parents)).sum(0) / weights.sum()
    found = merge_of(refs[1:], "average", weights=tuple(weights.tolist()))
    torch.testing.assert_close(found.double(), average, rtol=1e-6, atol=1e-6)
    cosine = torch.nn.functional.cosine_similarity(parents[0].ravel(), parents[3].ravel(), dim=0)
    theta = torch.acos(cosine)
    arc = (torch.sin(0.7 * theta) * parents[0] + torch.sin(0.3 * theta) * parents[3]) / torch.sin(theta)
    found = merge_of([refs[1], refs[4]], "slerp", t=0.3)
    torch.testing.assert_close(found.double(), arc, rtol=1e-5, atol=1e-6)


def test_ties_by_hand(save: Callable[..., dict[str, TensorRef]]) -> None:
    """Trim each to its three largest, elect by the sum, average those that agree."""
    rows = {
        "base": [0.0, 0.0, 0.0, 0.0, 0.0],
        "a": [3.0, -2.0, 1.0, 0.5, 0.0],  # 3, -2, 1 stay
        "b": [-1.0, -4.0, 0.5, 0.25, 2.0],  # -1, -4, 2 stay
        "c": [-2.0, 1.0, 0.0, 0.0, -2.0],  # -2, 1, -2 stay
    }
    found = save({name: torch.tensor(row) for name, row in rows.items()})
    merged = merge_of([found[name] for name in rows], "ties", density=0.6)
    # sums 0 (so plus), -5, 1, 0, 0 (so plus)
    assert merged.tolist() == [3.0, -3.0, 1.0, 0.0, 2.0]


def test_the_first_of_equal_magnitudes_are_kept(save: Callable[..., dict[str, TensorRef]]) -> None:
    found = save({"base": torch.zeros(7), "a": torch.tensor([1.0, -2.0, 2.0, 5.0, 2.0, -2.0, 1.0])})
    with cut(block=3, chunk=2):
        merged = merge_of([found["base"], found["a"]], "ties", density=0.6)  # four of seven
    assert merged.tolist() == [0.0, -2.0, 2.0, 5.0, 2.0, 0.0, 0.0]


def kept_by(zero_and_one: list[TensorRef], *, seed: int, density: float) -> torch.Tensor:
    return merge_of(zero_and_one, "dare_linear", seed=seed, density=density) != 0


def test_dare_keeps_its_share_and_the_length(save: Callable[..., dict[str, TensorRef]]) -> None:
    found = save({"zero": torch.zeros(40_001), "one": torch.linspace(-1, 1, 40_001)})
    merged = merge_of([found["zero"], found["one"]], "dare_linear", seed=2**64 - 1, density=0.3)
    assert (merged != 0).double().mean().item() == pytest.approx(0.3, abs=0.01)
    assert merged.double().abs().sum().item() == pytest.approx(tensor_of(found["one"]).double().abs().sum().item())
    factors = (merged / tensor_of(found["one"]))[merged != 0]
    assert factors.mean().item() == pytest.approx(1 / 0.3, rel=0.03)
    torch.testing.assert_close(factors, torch.full_like(factors, factors[0].item()))


def test_dare_depends_on_seed_parent_and_block_alone(save: Callable[..., dict[str, TensorRef]]) -> None:
    found = save({"zero": torch.zeros(64), "one": torch.ones(64), "zeros": torch.zeros(32), "ones": torch.ones(32)})
    whole, part = [found["zero"], found["one"]], [found["zeros"], found["ones"]]
    with cut(block=16, chunk=4):
        mask = kept_by(whole, seed=7, density=0.5)
        assert torch.equal(mask[:32], kept_by(part, seed=7, density=0.5))
        assert not torch.equal(mask[:16], mask[16:32])
        assert not torch.equal(mask, kept_by(whole, seed=8, density=0.5))
        second = merge_of([*whole, found["one"]], "dare_linear", weights=(0.0, 1.0), seed=7, density=0.5) != 0
        assert not torch.equal(mask, second)
        with cut(block=16, chunk=8):
            assert torch.equal(mask, kept_by(whole, seed=7, density=0.5))


def test_dare_is_the_same_on_every_machine(save: Callable[..., dict[str, TensorRef]]) -> None:
    found = save({"zero": torch.zeros(8), "one": torch.ones(8)})
    assert kept_by([found["zero"], found["one"]], seed=2**64 - 1, density=0.5).tolist() == MASK_STARTS


def adapted(ref: TensorRef, a: TensorRef, b: TensorRef) -> TensorWrite:
    return TensorWrite("adapted", "BF16", ref.shape, (ref,), (LowRank(a, b, 0.5),))


@pytest.mark.parametrize("method", MERGES)
def test_an_input_may_be_computed(
    refs: list[TensorRef], save: Callable[..., dict[str, TensorRef]], method: str
) -> None:
    """Adapter, noise and merge inside a merge equal the same merge of their results, stored as float32."""
    factors = save({"a": torch.randn(3, 17), "b": torch.randn(31, 3)}, file="lora.safetensors")
    merge = Merge("ties", (1.0, 0.5), density=0.4)
    inner: list[Input] = [
        adapted(refs[1], factors["a"], factors["b"]),
        TensorWrite("noisy", "BF16", (31, 17), (refs[2],), (Scale(2.0), Noise(0.1, True, 5))),
        TensorWrite("merged", "BF16", (31, 17), (refs[0], refs[3], adapted(refs[4], *factors.values())), (merge,)),
    ]
    if method == "slerp":
        del inner[0]
    stored = {}
    with cut(block=100, chunk=16):
        for index, write in enumerate(inner):
            stored[str(index)] = written(TensorWrite("w", "F32", write.shape, write.inputs, write.steps))
        plain = save(stored, file="stored.safetensors")
        keys = {"density": 0.5, "scale": 0.7, "seed": 1}
        found = merge_of([refs[0], *inner] if MERGES[method] else inner, method, **keys)
        flat = [plain[str(index)] for index in range(len(inner))]
        expected = merge_of([refs[0], *flat] if MERGES[method] else [*flat], method, **keys)
        assert torch.equal(found, expected)


def test_statistics_of_an_input_are_computed_once(refs: list[TensorRef], monkeypatch: pytest.MonkeyPatch) -> None:
    """The outer merge reads its inputs three times; their thresholds and deviations stay the same."""
    calls = []
    largest, std = merging._largest, values_module._std
    monkeypatch.setitem(
        merging.METHODS,
        "ties",
        lambda merge, inputs: merging._differences(
            merge,
            inputs,
            trim=lambda *args: calls.append("largest") or largest(*args),
            mix=merging._elected,
            normalize=True,
        ),
    )
    monkeypatch.setattr(values_module, "_std", lambda numbers: calls.append("std") or std(numbers))
    merge = Merge("ties", (1.0,), density=0.5)
    inner = TensorWrite("inner", "F32", (31, 17), (refs[0], refs[1]), (merge, Noise(0.1, True, 0)))
    written(TensorWrite("outer", "F32", (31, 17), (refs[0], inner), (merge,)))
    assert calls == ["largest", "std", "largest"]


def test_a_computed_input_without_a_merge(refs: list[TensorRef]) -> None:
    constant = TensorWrite("c", "F32", (31, 17), (), (Constant(2.0),))
    assert not TensorWrite("w", "F32", (31, 17), (constant,)).is_copy
    assert torch.equal(written(TensorWrite("w", "F32", (31, 17), (constant,), (Scale(2.0),))), torch.full((31, 17), 4))
    with cut(block=100, chunk=16):
        assert torch.equal(merge_of([constant, refs[1]], "task_arithmetic"), tensor_of(refs[1]))


def test_sources_at_any_depth(refs: list[TensorRef], save: Callable[..., dict[str, TensorRef]]) -> None:
    factors = save({"a": torch.randn(3, 17), "b": torch.randn(31, 3)}, file="lora.safetensors")
    inner = adapted(refs[1], factors["a"], factors["b"])
    outer = TensorWrite("w", "F32", (31, 17), (refs[0], inner), (Merge("ties", (1.0,)),))
    assert outer.sources == (refs[0], refs[1], factors["a"], factors["b"])
    assert outer.factors == (factors["a"], factors["b"])


@pytest.mark.parametrize("method", MERGES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [0, 1])
def test_a_broken_source_is_blamed(
    save: Callable[..., dict[str, TensorRef]], method: str, value: float, place: int
) -> None:
    """Also where the number would be trimmed, masked or outvoted."""
    for flat in range(8):
        tensors = [torch.arange(8.0), torch.arange(8.0) ** 2, -torch.arange(8.0)][: 2 if method == "slerp" else 3]
        tensors[place][flat] = value
        found = save({str(index): tensor for index, tensor in enumerate(tensors)}, file=f"{flat}.safetensors")
        with pytest.raises(NumericsError, match=rf"tensor '{place}' in .*/{flat}\.safetensors holds .* at \[{flat}\]"):
            merge_of([*found.values()], method, density=0.3, scale=0.0, t=0.0, seed=flat)


def test_a_merge_out_of_range_names_the_sources(save: Callable[..., dict[str, TensorRef]]) -> None:
    found = save({"base": torch.zeros(3), "a": torch.tensor([1.0, -3e4, 2.0])})
    with pytest.raises(NumericsError, match=r"tensor 'out' from .*source.safetensors becomes -90000 at \[1\]"):
        merge_of([found["base"], found["a"]], "task_arithmetic", scale=3.0, dtype="F16")


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"method": "mean"}, "unknown merge method 'mean', expected one of average, task_arithmetic"),
        ({"weights": ()}, "one finite number per parent"),
        ({"weights": (1.0, math.nan)}, "one finite number per parent"),
        ({"method": "average", "weights": (1.0, -1.0)}, "add up to 0"),
        ({"method": "slerp", "weights": (1.0,)}, "1 parents, expected 2"),
        ({"scale": math.inf}, "scale is inf"),
        ({"density": 0.0}, "density is 0.0, expected more than 0 and at most 1"),
        ({"density": 1.1}, "density is 1.1"),
        ({"density": math.nan}, "density is nan"),
        ({"t": -0.1}, "t is -0.1, expected 0 to 1"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**64}, "seed is 18446744073709551616"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, object], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Merge(**{"method": "ties", "weights": (1.0, 1.0), **settings})


def test_every_method_is_made() -> None:
    assert merging.METHODS.keys() == MERGES.keys()


def test_parents_and_weights_must_match(refs: list[TensorRef]) -> None:
    with pytest.raises(ValueError, match="w: ties of 1 parents and the base with 3 inputs"):
        TensorWrite("w", "F32", (31, 17), (*refs[:3],), (Merge("ties", (1.0,)),))
    with pytest.raises(ValueError, match="w: average of 2 parents with 1 inputs"):
        TensorWrite("w", "F32", (31, 17), (refs[0],), (Merge("average", (1.0, 1.0)),))


def test_empty_tensors(save: Callable[..., dict[str, TensorRef]]) -> None:
    ref = save({"w": torch.zeros(0, 4)})["w"]
    for method in MERGES:
        inputs = (ref, ref) if method == "slerp" else (ref, ref, ref)
        merge = Merge(method, (1.0,) * (len(inputs) - MERGES[method]), density=0.5)
        assert materialize(TensorWrite("w", "BF16", (0, 4), inputs, (merge,))).size == 0
