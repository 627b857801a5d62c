"""Subject: opens recipes and artifacts, plans them once and fits their routers once."""

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import frankenmoe as fm
import tiny
from frankenmoe import cache, subject
from frankenmoe.errors import ArtifactError, PlanError, RecipeError
from frankenmoe.gates import fitted
from frankenmoe.pipeline import run
from frankenmoe.planning.kind import kind_of
from frankenmoe.progress import Progress
from frankenmoe.subject import Dense, open_model, open_subject
from frankenmoe.train.run import train
from refusals import cli, refused

Parents = dict[str, list[Path]]
Calls = list[object]


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache for one test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "frankenmoe" / "routers"


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """A list that records every fit."""
    calls: Calls = []
    original = fitted.fit_plan
    monkeypatch.setattr(fitted, "fit_plan", lambda *args, **keys: (calls.append(args), original(*args, **keys))[1])
    return calls


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """A list that records every plan."""
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


def test_a_subject_can_be_opened_with_another_dtype(parents: Parents, tmp_path: Path) -> None:
    opened = open_subject(tiny.write_recipe(tmp_path / "r.yml", parents["llama"][0], parents["llama"][1:]))
    stored = opened.plan.dtype_name
    assert open_subject(opened, dtype="float16").plan.dtype_name == "float16" != stored
    assert fm.build(opened, tmp_path / "out", dtype="float16").record["dtype"] == "float16"
    assert opened.plan.dtype_name == stored


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
    recipe.write_text(recipe.read_text() + "fit: {tokens: 512, block: 16}\n")
    fm.load(recipe)
    assert len(fits) == 5


def test_every_command_fits_as_the_recipe_says(parents: Parents, tmp_path: Path, empty_cache: Path) -> None:
    recipe = with_data(tmp_path, list(parents["llama"]))
    recipe.write_text(recipe.read_text() + "fit: {tokens: 512, block: 16}\n")

    texts = [
        fm.build(recipe, tmp_path / "built", virtual=True).record["stages"][-1]["fit"]["text"],
        fm.fit(recipe, tmp_path / "fitted").report["text"],
        fm.fit(tmp_path / "built", keep_anyway=True).report["text"],
    ]
    assert [text["e0"]["block"] for text in texts] == [16, 16, 16]
    assert [text["e0"]["tokens"] for text in texts] == [29 * 16] * 3


def test_the_data_of_a_shared_expert_is_part_of_the_key(
    parents: Parents, tmp_path: Path, empty_cache: Path, fits: Calls
) -> None:
    base, one, two = parents["llama"]
    for name in ("e0", "e1", "shared"):
        (tmp_path / f"{name}.txt").write_text("ABCDEFGH " * 60)
    experts = [{"source_model": str(one), "data": "e0.txt"}, {"source_model": str(two), "data": "e1.txt"}]
    shared = [{"source_model": str(base), "data": "shared.txt", "positive_prompts": ["ABC"]}]
    recipe = tiny.write_recipe(tmp_path / "r.yml", base, [], experts=experts, shared_experts=shared, gate_mode="ridge")
    fm.load(recipe)
    (tmp_path / "shared.txt").write_text("zyxw " * 100)
    fm.load(recipe)
    assert len(fits) == 2


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
    with pytest.raises(ArtifactError, match="is already built"):
        fm.build(artifact, tmp_path / "again")


def test_notes_of_a_stage_reach_the_listener_of_a_run() -> None:
    from frankenmoe.pipeline.run import numbered

    said: list[str] = []
    progress = numbered(Progress(start=lambda stage, total, unit: said.append(stage), note=said.append), "1/2 train")
    progress.start("training", 1, "tokens")
    progress.note("loss 1.0")
    assert said == ["1/2 train: training", "loss 1.0"]


def test_a_subject_notices_that_its_artifact_was_fitted(parents: Parents, tmp_path: Path) -> None:
    artifact = fm.build(prompted(tmp_path, parents["llama"]), tmp_path / "out", virtual=True)
    kept = fm.open(artifact)
    kept.routers()
    fm.fit(kept, method="lda", keep_anyway=True)
    made = fm.fit(kept, method="ridge", keep_anyway=True).artifact
    assert [each["stage"] for each in made.record["stages"]] == ["build", "fit", "fit"]
    now = fm.open(artifact.folder).routers().routers
    assert all((kept.routers().routers[name][2] == raw).all() for name, (_, _, raw) in now.items())
    assert fm.open(kept).artifact == made


def test_a_subject_notices_that_a_source_has_changed(parents: Parents, tmp_path: Path) -> None:
    copies = [shutil.copytree(parent, tmp_path / parent.name) for parent in parents["llama"]]
    kept = fm.open(tiny.write_recipe(tmp_path / "r.yml", copies[0], copies[1:]))
    assert kept.plan.experts == 2
    tiny.make_parent(copies[1], seed=9)
    assert fm.open(kept) is not kept
    fm.build(kept, tmp_path / "out", virtual=True)


def test_a_subject_fits_again_when_its_text_changes(parents: Parents, tmp_path: Path, empty_cache: Path) -> None:
    kept = fm.open(with_data(tmp_path, parents["llama"]))
    before = kept.routers()
    assert kept.routers() is before
    (tmp_path / "e0.txt").write_text("0123 other words " * 60)
    assert kept.routers() is not before


def test_a_type_given_beside_a_subject_counts(parents: Parents, tmp_path: Path) -> None:
    kept = fm.open(tiny.write_recipe(tmp_path / "r.yml", parents["llama"][0], parents["llama"][1:]))
    artifact = fm.build(kept, tmp_path / "out", virtual=True, dtype="float16")
    assert artifact.record["dtype"] == "float16"
    with pytest.raises(PlanError, match="dtype must be float32, bfloat16 or float16, found 'banana'"):
        fm.open(artifact, dtype="banana").plan  # noqa: B018
    with pytest.raises(PlanError, match="found 'banana'"):
        kept.load(dtype="banana")


@pytest.mark.parametrize("what", [None, b"r.yml", 3])
def test_what_cannot_be_opened_is_rejected(what: object) -> None:
    with pytest.raises(RecipeError, match="expected a recipe, an artifact or a path"):
        open_subject(what)  # type: ignore[arg-type]


def test_an_entry_is_made_again_where_any_file_is_damaged(
    parents: Parents, tmp_path: Path, empty_cache: Path, fits: Calls
) -> None:
    recipe = with_data(tmp_path, parents["llama"])
    first = fm.open(recipe).routers()
    (entry,) = empty_cache.iterdir()
    routers, statistics = entry / "model-routers.safetensors", entry / "router-statistics.safetensors"
    raw = routers.read_bytes()
    damages: list[Callable[[], object]] = [
        lambda: routers.write_bytes(raw[:-3] + bytes([raw[-3] ^ 1]) + raw[-2:]),
        lambda: statistics.write_bytes(statistics.read_bytes()[:100]),
        statistics.unlink,
    ]
    for damage in damages:
        damage()
        fits.clear()
        again = fm.open(recipe).routers()
        assert len(fits) == 1
        assert again.statistics is not None
        assert all((again.routers[name][2] == raw).all() for name, (_, _, raw) in first.routers.items())
        assert fm.open(recipe).routers().statistics == again.statistics
        assert len(fits) == 1


def test_routers_fitted_while_a_source_changed_are_not_cached(
    parents: Parents, tmp_path: Path, empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = with_data(tmp_path, parents["llama"])
    original = fitted.fit_plan

    def meanwhile(*args: Any, **keys: Any) -> Any:
        (tmp_path / "e1.txt").write_text("written while others read " * 40)
        return original(*args, **keys)

    monkeypatch.setattr(fitted, "fit_plan", meanwhile)
    fm.open(recipe).routers()
    assert not empty_cache.exists()


def test_the_cache_is_listed_whatever_is_in_it(tmp_path: Path, empty_cache: Path) -> None:
    (empty_cache / "entry").mkdir(parents=True)
    (empty_cache / "entry" / cache.NAME).write_bytes(b"\xff\xfe")
    (empty_cache / "link").symlink_to(tmp_path / "nothing")
    abandoned = empty_cache / "key.1.partial"
    abandoned.mkdir()
    os.utime(abandoned, (1, 1))
    assert [each.path.name for each in cache.entries("routers")] == ["entry"]
    cache.trim("routers", limit=2**20)
    assert not abandoned.exists()


def test_a_cache_in_an_odd_place_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert (cache.entries("routers"), cache.clear("routers")) == ([], 0)
    for relative in ("relative", "~/cache", ""):
        monkeypatch.setenv("XDG_CACHE_HOME", relative)
        assert cache.cache_folder("routers") == Path.home() / ".cache" / "frankenmoe" / "routers"


def test_an_empty_folder_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").write_text("some text")
    arguments = ("eval", tmp_path / "empty", "--text", tmp_path / "text.txt")
    facts = (f"{tmp_path / 'empty'} has no config.json",)
    refused(*arguments, inside=tmp_path, facts=facts, hint="name an artifact, a recipe, or the folder")


def test_arguments_of_a_wrong_type_are_explained(parents: Parents, tmp_path: Path) -> None:
    recipe = with_data(tmp_path, parents["llama"])
    with pytest.raises(RecipeError, match="data must map the names of experts to files, found list"):
        fm.fit(recipe, tmp_path / "out", data=["e0.txt"])  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="data of 'e0' must be a list of files or hub datasets, found 3"):
        train(recipe, tmp_path / "out", data={"e0": 3})  # type: ignore[dict-item]
    with pytest.raises(RecipeError, match="settings must be the settings of a stage, found a mapping"):
        fm.build(recipe, tmp_path / "out", settings={"virtual": True})  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="build: virtual must be true or false, found the text 'maybe'") as found:
        fm.build(recipe, tmp_path / "out", virtual="maybe")
    assert found.value.hint == "leave it out to use the default"
    files = {"e0": str(tmp_path / "e0.txt"), "e1": tmp_path / "e1.txt"}  # one text, one Path
    assert fm.fit(recipe, tmp_path / "out", data=files, method="lda").replaced  # type: ignore[arg-type]
