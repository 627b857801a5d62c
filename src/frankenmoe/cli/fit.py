"""`frankenmoe fit`, `add-expert` and `extract`: their options, and what they print; computes nothing."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

import click
from rich.table import Table

from frankenmoe.cli.progress import bars
from frankenmoe.cli.show import command, console, warn
from frankenmoe.errors import RecipeError

if TYPE_CHECKING:
    from frankenmoe.fitting import FitResult

METHODS = ("logistic", "regret", "ridge", "lda", "centroid")
TEXT = (
    click.option(
        "--tokens",
        type=click.IntRange(min=512),
        default=32768,
        show_default=True,
        help="Most tokens of data per expert.",
    ),
    click.option("--block", type=click.IntRange(min=8), default=256, show_default=True, help="Tokens read at once."),
    click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table."),
    click.option(
        "--trust-remote-code", is_flag=True, help="Run Python code that a source brings along. Read it first."
    ),
)


def text_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options that `fit` and `add-expert` share."""
    for option in reversed(TEXT):
        command = option(command)
    return command


@click.command(
    "fit",
    epilog="\b\nExample:\n  frankenmoe fit recipe.yml out-virtual/\n"
    "  frankenmoe fit out/ --data maths=maths.txt --data verse=poems.jsonl",
)
@click.argument("what", metavar="OUT|RECIPE", type=click.Path(path_type=Path))
@click.argument("out", metavar="[OUT]", required=False, type=click.Path(path_type=Path))
@click.option(
    "--data", "data", metavar="EXPERT=FILE", multiple=True,
    help="Text an expert is good at: a file, JSONL or hub dataset; again for more. Default: the recipe's data, else "
    "its prompts.",
)  # fmt: skip
@click.option(
    "--method",
    type=click.Choice(METHODS),
    help="Default: the recipe's gate_mode, or regret, or logistic from prompts.",
)
@click.option("--keep-anyway", is_flag=True, help="Replace the routers even if the new ones are worse.")
@text_options
def fit_command(
    what: Path,
    out: Path | None,
    data: tuple[str, ...],
    method: str | None,
    keep_anyway: bool,
    tokens: int,
    block: int,
    as_json: bool,
    trust_remote_code: bool,
) -> None:
    """Fit routers to the experts' text in closed form.

    No training: one pass over the text with each expert forced, one under the routers this gives, and a line search for
    how sharp they should be. Of an artifact the routers are replaced if held-out loss falls; of a recipe a virtual
    artifact is made.
    """
    named = pairs(data)
    from frankenmoe.building import is_recipe

    if is_recipe(what):
        from frankenmoe.planning import plan
        from frankenmoe.recipe import Recipe

        warn(plan(Recipe.load(what), trust_remote_code=trust_remote_code).warnings)

    from frankenmoe.fitting import fit

    with bars() as progress:
        result = fit(
            what,
            out,
            data=named,
            method=method,
            tokens=tokens,
            length=block,
            keep_anyway=keep_anyway,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    show(result, as_json=as_json)


@click.command(
    "add-expert",
    epilog="\b\nExample:\n  frankenmoe add-expert out/ larger/ --source ../law-3b --name law --data law.txt",
)
@click.argument("folder", metavar="ARTIFACT", type=click.Path(path_type=Path))
@click.argument("out", metavar="OUT", type=click.Path(path_type=Path))
@click.option("--source", required=True, help="The new parent: a folder or hub id, with @revision and +adapter.")
@click.option("--name", required=True, help="What the expert is called.")
@click.option("--data", multiple=True, required=True, metavar="FILE", help="Text it is good at; again for more.")
@click.option(
    "--method", type=click.Choice(METHODS[2:]), help="Default: the artifact's if it is one of these, or ridge."
)
@text_options
def add_expert_command(
    folder: Path,
    out: Path,
    source: str,
    name: str,
    data: tuple[str, ...],
    method: str | None,
    tokens: int,
    block: int,
    as_json: bool,
    trust_remote_code: bool,
) -> None:
    """One expert more, without the others' text.

    Makes OUT like ARTIFACT, whose fitted routers left their statistics behind: the new text joins them.
    """
    from frankenmoe.fitting import add_expert

    with bars() as progress:
        result = add_expert(
            folder,
            out,
            source=source,
            name=name,
            data=data,
            method=method,
            tokens=tokens,
            length=block,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    show(result, as_json=as_json)


@click.command("extract", epilog="\b\nExample:\n  frankenmoe extract out/ dense/ --expert maths")
@click.argument("folder", metavar="ARTIFACT", type=click.Path(path_type=Path))
@click.argument("out", metavar="OUT", type=click.Path(path_type=Path))
@click.option("--expert", required=True, help="A name, group/name for a nested one, or a number from 0.")
def extract_command(folder: Path, out: Path, expert: str) -> None:
    """Write one expert as a dense checkpoint.

    It is the MoE's backbone with that expert's FFN in every layer; stock transformers loads it.
    """
    from frankenmoe.extracting import extract

    with bars() as progress:
        made = extract(folder, out, expert=expert, progress=progress)
    click.echo(f"dense checkpoint in {made}")


def pairs(data: tuple[str, ...]) -> dict[str, list[str]]:
    """EXPERT=FILE options by expert; RecipeError for one that is not such a pair."""
    found: dict[str, list[str]] = {}
    for each in data:
        name, sign, file = each.partition("=")
        if not sign or not name or not file:
            raise RecipeError(f"--data must be EXPERT=FILE, found {each!r}", hint="for example --data maths=maths.txt")
        found.setdefault(name, []).append(file)
    return found


def show(result: "FitResult", *, as_json: bool) -> None:
    """The losses by expert and what became of the routers."""
    if as_json:
        click.echo(json.dumps(result.to_dict(), indent=2))
        return
    report = result.report
    out = console()
    out.print(f"{report['method']} gates, scale {report['scale']:.3g}; held-out loss, nats per token:", highlight=False)
    out.print(loss_table(report["held_out_loss"]))
    folder = result.artifact.folder
    if result.replaced:
        click.echo(f"routers in {folder}")
        click.echo(f"next: {command('chat', folder)}")
    else:
        click.secho(
            f"the new routers are no better, so {folder} keeps its own (--keep-anyway replaces them)",
            fg="yellow",
            err=True,
        )


def loss_table(losses: Mapping[str, Any]) -> Table:
    """A row per expert's text: before, after, and with that expert forced in every layer."""
    columns = {name: losses[key] for key, name in COLUMNS.items() if losses[key]}
    table = Table(box=None, pad_edge=False)
    table.add_column("text of", overflow="fold")
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for expert in losses["after"]:
        table.add_row(expert, *(f"{values[expert]:.3f}" for values in columns.values()))
    if len(losses["after"]) > 1:
        table.add_row("mean", *(f"{mean(values.values()):.3f}" for values in columns.values()), style="bold")
    return table


COLUMNS = {"before": "before", "after": "fitted", "own_expert": "own expert forced"}
