"""`frankenmoe families`: what can be built from what, and which programs run it."""

import click
from rich.table import Table

from frankenmoe.cli.options import JSON, example
from frankenmoe.cli.show import console
from frankenmoe.cli.text import json_text
from frankenmoe.families import PARTLY, VIRTUAL
from frankenmoe.families.runtimes import RUN_HERE, Pair, pairs
from frankenmoe.families.wrapped import WRAPPERS


@click.command("families", epilog=example("frankenmoe families\nfrankenmoe families --json"))
@JSON
def families_command(as_json: bool) -> None:
    """List families, their MoE formats and what runs them.

    A family is what a dense model is, such as llama. The formats are those it can be built as.

    Families without a format run as virtual MoEs; the list names the reason. --json says for each program how that is
    known: run here with a certain version, or only read in the program's tables.
    """
    if as_json:
        nested = {outer: wrapper.text for outer, wrapper in WRAPPERS.items()}
        virtual = {"virtual": dict(VIRTUAL), "virtual_models": dict(PARTLY)}
        click.echo(json_text({"built": [pair.to_dict() for pair in pairs()], "nested": nested, **virtual}))
        return
    table = Table(box=None, pad_edge=False)
    for name in ("family", "format", "shared expert", "runs in"):
        table.add_column(name, no_wrap=name != "runs in")
    before = None
    for pair in pairs():
        table.add_row(
            "" if pair.family == before else pair.family, pair.fmt, ", ".join(pair.shared) or "-", _runs(pair)
        )
        before = pair.family
    out = console()
    out.print(table)
    out.print("* read in the program's tables, not run here", style="dim", highlight=False, markup=False)
    for outer, wrapper in ((outer, wrapper) for outer, wrapper in WRAPPERS.items() if wrapper.tower is None):
        out.print(f"read for its text: {outer}, as {wrapper.text}", style="dim", highlight=False, markup=False)
    for family, models in PARTLY.items():
        out.print(f"virtual only, of {family}: {models}", style="dim", highlight=False, markup=False)
    for model_type, reason in VIRTUAL.items():
        out.print(f"virtual only: {model_type}: {reason}", style="dim", highlight=False, markup=False)


def _runs(pair: Pair) -> str:
    """The programs that run it; a star stands for those where that was read and not run here."""
    return ", ".join(
        f"{name}{'' if known.how.startswith(RUN_HERE) else '*'}" for name, known in pair.programs.items() if known.runs
    )
