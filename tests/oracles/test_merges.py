"""Merged tensors against mergekit's own functions on the same tensors: float32 to the last bits, bf16 to one unit."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.merge_methods import registry
from mergekit.merge_methods.base import TensorBatch, TensorGroup
from mergekit.merge_methods.slerp import slerp
from mergekit.options import MergeOptions
from safetensors.torch import save_file

from frankenmoe.checkpoint.cast import decode
from frankenmoe.checkpoint.header import read_header
from frankenmoe.checkpoint.merging import _Random
from frankenmoe.checkpoint.reader import open_checkpoint
from frankenmoe.checkpoint.tensors import DTYPES, Merge, TensorWrite
from frankenmoe.checkpoint.values import materialize, values

DTYPE = {torch.float32: "F32", torch.bfloat16: "BF16"}
NEAR, FAR = 0.0025, 0.3  # parent's distance from the base over the base's norm
SHAPE = (97, 211)


@pytest.fixture(autouse=True)
def _one_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """mergekit sorts equal magnitudes in no order; here in that of the tensor, which is ours."""
    sort = torch.argsort
    monkeypatch.setattr(torch, "argsort", lambda *args, **keys: sort(*args, **keys, stable=True))


def tensors_of(count: int, dtype: torch.dtype, *, distance: float) -> list[torch.Tensor]:
    """A base and `count - 1` tensors at a distance from it."""
    generator = torch.Generator().manual_seed(count)
    base = 0.05 * torch.randn(*SHAPE, generator=generator)
    others = [base + distance * 0.05 * torch.randn(*SHAPE, generator=generator) for _ in range(count - 1)]
    return [tensor.to(dtype) for tensor in (base, *others)]


def ours(merge: Merge, tensors: Sequence[torch.Tensor], folder: Path, *, dtype: torch.dtype) -> torch.Tensor:
    save_file({str(index): tensor for index, tensor in enumerate(tensors)}, folder / "w.safetensors")
    refs = read_header(folder / "w.safetensors")
    inputs = tuple(refs[str(index)] for index in range(len(tensors)))
    write = TensorWrite("out", DTYPE[dtype], tuple(tensors[0].shape), inputs, (merge,))
    raw = torch.from_numpy(materialize(write))
    return raw.view(getattr(torch, DTYPES[write.dtype].name)).view(write.shape)


def theirs(merge: Merge, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """mergekit's result with its own defaults for all that a Merge does not say."""
    if merge.method == "slerp":
        return slerp(torch.tensor([merge.t]), tensors[0][None], tensors[1][None])[0]
    if merge.method == "average":
        batch = TensorBatch(tuple(tensor[None] for tensor in tensors))
        return registry.get("linear").merge_batch(batch, weight=torch.tensor([merge.weights]), normalize=True)[0]
    method = registry.get(merge.method)
    defaults = {parameter.name: parameter.default for parameter in method.spec.parameters}
    parents = range(1, len(tensors))
    given: dict[str, Any] = {
        "weight": dict(zip(parents, merge.weights, strict=True)),
        "density": dict.fromkeys(parents, merge.density),
        "lambda": merge.scale,
    }
    return method.merge_group(TensorGroup.from_tensors(tensors, base_index=0), **{**defaults, **given})


def off(one: torch.Tensor, two: torch.Tensor, *scales: torch.Tensor) -> float:
    """The largest difference, in bfloat16's unit of the last place of the largest number among both and `scales`."""
    largest = torch.stack([tensor.double().abs() for tensor in (one, two, *scales)]).amax(0)
    mantissa, exponent = torch.frexp(largest)
    return float(((one.double() - two.double()).abs() / torch.ldexp(torch.ones_like(mantissa), exponent - 8)).max())


def masked_as_ours(monkeypatch: pytest.MonkeyPatch, merge: Merge) -> None:
    """Gives mergekit the random masks of ours, parent by parent."""
    if merge.density == 1:  # no masks in either
        return
    masks = iter([_Random(merge, index)(np.ones(SHAPE, np.float32).ravel(), 0, 0) for index in range(9)])
    monkeypatch.setattr(
        torch, "bernoulli", lambda given: torch.from_numpy(next(masks)).view(given.shape).to(given.dtype)
    )


MERGES_TO_COMPARE = [
    Merge("average", (1.0, 1.0, 1.0)),
    Merge("average", (0.2, 1.5, -0.3)),
    Merge("task_arithmetic", (1.0,)),
    Merge("task_arithmetic", (1.0, 1.0, 1.0), scale=0.7),
    Merge("task_arithmetic", (0.3, -0.5, 2.0), density=0.5),  # has no density in mergekit
    Merge("ties", (1.0, 1.0, 1.0), density=0.5),
    Merge("ties", (1.0, 1.0), density=0.2, scale=1.3),
    Merge("ties", (0.5, 0.25, 1.0, -0.5)),
    Merge("ties", (0.3, 0.7, 0.1), density=0.03),
    Merge("ties", (1.0,), density=1e-9),  # keeps one number
    Merge("dare_linear", (1.0, 0.5), density=0.5, seed=3),
    Merge("dare_linear", (0.7,), density=0.1, scale=0.9, seed=4),
    Merge("dare_ties", (1.0, 1.0, 0.5), density=0.6, seed=5),
    Merge("dare_ties", (1.0, 1.0)),
    Merge("slerp", (1.0, 1.0), t=0.5),
    Merge("slerp", (1.0, 1.0), t=0.1),
]


@pytest.mark.parametrize("merge", MERGES_TO_COMPARE, ids=lambda merge: f"{merge.method}-{merge.weights}")
@pytest.mark.parametrize("distance", [NEAR, FAR])
def test_float32_to_the_last_bits(
    merge: Merge, distance: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    masked_as_ours(monkeypatch, merge)
    tensors = tensors_of(merge.count, torch.float32, distance=distance)
    found, expected = ours(merge, tensors, tmp_path, dtype=torch.float32), theirs(merge, tensors)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
    if merge.method in ("task_arithmetic", "ties"):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("merge", MERGES_TO_COMPARE, ids=lambda merge: f"{merge.method}-{merge.weights}")
@pytest.mark.parametrize("distance", [NEAR, FAR])
def test_bfloat16_to_one_unit(merge: Merge, distance: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16 parents, as in `dtype: float32` with `out_dtype: bfloat16` of a mergekit recipe."""
    masked_as_ours(monkeypatch, merge)
    tensors = tensors_of(merge.count, torch.bfloat16, distance=distance)
    expected = theirs(merge, [tensor.float() for tensor in tensors]).bfloat16()
    found = ours(merge, tensors, tmp_path, dtype=torch.bfloat16)
    assert off(found, expected) <= 1
    assert float((found != expected).float().mean()) < 0.02


@pytest.mark.parametrize("merge", MERGES_TO_COMPARE, ids=lambda merge: f"{merge.method}-{merge.weights}")
def test_bfloat16_arithmetic(merge: Merge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """mergekit in bf16, its default for bf16 parents, rounds every difference and sum: ours is not farther off."""
    tensors = tensors_of(merge.count, torch.bfloat16, distance=NEAR)
    expected = []
    for wanted in ([tensor.double() for tensor in tensors], tensors):
        masked_as_ours(monkeypatch, merge)
        expected.append(theirs(merge, wanted))
    exact, rounded = expected
    found = ours(merge, tensors, tmp_path, dtype=torch.bfloat16)
    assert off(found, exact) <= 0.51  # as near as bf16 numbers are
    assert (found - exact).abs().mean() <= 1.001 * (rounded - exact).abs().mean()


def test_equal_magnitudes(tmp_path: Path) -> None:
    """Small whole numbers: most differences lie at the threshold."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randint(-4, 5, SHAPE, generator=generator).float() for _ in range(4)]
    for density in (0.01, 0.3, 0.5, 0.77, 0.999):
        merge = Merge("ties", (1.0, 1.0, 1.0), density=density)
        assert torch.equal(ours(merge, tensors, tmp_path, dtype=torch.float32), theirs(merge, tensors))


@pytest.mark.parametrize("angle", [0.0, 0.01, 0.03, 0.033, 1.0, 1.57, 3.0, 3.13])
def test_slerp_at_any_angle(angle: float, tmp_path: Path) -> None:
    """On both sides of mergekit's limit for parallel vectors (0.0316), and for opposite ones."""
    one, other = torch.linalg.qr(torch.randn(SHAPE[0] * SHAPE[1], 2, generator=torch.Generator().manual_seed(1)))[0].T
    tensors = [one.reshape(SHAPE), 2 * (math.cos(angle) * one + math.sin(angle) * other).reshape(SHAPE)]
    for t in (0.0, 0.3, 1.0):
        merge = Merge("slerp", (1.0, 1.0), t=t)
        found, expected = ours(merge, tensors, tmp_path, dtype=torch.float32), theirs(merge, tensors)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_slerp_with_nothing(tmp_path: Path) -> None:
    tensors = [torch.zeros(SHAPE), torch.ones(SHAPE)]
    merge = Merge("slerp", (1.0, 1.0), t=0.25)
    found, expected = ours(merge, tensors, tmp_path, dtype=torch.float32), theirs(merge, tensors)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("method", "of_parent", "of_all", "merge"),
    [
        ("linear", {"weight": 1.0}, {}, Merge("average", (1.0, 1.0))),
        ("task_arithmetic", {"weight": 1.0}, {"lambda": 0.7}, Merge("task_arithmetic", (1.0, 1.0), scale=0.7)),
        ("ties", {"weight": 0.5, "density": 0.4}, {}, Merge("ties", (0.5, 0.5), density=0.4)),
        ("slerp", {}, {"t": 0.3}, Merge("slerp", (1.0, 1.0), t=0.3)),
    ],
)
def test_whole_models_as_mergekit_merges_them(
    method: str,
    of_parent: dict[str, float],
    of_all: dict[str, float],
    merge: Merge,
    parents: dict[str, list[Path]],
    tmp_path: Path,
) -> None:
    """Through mergekit's own recipe, planner and writer: what it leaves out of a recipe has our meaning too."""
    base, *others = parents["llama"]
    models = [{"model": str(folder), "parameters": of_parent} for folder in others]
    recipe = {"models": models, "merge_method": method, "parameters": of_all, "dtype": "float32"}
    if method == "slerp":
        recipe["base_model"] = str(others[0])
    elif method != "linear":
        recipe["base_model"] = str(base)
    config = MergeConfiguration.model_validate(recipe)
    run_merge(config, str(tmp_path / "theirs"), options=MergeOptions(copy_tokenizer=False, quiet=True))
    theirs = open_checkpoint(tmp_path / "theirs").tensors
    checkpoints = [open_checkpoint(folder).tensors for folder in ([base, *others] if merge.count == 3 else others)]
    assert theirs.keys() == checkpoints[0].keys()
    for name, ref in theirs.items():
        inputs = tuple(tensors[name] for tensors in checkpoints)
        found = materialize(TensorWrite(name, ref.dtype, ref.shape, inputs, (merge,)))
        expected = values(ref).ravel()
        np.testing.assert_allclose(decode(found, dtype=ref.dtype), expected, rtol=1e-5, atol=1e-7)
