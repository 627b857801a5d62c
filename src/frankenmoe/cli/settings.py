"""Makes the options of a command from the settings model of its stage."""

from collections.abc import Callable, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import click
from pydantic.fields import FieldInfo

from frankenmoe.cli.options import Number
from frankenmoe.data.given import by_label, pairs
from frankenmoe.recipe import Recipe
from frankenmoe.recipe.settings import Closed, Option

PREFIX = "set_"
Command = Callable[..., Any]


def settings_options(model: type[Closed]) -> Callable[[Command], Command]:
    """Adds an option for each field of a model; name, type, help and default come from the field."""

    def add(command: Command) -> Command:
        for name, field in reversed(model.model_fields.items()):
            shown = next((each for each in field.metadata if isinstance(each, Option)), Option())
            if not shown.hidden:
                command = _option(name, field, shown)(command)
        return command

    return add


def given(options: dict[str, Any]) -> dict[str, Any]:
    """Moves the settings that the user gave out of click's options: setting -> value."""
    names = [name for name in options if name.startswith(PREFIX)]
    found = {name.removeprefix(PREFIX): options.pop(name) for name in names}
    return {name: value for name, value in found.items() if value not in (None, ())}


def by_expert(data: Sequence[str], recipe: Recipe, *, form: str = "EXPERT=FILE") -> dict[str, list[str]]:
    """The texts of --data by the name of their expert; `form` says in messages how they are written."""
    names = [expert.name for expert in recipe.experts]
    return by_label(pairs(data, flag="--data", names=names, folder=Path.cwd(), form=form))


def _option(name: str, field: FieldInfo, shown: Option) -> Callable[[Command], Command]:
    flag, kind = shown.flag or f"--{name.replace('_', '-')}", _plain(field.annotation)
    text = f"{field.description}{_default(field.default)}"
    keys: dict[str, Any] = {"help": text, "default": None, "metavar": shown.metavar}
    if kind is bool:
        optional = NoneType in get_args(field.annotation)
        return click.option(f"{flag}/--no-{flag[2:]}" if optional else flag, PREFIX + name, is_flag=True, **keys)
    if get_origin(kind) is Literal:
        keys["type"] = click.Choice(get_args(kind))
    elif kind in (int, float):
        keys["type"] = Number(Annotated[(field.annotation, shown, *field.metadata)])
    elif get_origin(kind) is tuple and not shown.listed:
        keys |= {"multiple": True, "help": _repeatable(text)}
    elif get_origin(kind) is dict:
        keys |= {"multiple": True, "callback": _mapping, "help": _repeatable(text)}
    return click.option(flag, PREFIX + name, **keys)


def _plain(annotation: Any) -> Any:
    """A type without bounds and without None."""
    if get_origin(annotation) is Annotated:
        return _plain(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        (kind,) = (each for each in get_args(annotation) if each is not NoneType)
        return _plain(kind)
    return annotation


def _default(value: Any) -> str:
    """A default as shown in help; nothing if it is a bool, empty or None."""
    if isinstance(value, bool) or not isinstance(value, int | float | str | tuple) or value == ():
        return ""
    return f"  [default: {','.join(value) if isinstance(value, tuple) else value}]"


def _repeatable(text: str) -> str:
    return f"{text.removesuffix('.')} (repeatable)."


def _mapping(context: click.Context, option: click.Parameter, values: tuple[str, ...]) -> dict[str, str] | None:
    """NAME=VALUE options as a mapping."""
    found = by_label(pairs(values, flag=option.opts[0], form=option.metavar or "NAME=VALUE"))
    return {name: each[-1] for name, each in found.items()} or None
