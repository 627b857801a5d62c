"""The compiled kernel for noise writes the bytes that numpy's way writes."""

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from frankenmoe.checkpoint import noise
from frankenmoe.checkpoint.cast import decode, encode
from frankenmoe.checkpoint.header import read_header
from frankenmoe.checkpoint.noise import AddNoise
from frankenmoe.checkpoint.tensors import Noise, Part, TensorRef, TensorWrite
from frankenmoe.checkpoint.values import blocks
from frankenmoe.errors import NumericsError

pytest.importorskip("numba")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor is worth the kernel."""
    monkeypatch.setattr(noise, "_LARGE", 1)


@pytest.fixture
def without_numba(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(sys.modules, "frankenmoe.checkpoint.noisekernel", None)
    monkeypatch.delattr("frankenmoe.checkpoint.noisekernel", raising=False)
    noise._compiled.cache_clear()
    yield
    noise._compiled.cache_clear()


def ref_of(folder: Path, numbers: torch.Tensor) -> TensorRef:
    file = folder / "model.safetensors"
    save_file({"x": numbers}, file)
    return read_header(file)["x"]


def written(write: TensorWrite) -> bytes:
    return b"".join(raw.tobytes() for raw in blocks(write))


def by_numpy(write: TensorWrite, monkeypatch: pytest.MonkeyPatch) -> bytes:
    with monkeypatch.context() as patch:
        patch.setattr(noise, "_LARGE", 2**62)
        return written(write)


@pytest.mark.parametrize("size", [1, 3, 4096, 4097, 2**20 - 1, 2**20 + 5])
@pytest.mark.parametrize("relative", [True, False])
def test_it_writes_what_numpy_writes(
    size: int, relative: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = torch.randn(size, generator=torch.Generator().manual_seed(size)).bfloat16()
    ref = ref_of(tmp_path, numbers)
    assert AddNoise(1.0, 0).in_one_pass(ref, TensorWrite("y", "BF16", ref.shape, (ref,), ()))
    write = TensorWrite("y", "BF16", ref.shape, (ref,), (Noise(0.5, relative, 2**64 - 1),))
    assert written(write) == by_numpy(write, monkeypatch)


def test_every_number_of_16_bits_is_rounded_as_numpy_rounds_it() -> None:
    """Tiny, subnormal and huge numbers too. Blocks with a result that is not finite are left to numpy."""
    codes = np.arange(2**16, dtype=np.uint16)
    finite = codes[(codes & 0x7F80) != 0x7F80]
    for number in range(5):
        step = AddNoise(2.0 ** (20 * number - 60), 7)
        raw = finite.view(np.uint8)
        expected = encode(step(decode(raw, dtype="BF16"), number), dtype="BF16")
        assert np.array_equal(step.bfloat16(raw, number), expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_found(value: float, tmp_path: Path) -> None:
    numbers = torch.zeros(2**20 + 9).bfloat16()
    numbers[2**20 + 6] = value
    ref = ref_of(tmp_path, numbers)
    with pytest.raises(NumericsError, match=r"at \[1048582\]"):
        written(TensorWrite("y", "BF16", ref.shape, (ref,), (Noise(1.0, False, 1),)))


def test_a_result_that_bfloat16_cannot_hold_is_found(tmp_path: Path) -> None:
    ref = ref_of(tmp_path, torch.full((5000,), 3.3895e38).bfloat16())
    with pytest.raises(NumericsError, match="BF16 holds at most"):
        written(TensorWrite("y", "BF16", ref.shape, (ref,), (Noise(1e36, False, 1),)))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("std", [3e38, 1e39, float("nan")])
def test_noise_that_is_not_finite_is_found(std: float, tmp_path: Path) -> None:
    ref = ref_of(tmp_path, torch.zeros(5000).bfloat16())
    with pytest.raises(NumericsError, match="less noise"):
        written(TensorWrite("y", "BF16", ref.shape, (ref,), (Noise(std, False, 1),)))


def test_a_part_of_a_tensor_is_left_to_numpy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ref = ref_of(tmp_path, torch.arange(64).bfloat16())
    write = TensorWrite("y", "BF16", (16,), (ref,), (Part(32), Noise(1e-3, False, 1)))
    assert decode(np.frombuffer(written(write), np.uint8), dtype="BF16").round().tolist() == list(range(32, 48))
    assert written(write) == by_numpy(write, monkeypatch)


@pytest.mark.usefixtures("without_numba")
def test_numba_is_not_required(tmp_path: Path) -> None:
    ref = ref_of(tmp_path, torch.zeros(8).bfloat16())
    write = TensorWrite("y", "BF16", ref.shape, (ref,), (Noise(1.0, False, 1),))
    assert not AddNoise(1.0, 1).in_one_pass(ref, write)
    assert len(written(write)) == 16
