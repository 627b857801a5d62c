"""`frankenmoe audit` as a person meets it: any width, no colours, JSON, two artifacts, mistakes."""

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from rich.cells import cell_len
from rich.console import Console

import frankenmoe as fm
import synthetic
import tiny
from frankenmoe.audit.page import page
from frankenmoe.cli.app import app
from frankenmoe.cli.audit import load_bar, show_audit, show_difference
from frankenmoe.errors import FrankenMoEError

Parents = dict[str, list[Path]]
QUESTIONS = (
    "1. Is it an MoE at all?",
    "2. Who gets the tokens?",
    "3. Does routing follow the domain?",
    "4. Is the router conditioned?",
    "5. Would it survive?",
    "6. What did this token see?",
)


def run(*arguments: object, **environment: str) -> str:
    result = CliRunner().invoke(app, ["audit", *map(str, arguments)], catch_exceptions=False, env=environment)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.parametrize("columns", [40, 200])
def test_the_report_fits_any_terminal(columns: int, recipe: Path, tmp_path: Path) -> None:
    out = run(recipe, "--out", tmp_path / "reports", COLUMNS=str(columns))
    assert max(map(len, out.splitlines()[:-2])) <= min(columns, 80)  # the last two lines name files
    plain = " ".join(out.split())
    for question in QUESTIONS:
        assert question in plain
    assert "\x1b" not in out
    assert (tmp_path / "reports" / "audit-tiny" / "audit.html").is_file()
    assert "…" not in out


def test_many_experts_and_layers_fit_too() -> None:
    report = synthetic.make_audit(experts=64, layers=32, tokens=40).report
    for columns in (40, 80):
        show = Console(width=columns, record=True, color_system=None, file=io.StringIO())
        show_audit(report, show)
        show_difference(report, report, show)
        text = show.export_text()
        assert max(map(len, text.splitlines())) <= columns
        assert "…" not in re.sub(r"layer \d+:.*", "", text)
        assert "the first 26" in " ".join(text.split())
        assert "50% of tokens switch expert" in " ".join(text.split())


def test_wide_letters_keep_their_place() -> None:
    report = synthetic.make_audit(experts=4, layers=30, tokens=40).report
    report["passages"][0]["tokens"][:2] = ["日本語日本語日本語", "\x1b[31m\u202e"]
    show = Console(width=40, record=True, color_system=None, file=io.StringIO())
    show_audit(report, show)
    lines = show.export_text().splitlines()
    assert max(map(cell_len, lines)) <= 40
    assert next(line for line in lines if line.startswith("日"))[6] == " "  # six letters take twelve columns
    assert not {"\x1b", "\u202e"} & set("".join(lines))


def test_dead_experts_inside_others_are_listed() -> None:
    report = synthetic.make_audit(experts=4, layers=2, tokens=40).report
    inside = report["routers"][0]
    report["routers"].append({**inside, "path": "3", "load": {**inside["load"], "dead": [1]}})
    report["model"]["paths"]["3.1"] = "inner/law"
    show = Console(width=80, record=True, color_system=None, file=io.StringIO())
    show_audit(report, show)
    assert "dead in layer 0: inner/law" in show.export_text()


def test_colours_are_the_pages_and_chats() -> None:
    audit = synthetic.make_audit(experts=3, layers=2, tokens=20)
    show = Console(width=80, record=True, force_terminal=True, color_system="truecolor", file=io.StringIO())
    show_audit(audit.report, show)
    text = show.export_text(styles=True)
    assert "48;2;0;114;178" in text  # expert 0: #0072B2 behind its digit
    assert "background-color:#0072B2" in page([audit])


@pytest.mark.usefixtures("no_page")
def test_json_is_the_file(recipe: Path, tmp_path: Path) -> None:
    printed = json.loads(run(recipe, "--json", "--out", tmp_path / "reports", "--prompt", "More"))
    assert printed == json.loads((tmp_path / "reports" / "audit-tiny" / "audit.json").read_text())
    assert printed["passages"][0]["tokens"][1:] == list("More")


def test_two_artifacts(place: Path, tmp_path: Path) -> None:
    out = run(place / "virtual", place / "built", "--out", tmp_path / "reports", "--tokens", "50")
    assert "From the first to the second" in out
    assert (tmp_path / "reports" / "audit-tiny" / "audit.json").is_file()


def test_the_second_is_checked_before_the_first_is_computed(
    recipe: Path, parents: Parents, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("frankenmoe.subject.Subject.load", lambda *_, **__: pytest.fail("loaded"))
    base, one, _ = parents["llama"]
    second = tiny.write_recipe(tmp_path / "second.yml", base, [base, one], prompts=True)
    (tmp_path / "a.txt").write_text("abc " * 30)
    with pytest.raises(FrankenMoEError, match="names an unknown expert, expected one of e0, e1"):
        run(recipe, second, "--out", tmp_path / "reports", "--data", f"e2={tmp_path / 'a.txt'}")


@pytest.mark.usefixtures("no_page")
def test_data_with_and_without_a_label(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "a=b.txt").write_text("hello " * 30)
    found = json.loads(
        run(
            recipe, "--json", "--out", tmp_path / "reports",
            "--data", f"e1={tmp_path / 'a=b.txt'}", "--data", tmp_path / "a=b.txt",
        )
    )  # fmt: skip
    assert {name: part["own_expert"] for name, part in found["text"].items()} == {"e1": 1, "text": None}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data", "e9=x.txt"], "names an unknown expert"),
        (["--data", "missing.txt"], "does not exist"),
        (["--data", f"{'a' * 5000}=x"], "names an unknown expert"),
        (["--prompt", ""], "prompt must not be empty"),
    ],
)
def test_mistakes_write_nothing(arguments: list[str], words: str, recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(FrankenMoEError, match=words):
        run(recipe, "--out", tmp_path / "reports", *arguments)
    assert not (tmp_path / "reports").exists()


@pytest.mark.parametrize(
    ("shares", "expected"), [([0.5, 0.25, 0.25], "00001122"), ([0, 1.0], "11111111"), ([0, 0], "")]
)
def test_a_load_bar_by_hand(shares: list[float], expected: str) -> None:
    assert load_bar(shares, 8).plain == expected


def test_help_has_an_example_and_fits() -> None:
    out = run("--help")
    assert "frankenmoe audit" in out.partition("Example:")[2]
    assert max(map(len, out.splitlines())) <= 80


def test_chat_marks_experts_alike(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from frankenmoe.cli import chat
    from frankenmoe.moe.generate import reply

    show = Console(width=80, record=True, force_terminal=True, color_system="truecolor", file=io.StringIO())
    monkeypatch.setattr(chat, "console", lambda: show)
    moe: Any = fm.load(recipe)
    tokenizer = moe.tokenizer()
    made = reply(moe, tokenizer, [{"role": "user", "content": "hello"}], max_new_tokens=3)
    chat.show_trace(made, ("\x1b[31m\u202ered", *moe.experts[1:]), tokenizer)
    assert "\\x1b[31m\\u202ered" in show.export_text(styles=False, clear=False)
    assert "48;2;0;114;178" in show.export_text(styles=True)


def test_a_trace_of_chat_names_experts_at_40_columns(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from frankenmoe.cli import chat
    from frankenmoe.moe.generate import reply

    show = Console(width=40, record=True, color_system=None, file=io.StringIO())
    monkeypatch.setattr(chat, "console", lambda: show)
    moe: Any = fm.load(recipe)
    tokenizer = moe.tokenizer()
    chat.show_trace(
        reply(moe, tokenizer, [{"role": "user", "content": "hello"}], max_new_tokens=3), moe.experts, tokenizer
    )
    lines = show.export_text().splitlines()[2:]
    assert max(map(len, lines)) <= 40
    assert all(re.search(r"\d+% e\d", line) for line in lines)
