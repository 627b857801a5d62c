"""Options and kinds of values that several commands share; knows no command."""

import math
import re
from typing import Any

import click

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
LARGEST = 1e18  # more than any number of bytes
COLDEST = 0.001
REMOTE = click.option(
    "--trust-remote-code", is_flag=True, help="Run Python code that a source brings along. Read it first."
)


class Size(click.ParamType[int]):
    """A number of bytes such as 4GB, 500MB or 2GiB."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?", str(value).strip().upper())
        if match is None or match[2] not in SIZE_UNITS or not 0 < float(match[1]) < LARGEST:
            self.fail(f"{value!r} is not a size; write it like 4GB, 500MB or 2GiB", param, ctx)
        return max(1, int(float(match[1]) * SIZE_UNITS[match[2]]))


class Temperature(click.ParamType[float]):
    """Zero, or a number that logits can be divided by."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if number and not COLDEST <= number <= 1 / COLDEST:
            self.fail(f"{value!r} is not a temperature; write 0, or a number from 0.001 to 1000", param, ctx)
        return number


def example(text: str) -> str:
    """An epilog that click prints as it stands."""
    return "\b\nExample:\n" + "\n".join(f"  {line}" for line in text.splitlines())
