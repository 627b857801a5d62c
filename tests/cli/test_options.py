"""Every number that an option takes is bounded, in the same way in all commands."""

from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from frankenmoe.cli.app import app
from frankenmoe.cli.options import Number, Size
from frankenmoe.errors import RecipeError
from frankenmoe.recipe.sections import EvalSettings, ExportSettings
from frankenmoe.recipe.settings import Closed, settings_with

NUMBERS = [
    (name, option.opts[0], option.type)
    for name, command in app.commands.items()
    for option in command.params
    if isinstance(option.type, Number | Size)
]
# neither text nor a float that counts anything
NONSENSE = ["", "x", "nan", "inf", "-1", "1" + "0" * 40, "1e400", "9" * 5000, "1.5.2", "0x10"]


def test_numbers_have_bounds_in_every_command() -> None:
    loose = {click.INT, click.FLOAT}
    found = {
        (name, option.name)
        for name, command in app.commands.items()
        for option in command.params
        if option.type in loose or isinstance(option.type, click.IntRange | click.FloatRange)
    }
    assert found == set()
    assert {"card", "chat", "fit", "audit", "eval", "export", "build"} <= {name for name, _, _ in NUMBERS}


@pytest.mark.parametrize("text", NONSENSE)
@pytest.mark.parametrize(("command", "flag", "kind"), NUMBERS)
def test_nonsense_is_rejected(command: str, flag: str, kind: click.ParamType, text: str) -> None:
    with pytest.raises(click.BadParameter):
        kind.convert(text, None, None)


@pytest.mark.parametrize(
    ("flag", "text", "words"),
    [
        ("--temperature", "nan", "must be a finite number, found nan"),
        ("--temperature", "0.0001", "must be 0 or from 0.001 to 1000, found 0.0001"),
        ("--seed", "1" + "0" * 30, "must be less than 9223372036854775808"),
        ("--seed", "-1", "must be at least 0, found -1"),
        ("--max-new-tokens", "0", "must be at least 1, found 0"),
        ("--max-new-tokens", "many", "must be a whole number, found the text 'many'"),
    ],
)
@pytest.mark.parametrize("command", ["card", "chat"])
def test_the_message_says_what_was_expected(command: str, flag: str, text: str, words: str, tmp_path: Path) -> None:
    outcome = CliRunner().invoke(app, [command, str(tmp_path), flag, text])
    assert outcome.exit_code == 2
    assert f"'{flag}': {words}" in outcome.output


def test_defaults_are_within_the_bounds() -> None:
    for name, command in app.commands.items():
        for option in command.params:
            if isinstance(option.type, Number | Size) and isinstance(option.default, str | int | float):
                assert option.type.convert(option.default, option, None) is not None, (name, option.name)


@pytest.mark.parametrize("text", ["", ",,", " , "])
@pytest.mark.parametrize(("settings", "name"), [(EvalSettings, "tasks"), (ExportSettings, "types")])
def test_a_list_without_names_is_rejected(settings: type[Closed], name: str, text: str) -> None:
    with pytest.raises(RecipeError, match=f"{name} must name at least one, found"):
        settings_with(settings(), {name: text})
