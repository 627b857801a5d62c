"""`frankenmoe run`: one line per step as it ends, one table at the end; does no step itself."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from frankenmoe.cli.options import JSON, NO_CACHE, REMOTE, example
from frankenmoe.cli.progress import bars
from frankenmoe.cli.show import command, console, warn
from frankenmoe.recipe import Recipe
from frankenmoe.subject import open_subject

if TYPE_CHECKING:
    from frankenmoe.pipeline import Finished


@click.command("run", epilog=example("frankenmoe run recipe.yml raiden/\nfrankenmoe push raiden/model me/raiden"))
@click.argument("recipe", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@NO_CACHE
@JSON
@REMOTE
def run_command(recipe: Path, out: Path, no_cache: bool, as_json: bool, trust_remote_code: bool) -> None:
    """Run every stage RECIPE asks for, in the folder OUT.

    Builds the model in OUT/model, then fits, trains, audits, measures, exports and describes it, as far as the recipe
    has sections for that. Unchanged steps are skipped. If killed, the same command continues.
    """
    # planned first: a mistake in the recipe is reported before torch has been imported
    subject = open_subject(Recipe.load(recipe), cache=not no_cache, trust_remote_code=trust_remote_code)
    warn(subject.plan.warnings)

    from frankenmoe.pipeline import run

    with bars() as progress:
        finished = run(subject, out, progress=progress)
    if as_json:
        facts = {"artifact": str(finished.artifact.folder), "steps": [asdict(step) for step in finished.steps]}
        click.echo(json.dumps(facts, indent=2, ensure_ascii=False))
    else:
        _show(finished)


def _show(finished: "Finished") -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("step", style="bold", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("took", justify="right", no_wrap=True)
    table.add_column("result", overflow="fold")
    for step in finished.steps:
        state = "done" if step.now else "unchanged"
        table.add_row(step.name, state, f"{step.seconds:.1f} s" if step.now else "", escape(step.said))
    console().print(table)
    click.echo(f"model in {finished.artifact.folder}")
    click.echo(f"next: {command('push', finished.artifact.folder, 'ORG/NAME', '--dry-run')}")
