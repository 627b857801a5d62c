"""`frankenmoe run`: its options and its table of stages."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from frankenmoe.cli.options import JSON, NO_CACHE, REMOTE, example, placed
from frankenmoe.cli.progress import bars
from frankenmoe.cli.show import command, console, warn
from frankenmoe.cli.text import cell, json_text
from frankenmoe.recipe import Recipe
from frankenmoe.subject import open_subject

if TYPE_CHECKING:
    from frankenmoe.pipeline import Finished


@click.command("run", epilog=example("frankenmoe run recipe.yml raiden/\nfrankenmoe push raiden/model me/raiden"))
@click.argument("recipe", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@placed
@NO_CACHE
@JSON
@REMOTE
def run_command(
    recipe: Path,
    out: Path,
    device: str,
    dtype: str | None,
    no_cache: bool,
    as_json: bool,
    trust_remote_code: bool,
) -> None:
    """Run every stage of RECIPE in the folder OUT.

    Builds the model in OUT/model. Also fits, trains, audits, evaluates, exports and describes it if RECIPE has those
    sections. Unchanged stages are skipped. If killed, the same command continues.
    """
    # the plan comes first, so that mistakes in the recipe are reported before torch is imported
    subject = open_subject(Recipe.load(recipe), cache=not no_cache, trust_remote_code=trust_remote_code)
    warn(subject.planned.warnings)

    from frankenmoe.pipeline import run

    with bars() as progress:
        finished = run(subject, out, device=device, dtype=dtype, progress=progress)
    if as_json:
        facts = {"artifact": str(finished.artifact.folder), "steps": [asdict(step) for step in finished.steps]}
        click.echo(json_text(facts))
    else:
        _show(finished)


def _show(finished: "Finished") -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("step", style="bold", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("time", justify="right", no_wrap=True)
    table.add_column("result", overflow="fold")
    for step in finished.steps:
        state = "done" if step.now else "unchanged"
        table.add_row(step.name, state, f"{step.seconds:.1f} s" if step.now else "", cell(step.summary))
    console().print(table)
    click.echo(f"model in {finished.artifact.folder}")
    click.echo(f"next: {command('push', finished.artifact.folder, 'ORG/NAME', '--dry-run')}")
