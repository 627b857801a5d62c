"""`frankenmoe eval` in two processes of a launcher: one process's scores, one report, one voice."""

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval")

import launch
import tiny
from rowfiles import write_rows

COUNTS = ("documents", "requests", "cut_on_the_left", "question_cut", "from_earlier_runs")
COMMAND = "from frankenmoe.cli import main; main()"
TEXT = "".join(f"{number} and {number} is {2 * number}.\n" for number in range(120))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with rows of every task, a text, and the recipe of an MoE that sees 4096 tokens."""
    folder = tmp_path_factory.mktemp("together")
    write_rows(folder / "rows")
    (folder / "text.txt").write_text(TEXT)
    made = [
        tiny.make_parent(folder / name, "llama", seed=seed, max_position_embeddings=4096)
        for seed, name in enumerate(("base", "one", "two"))
    ]
    tiny.write_recipe(folder / "r.yml", made[0], made[1:])
    return folder


def words(place: Path, out: str, *more: object) -> list[object]:
    data = ["--tasks", "leaderboard-v1,ppl", "--data-dir", place / "rows", "--text", f"sums={place / 'text.txt'}"]
    return [
        "eval",
        place / "r.yml",
        *data,
        "--limit",
        3,
        "--json",
        place / out,
        "--cache",
        place / f"{out}.cache",
        *more,
    ]


def numbers(place: Path, out: str) -> dict[str, Any]:
    """What was measured."""
    (model,) = json.loads((place / out).read_text())["models"]
    return {key: model[key] for key in ("tasks", "domains", "errors")}


@pytest.mark.timeout(300)
def test_two_processes_score_as_one(place: Path) -> None:
    (alone,) = launch.run_together(COMMAND, *words(place, "one.json"), processes=1)
    assert alone.returncode == 0, alone.stderr

    first, second = launch.run_together(COMMAND, *words(place, "two.json", "--log-samples", place / "samples"))
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert (second.stdout, second.stderr) == ("", "")
    assert "Avg." in first.stdout
    one, two = numbers(place, "one.json"), numbers(place, "two.json")
    for name, task in one["tasks"].items():
        # batches of other sizes round differently
        assert two["tasks"][name]["metrics"] == pytest.approx(task["metrics"], abs=1e-6)
        assert {key: two["tasks"][name][key] for key in COUNTS} == {key: task[key] for key in COUNTS}
    assert two["errors"] == one["errors"] == []
    assert two["domains"]["sums"]["nats_per_token"] == pytest.approx(one["domains"]["sums"]["nats_per_token"], abs=1e-6)
    assert two["domains"]["sums"]["blocks"] == one["domains"]["sums"]["blocks"] > 2
    assert len(list((place / "samples").iterdir())) == 8

    # both wrote their answers, once each, so that nothing is read again
    answers = [path.read_text().splitlines() for path in sorted((place / "two.json.cache").rglob("*.jsonl"))]
    expected = [path.read_text().splitlines() for path in sorted((place / "one.json.cache").rglob("*.jsonl"))]
    assert [len(lines) for lines in answers] == [len(lines) for lines in expected]
    again = launch.run_together(COMMAND, *words(place, "two.json"))
    assert [each.returncode for each in again] == [0, 0]
    found = json.loads((place / "two.json").read_text())["models"][0]["tasks"]["arc_challenge"]
    assert found["from_earlier_runs"] == found["requests"] > 0


def test_an_error_of_one_process_ends_all(place: Path) -> None:
    code = (
        """
from frankenmoe.errors import NumericsError
from frankenmoe.evaluate import lm
from frankenmoe.moe import processes

class Broken(lm.Scorer):
    def score(self, queries, on_answer):
        if processes.rank() == 1:
            raise NumericsError("document 1: the model computes NaN", hint="check the weights")
        super().score(queries, on_answer)

lm.Scorer = Broken
"""
        + COMMAND
    )
    data = ["--tasks", "arc_challenge", "--data-dir", place / "rows", "--no-cache"]
    first, second = launch.run_together(code, "eval", place / "r.yml", *data)
    assert (first.returncode, second.returncode) == (2, 2), first.stderr
    assert "document 1: the model computes NaN (check the weights)" in first.stderr


def test_a_command_for_one_process_says_so(place: Path) -> None:
    first, second = launch.run_together(COMMAND, "plan", place / "r.yml")
    assert (first.returncode, second.returncode) == (2, 2)
    assert "`plan` runs in one process, found 2 started by a launcher" in first.stderr
    assert first.stdout == second.stdout == ""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_torchrun_runs_the_module(place: Path) -> None:
    compared = ["--text", f"sums={place / 'text.txt'}", "--limit", 3, "--against-parents", "--no-cache"]
    done = launch.torchrun(["-m", "frankenmoe", "eval", place / "r.yml", *compared, "--json", place / "run.json"])
    assert done.returncode == 0, done.stderr
    found = json.loads((place / "run.json").read_text())
    assert [model["kind"] for model in found["models"]][-1] == "moe"
    assert done.stdout.count(found["verdict"][0].split(";")[0][:40]) == 1
