"""Bounds on computed tensors: no result is larger, and what is sure to fit needs no computing."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from frankenmoe.checkpoint.bounds import surely_fits
from frankenmoe.checkpoint.cast import decode
from frankenmoe.checkpoint.header import read_header
from frankenmoe.checkpoint.noise import MOST, AddNoise
from frankenmoe.checkpoint.tensors import Exp, Noise, Scale, Shift, Step, TensorRef, TensorWrite
from frankenmoe.checkpoint.values import blocks
from frankenmoe.errors import NumericsError


def ref_of(folder: Path, numbers: torch.Tensor) -> TensorRef:
    file = folder / "model.safetensors"
    save_file({"x": numbers}, file)
    return read_header(file)["x"]


def write_of(ref: TensorRef, *steps: Step, dtype: str = "F16") -> TensorWrite:
    return TensorWrite("y", dtype, ref.shape, (ref,), steps)


def test_noise_is_within_its_bound() -> None:
    drawn = AddNoise(1.0, 0)(np.zeros(2**22, np.float32), 0)  # every one of the 65536 quantiles
    assert 4.2 < float(np.abs(drawn).max()) < MOST


@pytest.mark.parametrize("largest", [10.0, 20_000.0, 60_000.0])
@pytest.mark.parametrize(
    "steps",
    [
        (Scale(-2.0),),
        (Shift(-40_000.0),),
        (Noise(1.0, True, 3),),
        (Noise(0.01, True, 3), Scale(1.5)),
        (Noise(9_000.0, False, 3),),
    ],
    ids=["scale", "shift", "noise", "noise and scale", "absolute noise"],
)
def test_what_is_sure_to_fit_fits(tmp_path: Path, largest: float, steps: tuple[Step, ...]) -> None:
    numbers = torch.linspace(-largest, largest, 5000)
    write = write_of(ref_of(tmp_path, numbers), *steps)
    if surely_fits(write):
        assert all(np.isfinite(decode(raw, dtype="F16")).all() for raw in blocks(write))
    else:
        assert largest > 1_000 or isinstance(steps[0], Shift | Noise)


def test_a_result_out_of_range_is_not_sure(tmp_path: Path) -> None:
    write = write_of(ref_of(tmp_path, torch.full((8,), 40_000.0)), Scale(2.0))
    assert not surely_fits(write)
    with pytest.raises(NumericsError, match="F16 holds at most 65504"):
        list(blocks(write))


@pytest.mark.parametrize(
    ("largest", "steps", "dtype"),
    [
        (1e10, (Scale(1e30), Scale(1e-30)), "F32"),  # too large on the way
        (1e38, (Scale(100.0),), "F64"),  # which holds more than numbers on the way can be
        (0.0, (Scale(1e300),), "F32"),  # 0 times infinity
    ],
    ids=["on the way", "float64", "factor"],
)
def test_numbers_on_the_way_are_float32(tmp_path: Path, largest: float, steps: tuple[Step, ...], dtype: str) -> None:
    write = write_of(ref_of(tmp_path, torch.full((8,), largest)), *steps, dtype=dtype)
    assert not surely_fits(write)
    with pytest.raises(NumericsError, match="becomes"):
        list(blocks(write))


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), float("-inf")])
def test_a_source_that_is_not_finite_is_not_sure(tmp_path: Path, odd: float) -> None:
    numbers = torch.zeros(3_000_000)
    numbers[2_500_000] = odd
    assert not surely_fits(write_of(ref_of(tmp_path, numbers), Scale(0.5)))


def test_steps_without_a_bound_are_computed(tmp_path: Path) -> None:
    assert not surely_fits(write_of(ref_of(tmp_path, torch.zeros(8)), Exp()))
    assert not surely_fits(write_of(ref_of(tmp_path, torch.zeros(8, dtype=torch.int32)), Scale(1.0)))
