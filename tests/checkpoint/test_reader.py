"""Folders: every layout that is read, every one that is refused, and bytes that are mapped and never stale."""

import json
import os
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from frankenmoe.checkpoint.reader import map_bytes, open_adapter, open_checkpoint
from frankenmoe.errors import SourceError

INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder with a config and no weights."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


def put_index(folder: Path, weight_map: object) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def put_shards(folder: Path) -> None:
    save_file({"b": torch.ones(2)}, folder / "m-1.safetensors")
    save_file({"a": torch.zeros(3), "unlisted": torch.zeros(1)}, folder / "m-2.safetensors")
    put_index(folder, {"a": "m-2.safetensors", "b": "m-1.safetensors"})


def message(folder: Path) -> str:
    with pytest.raises(SourceError) as caught:
        open_checkpoint(folder)
    assert caught.value.hint
    assert "\n" not in caught.value.message
    return caught.value.message


def test_config_without_weights(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    assert checkpoint.config == {"model_type": "llama"}
    assert (checkpoint.tensors, checkpoint.files, checkpoint.has_weights) == ({}, (), False)


@pytest.mark.parametrize("name", ["model.safetensors", "other.safetensors"])
def test_single_file_of_any_name(folder: Path, name: str) -> None:
    save_file({"a": torch.zeros(2, 3)}, folder / name)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.has_weights
    assert checkpoint.files == (folder / name,)
    assert checkpoint.tensors["a"].shape == (2, 3)


def test_the_shards_of_an_index(folder: Path) -> None:
    put_shards(folder)
    checkpoint = open_checkpoint(folder)
    assert {name: ref.file.name for name, ref in checkpoint.tensors.items()} == {
        "a": "m-2.safetensors",
        "b": "m-1.safetensors",
    }
    assert checkpoint.files == (folder / "m-1.safetensors", folder / "m-2.safetensors")
    assert checkpoint.notes == ()


def put_whole(folder: Path) -> None:
    save_file({"whole": torch.zeros(1)}, folder / "model.safetensors")


def put_broken_index(folder: Path) -> None:
    (folder / INDEX).write_text("{")


def put_stale_index(folder: Path) -> None:
    put_index(folder, {"a": "m-2.safetensors", "b": "m-1.safetensors"})


def put_own_index(folder: Path) -> None:
    put_index(folder, {"whole": "model.safetensors"})


@pytest.mark.parametrize(
    ("beside", "said"),
    [
        (put_shards, "which names 2 other files"),
        (put_stale_index, "which names 2 missing files"),
        (put_broken_index, None),
        (put_own_index, None),
    ],
)
def test_a_whole_file_goes_before_an_index_as_in_transformers(folder: Path, beside, said: str | None) -> None:
    beside(folder)
    put_whole(folder)
    checkpoint = open_checkpoint(folder)
    assert set(checkpoint.tensors) == {"whole"}
    assert set(open_checkpoint(folder, whole=False).tensors) == {"whole"}
    assert len(checkpoint.notes) == (said is not None)
    assert said is None or said in checkpoint.notes[0]


@pytest.mark.parametrize("name", ["m-1.safetensors", INDEX])
def test_the_file_that_the_config_names(folder: Path, name: str) -> None:
    put_whole(folder)
    put_shards(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "transformers_weights": name}))
    assert set(open_checkpoint(folder).tensors) == ({"b"} if name != INDEX else {"a", "b"})


@pytest.mark.parametrize("name", ["../m-1.safetensors", "/m-1.safetensors", 7, "pytorch_model.bin", "sub/" + INDEX])
def test_a_config_that_names_another_kind_of_file_is_refused(folder: Path, name: object) -> None:
    put_whole(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "transformers_weights": name}))
    assert f"has transformers_weights {name!r}" in message(folder)


@pytest.mark.parametrize("pickle_name", ["pytorch_model.bin", "pytorch_model.bin.index.json"])
@pytest.mark.parametrize("name", ["model.fp16.safetensors", "consolidated.safetensors"])
def test_a_variant_beside_the_pickle_that_transformers_would_load(folder: Path, name: str, pickle_name: str) -> None:
    save_file({"a": torch.zeros(1)}, folder / name)
    (folder / pickle_name).write_bytes(b"")
    assert f"two sets of weights: {pickle_name}, which transformers would load, and {name}" in message(folder)


def test_one_of_several_shards_is_not_the_whole_model(folder: Path) -> None:
    save_file({"a": torch.zeros(1)}, folder / "model-00001-of-00002.safetensors")
    assert "has model-00001-of-00002.safetensors alone, one of 2 files" in message(folder)
    assert not open_checkpoint(folder, whole=False).has_weights


def test_the_only_shard_is_the_whole_model(folder: Path) -> None:
    save_file({"a": torch.zeros(1)}, folder / "model-00001-of-00001.safetensors")
    assert set(open_checkpoint(folder).tensors) == {"a"}


def test_model_file_decides_over_others(folder: Path) -> None:
    save_file({"a": torch.zeros(1)}, folder / "model.safetensors")
    save_file({"b": torch.zeros(1)}, folder / "consolidated.safetensors")
    assert set(open_checkpoint(folder).tensors) == {"a"}


def test_links_into_a_cache_are_followed(folder: Path) -> None:
    put_shards(folder)
    blobs = folder.parent / "blobs"
    blobs.mkdir()
    for number, file in enumerate(sorted(folder.iterdir())):
        file.rename(blobs / str(number))
        file.symlink_to(Path("../../blobs") / str(number))
    (folder.parent / "snapshots").mkdir()
    snapshot = folder.rename(folder.parent / "snapshots" / "revision")
    checkpoint = open_checkpoint(snapshot)
    assert set(checkpoint.tensors) == {"a", "b"}
    assert checkpoint.notes == ()


def test_a_folder_inside_a_snapshot_and_links_into_another_cache_are_followed(folder: Path) -> None:
    put_shards(folder)
    model = folder.parent / "models--org--name"
    (model / "blobs").mkdir(parents=True)
    for number, file in enumerate(sorted(folder.iterdir())):
        file.rename(model / "blobs" / str(number))
        file.symlink_to(model / "blobs" / str(number))
    assert open_checkpoint(folder).notes == ()
    (model / "snapshots" / "revision").mkdir(parents=True)
    assert open_checkpoint(folder.rename(model / "snapshots" / "revision" / "step-100")).notes == ()


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "chat_template.jinja", "LICENSE", "README.md"])
def test_a_link_to_another_file_of_this_machine_is_refused(folder: Path, name: str) -> None:
    put_whole(folder)
    (folder.parent / "private").write_text('{"model_type": "llama"}')
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(folder.parent / "private")
    assert f"{folder / name} is a link to {folder.parent / 'private'}, outside its folder" in message(folder)


@pytest.mark.parametrize("name", ["additional_chat_templates", "additional_chat_templates/tools.jinja"])
def test_a_link_where_transformers_reads_templates_is_refused(folder: Path, name: str) -> None:
    put_whole(folder)
    private = folder.parent / "private"
    private.mkdir()
    (private / "tools.jinja").write_text("mine")
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).symlink_to(private / "tools.jinja" if "/" in name else private)
    assert f"{folder / name} is a link to {private}" in message(folder)


def test_links_inside_the_folder_and_links_to_weights_are_taken(folder: Path) -> None:
    save_file({"a": torch.zeros(1)}, folder.parent / "elsewhere.safetensors")
    (folder / "model.safetensors").symlink_to("../elsewhere.safetensors")
    (folder / "other.json").symlink_to("config.json")
    (folder / "broken.json").symlink_to("nowhere")
    checkpoint = open_checkpoint(folder)
    assert set(checkpoint.tensors) == {"a"}
    assert [note for note in checkpoint.notes if "elsewhere.safetensors, outside its folder" in note]
    assert len(checkpoint.notes) == 1
    (folder / "model.safetensors").unlink()
    (folder.parent / "elsewhere.safetensors").rename(folder.parent / "key.pem")
    (folder / "model.safetensors").symlink_to("../key.pem")
    assert "is a link to" in message(folder)


def test_a_folder_that_is_a_link_itself_is_no_matter(folder: Path) -> None:
    put_shards(folder)
    (folder.parent / "link").symlink_to(folder)
    assert set(open_checkpoint(folder.parent / "link").tensors) == {"a", "b"}


def test_an_adapter_with_a_link_out_of_its_folder_is_refused(folder: Path) -> None:
    (folder.parent / "private").write_text("{}")
    (folder / "adapter_config.json").symlink_to("../private")
    with pytest.raises(SourceError, match="outside its folder"):
        open_adapter(folder)


@pytest.mark.parametrize(
    "name",
    ["../../elsewhere", "../m.safetensors", "/m.safetensors", "s/m.safetensors", "..\\m.safetensors", "", "..", 7],
)
def test_index_that_points_elsewhere_is_refused(folder: Path, name: object) -> None:
    save_file({"a": torch.zeros(1)}, folder.parent / "m.safetensors")
    put_index(folder, {"a": name})
    assert f"{folder / INDEX} puts tensor 'a' in {name!r}, expected the bare name" in message(folder)


@pytest.mark.parametrize("weight_map", [None, {}, [], "m.safetensors"])
def test_index_without_a_map_is_refused(folder: Path, weight_map: object) -> None:
    put_index(folder, weight_map)
    assert "has no weight_map" in message(folder)


def test_missing_shard(folder: Path) -> None:
    put_shards(folder)
    (folder / "m-1.safetensors").unlink()
    assert "names m-1.safetensors, which is not there" in message(folder)


def test_tensor_missing_from_its_shard(folder: Path) -> None:
    put_shards(folder)
    put_index(folder, {"a": "m-1.safetensors"})
    assert "says that tensor 'a' is in m-1.safetensors, which does not have it" in message(folder)


def test_dangling_link_is_not_taken_for_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").symlink_to("../blobs/absent")
    save_file({"a": torch.zeros(1)}, folder / "other.safetensors")
    assert "model.safetensors is not a file" in message(folder)


def test_several_files_without_an_index(folder: Path) -> None:
    put_shards(folder)
    (folder / INDEX).unlink()
    assert f"has 2 safetensors files and no {INDEX}" in message(folder)


class Bomb:
    def __reduce__(self) -> tuple:
        return os.abort, ()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth"])
def test_pickles_are_refused_unopened(folder: Path, name: str) -> None:
    (folder / name).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(SourceError, match=f"only pickled weights \\({name}\\)") as caught:
        open_checkpoint(folder)
    assert "safe_serialization=True" in str(caught.value)


def test_pickles_beside_safetensors_do_not_matter(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"")
    save_file({"a": torch.zeros(1)}, folder / "model.safetensors")
    assert set(open_checkpoint(folder).tensors) == {"a"}


def test_an_adapter_is_not_the_weights(folder: Path) -> None:
    save_file({"a": torch.zeros(1)}, folder / "adapter_model.safetensors")
    assert not open_checkpoint(folder).has_weights


def test_missing_folder(tmp_path: Path) -> None:
    assert f"{tmp_path / 'absent'} is not a folder" in message(tmp_path / "absent")


def test_missing_config(tmp_path: Path) -> None:
    assert f"{tmp_path} has no config.json" in message(tmp_path)


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff", b'{"a":' * 100_000])
def test_invalid_config(folder: Path, content: bytes) -> None:
    (folder / "config.json").write_bytes(content)
    assert "config.json is not a JSON object" in message(folder)


def test_adapter(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"r": 4}')
    save_file({"a.lora_A.weight": torch.zeros(4, 8)}, tmp_path / "adapter_model.safetensors")
    adapter = open_adapter(tmp_path)
    assert adapter.config == {"r": 4}
    assert adapter.tensors["a.lora_A.weight"].shape == (4, 8)


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({}, "has no adapter_config.json"),
        ({"adapter_config.json": "{}"}, "has no adapter_model.safetensors"),
        ({"adapter_config.json": "{}", "adapter_model.bin": ""}, "only pickled weights"),
        ({"adapter_config.json": "{}", "adapter_model.safetensors": ""}, "has 0 bytes"),
    ],
)
def test_adapter_that_is_refused(tmp_path: Path, files: dict[str, str], reason: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(SourceError, match=reason):
        open_adapter(tmp_path)


def test_mapped_bytes_are_the_tensor(save) -> None:
    expected = torch.randn(4, 5)
    mapped = map_bytes(save({"first": torch.zeros(3), "w": expected})["w"])
    assert torch.equal(torch.frombuffer(mapped, dtype=torch.float32).view(4, 5), expected)


def test_a_file_is_mapped_once(save) -> None:
    refs = save({"a": torch.zeros(3), "b": torch.zeros(3)})
    link = refs["a"].file.with_name("link.safetensors")
    link.symlink_to(refs["a"].file)
    starts = {map_bytes(ref).ctypes.data - ref.start for ref in (refs["a"], replace(refs["b"], file=link))}
    assert len(starts) == 1


def test_writing_to_mapped_bytes_leaves_the_file(save) -> None:
    ref = save({"a": torch.zeros(3)})["a"]
    before = ref.file.read_bytes()
    map_bytes(ref)[:] = 1
    assert ref.file.read_bytes() == before


def test_a_replaced_file_is_mapped_anew(save) -> None:
    old = map_bytes(save({"a": torch.zeros(3)})["a"])
    new = map_bytes(save({"a": torch.ones(3)})["a"])
    assert np.array_equal(new.view(np.float32), [1, 1, 1])
    assert not old.any()


def test_a_file_that_shrank_or_went_is_refused(save) -> None:
    ref = save({"a": torch.zeros(3)})["a"]
    os.truncate(ref.file, ref.end - 1)
    with pytest.raises(SourceError, match=r"bytes left, but tensor 'a' ends at"):
        map_bytes(ref)
    ref.file.unlink()
    with pytest.raises(SourceError, match="cannot be mapped: No such file"):
        map_bytes(ref)
