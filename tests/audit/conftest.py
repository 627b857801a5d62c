"""One MoE as a recipe and as both kinds of artifact, and its audits, made once and only read."""

from pathlib import Path

import pytest

import frankenmoe as fm
import tiny
from frankenmoe.audit.examine import Audit
from frankenmoe.audit.run import look


@pytest.fixture(scope="session")
def place(parents: dict[str, list[Path]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the recipe r.yml and its artifacts `virtual` and `built`."""
    folder = tmp_path_factory.mktemp("audit")
    base, one, two = parents["llama"]
    recipe = tiny.write_recipe(folder / "r.yml", base, [base, one, two], prompts=True, name="tiny")
    for form in ("virtual", "built"):
        fm.build(recipe, folder / form, virtual=form == "virtual")
    return folder


@pytest.fixture
def recipe(place: Path) -> Path:
    return place / "r.yml"


@pytest.fixture
def no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves the page empty: its charts take most of the time of a report."""
    monkeypatch.setattr("frankenmoe.audit.write.page", lambda audits: "")


@pytest.fixture(scope="session")
def audits(place: Path) -> dict[str, Audit]:
    """The audits of the three forms, by name."""
    return {name: look(place / name) for name in ("r.yml", "virtual", "built")}
