"""Names of sources: folders, and the real huggingface_hub on a cache made by hand, offline."""

import json
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors.torch import load_file, save

import frankenmoe as fm
import tiny
from frankenmoe.checkpoint.hub import resolve
from frankenmoe.checkpoint.reader import open_checkpoint
from frankenmoe.errors import SourceError
from refusals import cli, refused

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CONFIG = {"config.json": b"{}"}
MODEL = CONFIG | {"model.safetensors": save({"w": torch.zeros(2)})}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty Hugging Face cache, with the network off."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


def put_model(cache: Path, files: dict[str, bytes]) -> Path:
    """Lay out `org/name` as the hub client does: blobs, and a snapshot of links to them."""
    model = cache / "models--org--name"
    snapshot = model / "snapshots" / COMMIT
    for folder in (snapshot, model / "blobs", model / "refs"):
        folder.mkdir(parents=True)
    (model / "refs" / "main").write_text(COMMIT)
    for number, (name, content) in enumerate(files.items()):
        (model / "blobs" / str(number)).write_bytes(content)
        (snapshot / name).symlink_to(Path("../../blobs") / str(number))
    return snapshot


def test_folder_relative_to_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    (tmp_path / "recipes").mkdir()
    expected = tmp_path / "org" / "name"
    assert resolve("org/name", revision=None, folder=tmp_path) == expected
    assert resolve("../org/name", revision=None, folder=tmp_path / "recipes") == expected
    assert resolve(str(expected), revision=None, folder=Path("/")) == expected


def test_folder_under_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    assert resolve("~/model", revision=None, folder=Path("/")) == tmp_path / "model"


def test_folders_have_no_revisions(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    with pytest.raises(SourceError, match="has no revision 'v1'"):
        resolve("model", revision="v1", folder=tmp_path)


@pytest.mark.parametrize(
    "name", ["gpt2", "./org/name", "../name", "/a/b", "a/b/c", "~/x", "~nobody/x", "", "a\0/b", "ä/b"]
)
def test_neither_folder_nor_id(cache: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "recipes"
    folder.mkdir()
    if not name:
        folder = folder / "absent"
    with pytest.raises(SourceError, match="is neither a folder, looked for at /") as caught:
        resolve(name, revision=None, folder=folder)
    assert caught.value.hint


@pytest.mark.parametrize("revision", [None, "main", COMMIT])
def test_cached_model(cache: Path, tmp_path: Path, revision: str | None) -> None:
    snapshot = put_model(cache, MODEL)
    found = resolve("org/name", revision=revision, folder=tmp_path)
    assert found == snapshot
    assert set(open_checkpoint(found).tensors) == {"w"}


def test_config_is_enough_for_the_bill(cache: Path, tmp_path: Path) -> None:
    snapshot = put_model(cache, CONFIG)
    assert resolve("org/name", revision=None, folder=tmp_path, weights=False) == snapshot
    with pytest.raises(SourceError, match="has no safetensors weights"):
        resolve("org/name", revision=None, folder=tmp_path)


def test_cached_pickles_are_refused_where_they_are_met(cache: Path, tmp_path: Path) -> None:
    put_model(cache, CONFIG | {"pytorch_model.bin": b"never opened"})
    found = resolve("org/name", revision=None, folder=tmp_path)
    with pytest.raises(SourceError, match="only pickled weights"):
        open_checkpoint(found)


@pytest.mark.parametrize("revision", [None, "v2"])
def test_offline_and_not_cached(cache: Path, tmp_path: Path, revision: str | None) -> None:
    if revision:
        put_model(cache, MODEL)
    with pytest.raises(SourceError, match="is not complete in the cache") as caught:
        resolve("org/name", revision=revision, folder=tmp_path)
    assert "HF_HUB_OFFLINE" in str(caught.value)
    assert revision is None or "at revision 'v2'" in caught.value.message


SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


def shards_of(parent: Path) -> dict[str, bytes]:
    """A tiny model's files as a hub would hold them in two shards with an index."""
    tensors = load_file(parent / "model.safetensors")
    names = sorted(tensors)
    halves = [names[::2], names[1::2]]
    index = {"metadata": {}, "weight_map": {name: SHARDS[half] for half in (0, 1) for name in halves[half]}}
    small = {name: (parent / name).read_bytes() for name in ("config.json", "tokenizer.json", "tokenizer_config.json")}
    weights = {SHARDS[half]: save({name: tensors[name] for name in halves[half]}) for half in (0, 1)}
    return small | {"model.safetensors.index.json": json.dumps(index).encode()} | weights


@pytest.mark.parametrize("lost", [[SHARDS[1]], SHARDS, ["model.safetensors.index.json"]], ids=["one", "both", "index"])
def test_an_interrupted_download_is_planned_and_then_gone_on_with(
    lost: list[str], cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = shards_of(tiny.make_parent(tmp_path / "parent"))
    snapshot = put_model(cache, {name: content for name, content in files.items() if name not in lost})
    recipe = tmp_path / "r.yml"
    recipe.write_text(
        "base_model: org/name\ngate_mode: random\nexperts: [{source_model: org/name}, {source_model: org/name}]\n"
    )
    made = fm.plan(fm.Recipe.load(recipe))
    assert made.bill.total > 0
    assert [problem for problem in made.problems if "no weights in org/name" in problem]
    # offline, what is missing cannot be had
    with pytest.raises(SourceError, match=r"names .* not there|which tensor is in which|no safetensors weights"):
        fm.build(recipe, tmp_path / "out", allow_identical=True)

    def go_on(name: str, *, allow_patterns: list[str], **_: object) -> str:
        for missing in lost if "*.safetensors" in allow_patterns else []:
            (snapshot / missing).write_bytes(files[missing])
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", go_on)
    outcome = cli("build", recipe, tmp_path / "out", "--allow-identical")
    assert outcome.code == 0, outcome.stderr


def test_a_folder_that_lacks_a_shard_is_refused_by_the_plan_too(tmp_path: Path) -> None:
    parent = tiny.make_parent(tmp_path / "parent")
    files = shards_of(parent)
    (parent / "model.safetensors").unlink()
    for name in files.keys() - {SHARDS[1]}:
        (parent / name).write_bytes(files[name])
    recipe = tiny.write_recipe(tmp_path / "r.yml", parent, [parent, parent])
    refused("plan", recipe, inside=tmp_path, facts=(SHARDS[1], "not there"), hint="missing shard")


def test_an_id_that_the_hub_does_not_allow(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="is no valid hub id"):
        resolve("org/na--me", revision=None, folder=tmp_path)


def make(kind: type[Exception]) -> Exception:
    """An error of the client, whose constructor wants a response that none of our code looks at."""
    error = kind.__new__(kind)
    error.args = ("first line\nsecond line",)
    return error


@pytest.mark.parametrize(
    ("kind", "reason", "hint"),
    [
        (GatedRepoError, "is gated", "accept its terms"),
        (RepositoryNotFoundError, "does not exist", "spelling"),
        (RevisionNotFoundError, "at revision 'v2' does not exist", "branches"),
        (LocalEntryNotFoundError, "is not in the cache", "check the network"),
        (ConnectionError, "cannot be downloaded: first line", "check the network"),
    ],
)
def test_what_the_hub_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Exception], reason: str, hint: str
) -> None:
    def fail(*_: object, **__: object) -> str:
        raise make(kind)

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(SourceError, match=reason) as caught:
        resolve("org/name", revision="v2", folder=tmp_path)
    assert "\n" not in caught.value.message
    assert hint in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("weights", "fetched"), [(True, {"w", "i", "c", "t", "j", "r", "l"}), (False, {"c", "t", "j", "r", "l"})]
)
def test_only_what_is_needed_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: bool, fetched: set[str]
) -> None:
    repository = {
        "w": "model-00001-of-00002.safetensors",
        "i": "model.safetensors.index.json",
        "c": "config.json",
        "t": "tokenizer.model",
        "j": "chat_template.jinja",
        "r": "README.md",
        "l": "LICENSE.txt",
        "pickle": "pytorch_model.bin",
        "twice": "consolidated.safetensors",
        "other": "onnx/model.safetensors",
        "code": "modeling_custom.py",
    }
    asked: dict[str, list[str]] = {}

    def record(name: str, **options: list[str]) -> str:
        asked.update(options)
        (tmp_path / "model.safetensors").touch()
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", record)
    resolve("org/name", revision=None, folder=tmp_path, weights=weights)
    from huggingface_hub.utils import filter_repo_objects

    kept = filter_repo_objects(
        repository.values(), allow_patterns=asked["allow_patterns"], ignore_patterns=asked["ignore_patterns"]
    )
    assert set(kept) == {repository[key] for key in fetched}


def test_the_environment_variable_alone_keeps_it_offline(tmp_path: Path) -> None:
    """In a process of its own: neither torch nor the hub client may be loaded before a hub id is met."""
    snapshot = put_model(tmp_path / "hub", MODEL)
    script = (
        "import sys; from pathlib import Path; from frankenmoe.checkpoint.hub import resolve\n"
        "assert not {'torch', 'huggingface_hub'} & sys.modules.keys()\n"
        "print(resolve('org/name', revision=None, folder=Path('/')))\n"
    )
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert done.stdout.strip() == str(snapshot)
