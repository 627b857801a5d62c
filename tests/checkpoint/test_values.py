"""The numbers: casts bit for bit as torch does them, steps against float64, and every way not to be finite."""

import itertools
import math
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from frankenmoe.checkpoint import cast
from frankenmoe.checkpoint import values as values_module
from frankenmoe.checkpoint.cast import decode, encode
from frankenmoe.checkpoint.header import header_bytes, read_header
from frankenmoe.checkpoint.tensors import (
    DTYPES,
    Constant,
    LowRank,
    Merge,
    Noise,
    Scale,
    Step,
    TensorRef,
    TensorWrite,
)
from frankenmoe.checkpoint.values import blocks, check_finite, materialize, values
from frankenmoe.errors import NumericsError, SourceError

GOLDEN_NOISE = [2.426565647125244, 0.5445383787155151, -0.2062937319278717]
SIXTEEN_BITS = np.arange(2**16, dtype=np.uint16)


def written(write: TensorWrite) -> torch.Tensor:
    """The output of a write as torch sees it, made block by block."""
    raw = bytearray(b"".join(block.tobytes() for block in blocks(write)))
    return torch.frombuffer(raw, dtype=getattr(torch, DTYPES[write.dtype].name)).view(write.shape)


def step_write(ref: TensorRef, *steps: Step, dtype: str = "F32") -> TensorWrite:
    return TensorWrite("out", dtype, ref.shape, (ref,), steps)


def assert_same_bits(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Equal bit for bit, but for which NaN it is: torch itself gives another one on another CPU."""
    nan = np.isnan(theirs)
    assert np.array_equal(np.isnan(ours), nan)
    bits = {2: np.uint16, 4: np.uint32}[theirs.itemsize]
    assert np.array_equal(ours.view(bits)[~nan], theirs.view(bits)[~nan])


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
@pytest.mark.parametrize("chunk", [100, 2**10, 2**18])  # a chunk of its own for subnormal, infinite, NaN: no other way
def test_decode_is_bit_identical_to_torch(dtype: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cast, "_CHUNK", chunk)
    theirs = torch.from_numpy(SIXTEEN_BITS.copy()).view(getattr(torch, DTYPES[dtype].name)).float().numpy()
    assert_same_bits(decode(SIXTEEN_BITS.view(np.uint8), dtype=dtype), theirs)


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
@pytest.mark.parametrize("low", [0, 1, 0x0FFF, 0x1000, 0x1001, 0x3000, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
def test_encode_is_bit_identical_to_torch(dtype: str, low: int) -> None:
    """Every sign, exponent and high mantissa with the low bits around each tie: normal, denormal, infinite, NaN."""
    numbers = (SIXTEEN_BITS.astype(np.uint32) << 16 | low).view(np.float32)
    theirs = torch.from_numpy(numbers).to(getattr(torch, DTYPES[dtype].name))
    ours = encode(numbers, dtype=dtype)
    assert_same_bits(decode(ours, dtype=dtype), theirs.float().numpy())


@settings(deadline=None, max_examples=100)
@given(
    bits=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=64),
    dtype=st.sampled_from(["BF16", "F16", "F64"]),
    chunk=st.sampled_from([1, 5, 2**18]),
)
def test_encode_of_any_bits_is_as_torch(bits: list[int], dtype: str, chunk: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cast, "_CHUNK", chunk)
        assert_encodes_as_torch(bits, dtype)


def assert_encodes_as_torch(bits: list[int], dtype: str) -> None:
    numbers = np.array(bits, np.uint32).view(np.float32)
    theirs = torch.from_numpy(numbers).to(getattr(torch, DTYPES[dtype].name))
    assert_same_bits(decode(encode(numbers, dtype=dtype), dtype=dtype), theirs.float().numpy())


def test_nan_keeps_its_sign_and_never_becomes_infinite() -> None:
    bits = np.array([0x7F800001, 0xFF800001, 0x7FFFFFFF, 0xFFFFFFFF], np.uint32)
    encoded = encode(bits.view(np.float32), dtype="BF16").view(np.uint16)
    assert [f"{code:04x}" for code in encoded] == ["7fc0", "ffc0", "7fff", "ffff"]


@pytest.mark.parametrize("source", ["F64", "F32", "F16", "BF16"])
@pytest.mark.parametrize("target", ["F64", "F32", "F16", "BF16"])
def test_cast_between_any_floats(save, monkeypatch: pytest.MonkeyPatch, source: str, target: str) -> None:
    monkeypatch.setattr(values_module, "BLOCK", 7)
    tensor = torch.randn(5, 6, dtype=torch.float64).to(getattr(torch, DTYPES[source].name))
    write = step_write(save({"w": tensor})["w"], dtype=target)
    through = tensor if source == target else tensor.float()
    assert torch.equal(written(write), through.to(getattr(torch, DTYPES[target].name)))


def test_values_have_their_shape_and_are_a_copy(save) -> None:
    ref = save({"w": torch.arange(6.0).view(2, 3)})["w"]
    values(ref)[:] = 9
    assert np.array_equal(values(ref), [[0, 1, 2], [3, 4, 5]])


def test_odd_offsets_are_no_obstacle(tmp_path: Path) -> None:
    """Nothing in the format aligns a tensor to its element size."""
    number = np.array([1.5, -2.0], np.float32)
    file = tmp_path / "odd.safetensors"
    header = header_bytes([("byte", "U8", (1,)), ("w", "F32", (2,))], metadata={})
    file.write_bytes(header + b"\0" + number.tobytes())
    ref = read_header(file)["w"]
    check_finite(ref)
    assert np.array_equal(values(ref), number)
    assert torch.equal(written(step_write(ref, dtype="BF16")), torch.tensor([1.5, -2.0], dtype=torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.float8_e5m2])
def test_other_types_are_copied_and_not_computed(save, dtype: torch.dtype) -> None:
    ref = save({"w": torch.tensor([0, 1, 1]).to(dtype)})["w"]
    assert (
        b"".join(block.tobytes() for block in blocks(step_write(ref, dtype=ref.dtype)))
        == ref.file.read_bytes()[ref.start :]
    )
    for write in (step_write(ref), step_write(ref, Scale(2.0), dtype=ref.dtype)):
        with pytest.raises(SourceError, match=f"tensor 'w' in .* has dtype {ref.dtype}, expected one of BF16"):
            materialize(write)
    with pytest.raises(SourceError, match="has dtype"):
        values(ref)


def test_floats_do_not_become_integers(save) -> None:
    with pytest.raises(SourceError, match="'out' is to be written as I64"):
        materialize(step_write(save({"w": torch.ones(2)})["w"], dtype="I64"))


def test_constant() -> None:
    assert torch.equal(
        written(TensorWrite("c", "BF16", (2, 3), (), (Constant(-1.5),))), torch.full((2, 3), -1.5).bfloat16()
    )


def test_empty_tensor(save) -> None:
    ref = save({"w": torch.zeros(0, 4)})["w"]
    check_finite(ref)
    assert materialize(step_write(ref, Noise(1.0, True, 0), dtype="BF16")).size == 0


@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(1, 6), columns=st.integers(1, 6), rank=st.integers(1, 3), block=st.integers(1, 40), data=st.data()
)
def test_steps_against_float64(
    tmp_path_factory: pytest.TempPathFactory, rows: int, columns: int, rank: int, block: int, data: st.DataObject
) -> None:
    """Mean, low-rank term and factor, for any shape cut into any blocks."""
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    count = data.draw(st.integers(1, 4))
    tensors = {f"w{i}": torch.randn(rows, columns, generator=generator) for i in range(count)}
    tensors |= {"a": torch.randn(rank, columns, generator=generator), "b": torch.randn(rows, rank, generator=generator)}
    file = tmp_path_factory.mktemp("steps") / "w.safetensors"
    save_file(tensors, file)
    refs = read_header(file)
    steps = (Merge("average", (1.0,) * count), LowRank(refs["a"], refs["b"], 0.25), Scale(-3.0))
    write = TensorWrite("out", "F32", (rows, columns), tuple(refs[f"w{i}"] for i in range(count)), steps)
    wide = {name: tensor.double() for name, tensor in tensors.items()}
    mean = sum(wide[f"w{i}"] for i in range(count)) / count
    expected = -3.0 * (mean + 0.25 * wide["b"] @ wide["a"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(values_module, "BLOCK", block)
        torch.testing.assert_close(written(write).double(), expected, rtol=1e-5, atol=1e-5)
        assert materialize(write).tobytes() == b"".join(part.tobytes() for part in blocks(write))


def test_mean_of_equal_tensors_changes_no_bit(save) -> None:
    tensor = torch.randn(50).bfloat16()
    ref = save({"w": tensor})["w"]
    assert torch.equal(written(TensorWrite("out", "BF16", (50,), (ref,) * 3, (Merge("average", (1.0,) * 3),))), tensor)


def test_mean_of_large_numbers_does_not_overflow(save) -> None:
    ref = save({"w": torch.tensor([3e38])})["w"]
    assert written(
        TensorWrite("out", "F32", (1,), (ref, ref), (Merge("average", (1.0, 1.0)),))
    ).item() == pytest.approx(3e38)


def test_steps_do_not_write_into_the_mapped_source(save) -> None:
    ref = save({"w": torch.ones(4)})["w"]
    materialize(step_write(ref, Scale(2.0), Noise(1.0, False, 1)))
    assert np.array_equal(values(ref), np.ones(4))


def noise_of(ref: TensorRef, *, seed: int) -> torch.Tensor:
    return written(step_write(ref, Noise(1.0, False, seed)))


def test_noise_depends_on_seed_and_block_alone(save, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(values_module, "BLOCK", 4)
    refs = save({"w": torch.zeros(12), "part": torch.zeros(8)})
    first = noise_of(refs["w"], seed=7)
    assert torch.equal(first, noise_of(refs["w"], seed=7))
    assert torch.equal(first[:8], noise_of(refs["part"], seed=7))
    assert not torch.equal(first[:4], first[4:8])
    assert not torch.equal(first, noise_of(refs["w"], seed=8))


def test_noise_is_the_same_on_every_machine(save) -> None:
    """If a new numpy fails this, recipes with noise no longer build to the same bytes: say so in the release."""
    drawn = noise_of(save({"w": torch.zeros(3)})["w"], seed=2**64 - 1)
    torch.testing.assert_close(drawn, torch.tensor(GOLDEN_NOISE), rtol=0, atol=0)


def test_noise_has_its_standard_deviation(save) -> None:
    added = written(step_write(save({"w": torch.full((40_000,), 5.0)})["w"], Noise(0.3, False, 1))) - 5.0
    assert added.std().item() == pytest.approx(0.3, rel=0.03)
    assert added.mean().item() == pytest.approx(0.0, abs=0.01)


def test_relative_noise_is_a_share_of_the_tensor_before_the_step(save, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(values_module, "BLOCK", 1000)
    tensor = 100 + torch.randn(2500) + torch.linspace(-5, 5, 2500)  # so that the blocks differ in their mean
    ref = save({"w": tensor})["w"]
    relative = written(step_write(ref, Scale(2.0), Noise(0.1, True, 1)))
    std = (2 * tensor).double().std(correction=0).item()
    absolute = written(step_write(ref, Scale(2.0), Noise(0.1 * std, False, 1)))
    torch.testing.assert_close(relative, absolute, rtol=1e-6, atol=0)


def test_noise_is_normal(save) -> None:
    drawn = noise_of(save({"w": torch.zeros(2**18)})["w"], seed=3).double()
    for limit, share in ((-2.0, 0.02275), (-1.0, 0.15866), (0.0, 0.5), (0.5, 0.69146), (3.0, 0.99865)):
        assert (drawn < limit).double().mean().item() == pytest.approx(share, abs=0.004)
    assert torch.corrcoef(torch.stack([drawn[:-1], drawn[1:]]))[0, 1].abs() < 0.01


def test_relative_noise_follows_a_file_that_was_replaced(save) -> None:
    added = [
        (written(step_write(save({"w": size * torch.arange(9.0)})["w"], Noise(0.1, True, 1))) / size).tolist()
        for size in (1, 2)
    ]
    assert added[0] == pytest.approx(added[1])


def test_relative_noise_of_a_constant_tensor_is_none(save) -> None:
    ref = save({"w": torch.full((5,), 0.1)})["w"]
    assert torch.equal(written(step_write(ref, Noise(0.5, True, 1))), torch.full((5,), 0.1))


@pytest.mark.parametrize(
    ("dtype", "value", "steps", "largest"),
    [
        ("F16", 65536.0, (), "65504"),
        ("F16", -1e6, (), "65504"),
        ("BF16", 3.4e38, (), "3.38953e+38"),
        ("F32", 3e38, (Scale(2.0),), "3.40282e+38"),
    ],
)
def test_overflow_names_tensor_file_and_value(save, dtype: str, value: float, steps: tuple, largest: str) -> None:
    ref = save({"w": torch.tensor([[0.0, 1.0], [value, 2.0]])})["w"]
    with pytest.raises(NumericsError) as caught:
        materialize(step_write(ref, *steps, dtype=dtype))
    became = math.inf if steps else value
    assert caught.value.message == (
        f"tensor 'out' from {ref.file} becomes {became:g} at [1, 0], but {dtype} holds at most {largest}"
    )
    assert ("wider range" in str(caught.value.hint)) == math.isfinite(became)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("steps", [(), (Scale(0.5),), (Noise(0.1, True, 1),)], ids=["cast", "scale", "noise"])
def test_a_float64_beyond_float32_is_told_without_a_warning(save, steps: tuple) -> None:
    ref = save({"w": torch.tensor([0.0, 1e300], dtype=torch.float64)})["w"]
    with pytest.raises(NumericsError, match="computed in float32"):
        materialize(step_write(ref, *steps, dtype="F32"))


def test_overflow_in_a_later_block_is_placed_right(save, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(values_module, "BLOCK", 4)
    ref = save({"w": torch.tensor([0.0] * 9 + [1e5])})["w"]
    with pytest.raises(NumericsError, match=r"becomes 100000 at \[9\]"):
        materialize(step_write(ref, dtype="F16"))


def test_largest_half_fits(save) -> None:
    assert written(step_write(save({"w": torch.tensor([65519.0])})["w"], dtype="F16")).item() == 65504.0


@pytest.mark.parametrize("make", [lambda ref: step_write(ref), lambda ref: step_write(ref, Scale(0.0), dtype="BF16")])
def test_a_broken_source_is_blamed_and_not_the_step(save, make: Callable[[TensorRef], TensorWrite]) -> None:
    tensor = torch.zeros(4, 20)
    tensor[3, 17] = torch.nan
    ref = save({"w": tensor})["w"]
    with pytest.raises(NumericsError, match=r"tensor 'w' in .*source\.safetensors holds NaN at \[3, 17\]"):
        list(blocks(make(ref)))


def test_a_broken_low_rank_factor_is_blamed(save) -> None:
    refs = save({"w": torch.zeros(2, 2), "a": torch.tensor([[1.0, -torch.inf]]), "b": torch.zeros(2, 1)})
    with pytest.raises(NumericsError, match=r"tensor 'a' in .* holds -Inf at \[0, 1\]"):
        materialize(step_write(refs["w"], LowRank(refs["a"], refs["b"], 1.0)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("bad", "spelt"), [(torch.nan, "NaN"), (torch.inf, "Inf"), (-torch.inf, "-Inf")])
def test_check_finite_names_the_place(
    save, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, bad: float, spelt: str
) -> None:
    monkeypatch.setattr(cast, "_CHUNK", 8)
    info = torch.finfo(dtype)
    tensor = torch.tensor([info.max, info.min, info.tiny, -0.0, 0.0], dtype=dtype).repeat(6).view(5, 6)
    check_finite(save({"w": tensor})["w"])
    for flat in (0, 7, 8, 29):
        broken = tensor.clone().view(-1)
        broken[flat] = bad
        ref = save({"w": broken.view(5, 6)}, file=f"{flat}.safetensors")["w"]
        with pytest.raises(NumericsError) as caught:
            check_finite(ref)
        assert f"tensor 'w' in {ref.file} holds {spelt} at [{flat // 6}, {flat % 6}]" in caught.value.message


def test_a_nan_with_its_sign_bit_set_is_found(save) -> None:
    tensor = torch.tensor([0x0000, 0xFFC0 - 2**16], dtype=torch.int16).view(torch.bfloat16)
    with pytest.raises(NumericsError, match=r"NaN at \[1\]"):
        check_finite(save({"w": tensor})["w"])


def test_types_without_infinities_are_not_scanned(save) -> None:
    check_finite(save({"w": torch.full((4,), -1)})["w"])


def test_a_copy_is_the_mapped_source(save) -> None:
    ref = save({"w": torch.randn(9)})["w"]
    first, second = (materialize(step_write(ref)) for _ in range(2))
    assert first.ctypes.data == second.ctypes.data


def test_blocks_hold_a_million_elements_and_memory_is_constant(tmp_path: Path) -> None:
    numel = 2**23
    file = tmp_path / "sparse.safetensors"
    header = header_bytes([("w", "F32", (numel,))], metadata={})
    file.write_bytes(header)
    with file.open("r+b") as sparse:
        sparse.truncate(len(header) + 4 * numel)
    ref = read_header(file)["w"]
    tracemalloc.start()
    sizes = [block.size for block in blocks(step_write(ref, Scale(2.0), dtype="BF16"))]
    check_finite(ref)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sizes == [2**21] * 8
    assert peak < 40 * 2**20


def test_blocks_are_made_as_they_are_asked_for(save, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(values_module, "BLOCK", 2)
    ref = save({"w": torch.tensor([1.0, 2.0, torch.nan])})["w"]
    assert len(list(itertools.islice(blocks(step_write(ref, dtype="BF16")), 1))) == 1


def test_blocks_of_a_pool_are_the_same_and_in_order(tmp_path: Path) -> None:
    random = torch.Generator().manual_seed(0)
    tensors = {
        "x": torch.randn(5, 2**19 + 3, generator=random),
        "a": torch.randn(4, 2**19 + 3, generator=random),
        "b": torch.randn(5, 4, generator=random),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    refs = read_header(tmp_path / "model.safetensors")
    steps = (Noise(0.1, True, 7), LowRank(refs["a"], refs["b"], 0.5), Scale(2.0))
    alone = [raw.tobytes() for raw in blocks(step_write(refs["x"], *steps, dtype="BF16"))]
    with ThreadPoolExecutor(3) as pool:
        together = blocks(step_write(refs["x"], *steps, dtype="BF16"), pool, ahead=2)
        assert [raw.tobytes() for raw in together] == alone
    assert len(alone) > 2
