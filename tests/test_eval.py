"""`frankenmoe eval` from the command line: what it writes, what it keeps, how it fails."""

import errno
import io
import json
import shutil
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("lm_eval")

import forks
import frankenmoe as fm
import tiny
from frankenmoe.cli import main
from rowfiles import ROWS, write_rows, write_split

TEXT = "".join(f"{number} and {number} is {2 * number}.\n" for number in range(400))


@pytest.fixture
def place(tmp_path: Path, parents: dict[str, list[Path]]) -> Path:
    """A folder with a recipe, its experts' texts and rows; 97 tokens, so prompts are longer than the model sees."""
    write_rows(tmp_path / "rows")
    for name in ("one", "two"):
        (tmp_path / f"{name}.txt").write_text(TEXT if name == "one" else TEXT.upper())
    recipe = tiny.write_recipe(tmp_path / "recipe.yml", parents["llama"][0], parents["llama"][1:])
    text = (
        recipe.read_text()
        .replace("name: e0", "name: e0\n  data: [one.txt]")
        .replace("name: e1", "name: e1\n  data: [two.txt]")
    )
    recipe.write_text(text)
    return tmp_path


def run(arguments: str, folder: Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    """The command in this process, since importing everything anew takes longer than most of it."""
    out, err = io.StringIO(), io.StringIO()
    found = 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["frankenmoe", "eval", *arguments.split(), "--cache", "cache"])
        try:
            main()
        except SystemExit as ended:
            found = int(ended.code or 0)
    assert found == code, err.getvalue()
    assert all(len(line) <= 80 for line in out.getvalue().splitlines())
    return subprocess.CompletedProcess(arguments, found, out.getvalue(), err.getvalue())


def report(folder: Path, name: str = "out.json") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / name).read_text())
    return found


TASKS = "--tasks leaderboard-v1 --data-dir rows"


@pytest.mark.timeout(300)
def test_the_leaderboard_is_scored_logged_and_remembered(place: Path) -> None:
    model = tiny.make_parent(place / "long", "llama", seed=3, max_position_embeddings=4096)
    done = run(f"{model} {TASKS} --limit 3 --json out.json --log-samples samples", place)
    assert "Avg." in done.stdout
    (found,) = report(place)["models"]
    assert report(place)["versions"]["lm_eval"] == "0.4.13"
    assert report(place)["seeds"]["document_order_and_few_shot_draws"] == 42
    tasks = found["tasks"]
    assert [tasks[name]["documents"] for name in tasks] == [3, 3, 6, 3, 3, 3, 3]
    assert tasks["mmlu"]["subjects"].keys() == {"odd_words", "plain_sums"}
    six = [task["value"] for task in tasks.values() if task["counted_in_average"]]
    assert found["average"] == pytest.approx(sum(six) / 6)
    assert tasks["arc_challenge"]["metric"] == "acc_norm"
    assert tasks["arc_challenge"]["stderr"] is not None

    rows = [json.loads(line) for line in (place / "samples" / "samples_winogrande.jsonl").read_text().splitlines()]
    assert len(rows) == 3
    assert rows[0]["doc"] == ROWS["winogrande"]["validation"][rows[0]["doc_id"]]
    assert rows[0]["arguments"]["gen_args_0"]["arg_1"] == rows[0]["arguments"]["gen_args_1"]["arg_1"]
    assert (place / "samples" / "samples_mmlu_odd_words.jsonl").is_file()

    run(f"{model} {TASKS} --limit 3 --json again.json", place)
    again = report(place, "again.json")["models"][0]["tasks"]
    for name, task in tasks.items():
        assert again[name]["from_earlier_runs"] == task["requests"] > 0
        same = ("value", "stderr", "metrics", "documents", "cut_on_the_left", "question_cut")
        assert {key: again[name][key] for key in same} == {key: task[key] for key in same}

    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] * 1.01
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    run(f"{model} --tasks winogrande --data-dir rows --limit 3 --json third.json", place)
    third = report(place, "third.json")["models"][0]
    assert third["digest"] != found["digest"]
    assert all(task["from_earlier_runs"] == 0 for task in third["tasks"].values())


@pytest.mark.timeout(300)
def test_an_moe_beside_its_parents(place: Path) -> None:
    done = run("recipe.yml --against-parents --limit 4 --json out.json --plot worth.svg --dtype float32", place)
    found = report(place)
    rivals = ["base", "e0", "e1", "average", "task arithmetic 0.7", "ties 0.5", "random gates", "own expert forced"]
    rivals.append("best parent per text")
    assert [model["name"] for model in found["models"]] == [*rivals, "recipe"]
    assert (place / "worth.svg").read_text().startswith("<svg")
    assert found["verdict"][0].split(";")[0] in " ".join(done.stdout.split())
    assert [gain["than"] for gain in found["gains"]] == rivals
    assert set(found["texts"]) == {"e0", "e1", "general text"}
    assert found["texts"]["e0"]["held_out_part"] is True
    base, moe = found["models"][0], found["models"][-1]
    assert moe["memory_bytes"] > base["memory_bytes"]
    expected = base["mean_loss"] - moe["mean_loss"]
    assert found["gains"][0]["mean_nats_per_token"]["value"] == pytest.approx(expected, abs=1e-6)


def test_another_number_of_experts_is_measured_apart_and_said(place: Path) -> None:
    text = "--text one=one.txt --limit 2 --dtype float32"
    (place / "one.yml").write_text(f"experts_per_token: 1\n{(place / 'recipe.yml').read_text()}")
    for arguments, name in (("recipe.yml", "own"), ("recipe.yml --experts-per-token 1", "asked"), ("one.yml", "is")):
        run(f"{arguments} {text} --json {name}.json", place)
    own, asked, one = (report(place, f"{name}.json")["models"][0] for name in ("own", "asked", "is"))
    assert [row["experts_per_token"] for row in (own, asked, one)] == [2, 1, 1]
    assert [row["name"] for row in (own, asked)] == ["recipe", "recipe top-1"]
    assert asked["mean_loss"] == one["mean_loss"] != own["mean_loss"]
    assert own["digest"] != asked["digest"]


@pytest.mark.timeout(300)
def test_equal_experts_are_told_that_they_are_their_base(place: Path, parents: dict[str, list[Path]]) -> None:
    base = parents["llama"][0]
    tiny.write_recipe(place / "same.yml", base, [base, base])
    done = run("same.yml --against-parents --text one=one.txt --limit 2 --dtype float32 --json out.json", place)
    assert report(place)["verdict"][0].startswith("It computes its base exactly: no gain is possible")
    assert "dense merges" in report(place)["skipped"]
    assert "not compared" in done.stdout


@pytest.mark.timeout(300)
def test_a_task_that_fails_is_named_and_the_others_go_on(place: Path) -> None:
    model = tiny.make_parent(place / "nan", "llama", seed=3, max_position_embeddings=4096)
    weights = load_file(model / "model.safetensors")
    # NaN for one token only, which every prompt of TruthfulQA holds and none of Winogrande
    token = tiny.make_tokenizer().encode("Q", add_special_tokens=False)[0]
    weights["model.embed_tokens.weight"][token] = float("nan")
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    done = run(f"{model} --tasks winogrande,truthfulqa --data-dir rows --json out.json", place, code=2)
    tasks = report(place)["models"][0]["tasks"]
    assert "document" in tasks["truthfulqa"]["error"]
    assert "NaN" in done.stderr
    assert tasks["winogrande"]["value"] is not None


def test_a_killed_run_goes_on(place: Path) -> None:
    model = tiny.make_parent(place / "long", "llama", seed=3, max_position_embeddings=4096)
    write_split(place / "rows", "winogrande", "validation", ROWS["winogrande"]["validation"] * 12)
    command = f"{model} --tasks winogrande --data-dir rows --json out.json".split()
    process = forks.start(forks.COMMAND, "eval", *command, "--cache", "cache", cwd=place, out=place)
    deadline = time.monotonic() + 120
    while not any(file.stat().st_size for file in (place / "cache").rglob("winogrande*.jsonl")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.join()
    (kept,) = (place / "cache").rglob("winogrande*.jsonl")
    lines = kept.read_bytes().splitlines()
    kept.write_bytes(b"\n".join(lines) + b'\n["torn')  # as a kill within a write leaves it
    run(" ".join(command), place)
    task = report(place)["models"][0]["tasks"]["winogrande"]
    assert 0 < task["from_earlier_runs"] <= len({json.loads(line)[0] for line in lines})
    assert task["documents"] == 72


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("recipe.yml --tasks hellaswagg", "did you mean 'hellaswag'?"),
        ("recipe.yml --tasks arc_challenge --data-dir rows/mmlu", "cannot be read"),
        ("nowhere/at-all/model --tasks ppl --text one.txt", "neither a folder"),
        ("recipe.yml --text none.txt", "does not exist"),
        ("recipe.yml recipe.yml --text one.txt", "two models are called"),
        ("recipe.yml {parent} --against-parents", "compares one MoE"),
        ("recipe.yml rows --text one.txt", "rows has no config.json"),
        ("recipe.yml --text one.txt --batch-size many", "neither `auto` nor a number"),
        ("recipe.yml --text one.txt --plot picture.txt", "must end in"),
        ("recipe.yml --text one.txt --json no/such/folder.json", "does not exist"),
        ("recipe.yml --text one.txt --json rows", "is a folder"),
        ("recipe.yml --text one.txt --log-samples one.txt", "not a folder"),
        ("recipe.yml --text one.txt --memory 1KB", "too little memory"),
        ("recipe.yml --text one.txt --device moon", "there is no device 'moon'"),
        ("recipe.yml --text one.txt --text one=two.txt", "two texts are named"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(
    arguments: str, said: str, place: Path, parents: dict[str, list[Path]]
) -> None:
    done = run(arguments.format(parent=parents["llama"][1]), place, code=2)
    assert said in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert not list(place.glob("*.json"))


def test_what_cannot_be_written_is_said(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import frankenmoe.artifact.folder as artifact
    from frankenmoe.errors import ArtifactError
    from frankenmoe.evaluate.store import Store

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(artifact, "write_atomic", full)
        done = run("recipe.yml --text one=one.txt --limit 2 --json out.json", place, code=2)
    assert "cannot be written to out.json: No space left on device" in " ".join(done.stderr.split())
    assert "nats per token" in done.stdout  # the scores are not lost
    store = Store(place / "kept", model="m", task="t", version=1)
    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(ArtifactError, match="cannot be used: No space left on device"):
        store.add([("key", 1)])


def test_models_of_one_name_are_told_apart_by_their_folders(place: Path) -> None:
    for run_name in ("one", "two"):
        tiny.make_parent(place / run_name / "model", "llama", seed=3)
    run("one/model two/model --text one=one.txt --limit 2 --json out.json", place)
    assert [model["name"] for model in report(place)["models"]] == ["one/model", "two/model"]
    low, high = report(place)["models"][0]["domains"]["one"]["interval"]
    assert low <= report(place)["models"][0]["domains"]["one"]["nats_per_token"] <= high


def test_the_library_reports_too(place: Path) -> None:
    from frankenmoe.evaluate.run import evaluate
    from frankenmoe.evaluate.score import Scoring

    made = fm.build(place / "recipe.yml", place / "built")
    found = evaluate([made.folder], texts={"one": place / "one.txt"}, limit=4, scoring=Scoring())
    (result,) = found.results
    assert result.losses["one"].mean == pytest.approx(result.mean_loss)
    assert torch.get_num_threads() == found.conditions["threads"]


def test_a_built_artifact_without_sources_has_a_loss_but_no_parents(place: Path) -> None:
    for index in range(3):
        tiny.make_parent(place / f"p{index}", "llama", seed=index)
    recipe = tiny.write_recipe(place / "own.yml", place / "p0", [place / "p1", place / "p2"])
    recipe.write_text(recipe.read_text().replace("name: e0", "name: e0\n  data: [one.txt]"))
    fm.build(recipe, place / "built")
    shutil.rmtree(place / "p1")
    run("built --limit 2 --json out.json", place)
    assert list(report(place)["models"][0]["domains"]) == ["e0"]
    failed = run("built --against-parents --limit 2", place, code=2)
    assert "the sources of built cannot be used any more" in failed.stderr


def test_a_busy_moment_does_not_make_a_model_slow() -> None:
    from frankenmoe.evaluate.score import speed

    passes = iter([0.01, 0.2, *[0.01] * 100])  # the second one is kept waiting by something else
    text = SimpleNamespace(vocab_size=9, max_position_embeddings=100)

    def model(**_: Any) -> Any:
        time.sleep(next(passes))
        return SimpleNamespace(logits=torch.zeros(1, 1, 1))

    model.config = SimpleNamespace(get_text_config=lambda: text)  # type: ignore[attr-defined]
    model.device = torch.device("cpu")  # type: ignore[attr-defined]
    assert 100 / 0.02 < speed(model) <= 100 / 0.01
