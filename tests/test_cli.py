"""The command line: tables of 80 columns, JSON, streaming, no progress bars in pipes, exit codes."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import forks
import tiny
from frankenmoe import __version__
from frankenmoe.build.run import build
from frankenmoe.cli import progress
from frankenmoe.cli.app import app
from frankenmoe.cli.options import Size
from frankenmoe.errors import FrankenMoEError, PlanError
from frankenmoe.subject import open_subject

Parents = dict[str, list[Path]]
COLUMNS = 80


@pytest.fixture
def recipe(parents: Parents, tmp_path: Path) -> Path:
    base, one, two = parents["llama"]
    return tiny.write_recipe(tmp_path / "r.yml", base, [base, one, two], prompts=True, gate_mode="hidden", name="tiny")


def run(*arguments: object, **keys: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False, **keys)  # type: ignore[arg-type]
    assert result.exit_code == 0, result.output
    return result.stdout


def test_plan_is_a_table_of_at_most_eighty_columns(recipe: Path) -> None:
    out = run("plan", recipe)
    assert max(map(len, out.splitlines())) <= COLUMNS
    for word in ("tiny", "Mixtral", "parameters", "active per token", "q4_0", "KV cache", "licences"):
        assert word in out
    assert "\\n" not in out
    assert len([line for line in out.splitlines() if "bits" in line]) == 4


def test_every_gguf_size_has_a_line_of_its_own(recipe: Path) -> None:
    lines = run("plan", recipe).splitlines()
    sizes = [line for line in lines if re.search(r"iB (q4_0|q5_0|q4_k_m|q8_0) \(", line)]
    assert len(sizes) == 4
    assert "\\n" not in "".join(lines)


def test_plan_json_has_the_promised_keys(recipe: Path) -> None:
    data = json.loads(run("plan", recipe, "--json"))
    promised = {
        "format",
        "layers",
        "experts",
        "experts_per_token",
        "parameters",
        "bytes",
        "memory",
        "identical_experts",
    }
    assert promised | {"warnings", "writes"} <= data.keys()
    assert data["parameters"].keys() == {"total", "active", "shared", "per_expert"}
    assert data["bytes"].keys() == {"built", "virtual"}


@pytest.mark.parametrize("virtual", [True, False])
def test_build_verify_chat(virtual: bool, recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert str(out) in run("build", recipe, out, *(["--virtual"] if virtual else []))
    assert "matches its recipe" in run("verify", out)
    assert json.loads(run("verify", out, "--json"))["routers"]
    said = json.loads(run("chat", out, "--prompt", "hello", "--max-new-tokens", 5, "--json"))
    assert len(said["trace"]) == 5 + 5 - 1
    assert said["trace"][0]["token"] == "h"
    assert len(said["trace"][0]["layers"][1]["ids"]) == 2


def test_chat_streams_and_traces_straight_from_a_recipe(recipe: Path) -> None:
    out = run("chat", recipe, "--prompt", "hello", "--max-new-tokens", 6, "--trace")
    assert "experts: 0 e0  1 e1  2 e2" in out
    assert max(map(len, out.splitlines())) <= COLUMNS
    plain = run("chat", recipe, "--prompt", "hello", "--max-new-tokens", 6)
    assert out.startswith(plain.rstrip("\n"))


def test_chat_with_another_number_of_experts_is_the_model_that_has_it(recipe: Path, tmp_path: Path) -> None:
    arguments = ("--prompt", "hello", "--max-new-tokens", 6, "--json")
    three = tmp_path / "three.yml"
    three.write_text(f"experts_per_token: 3\n{recipe.read_text()}")
    asked = json.loads(run("chat", recipe, *arguments, "--experts-per-token", 3))
    assert asked["reply"] == json.loads(run("chat", three, *arguments))["reply"]
    assert len(asked["trace"][0]["layers"][0]["ids"]) == 3
    with pytest.raises(PlanError, match=r"r\.yml has 3 experts, found 4 experts per token") as caught:
        run("chat", recipe, *arguments, "--experts-per-token", 4)
    assert "from 1 to 3; its own is 2" in str(caught.value.hint)


def test_a_build_keeps_the_number_in_its_recipe(recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="the recipe's 2 experts per token, found 1"):
        build(open_subject(recipe, experts_per_token=1), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_chat_in_int8_says_nearly_the_same(recipe: Path) -> None:
    arguments = ("chat", recipe, "--prompt", "hello", "--max-new-tokens", 6, "--json")
    plain, rounded = (json.loads(run(*arguments, *more)) for more in ((), ("--int8",)))
    weights = [
        [layer["weights"] for token in said["trace"][:5] for layer in token["layers"]] for said in (plain, rounded)
    ]
    assert weights[0] != weights[1]
    assert torch.allclose(*map(torch.tensor, weights), atol=0.1)
    refused = CliRunner().invoke(app, ["chat", "some.gguf", "--int8"])
    assert refused.exit_code == 2
    assert "export" in refused.output


def test_chat_says_where_kernels_are_missing(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("frankenmoe.moe.linear.kernels", lambda: None)
    monkeypatch.setattr("frankenmoe.moe.linear.SMALL", 0)
    arguments = ["chat", str(recipe), "--prompt", "hello", "--max-new-tokens", "2"]
    plain, rounded = (CliRunner().invoke(app, [*arguments, *more]) for more in ([], ["--int8"]))
    assert "frankenmoe[cpu]" not in plain.stderr  # for float32, torch's kernels are as fast
    assert "frankenmoe[cpu]" in rounded.stderr


def test_chat_reads_a_conversation_from_a_pipe(recipe: Path) -> None:
    out = run("chat", recipe, "--max-new-tokens", 3, input="hello\n\nagain\n")
    assert len(out.strip("\n").splitlines()) >= 2


@pytest.mark.parametrize(
    ("what", "prompt", "words"),
    [
        ("missing.yml", "hi", "missing.yml"),
        ("recipe", "a" * 100, "100 tokens, but the model sees 64"),
        ("recipe", "", "no tokens"),
    ],
)
def test_chat_refuses_what_it_cannot_say(what: str, prompt: str, words: str, recipe: Path) -> None:
    with pytest.raises(FrankenMoEError, match=words):
        run("chat", recipe if what == "recipe" else what, "--prompt", prompt)


def test_sampling_follows_the_seed(recipe: Path) -> None:
    arguments = ("chat", recipe, "--prompt", "hello", "--max-new-tokens", 12, "--temperature", 2.0, "--json", "--seed")
    one, same, other = (json.loads(run(*arguments, seed))["reply"] for seed in (1, 1, 2))
    assert one == same != other


def test_nothing_but_data_on_stdout_and_no_bars_in_a_pipe(recipe: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "frankenmoe.cli", "build", str(recipe), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.startswith("built artifact in")
    assert "\x1b" not in done.stdout + done.stderr
    assert "Loading weights" not in done.stderr


def in_a_terminal(code: str) -> str:
    """The output of Python code in a terminal of 80 columns."""
    seen, terminal = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "80"}
    with subprocess.Popen([sys.executable, "-c", code], stderr=terminal, stdout=terminal, env=environment):
        os.close(terminal)
        text = ""
        try:
            while chunk := os.read(seen, 65536):
                text += chunk.decode(errors="replace")
        except OSError:  # Linux closes a terminal with this error
            pass
    return text


@pytest.mark.parametrize(("unit", "rate"), [("B", " MB/s"), ("tokens", " tokens/s")])
def test_a_terminal_gets_a_bar_with_rate_and_time_left(unit: str, rate: str) -> None:
    text = in_a_terminal(
        "import time\nfrom frankenmoe.cli.progress import bars\n"
        "with bars() as progress:\n"
        f"    progress.start('training', 10**9, '{unit}')\n"
        "    progress.note('loss 4.123, held out 4.321')\n"
        "    for _ in range(8): progress.advance(10**8); time.sleep(0.15)\n"
    )
    assert "training" in text
    assert re.search(rf"\d{rate}", text)
    assert "0:00:0" in text
    assert unit == "B" or "held out 4.321" in text


def test_a_long_note_is_cut_and_not_the_time_left() -> None:
    text = in_a_terminal(
        "import time\nfrom frankenmoe.cli.progress import bars\n"
        "with bars() as progress:\n"
        "    progress.start('1/7 fit: fitting', 10**6, 'tokens')\n"
        "    progress.note('statistics of the routers, own expert forced in every layer')\n"
        "    for _ in range(8): progress.advance(50); time.sleep(0.15)\n"
    )
    assert re.search(r"tokens/s \S*\d:\d\d:\d\d", text)
    assert re.search(r"statistics of \S*.*…", text)


def test_steps_that_take_longer_than_a_second_have_a_time_each() -> None:
    text = in_a_terminal(
        "import time\nfrom frankenmoe.cli.progress import bars\n"
        "with bars() as progress:\n"
        "    progress.start('training', 4, 'steps')\n"
        "    for _ in range(3): time.sleep(1.2); progress.advance(1)\n"
    )
    assert re.search(r"\d\.\d s each", text)
    assert re.search(r"0:00:0[1-9]", text)


def test_interrupted_says_so_and_exits_130(recipe: Path, tmp_path: Path) -> None:
    code = (
        "import os, signal\nfrom frankenmoe.build import body as compose\n"
        "compose.check_disk = lambda *a, **k: os.kill(os.getpid(), signal.SIGINT)\n"
        "from frankenmoe.cli import main\nmain()"
    )
    done = forks.run(code, "build", recipe, tmp_path / "out")
    assert done.returncode == 128 + signal.SIGINT
    assert "the same command continues" in done.stderr
    assert "Traceback" not in done.stderr
    assert run("build", recipe, tmp_path / "out")


def test_interrupted_does_not_promise_what_starts_again(recipe: Path, tmp_path: Path) -> None:
    code = (
        "import os, signal\nfrom frankenmoe import planning\n"
        "planning.plan = lambda *a, **k: os.kill(os.getpid(), signal.SIGINT)\n"
        "from frankenmoe.cli import main\nmain()"
    )
    done = forks.run(code, "plan", recipe)
    assert done.returncode == 128 + signal.SIGINT
    assert "the same command starts again" in done.stderr


def test_a_reader_that_leaves_early_is_no_error(recipe: Path) -> None:
    command = f"{sys.executable} -m frankenmoe.cli plan {recipe} --json | head -1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True)
    assert done.stdout == "{\n"
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "command", ["plan", "build", "verify", "chat", "audit", "demo", "schema", "card", "push", "run"]
)
def test_help_shows_an_example(command: str) -> None:
    out = run(command, "--help")
    assert f"frankenmoe {command}" in out.partition("Example:")[2]
    assert max(map(len, out.splitlines())) <= COLUMNS


def test_version() -> None:
    assert __version__ in run("--version")


@pytest.mark.parametrize(
    ("text", "size"), [("4GB", 4 * 10**9), ("500mb", 5 * 10**8), ("2GiB", 2**31), ("1.5K", 1500), ("7", 7)]
)
def test_sizes(text: str, size: int) -> None:
    assert Size().convert(text, None, None) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "4XB", "0", "4 G B", "nan", "9" * 400 + "TB"])
def test_what_is_not_a_size(text: str) -> None:
    assert CliRunner().invoke(app, ["build", "r.yml", "out", "--shard-size", text]).exit_code == 2


def test_bars_are_silent_where_nobody_watches(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.bars() as listener:
        listener.start("writing", 10, "B")
        listener.advance(10)
    assert capsys.readouterr() == ("", "")
