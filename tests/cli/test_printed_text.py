"""What the command line prints of names and of models' words: nothing that steers a terminal or is read as markup."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from rich.text import Text

import frankenmoe as fm
import tiny
from frankenmoe.cli.app import app
from frankenmoe.cli.text import STEERING, cell, json_text, spelled_out

NAMES = ["red \x1b[31m\x9b2J\u202e", "[bold]x[/] [/nothing] \x07"]


@given(st.text(alphabet=st.characters(), max_size=20))
def test_json_is_the_same_data_without_controls(text: str) -> None:
    written = json_text({text: [text]})
    assert not STEERING.search(written)
    assert json.loads(written) == {text: [text]}


@given(st.text(max_size=20))
def test_cells_show_every_letter(text: str) -> None:
    shown = Text.from_markup(cell(text)).plain
    assert shown.isprintable()
    assert "".join(each for each in text if each.isprintable()) in shown or any(not each.isprintable() for each in text)


def test_models_words_keep_lines_and_tabs() -> None:
    assert spelled_out("a\n\tb\r\x1b\x9b") == "a\n\tb\\r\\x1b\\x9b"


@pytest.mark.parametrize("command", ["plan", "fit", "audit", "chat"])
@pytest.mark.parametrize("as_json", [False, True])
def test_names_do_not_reach_the_terminal_raw(
    command: str, as_json: bool, parents: dict[str, list[Path]], tmp_path: Path
) -> None:
    base, one, two = map(str, parents["llama"])
    experts = [{"source_model": file, "name": name} for file, name in zip((one, two), NAMES, strict=True)]
    for number, expert in enumerate(experts):
        (tmp_path / f"{number}.txt").write_text("ab" * 4000 if number else "cd" * 4000)
        expert["data"] = str(tmp_path / f"{number}.txt")
    recipe = tiny.write_recipe(tmp_path / "r.yml", Path(base), [], name="moe \x1b[2J[/]", experts=experts)
    what = recipe
    if command == "fit":
        what = fm.build(recipe, tmp_path / "moe", virtual=True).folder
    more = {"fit": ["--keep-anyway", "--method", "ridge"], "audit": ["--tokens", "64", "--out", str(tmp_path / "a")]}
    more["chat"] = ["--prompt", "ab", "--max-new-tokens", "3", *([] if as_json else ["--trace"])]
    done = CliRunner().invoke(app, [command, str(what), *more.get(command, []), *(["--json"] if as_json else [])])
    assert done.exit_code == 0, done.output
    assert not STEERING.search(done.output)
    assert "\\x1b[31m" in done.output or "\\u001b[31m" in done.output
