"""A tiny version of recipes/raiden-16x3.43b.yml: every stage in one run, on generated parents."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

import frankenmoe as fm
from frankenmoe.checkpoint.writer import free_bytes
from frankenmoe.errors import ArtifactError, PlanError
from frankenmoe.pipeline import Finished, run
from pipeline.killer import kill_at

pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")
pytest.importorskip("lm_eval")

WEIGHTS = (".safetensors", ".gguf")
ALL = ["fit", "train", "build", "audit", "eval", "export", "card"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three parents with a tokenizer that llama.cpp knows, and two kinds of text."""
    import gguftools

    root = tmp_path_factory.mktemp("twin")
    for parent in gguftools.parents(root, "llama"):
        (parent / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: en\n---\n")
    (root / "abc.txt").write_text("abc bca cab " * 260)
    (root / "xyz.txt").write_text("xyz zyx yxz " * 260)
    return root


def write(folder: Path, **changes: Any) -> Path:
    experts = [
        {"source_model": "llama1", "name": "abc", "data": "abc.txt"},
        {"source_model": "llama2", "name": "xyz", "data": "xyz.txt"},
    ]
    recipe = {
        "name": "twin",
        "base_model": "llama0",
        "gate_mode": "random",
        "experts_per_token": 2,
        "experts": experts,
        "fit": {"method": "ridge", "tokens": 512, "block": 32},
        # trains all parts, so that the small possible gain is reached and the result is kept
        "train": {"what": ["routers", "experts"], "steps": 6, "batch": 4, "block": 32, "rate": 0.01},
        "audit": {"tokens": 256},
        "eval": {"limit": 2, "against_parents": True},
        "export": {"types": ["q8_0"], "check": False},
        "card": {"prompts": ["abc"], "max_new_tokens": 4},
    } | changes
    file = folder / "twin.yml"
    file.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return file


def now(finished: Finished) -> list[str]:
    return [step.name for step in finished.steps if step.now]


@pytest.mark.timeout(600)
def test_the_twin_runs_whole_then_only_what_changed(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert now(run(write(folder), out)) == ALL
    model = out / "model"
    assert fm.verify(model)
    for file in ("README.md", "routing.png", "gguf/twin-Q8_0.gguf"):
        assert (model / file).is_file(), file
    for report in ("audit.json", "audit.html", "eval.json", "export.json", "training.json", "samples.json"):
        assert (model / "reports" / report).is_file(), report
    stages = [stage["stage"] for stage in json.loads((model / "frankenmoe.json").read_text())["stages"]]
    assert stages == ["fit", "train", "build"]

    text = (model / "README.md").read_text()
    lacking = text.partition("## Not in this card")[2]
    assert "model-index" in lacking  # no leaderboard was run
    assert "Results" not in lacking
    for said in ("by ridge regression", "Then routers, experts were trained, 6 steps", "| twin |", "twin-Q8_0.gguf"):
        assert said in text, said
    assert ModelCard(text, ignore_metadata_errors=False).data.license == "apache-2.0"

    assert now(run(write(folder), out)) == []
    (model / "routing.png").unlink()
    assert now(run(write(folder), out)) == ["card"]
    assert now(run(write(folder, export={"types": ["q4_0"], "check": False}), out)) == ["export", "card"]
    assert [file.name for file in (model / "gguf").iterdir()] == ["twin-Q4_0.gguf"]


@pytest.mark.timeout(120)
def test_a_type_that_llama_cpp_does_not_have_is_told_before_the_first_step(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="q4_k_n"):
        run(write(folder, export={"types": ["q4_k_n"]}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("first", "step"),
    [(90, 110), pytest.param(1, 3, marks=pytest.mark.slow)],
    ids=["in train and export", "every third moment"],
)
def test_killed_in_any_stage_the_same_command_ends_with_the_same_model(
    folder: Path, tmp_path: Path, first: int, step: int
) -> None:
    recipe = write(folder, eval={"limit": 2}, export={"types": ["q8_0"]})
    assert kill_at(recipe, tmp_path, first, step) >= 2
    whole = content(tmp_path / "whole")
    for out in tmp_path.glob("killed-*"):
        found = content(out)
        assert found.keys() == whole.keys(), out.name
        assert [name for name in found if name.endswith(WEIGHTS) and found[name] != whole[name]] == [], out.name


def content(out: Path) -> dict[str, bytes]:
    """Every file of a run."""
    return {str(file.relative_to(out)): file.read_bytes() for file in out.rglob("*") if file.is_file()}


ONLY_EXPORT = {"fit": False, "train": False, "audit": False, "eval": False, "card": False}


@pytest.mark.timeout(120)
def test_a_finished_export_needs_no_room_for_a_second_one(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export = {"types": ["q8_0"], "check": False, "allow_random": True}
    recipe = write(folder, **ONLY_EXPORT, export=export)
    assert now(run(recipe, tmp_path / "out")) == ["build", "export"]
    monkeypatch.setattr("frankenmoe.artifact.folder.free_bytes", lambda folder: 0)
    assert now(run(recipe, tmp_path / "out")) == []
    # a run killed while it checked the files that it had written
    scratch = tmp_path / "out" / "work" / "export.partial"
    scratch.mkdir()
    (tmp_path / "out" / "model" / "gguf").rename(scratch / "gguf")
    monkeypatch.setattr("frankenmoe.artifact.folder.free_bytes", free_bytes)
    assert now(run(recipe, tmp_path / "out")) == ["export"]
    assert not scratch.exists()
    recipe = write(folder, **ONLY_EXPORT, export=export | {"types": ["f32"]})
    monkeypatch.setattr("frankenmoe.artifact.folder.free_bytes", lambda folder: 0)
    with pytest.raises(ArtifactError, match="GiB are still to be written"):
        run(recipe, tmp_path / "out")
