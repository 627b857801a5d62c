"""Everything that looks into writes also looks into the writes that are their inputs."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from frankenmoe.build.proof import _blocks, _compare_bytes, _sampled_once
from frankenmoe.checkpoint.header import read_header
from frankenmoe.checkpoint.tensors import LowRank, Merge, TensorRef, TensorWrite
from frankenmoe.checkpoint.writer import write_shard
from frankenmoe.errors import ArtifactError, NumericsError
from frankenmoe.planning.bill import distinct_bytes
from frankenmoe.planning.compare import compared_whole, one_for_all, same_expert
from frankenmoe.planning.trained import nodes_with_trained
from frankenmoe.planning.tree import ExpertNode

SUFFIX = "up_proj.weight"
Refs = dict[str, TensorRef]


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Refs]:
    def save(file: str, **tensors: torch.Tensor) -> Refs:
        save_file(tensors, tmp_path / file)
        return read_header(tmp_path / file)

    return save


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"base": (6, 4), "one": (6, 4), "two": (6, 4), "a": (2, 4), "b": (6, 2)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def merged(refs: Refs, *, scale: float = 1.0, density: float = 0.5) -> TensorWrite:
    """TIES of a parent and of another with an adapter."""
    adapted = TensorWrite("up", "F32", (6, 4), (refs["two"],), (LowRank(refs["a"], refs["b"], scale),))
    merge = Merge("ties", (1.0, 1.0), density=density)
    return TensorWrite("up", "F32", (6, 4), (refs["base"], refs["one"], adapted), (merge,))


def node(write: TensorWrite, *, index: int = 0) -> ExpertNode:
    return ExpertNode(f"e{index}", (index,), None, {0: {SUFFIX: write}}, {0: {}})


def test_experts_merged_from_equal_tensors_are_equal(saved: Callable[..., Refs]) -> None:
    first, copy = saved("first", **tensors()), saved("copy", **tensors())
    other = saved("other", **{**tensors(), "b": torch.ones(6, 2)})
    one, two = node(merged(first)), node(merged(copy), index=1)
    assert same_expert(one, two)
    assert compared_whole(one, two)
    assert one_for_all([one, two], [[0, 1]])[1].ffn is one.ffn
    assert not same_expert(one, node(merged(other)))  # the factor of the nested adapter differs
    assert not same_expert(one, node(merged(copy, scale=2.0)))
    assert not same_expert(one, node(merged(copy, density=0.4)))
    flat = TensorWrite("up", "F32", (6, 4), (copy["base"], copy["one"], copy["two"]), merged(copy).steps)
    assert not same_expert(one, node(flat))


def test_a_merged_tensor_costs_its_own_bytes_once(saved: Callable[..., Refs]) -> None:
    refs = saved("w", **tensors())
    leaves = [node(merged(refs)), node(merged(refs), index=1), node(merged(refs, density=0.3), index=2)]
    copy = TensorWrite("base", "F32", (6, 4), (refs["base"],))
    assert distinct_bytes([copy, replace(copy, name="again")], leaves) == 3 * 6 * 4 * 4


def test_training_replaces_a_merged_tensor(saved: Callable[..., Refs]) -> None:
    refs, trained = saved("w", **tensors()), saved("t", **{"experts.0.up": torch.ones(6, 4)})
    (found,) = nodes_with_trained((node(merged(refs)),), trained)
    assert found.ffn[0][SUFFIX].copied == trained["experts.0.up"]


def shard(writes: list[TensorWrite], path: Path, *, scanned: set[TensorRef] | None = None) -> dict[str, torch.Tensor]:
    found = set() if scanned is None else scanned
    write_shard(path, writes, metadata={}, on_bytes=lambda amount: None, scanned=found)
    return load_file(path)


def test_a_merged_tensor_is_written_once_and_proved(saved: Callable[..., Refs], tmp_path: Path) -> None:
    refs = saved("w", **tensors())
    write = merged(refs)
    writes = [write, replace(write, name="again"), TensorWrite("base", "F32", (6, 4), (refs["base"],))]
    scanned: set[TensorRef] = set()
    found = shard(writes, tmp_path / "out", scanned=scanned)
    assert scanned >= set(refs.values())
    assert torch.equal(found["up"], found["again"])
    assert not torch.equal(found["up"], found["base"])
    made = read_header(tmp_path / "out")
    for wanted in (writes, _sampled_once(writes, made)):
        for each in wanted:
            assert _compare_bytes(each, made[each.name], sampled=wanted is not writes, on_bytes=lambda amount: None)
    assert next(_blocks(write, sampled=True)).size == write.nbytes
    with pytest.raises(ArtifactError, match=r"tensor up in .* differs from its source"):
        _compare_bytes(write, made["base"], sampled=False, on_bytes=lambda amount: None)


def test_a_broken_factor_deep_inside_is_blamed(saved: Callable[..., Refs], tmp_path: Path) -> None:
    """Its product with zeros may hide it."""
    broken = tensors() | {"a": torch.full((2, 4), torch.nan), "b": torch.zeros(6, 2)}
    with pytest.raises(NumericsError, match=r"tensor 'a' in .* holds NaN"):
        shard([merged(saved("w", **broken))], tmp_path / "out")
    assert not (tmp_path / "out").exists()
