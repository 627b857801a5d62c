"""`frankenmoe adopt`: its options and output."""

from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.table import Table

from frankenmoe.cli.options import JSON, example
from frankenmoe.cli.progress import bars
from frankenmoe.cli.show import command, console
from frankenmoe.cli.text import cell, json_text, printable
from frankenmoe.planning.adopting import MERGEKIT

if TYPE_CHECKING:
    from frankenmoe.build.adopt import Adopted


@click.command(
    "adopt",
    epilog=example(
        "frankenmoe adopt tuned/ --recipe recipe.yml\nfrankenmoe adopt mistralai/Mixtral-8x7B-v0.1 mixtral/"
    ),
)
@click.argument("folder", metavar="FOLDER")
@click.argument("out", metavar="[OUT]", required=False, type=click.Path(path_type=Path))
@click.option(
    "--recipe", metavar="RECIPE", type=click.Path(path_type=Path),
    help="The recipe it was made from: its experts are found by content and keep their names, prompts and data.",
)  # fmt: skip
@JSON
def adopt_command(folder: str, out: Path | None, recipe: Path | None, as_json: bool) -> None:
    """Make an artifact of an MoE from elsewhere.

    Another program has made or trained it. FOLDER holds a stock checkpoint of a format in `frankenmoe families`. It
    gets a record, a recipe and a file of routers; its weights are never changed. With OUT these are written there, and
    the weights stay where they are. FOLDER may then be a hub id.
    """
    from frankenmoe.build.adopt import adopt

    with bars() as progress:
        made = adopt(folder, out, recipe=recipe, progress=progress)
    if as_json:
        click.echo(json_text(made.to_dict()))
    else:
        show(made)


def show(made: "Adopted") -> None:
    """Prints the experts, and what can be done next."""
    facts, folder = made.facts, made.artifact.folder
    table = Table(box=None, pad_edge=False)
    for heading in ("", "expert", *(("made from", "distance", "next") if facts["recipe"] else ())):
        table.add_column(heading, overflow="fold")
    for row in facts["experts"]:
        words = [cell(row[key]) for key in ("name", "made_from") if key in row]
        far = [f"{row[key]:.3g}" if row[key] is not None else "-" for key in ("distance", "next") if key in row]
        table.add_row(str(row["index"]), *words, *far)
    for name in facts["shared_experts"]:
        table.add_row("", cell(name))
    console().print(table)
    click.echo(printable(f"artifact in {folder}: its routers are in it, its weights in {facts['from']}"))
    click.echo(f"next: {command('audit', folder)}")
    if facts["mergekit"] and not facts["recipe"]:
        click.echo(f"mergekit-moe left its recipe beside the weights: --recipe {MERGEKIT} names the experts", err=True)
