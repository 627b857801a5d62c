"""`frankenmoe run`: stages run in order and only once, and a killed run can be continued."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

import frankenmoe as fm
import tiny
from frankenmoe.cli.app import app
from frankenmoe.errors import ArtifactError, FrankenMoEError, PlanError, RecipeError
from frankenmoe.pipeline import Finished, run
from frankenmoe.progress import Progress
from pipeline.killer import kill_at

CARD = {"license": "mit", "prompts": ["hello"], "max_new_tokens": 4}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three parents, a and b and a base."""
    root = tmp_path_factory.mktemp("run")
    for seed, name in enumerate(("base", "a", "b")):
        tiny.make_parent(root / name, seed=seed)
    return root


@pytest.fixture
def recipe(sources: Path, tmp_path: Path) -> Path:
    """A recipe next to links to its parents; tests may change it."""
    for name in ("base", "a", "b"):
        (tmp_path / name).symlink_to(sources / name)
    return tiny.write_recipe(tmp_path / "r.yml", Path("base"), [Path("a"), Path("b")], name="twin", card=CARD)


def changed(recipe: Path, **keys: Any) -> None:
    recipe.write_text(yaml.safe_dump(yaml.safe_load(recipe.read_text()) | keys, sort_keys=False))


def now(finished: Finished) -> list[str]:
    """The names of the stages that were not skipped."""
    return [step.name for step in finished.steps if step.now]


def test_first_all_then_nothing_then_what_changed(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = run(recipe, out)
    assert [step.name for step in first.steps] == now(first) == ["build", "card"]
    assert first.artifact.folder == out / "model"
    assert fm.verify(out / "model")
    before = {file: file.stat().st_mtime_ns for file in out.rglob("*") if file.is_file() and file.name != "run.lock"}
    again = run(recipe, out)
    assert now(again) == []
    assert [step.summary for step in again.steps] == [step.summary for step in first.steps]
    assert {file: file.stat().st_mtime_ns for file in before} == before

    changed(recipe, card=CARD | {"description": "A word of my own."})
    assert now(run(recipe, out)) == ["card"]
    assert "A word of my own." in (out / "model" / "README.md").read_text()
    changed(recipe, experts_per_token=1)
    assert now(run(recipe, out)) == ["build", "card"]
    assert json.loads((out / "model" / "config.json").read_text())["num_experts_per_tok"] == 1
    assert not list(out.rglob("*.old")) + list(out.rglob("*.partial"))


def test_a_source_that_changed_is_noticed_by_its_content_not_its_time(recipe: Path, tmp_path: Path) -> None:
    source = (tmp_path / "a").resolve()
    (tmp_path / "a").unlink()
    shutil.copytree(source, tmp_path / "a")
    run(recipe, tmp_path / "out")
    for file in (tmp_path / "a").iterdir():
        os.utime(file, (1, 1))
    assert now(run(recipe, tmp_path / "out")) == []
    tiny.make_parent(tmp_path / "a", seed=9)
    assert now(run(recipe, tmp_path / "out")) == ["build", "card"]
    assert fm.verify(tmp_path / "out" / "model")


def test_a_result_that_was_damaged_is_made_again(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(recipe, out)
    (out / "model" / "model-routers.safetensors").write_bytes(b"gone")
    assert now(run(recipe, out)) == ["build", "card"]
    (out / "model" / "README.md").unlink()
    assert now(run(recipe, out)) == ["card"]


def test_without_sections_there_is_a_model_and_nothing_else(recipe: Path, tmp_path: Path) -> None:
    changed(recipe, card=False, build={"virtual": True})
    finished = run(recipe, tmp_path / "out")
    assert now(finished) == ["build"]
    assert finished.artifact.form == "virtual"
    assert not (tmp_path / "out" / "model" / "README.md").exists()


def test_a_card_that_a_person_wrote_stops_the_run_before_it_begins(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(recipe, out)
    (out / "model" / "README.md").write_text("mine")
    changed(recipe, experts_per_token=1)
    with pytest.raises(ArtifactError, match="by hand"):
        run(recipe, out)
    assert (out / "model" / "README.md").read_text() == "mine"
    assert json.loads((out / "model" / "config.json").read_text())["num_experts_per_tok"] == 2


def test_a_model_that_cannot_be_made_anew_leaves_the_old_one(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    run(recipe, out)
    changed(recipe, experts_per_token=1)
    with monkeypatch.context() as patched:
        patched.setattr("frankenmoe.artifact.folder.free_bytes", lambda folder: 0)
        with pytest.raises(ArtifactError, match="GiB free"):
            run(recipe, out)
    assert fm.verify(out / "model")
    assert json.loads((out / "model" / "config.json").read_text())["num_experts_per_tok"] == 2
    assert now(run(recipe, out)) == ["build", "card"]


def test_progress_says_which_step_is_at_work(recipe: Path, tmp_path: Path) -> None:
    heard: list[str] = []
    run(recipe, tmp_path / "out", progress=Progress(start=lambda stage, total, unit: heard.append(stage)))
    assert heard[0].startswith("1/2 build: ")
    assert heard[-1].startswith("2/2 card: ")


def test_the_command_prints_one_summary(recipe: Path, tmp_path: Path) -> None:
    def said(*arguments: str) -> str:
        result = CliRunner().invoke(
            app, ["run", str(recipe), str(tmp_path / "out"), *arguments], catch_exceptions=False
        )
        assert result.exit_code == 0
        return result.stdout

    first = said()
    assert "build  done" in first
    assert "push" in first.splitlines()[-1]
    assert max(map(len, first.splitlines()[:-2])) <= 80
    data = json.loads(said("--json"))
    assert [(step["name"], step["now"]) for step in data["steps"]] == [("build", False), ("card", False)]
    assert data["artifact"] == str(tmp_path / "out" / "model")


def test_raidens_recipe_asks_for_everything_and_says_that_its_weights_are_not_here(tmp_path: Path) -> None:
    recipe = fm.Recipe.load(Path(__file__).parents[2] / "recipes" / "raiden-16x3.43b.yml")
    assert None not in (recipe.audit, recipe.eval, recipe.export, recipe.card)
    with pytest.raises(PlanError, match="has a config but no weights"):
        run(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_not_a_runs_is_left_alone(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(ArtifactError, match="not the folder of a run"):
        run(recipe, tmp_path / "mine")
    assert [file.name for file in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_two_runs_in_one_folder_do_not_meet(recipe: Path, tmp_path: Path) -> None:
    from frankenmoe.pipeline.state import claimed

    with claimed(tmp_path / "out"), pytest.raises(ArtifactError, match="another process"):
        run(recipe, tmp_path / "out")


@pytest.mark.parametrize("text", ["no json", "[]", '{"version": 1}', '{"version": 9, "doing": null, "steps": {}}'])
def test_a_state_that_is_none_is_named(recipe: Path, tmp_path: Path, text: str) -> None:
    out = tmp_path / "out"
    run(recipe, out)
    (out / "run.json").write_text(text)
    with pytest.raises(ArtifactError, match=r"run\.json is not the state of a run"):
        run(recipe, out)


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"card": {"lisence": "mit"}}, "license"),
        ({"card": {"prompts": "one"}}, "list of strings"),
        ({"audit": {"tokens": 0}}, "at least 1"),
        ({"eval": {"limit": "many"}}, "whole number"),
        ({"export": 3}, "mapping"),
    ],
)
def test_sections_are_closed_and_errors_name_the_line(recipe: Path, section: dict[str, Any], words: str) -> None:
    changed(recipe, **section)
    with pytest.raises(RecipeError, match=r"r\.yml:\d+: ") as caught:
        fm.Recipe.load(recipe)
    assert words in str(caught.value)


def test_a_bare_section_asks_for_its_stage_and_false_does_not(recipe: Path) -> None:
    text = recipe.read_text()
    recipe.write_text(f"{text}audit:\nexport: false\neval: true\n")
    read = fm.Recipe.load(recipe)
    assert read.audit is not None
    assert read.eval is not None
    assert read.export is None
    assert read.to_dict()["audit"] == {}
    recipe.write_text(text)
    assert read.digest == fm.Recipe.load(recipe).digest  # it is the same model


def test_nothing_is_begun_for_input_that_cannot_work(recipe: Path, tmp_path: Path) -> None:
    changed(recipe, experts=[{"source_model": "base"}, {"source_model": "base"}])
    with pytest.raises(FrankenMoEError, match="all 2 experts hold the same weights"):
        run(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def content(out: Path) -> dict[str, bytes]:
    """Every file of a run, except its state and files with times."""
    files = {str(file.relative_to(out)): file.read_bytes() for file in out.rglob("*") if file.is_file()}
    return {
        name: data
        for name, data in files.items()
        if not name.endswith(("run.json", "run.lock", "samples.json", "frankenmoe.json"))
    }


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("first", "step"), [(2, 9), pytest.param(1, 1, marks=pytest.mark.slow)], ids=["some", "every"])
def test_killed_at_any_moment_the_same_command_ends_with_the_same_files(
    recipe: Path, tmp_path: Path, first: int, step: int
) -> None:
    root = tmp_path / "runs"
    root.mkdir()
    assert kill_at(recipe, root, first, step) >= 3
    whole = content(root / "whole")
    for out in root.glob("killed-*"):
        assert content(out) == whole, out.name
