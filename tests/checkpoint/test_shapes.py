"""Tensors put together, cut and reordered, against torch; blocks are so small that every edge lies inside one."""

import pytest
import torch

from frankenmoe.checkpoint import values as values_module
from frankenmoe.checkpoint.tensors import Join, Noise, Part, Permute, Scale, Shift, TensorWrite, Turn
from frankenmoe.checkpoint.values import blocks, materialize
from frankenmoe.errors import NumericsError


def written(write: TensorWrite) -> torch.Tensor:
    return from_bytes(write, torch.float32)


def from_bytes(write: TensorWrite, dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(materialize(write).copy()).view(dtype).reshape(write.shape)


@pytest.fixture(params=[2, 7, 2**20])
def small_blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(values_module, "BLOCK", request.param)
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_join_part_permute(save, small_blocks: int, dtype: torch.dtype) -> None:
    a, b = torch.randn(4, 5).to(dtype), torch.randn(6, 5).to(dtype)
    refs = save({"a": a, "b": b})
    both = TensorWrite("j", "F32", (10, 5), (refs["a"], refs["b"]), (Join(),))
    whole = torch.cat([a, b]).float()
    assert torch.equal(written(both), whole)
    assert torch.equal(written(TensorWrite("p", "F32", (3, 5), (both,), (Part(10),))), whole[2:5])
    turned = TensorWrite("t", "F32", (10, 5), (both,), (Permute((1, 4, 0, 3, 2)), Scale(2.0), Shift(1.0)))
    order = torch.tensor([1, 4, 0, 3, 2, 6, 9, 5, 8, 7])
    assert torch.equal(written(turned), whole[order] * 2 + 1)
    assert sum(block.size for block in blocks(turned)) == turned.nbytes


def test_a_join_of_copies_has_their_bytes(save, small_blocks: int) -> None:
    parts = {str(index): torch.randn(3, 2).bfloat16() for index in range(3)}
    refs = save(parts)
    write = TensorWrite("j", "BF16", (3, 3, 2), tuple(refs.values()), (Join(),))
    assert len(write.joined) == 3
    assert materialize(write).tobytes() == b"".join(part.view(torch.int16).numpy().tobytes() for part in parts.values())


def test_an_order_and_its_inverse_cancel(save, small_blocks: int) -> None:
    ref = save({"a": torch.randn(8, 3)})["a"]
    order = Permute((2, 0, 3, 1))
    once = TensorWrite("o", "F32", (8, 3), (ref,), (order,))
    again = TensorWrite("i", "F32", (8, 3), (once,), (order.inverse,))
    assert torch.equal(written(again), written(TensorWrite("a", "F32", (8, 3), (ref,), (Scale(1.0),))))


def test_noise_on_a_part_is_the_noise_of_the_whole(save, small_blocks: int) -> None:
    ref = save({"a": torch.randn(6, 4)})["a"]
    noisy = TensorWrite("n", "F32", (6, 4), (ref,), (Noise(std=0.1, relative=True, seed=3),))
    assert torch.equal(written(TensorWrite("p", "F32", (2, 4), (noisy,), (Part(8),))), written(noisy)[2:4])


@pytest.mark.parametrize("columns", [1, 3, 2**23])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_turned_matrices(
    save, small_blocks: int, dtype: torch.dtype, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(values_module, "TURNED", columns * 10)
    a, b = torch.randn(4, 5).to(dtype), torch.randn(6, 5).to(dtype)
    refs = save({"a": a, "b": b})
    whole = torch.cat([a, b]).float()
    assert torch.equal(written(TensorWrite("t", "F32", (5, 10), (refs["a"], refs["b"]), (Turn(),))), whole.T)
    doubled = TensorWrite("d", "F32", (6, 5), (refs["b"],), (Scale(2.0),))
    turned = TensorWrite("t", "F32", (5, 10), (refs["a"], doubled), (Turn(), Shift(1.0)))
    assert torch.equal(written(turned), torch.cat([a.float(), b.float() * 2]).T + 1)
    again = TensorWrite(
        "u", "F32", (10, 5), (TensorWrite("t", "F32", (5, 10), tuple(refs.values()), (Turn(),)),), (Turn(),)
    )
    assert torch.equal(written(again), whole)
    # of one type, bytes are moved as they are
    name = {torch.float32: "F32", torch.bfloat16: "BF16"}[dtype]
    moved = TensorWrite("m", name, (5, 10), tuple(refs.values()), (Turn(),))
    assert torch.equal(from_bytes(moved, dtype), torch.cat([a, b]).T)
    twice = TensorWrite("c", name, (2, 5, 10), (moved, moved), (Join(),))
    assert len(twice.chained) == 2
    assert torch.equal(from_bytes(twice, dtype), torch.stack([torch.cat([a, b]).T] * 2))


def test_numbers_of_a_turned_matrix_are_checked(save) -> None:
    odd = torch.ones(4, 3)
    odd[2, 1] = float("nan")
    ref = save({"a": odd})["a"]
    with pytest.raises(NumericsError, match=r"holds NaN at \[2, 1\]"):
        materialize(TensorWrite("t", "F32", (3, 4), (ref,), (Turn(),)))


@pytest.mark.parametrize(
    ("shape", "steps"),
    [
        ((5, 3), (Join(),)),
        ((3, 3), (Part(12),)),
        ((6, 3), (Permute((1, 0, 2, 3)),)),
        ((6, 3), (Turn(),)),
        ((6, 3), (Scale(1.0), Part(0))),
    ],
)
def test_what_does_not_fit_is_refused(save, shape: tuple[int, int], steps: tuple) -> None:
    ref = save({"a": torch.randn(6, 3)})["a"]
    with pytest.raises(ValueError, match=r"elements|first step"):
        TensorWrite("x", "F32", shape, (ref,), steps)
