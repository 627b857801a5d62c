"""Documents are true: every command and program in the README runs, the reference and the schema are up to date."""

import json
import re
import runpy
import shlex
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

import frankenmoe as fm
from frankenmoe.demo import parents, run
from frankenmoe.demo.text import held_out
from frankenmoe.recipe import IGNORED_KEYS, schema
from refusals import cli

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SHORT = 3_000  # characters of a text
SETS_UP = ("make ", "python3 -m venv", ".venv/bin/")  # these make the environment that this test runs in


def blocks(kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", README, flags=re.S)


COMMANDS = [line for block in blocks("sh") for line in block.splitlines() if not line.startswith(SETS_UP)]


def check_story(story: dict[str, Any]) -> None:
    loss = {name: row["mean"] for name, row in story["held_out_loss"].items()}
    assert loss["MoE, own expert forced"] < loss["MoE, prompt gates"] < loss["MoE, random gates"]
    assert loss["MoE, prompt gates"] < loss["dense base"]
    assert story["largest_logit_difference_to_stock_transformers"] < 1e-4


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which `frankenmoe demo` has run with a quarter of its text, and the ready recipes beside it."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "recipes").symlink_to(ROOT / "recipes")
    with pytest.MonkeyPatch.context() as patch:
        smaller = replace(parents.DEFAULTS, rows=parents.DEFAULTS.rows // 4)
        patch.setattr(run, "make_parents", partial(parents.make_parents, settings=smaller))
        for name, value in (("TEXT_CHARACTERS", 10_000), ("FIT_TOKENS", 1024), ("TRAIN_STEPS", 20)):
            patch.setattr(run, name, value)
        patch.setattr(run, "held_out", lambda domain: shortened(held_out(domain), SHORT // 2))
        check_story(json.loads(frankenmoe("demo --json", folder)))
    # half of the commands fit routers again; the demo has shown what more text gives, here less will do
    for file in (folder / "demo-out" / "text").glob("*.txt"):
        file.write_text(shortened(file.read_text(), SHORT // 2 if "heldout" in file.name else SHORT))
    return folder


def shortened(text: str, characters: int) -> str:
    kept = text[:characters]
    return kept[: kept.rindex("\n") + 1]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_demo_at_its_own_size(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "frankenmoe.cli", "demo", "--json"]
    check_story(json.loads(subprocess.check_output(command, cwd=tmp_path)))


def frankenmoe(arguments: str, folder: Path) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        outcome = cli(*shlex.split(arguments))
    assert outcome.code == 0, outcome.stderr
    return outcome.stdout


@pytest.mark.timeout(600)
def test_every_command_of_the_readme_runs(workplace: Path) -> None:
    assert len(COMMANDS) > 5
    for command in COMMANDS:
        program, _, arguments = command.partition(" ")
        assert program == "frankenmoe", command
        assert frankenmoe(arguments, workplace), command


@pytest.mark.timeout(600)
def test_the_readmes_program_runs(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(workplace)
    (program,) = blocks("python")
    exec(compile(program, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "4 experts" in printed
    assert "tensor(" in printed
    assert (workplace / "from-python" / "frankenmoe.json").is_file()


@pytest.mark.timeout(600)
def test_the_readmes_recipe_is_one(workplace: Path) -> None:
    (text,) = blocks("yaml")
    recipe = fm.Recipe.parse(text, folder=workplace / "demo-out", origin="README.md")
    assert fm.plan(recipe).fmt is not None


def test_the_reference_is_what_the_program_says() -> None:
    made = runpy.run_path(str(ROOT / "docs" / "make_reference.py"))["reference"]()
    assert (ROOT / "docs" / "reference.md").read_text() == made, "run `make reference`"


def test_the_schema_on_disk_is_the_models() -> None:
    assert json.loads((ROOT / "recipes" / "recipe.schema.json").read_text()) == schema(), "run `make schema`"


def test_the_guide_names_every_key_of_a_recipe() -> None:
    guide = (ROOT / "docs" / "guide.md").read_text()
    keys = set(schema()["properties"]) | set(schema()["$defs"]["Expert"]["properties"])
    keys -= set(IGNORED_KEYS)
    assert [key for key in keys if f"`{key}`" not in guide] == []


def test_links_between_documents_lead_somewhere() -> None:
    for page in [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert target.startswith("http") or (page.parent / target).exists(), f"{page.name}: {target}"


def test_ready_recipes_are_yaml_that_the_schema_knows() -> None:
    for file in ROOT.glob("recipes/*.yml"):
        assert set(yaml.safe_load(file.read_text())) <= set(schema()["properties"])
