"""`frankenmoe fit`, `add-expert` and `extract`: their options and output."""

from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

import click
from rich.table import Table

from frankenmoe.cli.options import JSON, REMOTE, example, placed
from frankenmoe.cli.progress import bars
from frankenmoe.cli.settings import by_expert, given, settings_options
from frankenmoe.cli.show import command, console, warn
from frankenmoe.cli.text import cell, json_text
from frankenmoe.recipe.sections import FitSettings
from frankenmoe.subject import open_subject

if TYPE_CHECKING:
    from frankenmoe.gates.run import FitResult

# key in the report -> heading of the table's column
COLUMNS = {"before": "before", "after": "fitted", "own_expert": "own expert forced"}


@click.command(
    "fit",
    epilog=example(
        "frankenmoe fit recipe.yml out-virtual/\nfrankenmoe fit out/ --data maths=maths.txt --data verse=poems.jsonl"
    ),
)
@click.argument("what", metavar="ARTIFACT|RECIPE", type=click.Path(path_type=Path))
@click.argument("out", metavar="[OUT]", required=False, type=click.Path(path_type=Path))
@click.option(
    "--data", metavar="EXPERT=FILE", multiple=True,
    help="An expert's text, as file or hub dataset; default: the recipe's data or prompts (repeatable).",
)  # fmt: skip
@settings_options(FitSettings)
@click.option("--keep-anyway", is_flag=True, help="Replace the routers even if the new ones are worse.")
@placed
@JSON
@REMOTE
def fit_command(
    what: Path,
    out: Path | None,
    data: tuple[str, ...],
    keep_anyway: bool,
    device: str,
    dtype: str | None,
    as_json: bool,
    trust_remote_code: bool,
    **options: Any,
) -> None:
    """Fit routers to the experts' data or prompts.

    No training: the text is read once with its own expert forced and once with closed-form routers; regret also reads
    a third of it with every expert. A search on held-out text finds the scale. An artifact gets the new routers if they
    lower the held-out loss. A recipe becomes a virtual artifact.
    """
    subject = open_subject(what, trust_remote_code=trust_remote_code)
    named = by_expert(data, subject.recipe)
    if subject.artifact is None:
        warn(subject.planned.warnings)

    from frankenmoe.gates.run import fit

    with bars() as progress:
        result = fit(
            subject,
            out,
            data=named,
            keep_anyway=keep_anyway,
            device=device,
            dtype=dtype,
            progress=progress,
            **given(options),
        )
    show(result, as_json=as_json)


@click.command(
    "add-expert", epilog=example("frankenmoe add-expert out/ larger/ --source ../law-3b --name law --data law.txt")
)
@click.argument("folder", metavar="ARTIFACT", type=click.Path(path_type=Path))
@click.argument("out", metavar="OUT", type=click.Path(path_type=Path))
@click.option(
    "--source", required=True, help="The new parent: a folder or hub id, with optional @revision and +adapter."
)
@click.option("--name", required=True, help="Name of the expert.")
@click.option("--data", multiple=True, required=True, metavar="FILE", help="Text of the new expert (repeatable).")
@settings_options(FitSettings)
@placed
@JSON
@REMOTE
def add_expert_command(
    folder: Path,
    out: Path,
    source: str,
    name: str,
    data: tuple[str, ...],
    device: str,
    dtype: str | None,
    as_json: bool,
    trust_remote_code: bool,
    **options: Any,
) -> None:
    """Add an expert without the other experts' text.

    OUT is a copy of ARTIFACT with one more expert. ARTIFACT must have fitted routers: the new text is added to their
    statistics. The method must be a closed form, such as ridge.
    """
    from frankenmoe.gates.run import add_expert

    subject = open_subject(folder, trust_remote_code=trust_remote_code)
    with bars() as progress:
        result = add_expert(
            subject,
            out,
            source=source,
            name=name,
            data=data,
            device=device,
            dtype=dtype,
            progress=progress,
            **given(options),
        )
    show(result, as_json=as_json)


@click.command("extract", epilog=example("frankenmoe extract out/ dense/ --expert maths"))
@click.argument("folder", metavar="ARTIFACT", type=click.Path(path_type=Path))
@click.argument("out", metavar="OUT", type=click.Path(path_type=Path))
@click.option("--expert", required=True, help="Name, group/name if nested, or number from 0.")
@REMOTE
def extract_command(folder: Path, out: Path, expert: str, trust_remote_code: bool) -> None:
    """Write one expert as a dense checkpoint.

    The checkpoint is the MoE's backbone with that expert's FFN in every layer. Stock transformers loads it.
    """
    from frankenmoe.build.extraction import extract

    with bars() as progress:
        made = extract(open_subject(folder, trust_remote_code=trust_remote_code), out, expert=expert, progress=progress)
    click.echo(f"dense checkpoint in {made}")


def show(result: "FitResult", *, as_json: bool) -> None:
    """Prints the losses by expert, and whether the routers were replaced."""
    if as_json:
        click.echo(json_text(result.to_dict()))
        return
    report = result.report
    out = console()
    out.print(f"{report['method']} gates, scale {report['scale']:.3g}; held-out loss, nats per token:", highlight=False)
    out.print(loss_table(report["held_out_loss"]))
    if "cost" in report:
        cost = report["cost"]
        click.echo(f"cost: {cost['forward_passes']:.2f} forward passes over {cost['tokens']:,} tokens of text")
    folder = result.artifact.folder
    if result.replaced:
        click.echo(f"routers in {folder}")
        click.echo(f"next: {command('chat', folder)}")
    else:
        click.secho(
            f"the new routers are not better, so {folder} keeps its own (--keep-anyway replaces them)",
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
        table.add_row(cell(expert), *(f"{values[expert]:.3f}" for values in columns.values()))
    if len(losses["after"]) > 1:
        table.add_row("mean", *(f"{mean(values.values()):.3f}" for values in columns.values()), style="bold")
    return table
