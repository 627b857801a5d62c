"""One entry point: what is opened is known, planned once, and its routers are fitted once."""

import os
import shutil
import time
from pathlib import Path

import pytest

import frankenmoe as fm
import tiny
from frankenmoe import cache, subject
from frankenmoe.errors import ArtifactError, PlanError
from frankenmoe.gates import fitted
from frankenmoe.pipeline import run
from frankenmoe.progress import Progress
from frankenmoe.subject import Dense, kind_of, open_model, open_subject
from refusals import cli

Parents = dict[str, list[Path]]
Calls = list[object]


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's cache of this test alone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "frankenmoe" / "routers"


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Every fit of a plan that is made."""
    calls: Calls = []
    original = fitted.fit_plan
    monkeypatch.setattr(fitted, "fit_plan", lambda *args, **keys: (calls.append(args), original(*args, **keys))[1])
    return calls


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Every plan that is made, from a recipe or from an artifact's record."""
    calls: Calls = []
    original = subject.plan
    counted = lambda *args, **keys: (calls.append(args), original(*args, **keys))[1]  # noqa: E731
    monkeypatch.setattr("frankenmoe.subject.plan", counted)
    monkeypatch.setattr("frankenmoe.planning.recall.plan", counted)
    return calls


def prompted(folder: Path, parents: list[Path], **keys: object) -> Path:
    return tiny.write_recipe(folder / "r.yml", parents[0], parents[1:], prompts=True, gate_mode="logistic", **keys)


def with_data(folder: Path, parents: list[Path]) -> Path:
    experts = []
    for index, parent in enumerate(parents[1:]):
        (folder / f"e{index}.txt").write_text("ABCDEFGH "[index:] * 60)
        experts.append({"source_model": str(parent), "name": f"e{index}", "data": f"e{index}.txt"})
    return tiny.write_recipe(folder / "r.yml", parents[0], [], experts=experts, gate_mode="ridge")


def test_everything_that_can_be_opened_is_told_apart(parents: Parents, tmp_path: Path) -> None:
    recipe = tiny.write_recipe(tmp_path / "r.yml", parents["llama"][0], parents["llama"][1:])
    virtual = fm.build(recipe, tmp_path / "virtual", virtual=True)
    built = fm.build(virtual, tmp_path / "built")
    opened = {each: open_subject(each) for each in (recipe, virtual.folder, built.folder)}
    assert [each.kind for each in opened.values()] == ["recipe", "virtual artifact", "built artifact"]
    assert [each.built for each in opened.values()] == [False, False, True]
    assert open_subject(virtual).artifact == virtual
    assert fm.open(fm.Recipe.load(recipe)).plan.experts == 2
    kept = fm.open(recipe)
    assert fm.open(kept) is kept
    assert kind_of(tmp_path / "none.yml") == "recipe"
    assert kind_of(tmp_path / "file.gguf") == "gguf"
    assert isinstance(open_model(parents["llama"][0]), Dense)
    with pytest.raises(ArtifactError, match=r"holds no frankenmoe\.json"):
        open_subject(parents["llama"][0])


def test_parts_of_both_forms_are_the_same_tensors(parents: Parents, tmp_path: Path) -> None:
    recipe = tiny.write_recipe(tmp_path / "r.yml", parents["qwen2"][0], parents["qwen2"][1:])
    virtual = fm.build(recipe, tmp_path / "virtual", virtual=True)
    made, read = (open_subject(each).parts for each in (virtual, fm.build(virtual, tmp_path / "built")))
    assert [write.name for write in made.backbone] == [write.name for write in read.backbone]
    assert made.experts == read.experts
    assert (made.top_k, made.renormalizes, made.gates.keys()) == (read.top_k, read.renormalizes, read.gates.keys())


def test_routers_of_a_recipe_are_fitted_once(parents: Parents, tmp_path: Path, empty_cache: Path, fits: Calls) -> None:
    recipe = prompted(tmp_path, parents["llama"])
    built = fm.build(recipe, tmp_path / "built")
    fm.load(recipe)
    virtual = fm.build(recipe, tmp_path / "virtual", virtual=True)
    assert cli("chat", recipe, "--prompt", "hello", "--max-new-tokens", "2").code == 0
    assert len(fits) == 1
    assert (built.folder / "model-routers.safetensors").read_bytes() == (
        virtual.folder / "model-routers.safetensors"
    ).read_bytes()
    assert (virtual.folder / "router-statistics.safetensors").is_file()
    assert cli("build", recipe, tmp_path / "again", "--no-cache").code == 0
    assert len(fits) == 2
    assert len(list(empty_cache.iterdir())) == 1


def test_another_recipe_source_or_text_is_fitted_anew(
    parents: Parents, tmp_path: Path, empty_cache: Path, fits: Calls
) -> None:
    source = shutil.copytree(parents["llama"][1], tmp_path / "source")
    recipe = with_data(tmp_path, [parents["llama"][0], source, parents["llama"][2]])
    fm.load(recipe)
    fm.load(recipe)
    assert len(fits) == 1
    (tmp_path / "e0.txt").write_text("zyxw " * 100)
    fm.load(recipe)
    assert len(fits) == 2
    os.utime(source / "model.safetensors", ns=(1, 1))
    fm.load(recipe)
    assert len(fits) == 3
    recipe.write_text(recipe.read_text().replace("ridge", "lda"))
    fm.load(recipe)
    assert len(fits) == 4


def test_a_damaged_entry_is_made_again(parents: Parents, tmp_path: Path, empty_cache: Path, fits: Calls) -> None:
    recipe = prompted(tmp_path, parents["llama"])
    fm.load(recipe)
    (entry,) = empty_cache.iterdir()
    (entry / "model-routers.safetensors").write_bytes(b"\0" * 40)
    fm.load(recipe)
    assert len(fits) == 2
    fm.load(recipe)
    assert len(fits) == 2


def test_a_cache_that_cannot_be_written_costs_nothing_else(
    parents: Parents, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert fm.load(prompted(tmp_path, parents["llama"])).experts == ("e0", "e1")


def test_the_cache_is_bounded_listed_and_cleared(tmp_path: Path, empty_cache: Path) -> None:
    for index in range(4):
        (empty_cache / str(index)).mkdir(parents=True)
        (empty_cache / str(index) / "data").write_bytes(bytes(1000))
        (empty_cache / str(index) / cache.NAME).write_text(f"moe {index}")
        os.utime(empty_cache / str(index), (time.time() + index, time.time() + index))
    cache.trim("routers", limit=2500)
    assert [entry.name for entry in cache.entries("routers")] == ["moe 3", "moe 2"]
    listed = cli("cache")
    assert "moe 3" in listed.stdout
    assert "2 entries" in listed.stdout
    assert cli("cache", "clear", "routers").stdout.startswith("removed")
    assert cache.entries("routers") == []
    assert cli("cache", "--json").stdout.strip() == "[]"


def test_a_run_makes_one_plan(parents: Parents, tmp_path: Path, plans: Calls) -> None:
    recipe = prompted(
        tmp_path,
        parents["llama"],
        fit={"method": "ridge", "block": 16, "tokens": 512},
        audit={"tokens": 64},
        eval={"texts": {"one": "t.txt"}, "against_parents": True, "limit": 1},
        card={"license": "mit"},
    )
    (tmp_path / "t.txt").write_text("ABCDEFGH " * 40)
    assert [step.name for step in run(recipe, tmp_path / "out").steps] == ["fit", "build", "audit", "eval", "card"]
    assert len(plans) == 1


def test_fitting_an_artifact_makes_one_plan(parents: Parents, tmp_path: Path, plans: Calls) -> None:
    artifact = fm.build(prompted(tmp_path, parents["llama"]), tmp_path / "out", virtual=True)
    plans.clear()
    fm.fit(artifact, block=16, tokens=512, keep_anyway=True)
    assert len(plans) == 1


def test_an_artifact_takes_the_place_of_no_recipe(parents: Parents, tmp_path: Path) -> None:
    artifact = fm.build(
        tiny.write_recipe(tmp_path / "r.yml", parents["llama"][0], parents["llama"][1:]), tmp_path / "out"
    )
    with pytest.raises(ArtifactError, match="is an artifact, expected a recipe"):
        run(artifact.folder, tmp_path / "run")
    with pytest.raises(PlanError, match="is a recipe"):
        fm.verify(tmp_path / "r.yml")
    with pytest.raises(ArtifactError, match="is built already"):
        fm.build(artifact, tmp_path / "again")


def test_notes_of_a_stage_reach_the_listener_of_a_run() -> None:
    from frankenmoe.pipeline.run import numbered

    said: list[str] = []
    progress = numbered(Progress(start=lambda stage, total, unit: said.append(stage), note=said.append), "1/2 train")
    progress.start("training", 1, "tokens")
    progress.note("loss 1.0")
    assert said == ["1/2 train: training", "loss 1.0"]
