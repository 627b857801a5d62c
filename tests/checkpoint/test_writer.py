"""Shards: the right bytes by every route, whole or absent whatever happens."""

import errno
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from frankenmoe.checkpoint import direct, writer
from frankenmoe.checkpoint.header import read_header
from frankenmoe.checkpoint.tensors import DTYPES, LowRank, Scale, TensorRef, TensorWrite
from frankenmoe.checkpoint.writer import free_bytes, write_atomic, write_shard
from frankenmoe.errors import ArtifactError, NumericsError, SourceError

TENSORS = {"a": torch.randn(30, 10), "b": torch.randn(7).bfloat16(), "c": torch.arange(9), "d": torch.zeros(0, 3)}


def ignore(count: int) -> None:
    """Nobody watches the progress."""


def copy_of(ref: TensorRef, *, name: str | None = None) -> TensorWrite:
    return TensorWrite(name or ref.name, ref.dtype, ref.shape, (ref,))


def write(path: Path, writes: list[TensorWrite], **changes: Any) -> Path:
    write_shard(path, writes, **{"metadata": {"format": "pt"}, "on_bytes": ignore, "scanned": set()} | changes)
    return path


def refuse(code: int) -> Callable[..., int]:
    def fail(*_: object, **__: object) -> int:
        raise OSError(code, os.strerror(code))

    return fail


def assert_holds(path: Path, expected: dict[str, torch.Tensor]) -> None:
    found = load_file(path)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_copies_conversions_and_new_names(save, tmp_path: Path) -> None:
    refs = save(TENSORS)
    writes = [
        copy_of(refs["c"]),
        TensorWrite("half", "BF16", (30, 10), (refs["a"],)),
        TensorWrite("double", "F32", (10, 30), (refs["a"],), (Scale(2.0),)),
        copy_of(refs["a"], name="same"),
    ]
    path = write(tmp_path / "out.safetensors", writes)
    a, c = TENSORS["a"], TENSORS["c"]
    assert_holds(path, {"c": c, "half": a.bfloat16(), "double": 2 * a.view(10, 30), "same": a})
    assert list(read_header(path)) == ["c", "half", "double", "same"]
    assert read_header(path)["c"].start == 4096
    with safe_open(path, "pt") as shard:
        assert shard.metadata() == {"format": "pt"}


def test_progress_comes_by_the_buffer_and_adds_up_to_the_file(
    save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(direct, "BUFFER", 4096)
    refs = save({"a": torch.randn(1500), "b": torch.randn(10)})
    seen: list[int] = []
    writes = [copy_of(refs["a"]), TensorWrite("half", "F16", (1500,), (refs["a"],)), copy_of(refs["b"])]
    path = write(tmp_path / "out.safetensors", writes, on_bytes=seen.append)
    assert seen == [4096, 4096, 1904, 3000, 40]
    assert sum(seen) == path.stat().st_size


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("stop_after", [1, 2])
def test_an_interrupted_shard_leaves_nothing(save, tmp_path: Path, error: type[BaseException], stop_after: int) -> None:
    out = tmp_path / "out"
    out.mkdir()
    calls = iter(range(stop_after))

    def interrupt(count: int) -> None:
        if next(calls) == stop_after - 1:
            raise error

    with pytest.raises(error):
        write(out / "m.safetensors", [copy_of(save(TENSORS)["a"])], on_bytes=interrupt)
    assert list(out.iterdir()) == []


def test_an_interrupted_rewrite_leaves_the_old_shard(save, tmp_path: Path) -> None:
    ref = save(TENSORS)["a"]
    path = write(tmp_path / "m.safetensors", [copy_of(ref)])
    before = path.read_bytes()
    with pytest.raises(RuntimeError):
        write(path, [copy_of(ref, name="new")], on_bytes=refuse_to_go_on)
    assert path.read_bytes() == before


def refuse_to_go_on(count: int) -> None:
    raise RuntimeError


def test_kill_leaves_nothing_that_looks_finished(save, tmp_path: Path) -> None:
    ref = save(TENSORS)["a"]
    script = (
        "import os, signal, sys; from pathlib import Path\n"
        "from frankenmoe.checkpoint.header import read_header\n"
        "from frankenmoe.checkpoint.tensors import TensorWrite\n"
        "from frankenmoe.checkpoint.writer import write_shard\n"
        "ref = read_header(Path(sys.argv[1]))['a']\n"
        "write_shard(Path(sys.argv[2]), [TensorWrite('a', ref.dtype, ref.shape, (ref,))], metadata={},"
        " on_bytes=lambda count: os.kill(os.getpid(), signal.SIGKILL), scanned=set())\n"
    )
    path = tmp_path / "m.safetensors"
    done = subprocess.run([sys.executable, "-c", script, str(ref.file), str(path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert not path.exists()
    assert_holds(write(path, [copy_of(ref)]), {"a": TENSORS["a"]})
    assert not path.with_name("m.safetensors.partial").exists()


def test_file_and_folder_are_synced(save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.safetensors"
    seen: list[tuple[bool, bool]] = []
    monkeypatch.setattr(os, "fsync", lambda fd: seen.append((stat.S_ISDIR(os.fstat(fd).st_mode), path.exists())))
    write(path, [copy_of(save(TENSORS)["a"])])
    assert seen == [(False, False), (True, True)]


def test_a_full_disk_says_where_and_how_much(save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    out.mkdir()
    monkeypatch.setattr(os, "posix_fallocate", refuse(errno.ENOSPC))
    monkeypatch.setattr(writer, "free_bytes", lambda folder: 1000)
    with pytest.raises(ArtifactError) as caught:
        write(out / "m.safetensors", [copy_of(save(TENSORS)["a"])])
    assert caught.value.message == (
        f"{out / 'm.safetensors'} with its 5296 bytes does not fit into {out}: 4,296 more bytes needed"
    )
    assert caught.value.hint
    assert list(out.iterdir()) == []


def test_a_quota_is_met_while_writing(save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "pwrite", refuse(errno.EDQUOT))
    with pytest.raises(ArtifactError, match="the disk or the quota is full"):
        write(tmp_path / "m.safetensors", [copy_of(save(TENSORS)["a"])])
    assert {file.name for file in tmp_path.iterdir()} == {"source.safetensors"}


def test_another_failure_of_the_disk_is_told_as_it_is(save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "pwrite", refuse(errno.EIO))
    with pytest.raises(OSError, match="Input/output"):
        write(tmp_path / "out.safetensors", [copy_of(ref) for ref in save(TENSORS).values()])


def test_a_disk_that_cannot_reserve_is_written_all_the_same(
    save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "posix_fallocate", refuse(errno.EOPNOTSUPP))
    assert_holds(write(tmp_path / "m.safetensors", [copy_of(save(TENSORS)["a"])]), {"a": TENSORS["a"]})


def test_a_broken_source_is_refused_and_nothing_left(save, tmp_path: Path) -> None:
    ref = save({"w": torch.tensor([1.0, torch.nan])})["w"]
    with pytest.raises(NumericsError, match=r"tensor 'w' in .* holds NaN at \[1\]"):
        write(tmp_path / "m.safetensors", [copy_of(ref, name="out")])
    assert {file.name for file in tmp_path.iterdir()} == {"source.safetensors"}


def test_a_shared_source_is_scanned_once(save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refs = save({"w": torch.ones(3), "v": torch.ones(3)})
    seen: list[int] = []
    real = writer.first_nonfinite
    monkeypatch.setattr(writer, "first_nonfinite", lambda raw, dtype: seen.append(raw.size) or real(raw, dtype=dtype))
    scanned = {refs["v"]}
    write(tmp_path / "m.safetensors", [copy_of(refs["w"], name=str(i)) for i in range(16)], scanned=scanned)
    write(tmp_path / "n.safetensors", [copy_of(refs["w"]), copy_of(refs["v"])], scanned=scanned)
    assert seen == [12]
    assert scanned == set(refs.values())


@pytest.mark.parametrize("at", [0, 1023, 1024, 1025, 2999])
@pytest.mark.parametrize("odd", [0, 1, 3])
def test_a_number_that_is_none_is_found_wherever_buffers_end(
    save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int, odd: int
) -> None:
    monkeypatch.setattr(direct, "BUFFER", 4096)
    broken = torch.zeros(3000)
    broken[at] = -torch.inf
    refs = save({"a_bytes": torch.zeros(odd, dtype=torch.uint8), "w": broken})
    with pytest.raises(NumericsError, match=rf"tensor 'w' in .* holds -Inf at \[{at}\]"):
        write(tmp_path / "m.safetensors", [copy_of(refs["a_bytes"]), copy_of(refs["w"])])


def test_a_number_that_a_product_loses_is_found(save, tmp_path: Path) -> None:
    refs = save({"w": torch.zeros(2, 2), "a": torch.full((1, 2), torch.inf), "b": torch.zeros(2, 1)})
    lora = TensorWrite("w", "F32", (2, 2), (refs["w"],), (LowRank(refs["a"], refs["b"], 1.0),))
    with pytest.raises(NumericsError, match=r"tensor 'a' in .* holds Inf at \[0, 0\]"):
        write(tmp_path / "m.safetensors", [lora])


def test_what_is_computed_twice_is_read_back(save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "BUFFER", 4096)
    made: list[str] = []
    real = writer.blocks
    monkeypatch.setattr(writer, "blocks", lambda one: made.append(one.name) or real(one))
    tensor = torch.randn(5000)
    ref = save({"w": tensor})["w"]
    writes = [TensorWrite(name, "BF16", (5000,), (ref,)) for name in "abcdefgh"]
    path = write(tmp_path / "m.safetensors", writes)
    assert_holds(path, {name: tensor.bfloat16() for name in "abcdefgh"})
    assert made == ["a", "b"]  # b's turn comes while the end of a is still in the buffer


def test_a_source_that_shrank_or_went(save, tmp_path: Path) -> None:
    ref = save({"w": torch.ones(100)})["w"]
    os.truncate(ref.file, ref.end - 10)
    path = tmp_path / "m.safetensors"
    with pytest.raises(SourceError, match="ended 10 bytes before tensor 'w' was copied"):
        write(path, [copy_of(ref)], scanned={ref})
    ref.file.unlink()
    with pytest.raises(SourceError, match="cannot be read: No such file"):
        write(path, [copy_of(ref)], scanned={ref})
    assert list(tmp_path.iterdir()) == []


SHAPES = st.lists(st.integers(0, 5), max_size=3)
LONG = st.sampled_from([[511], [1], [2047], [2048], [2049], [4097], [3, 1366]])
PICKS = st.lists(
    st.tuples(st.sampled_from(["F32", "F16", "BF16", "F64", "U8"]), SHAPES | LONG, st.booleans()),
    min_size=1,
    max_size=6,
)


@pytest.mark.parametrize("way", ["direct", "buffered"])
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(picks=PICKS, data=st.data())
def test_any_mix_of_writes(
    way: str, tmp_path_factory: pytest.TempPathFactory, picks: list, data: st.DataObject
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(direct, "BUFFER", data.draw(st.sampled_from([4096, 8192])))
        if way == "buffered":
            patch.setattr(direct, "DIRECT", 0)
        assert_any_mix(tmp_path_factory, picks, data)


def assert_any_mix(tmp_path_factory: pytest.TempPathFactory, picks: list, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("mix")
    source = {
        str(i): torch.randn(shape).abs().to(getattr(torch, DTYPES[dtype].name))
        for i, (dtype, shape, _) in enumerate(picks)
    }
    save_file(source, folder / "source.safetensors")
    refs = read_header(folder / "source.safetensors")
    writes, expected = [], {}
    for i in data.draw(st.permutations(range(len(picks)))):
        ref, is_copy = refs[str(i)], picks[i][2] or picks[i][0] == "U8"
        dtype = ref.dtype if is_copy else "BF16"
        writes.append(TensorWrite(f"out.{i}", dtype, ref.shape, (ref,)))
        expected[f"out.{i}"] = source[str(i)].float().bfloat16() if dtype == "BF16" else source[str(i)]
    assert_holds_in_order(write(folder / "out.safetensors", writes), writes, expected)


def assert_holds_in_order(path: Path, writes: list[TensorWrite], expected: dict[str, torch.Tensor]) -> None:
    with safe_open(path, "np") as shard:
        assert set(shard.keys()) == expected.keys()
    content = path.read_bytes()
    start = int.from_bytes(content[:8], "little") + 8
    for write in writes:
        tensor = expected[write.name].reshape(-1)
        raw = tensor.view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        assert content[start : start + write.nbytes] == raw
        start += write.nbytes
    assert start == len(content)


def test_write_atomic_replaces(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    write_atomic(path, b"old")
    write_atomic(path, b"")
    assert path.read_bytes() == b""
    write_atomic(path, b"new")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_write_atomic_that_fails_keeps_the_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "record.json"
    write_atomic(path, b"old")
    monkeypatch.setattr(os, "fsync", refuse(errno.ENOSPC))
    with pytest.raises(ArtifactError):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_free_bytes(tmp_path: Path) -> None:
    status = os.statvfs(tmp_path)
    assert 0 < free_bytes(tmp_path) <= status.f_blocks * status.f_frsize
