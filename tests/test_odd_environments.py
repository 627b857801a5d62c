"""Shells and machines that lack something: a sentence with the cause, exit code 2, and nothing half written."""

import json
import os
import re
import subprocess
import sys
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

import forks
import tiny
from mounts import mounted
from refusals import Outcome, check_refusal, cli, copy_of, tree

Parents = dict[str, list[Path]]
LONG = "x" * 5000


@pytest.fixture
def recipe(parents: Parents, tmp_path: Path) -> Path:
    base, one, two = (copy_of(parent, tmp_path / str(index)) for index, parent in enumerate(parents["llama"]))
    return tiny.write_recipe(tmp_path / "r.yml", base, [one, two])


@pytest.fixture(scope="module")
def artifact(parents: Parents, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("artifact")
    base, one, two = parents["llama"]
    recipe = tiny.write_recipe(folder / "r.yml", base, [one, two])
    assert cli("build", recipe, folder / "out", "--virtual").code == 0
    return folder / "out"


def shell(command: str, *, folder: Path, **environment: str | None) -> Outcome:
    """A bash command in which $FM is this program; an environment variable that is None is not set."""
    whole = os.environ | {"FM": f"{sys.executable} -m frankenmoe"} | environment
    ended = subprocess.run(
        ["bash", "-c", command],
        capture_output=True,
        cwd=folder,
        env={name: value for name, value in whole.items() if value is not None},
    )
    return Outcome(ended.returncode, *(text.decode(errors="replace") for text in (ended.stdout, ended.stderr)))


# Python without assertions and docstrings


def test_help_and_plan_without_docstrings_and_assertions(recipe: Path, tmp_path: Path) -> None:
    for command, words in (("--help", ("plan", "build")), ("plan --help", ("--dtype", "--json"))):
        shown = shell(f"$FM {command}", folder=tmp_path, PYTHONOPTIMIZE="2")
        assert shown.code == 0, shown.stderr
        assert not [word for word in words if word not in shown.stdout]
    planned = json.loads(shell(f"$FM plan {recipe} --json", folder=tmp_path, PYTHONOPTIMIZE="2").stdout)
    usual = json.loads(cli("plan", recipe, "--json").stdout)
    assert planned | {"disk": None} == usual | {"disk": None}


# folders


@pytest.fixture
def deleted_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    return tmp_path


@pytest.mark.parametrize("command", ["plan", "build"])
def test_a_current_folder_that_was_deleted(command: str, deleted_folder: Path, recipe: Path) -> None:
    before = tree(deleted_folder)
    outcome = cli(command, recipe, *(["out"] if command == "build" else []))
    check_refusal(outcome, facts=("the current folder no longer exists",), hint="cd")
    assert tree(deleted_folder) == before


def test_what_needs_no_current_folder_runs_in_one_that_was_deleted(
    deleted_folder: Path, recipe: Path, artifact: Path
) -> None:
    for command in (["--help"], ["schema"], ["build", recipe, deleted_folder / "out"], ["verify", artifact]):
        assert cli(*command).code == 0


def read_only(folder: Path) -> AbstractContextManager[Path]:
    """A folder that even root cannot write to, for the time of a test."""
    return mounted(folder, "--bind", "-o", "ro", str(folder))


@pytest.mark.parametrize(
    "command",
    [
        "build RECIPE FOLDER/out",
        "build RECIPE FOLDER/out --virtual",
        "export ARTIFACT FOLDER --types f16 --allow-random",
        "export ARTIFACT FOLDER/new --types f16 --allow-random",
        "extract ARTIFACT FOLDER/out --expert 0",
        "audit ARTIFACT --out FOLDER",
        "eval ARTIFACT --text e0=TEXT --json FOLDER/eval.json",
        "run RECIPE FOLDER/out",
    ],
)
def test_an_output_that_is_read_only(command: str, recipe: Path, artifact: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("a few words " * 400)
    with read_only(tmp_path / "disk") as folder:
        places = {"RECIPE": recipe, "ARTIFACT": artifact, "FOLDER": folder, "TEXT": tmp_path / "text.txt"}
        for name, place in places.items():
            command = command.replace(name, str(place))
        before = tree(tmp_path)
        outcome = cli(*command.split())
        assert outcome.code == 2, outcome.stdout
        assert re.search("read-only|not writable", outcome.stderr, re.IGNORECASE), outcome.stderr
        assert str(folder) in outcome.stderr
        assert tree(tmp_path) == before


@pytest.mark.parametrize("command", ["card", "fit --method centroid", "train --steps 1"])
def test_an_artifact_that_is_read_only(command: str, artifact: Path, tmp_path: Path) -> None:
    name, *options = command.split()
    copy = copy_of(artifact, tmp_path / "disk")
    with read_only(copy):
        outcome = cli(name, copy, *options)
        assert outcome.code == 2, outcome.stdout
        assert "Traceback" not in outcome.stderr


# limits of the shell

LIMITED = "import resource; resource.setrlimit(resource.RLIMIT_{what}, ({most}, {most})); "


@pytest.mark.parametrize(
    ("most", "form"), [(2048, ()), (16_384, ()), (60_000, ()), (1024, ("--virtual",)), (4096, ("--virtual",))]
)
def test_files_that_may_not_grow(most: int, form: tuple[str, ...], recipe: Path, tmp_path: Path) -> None:
    before = tree(tmp_path)
    code = LIMITED.format(what="FSIZE", most=most) + forks.COMMAND
    done = forks.run(code, "build", recipe, tmp_path / "out", *form, "--no-cache")
    outcome = Outcome(done.returncode, done.stdout, done.stderr)
    check_refusal(outcome, facts=("larger than the shell or the file system allows",), hint="ulimit -f")
    assert tree(tmp_path) == before


# what a shell may leave out


@pytest.mark.parametrize(
    "environment",
    [
        {"HOME": None, "XDG_CACHE_HOME": None},
        {"HOME": "/nonexistent", "XDG_CACHE_HOME": None},
        {"TERM": None},
        {"TERM": "bogus", "COLUMNS": "0"},
        {"COLUMNS": "wide"},
        {"TMPDIR": "/nonexistent"},
        {"LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    ],
    ids=str,
)
def test_environments_that_lack_something(environment: dict[str, str | None], recipe: Path, tmp_path: Path) -> None:
    odd = recipe.rename(recipe.with_name("é漢.yml"))
    outcome = shell(f"$FM plan {odd.name}", folder=tmp_path, **environment)
    assert outcome.code == 0, outcome.stderr
    assert "Traceback" not in outcome.stderr


@pytest.mark.parametrize(
    ("command", "code"),
    [
        ("$FM plan r.yml >&-", 0),
        ("$FM plan r.yml >&- 2>&- <&-", 0),
        ("$FM plan none.yml 2>&-", 2),
        ("$FM plan none.yml 2>/dev/full", 2),
        ("$FM schema >/dev/full", 2),
        ("$FM schema | head -c 1; exit ${PIPESTATUS[1]}", 0),
        ("$FM plan r.yml --json | true; exit ${PIPESTATUS[1]}", 0),
    ],
)
def test_streams_that_are_closed_or_full(command: str, code: int, recipe: Path, tmp_path: Path) -> None:
    outcome = shell(command, folder=tmp_path)
    assert outcome.code == code
    assert "Traceback" not in outcome.stderr
    assert "Exception ignored" not in outcome.stderr


# names of 5,000 letters


@pytest.mark.parametrize(
    "command",
    [
        "plan LONG.yml",
        "plan LONG/r.yml",
        "build RECIPE LONG",
        "build RECIPE LONG --virtual",
        "build RECIPE FOLDER/LONG",
        "chat LONG --prompt x",
        "verify LONG",
        "card LONG",
        "push LONG a/b",
        "fit LONG",
        "fit RECIPE LONG",
        "train LONG",
        "audit LONG",
        "audit ARTIFACT --out LONG",
        "audit ARTIFACT --data e0=LONG",
        "eval LONG",
        "eval ARTIFACT --text e0=LONG",
        "export ARTIFACT LONG",
        "extract ARTIFACT LONG --expert 0",
        "extract ARTIFACT out --expert LONG",
        "extract-lora LONG LONG LONG",
        "add-expert ARTIFACT LONG --out out",
        "remove-expert ARTIFACT LONG 0",
        "remove-expert ARTIFACT out LONG",
        "prune ARTIFACT LONG --experts 1",
        "prune ARTIFACT out --experts 1 --data LONG",
        "heal ARTIFACT LONG",
        "run LONG",
        "run RECIPE LONG",
        "demo --out LONG",
        "LONG",
        "plan --LONG",
        "plan RECIPE --dtype LONG",
        "build RECIPE out --shard-size LONG",
        "chat RECIPE --device LONG --prompt x",
        "fit ARTIFACT --method LONG",
        "train ARTIFACT --what LONG",
    ],
)
def test_names_of_five_thousand_letters(
    command: str, recipe: Path, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    places = {"RECIPE": str(recipe), "ARTIFACT": str(artifact), "FOLDER": str(tmp_path), "LONG": LONG}
    for name, place in places.items():
        command = command.replace(name, place)
    before = tree(tmp_path)
    outcome = cli(*command.split())
    assert outcome.code == 2, outcome.stdout
    assert len(outcome.stderr) < 1500, outcome.stderr
    assert "x" * 200 not in outcome.stderr
    assert tree(tmp_path) == before
