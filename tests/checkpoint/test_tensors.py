"""The data types: names of dtypes, and the writes that are refused because they mean nothing."""

from pathlib import Path

import pytest
import torch

from frankenmoe.checkpoint.tensors import (
    DTYPES,
    FLOATS,
    Constant,
    LowRank,
    Merge,
    Noise,
    Scale,
    TensorRef,
    TensorWrite,
    safetensors_dtype,
)


def ref(*shape: int, dtype: str = "F32") -> TensorRef:
    return TensorRef("w", dtype, shape, Path("w.safetensors"), 0, torch.Size(shape).numel() * DTYPES[dtype].itemsize)


@pytest.mark.parametrize("key", DTYPES)
def test_dtypes_agree_with_torch(key: str) -> None:
    dtype = getattr(torch, DTYPES[key].name)
    assert dtype.itemsize == DTYPES[key].itemsize
    assert dtype.is_floating_point == (key in FLOATS or key.startswith("F8"))


@pytest.mark.parametrize("name", ["bfloat16", "bf16", "BF16"])
def test_every_spelling_of_a_dtype_is_understood(name: str) -> None:
    assert safetensors_dtype(name) == "BF16"


def test_short_and_long_names() -> None:
    assert [safetensors_dtype(name) for name in ("fp16", "float16", "fp32", "int64")] == ["F16", "F16", "F32", "I64"]


def test_unknown_dtype_lists_the_choices() -> None:
    with pytest.raises(ValueError, match=r"'bfloat8'.*bfloat16"):
        safetensors_dtype("bfloat8")


def test_sizes() -> None:
    write = TensorWrite("w", "BF16", (3, 5), (ref(3, 5),))
    assert (write.numel, write.nbytes, write.inputs[0].nbytes) == (15, 30, 60)


def test_only_one_unchanged_input_of_the_same_type_is_a_copy() -> None:
    assert TensorWrite("w", "F32", (4,), (ref(4),)).is_copy
    assert TensorWrite("w", "F32", (1, 4), (ref(4),)).is_copy
    assert not TensorWrite("w", "BF16", (4,), (ref(4),)).is_copy
    assert not TensorWrite("w", "F32", (4,), (ref(4),), (Scale(2.0),)).is_copy
    assert not TensorWrite("w", "F32", (4,), (), (Constant(0.0),)).is_copy


def test_sources_name_the_factors_of_low_rank_terms() -> None:
    a, b = ref(2, 5), ref(3, 2)
    write = TensorWrite("w", "F32", (3, 5), (ref(3, 5),), (LowRank(a, b, 1.0), Noise(0.1, False, 0)))
    assert write.sources == (ref(3, 5), a, b)


@pytest.mark.parametrize(
    ("inputs", "steps", "reason"),
    [
        ((), (), "either inputs or a Constant"),
        ((ref(3, 5),), (Constant(0.0),), "either inputs or a Constant"),
        ((ref(3, 5), ref(3, 5)), (), "need a Merge"),
        ((ref(3, 5),), (Scale(2.0), Merge("average", (1.0,))), "only be the first"),
        ((ref(3, 5),), (Scale(2.0), Constant(1.0)), "only be the first"),
        ((ref(3, 4),), (), "15 elements"),
        ((ref(3, 5),), (LowRank(ref(2, 5), ref(3, 4), 1.0),), "low-rank"),
        ((ref(3, 5),), (LowRank(ref(2, 5), ref(5, 2), 1.0),), "low-rank"),
        ((ref(3, 5),), (LowRank(ref(), ref(), 1.0),), "low-rank"),
    ],
)
def test_a_write_without_meaning_is_refused(inputs: tuple[TensorRef, ...], steps: tuple, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        TensorWrite("w", "F32", (3, 5), inputs, steps)
