"""Same bytes or not: fingerprints, full hashes, and tensors compared."""

import hashlib
import os
from pathlib import Path

import pytest
import torch

from frankenmoe.checkpoint import fingerprint as module
from frankenmoe.checkpoint.fingerprint import fingerprint, same_values, sha256
from frankenmoe.checkpoint.header import header_bytes, read_header
from frankenmoe.errors import SourceError


def put(file: Path, content: bytes, *, name: str = "w") -> Path:
    file.write_bytes(header_bytes([(name, "U8", (len(content),))], metadata={}) + content)
    return file


def change(file: Path, offset: int) -> None:
    """Flip the byte that lies `offset` bytes into the data, as a later write would."""
    content = bytearray(file.read_bytes())
    content[4096 + offset] ^= 1
    file.write_bytes(content)
    status = file.stat()
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 1))


def test_fingerprint_is_of_the_content_alone(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    first = put(tmp_path / "a.safetensors", bytes(1000))
    second = put(tmp_path / "elsewhere" / "b.safetensors", bytes(1000))
    assert fingerprint(first) == fingerprint(second)


def test_fingerprint_is_the_same_on_every_machine(tmp_path: Path) -> None:
    """Artifacts record it: a change of method makes every artifact look as if its sources had changed."""
    file = put(tmp_path / "a.safetensors", bytes(range(256)) * 2000)
    assert fingerprint(file) == "5172c896262e9f6e120cd43c2a68264b"


def test_fingerprint_sees_size_header_and_sampled_bytes(tmp_path: Path) -> None:
    size = 10**6
    file = put(tmp_path / "a.safetensors", bytes(size))
    prints = [fingerprint(file), fingerprint(put(tmp_path / "b.safetensors", bytes(size + 1)))]
    prints.append(fingerprint(put(tmp_path / "c.safetensors", bytes(size), name="v")))
    for offset in (0, size - 1, (size - 4096) // 63):
        change(file, offset)
        prints.append(fingerprint(file))
    assert len(set(prints)) == len(prints)


def test_small_files_are_read_whole(tmp_path: Path) -> None:
    file = put(tmp_path / "a.safetensors", bytes(64 * 4096))
    prints = set()
    for offset in range(0, 64 * 4096, 4095):
        change(file, offset)
        prints.add(fingerprint(file))
    assert len(prints) == 65


def test_fingerprint_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = put(tmp_path / "a.safetensors", bytes(10))
    first = fingerprint(file)
    (tmp_path / "link").symlink_to(file)
    monkeypatch.delattr(module, "raw_header")
    assert fingerprint(tmp_path / "link") == first


def test_fingerprint_of_what_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="cannot be read"):
        fingerprint(tmp_path / "absent")
    (tmp_path / "short").write_bytes(b"1234")
    with pytest.raises(SourceError, match="has 4 bytes"):
        fingerprint(tmp_path / "short")


def test_sha256_and_its_progress(tmp_path: Path) -> None:
    content = os.urandom(2**20 + 5)
    (tmp_path / "f").write_bytes(content)
    seen: list[int] = []
    assert sha256(tmp_path / "f", on_bytes=seen.append) == hashlib.sha256(content).hexdigest()
    assert seen == [2**20, 5]
    assert sha256(tmp_path / "f") == hashlib.sha256(content).hexdigest()


def test_same_values_whatever_the_names(save) -> None:
    tensor = torch.randn(50, 20)
    first = save({"a": torch.zeros(1), "w": tensor}, file="1.safetensors")
    second = save({"v": tensor}, file="2.safetensors")
    assert same_values(first["w"], second["v"], limit=0)
    assert same_values(first["w"], second["v"], limit=10**6)


def test_other_shape_type_or_value_is_not_the_same(save) -> None:
    tensor = torch.zeros(4, 6)
    refs = save({"w": tensor, "shape": tensor.T.contiguous(), "type": tensor.int(), "value": tensor + 1})
    assert not any(same_values(refs["w"], refs[name], limit=10**6) for name in ("shape", "type", "value"))


def test_a_linked_file_is_known_unread(save, monkeypatch: pytest.MonkeyPatch) -> None:
    ref = save({"w": torch.zeros(4)})["w"]
    link = ref.file.with_name("link.safetensors")
    link.symlink_to(ref.file)
    monkeypatch.delattr(module, "map_bytes")
    assert same_values(ref, read_header(link)["w"], limit=0)


@pytest.mark.parametrize(("limit", "same"), [(0, True), (10_000, True), (10_001, False), (10**9, False)])
def test_limit_is_how_far_a_full_comparison_goes(tmp_path: Path, limit: int, same: bool) -> None:
    """Byte 10,000 of 200,000 lies between two sampled blocks."""
    first = put(tmp_path / "1.safetensors", bytes(200_000))
    second = put(tmp_path / "2.safetensors", bytes(200_000))
    change(second, 10_000)
    assert same_values(read_header(first)["w"], read_header(second)["w"], limit=limit) is same
