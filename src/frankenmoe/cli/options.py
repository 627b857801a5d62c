"""Options and option types that several commands share."""

import re
from collections.abc import Callable
from typing import Any

import click
from pydantic import TypeAdapter, ValidationError

from frankenmoe.recipe import fields
from frankenmoe.recipe.refusals import in_words

SIZE_UNITS = {
    "": 1,
    "K": 10**3,
    "M": 10**6,
    "G": 10**9,
    "T": 10**12,
    "KI": 2**10,
    "MI": 2**20,
    "GI": 2**30,
    "TI": 2**40,
}
Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]
LARGEST = 1e18  # bytes


class Number(click.ParamType[Any]):
    """A number with the bounds of a type in `recipe.fields`, so that options and recipes have the same bounds."""

    name = "number"

    def __init__(self, kind: Any) -> None:
        self.adapter: TypeAdapter[Any] = TypeAdapter(kind)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The number, or a usage error with expected and found values."""
        try:
            return self.adapter.validate_python(_as_number(value))
        except ValidationError as error:
            text, _ = in_words(error.errors(include_url=False)[0])
            self.fail(text, param, ctx)


def _as_number(value: Any) -> Any:
    """A text as a number if it is one, so that messages show a number; anything else unchanged."""
    for kind in (int, float) if isinstance(value, str) else ():
        try:
            return kind(value)
        except (ValueError, OverflowError):
            continue
    return value


class Size(click.ParamType[int]):
    """A number of bytes such as 4GB, 500MB or 2GiB."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The number of bytes, at least 1."""
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?", str(value).strip().upper())
        if match is None or match[2] not in SIZE_UNITS or not 0 < float(match[1]) < LARGEST:
            self.fail(f"{value!r} is not a size; write it like 4GB, 500MB or 2GiB", param, ctx)
        return max(1, int(float(match[1]) * SIZE_UNITS[match[2]]))


COUNT, SEED, TEMPERATURE = Number(fields.Count), Number(fields.Seed), Number(fields.Temperature)
SIZE = Size()

REMOTE = click.option("--trust-remote-code", is_flag=True, help="Run Python code found in a source; read it first.")


def json_option(text: str) -> Decorator:
    """The flag --json with the given help."""
    return click.option("--json", "as_json", is_flag=True, help=text)


def dtype_option(text: str) -> Decorator:
    """The option --dtype with the given help."""
    return click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help=text)


DEVICE = click.option(
    "--device",
    default="auto",
    show_default=True,
    help="Where models run: cpu, cuda, cuda:1, mps; `auto` is a GPU if there is one.",
)


def placed(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds --device and --dtype of a command that runs models; its parameters are `device` and `dtype`."""
    return DEVICE(dtype_option("Type to compute in; default: as stored.")(command))


EXPERTS_PER_TOKEN = click.option(
    "--experts-per-token", type=COUNT, metavar="N", help="Experts per token in each layer; default: the model's number."
)
NO_CACHE = click.option("--no-cache", is_flag=True, help="Neither read nor write cached routers and backbones.")
JSON = json_option("Print JSON instead of a table.")
DTYPE = dtype_option("Type to store weights in; default: the recipe's.")


def example(text: str) -> str:
    """An epilog with examples, which click prints without rewrapping."""
    return "\b\nExample:\n" + "\n".join(f"  {line}" for line in text.splitlines())
