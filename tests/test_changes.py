"""verify, load and resume notice changes in every file that an artifact depends on."""

import json
import shutil
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import frankenmoe as fm
import tiny
from frankenmoe.artifact.folder import partial_folder
from frankenmoe.build import run as building
from frankenmoe.errors import ArtifactError, SourceError

FORMS = pytest.mark.parametrize("virtual", [True, False], ids=["virtual", "built"])


@pytest.fixture
def own(tmp_path: Path) -> list[Path]:
    """Two parents that a test may edit."""
    return [tiny.make_parent(tmp_path / "parents" / str(seed), seed=seed) for seed in range(2)]


@pytest.fixture
def recipe(own: list[Path], tmp_path: Path) -> Path:
    return tiny.write_recipe(tmp_path / "r.yml", own[0], own)


def edit(file: Path) -> None:
    """Adds one field to the JSON, which no program reads: a minimal edit."""
    file.write_text(json.dumps(json.loads(file.read_text()) | {"_edited": True}))


@FORMS
@pytest.mark.parametrize(
    ("parent", "name"), [(0, "config.json"), (1, "config.json"), (0, "tokenizer.json"), (0, "generation_config.json")]
)
def test_verify_notices_an_edited_source(
    virtual: bool, parent: int, name: str, own: list[Path], recipe: Path, tmp_path: Path
) -> None:
    out = fm.build(recipe, tmp_path / "out", virtual=virtual).folder
    assert "configs" not in {check.what for check in fm.verify(out)}
    edit(own[parent] / name)
    with pytest.raises(ArtifactError, match=f"{name} changed since .*out was made") as caught:
        fm.verify(out)
    assert str(own[parent]) in caught.value.message
    if virtual:
        with pytest.raises(ArtifactError, match=name):
            fm.load(out)


@FORMS
def test_verify_notices_a_file_that_a_source_did_not_have(
    virtual: bool, own: list[Path], recipe: Path, tmp_path: Path
) -> None:
    out = fm.build(recipe, tmp_path / "out", virtual=virtual).folder
    (own[0] / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(ArtifactError, match=r"configs and tokenizer files .* changed"):
        fm.verify(out)


@FORMS
@pytest.mark.parametrize("change", [edit, Path.unlink], ids=["edited", "gone"])
def test_verify_notices_its_own_small_files(
    virtual: bool, change: Callable[[Path], Any], own: list[Path], recipe: Path, tmp_path: Path
) -> None:
    out = fm.build(recipe, tmp_path / "out", virtual=virtual).folder
    names = ["tokenizer.json", "generation_config.json"] + ([] if virtual else ["config.json"])
    assert {*names, "recipe.yml"} <= set(json.loads((out / "frankenmoe.json").read_text())["files"])
    for name in names:
        kept = shutil.copy(out / name, tmp_path / "kept")
        change(out / name)
        with pytest.raises(ArtifactError, match=f"{name} (was edited|was removed)"):
            fm.verify(out)
        shutil.copy(kept, out / name)
    assert "files" in {check.what for check in fm.verify(out)}


def interrupted(recipe: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves a partial folder behind, as Ctrl-C in the first shard does."""

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(building, "compose", stop)
        with pytest.raises(KeyboardInterrupt):
            fm.build(recipe, out)
    assert partial_folder(out).is_dir()


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_an_edited_config_is_noticed_on_resuming(
    name: str, own: list[Path], recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(recipe, tmp_path / "out", monkeypatch)
    edit(own[0] / name)
    with pytest.raises(ArtifactError, match="begun from another recipe"):
        fm.build(recipe, tmp_path / "out")


def test_a_build_of_an_earlier_layout_is_not_gone_on_with(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(recipe, tmp_path / "out", monkeypatch)
    planning = import_module("frankenmoe.planning.plan")
    monkeypatch.setattr(planning, "LAYOUT_VERSION", planning.LAYOUT_VERSION + 1)
    with pytest.raises(ArtifactError, match="begun from another recipe"):
        fm.build(recipe, tmp_path / "out")


@pytest.mark.parametrize("change", [edit, lambda file: shutil.rmtree(file.parent)], ids=["edited", "gone"])
def test_a_config_that_changes_meanwhile_is_noticed(
    change: Callable[[Path], Any], own: list[Path], recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = building.write_atomic

    def last_write(*args: Any) -> None:
        real(*args)
        change(own[1] / "config.json")

    monkeypatch.setattr(building, "write_atomic", last_write)
    with pytest.raises(SourceError, match="changed while it was read"):
        fm.build(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not partial_folder(tmp_path / "out").exists()
