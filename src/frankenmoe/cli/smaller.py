"""`frankenmoe remove-expert` and `prune`: their options and output."""

from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import click
from rich.table import Table

from frankenmoe.cli.options import COUNT, JSON, REMOTE, Decorator, example, placed
from frankenmoe.cli.progress import bars
from frankenmoe.cli.settings import by_expert, given, settings_options
from frankenmoe.cli.show import command, console
from frankenmoe.cli.text import cell, json_text, printable
from frankenmoe.data.given import pairs
from frankenmoe.recipe.sections import PruneSettings
from frankenmoe.subject import open_subject

if TYPE_CHECKING:
    from frankenmoe.smaller.run import Smaller


def _gates(take: Any) -> Any:
    """Adds the options that decide what becomes of the routers."""
    options: tuple[Decorator, ...] = (
        click.option(
            "--keep-gates", is_flag=True, help="Keep the other experts' rows of the routers as they are; reads no text."
        ),
        click.option(
            "--method", metavar="METHOD",
            help="Refit the routers by centroid, lda or ridge; default: the method of the fit if it is one of these.",
        ),
    )  # fmt: skip
    for option in options:
        take = option(take)
    return take


@click.command(
    "remove-expert",
    epilog=example("frankenmoe remove-expert out/ smaller/ law\nfrankenmoe remove-expert out/ smaller/ 2 5"),
)
@click.argument("folder", metavar="ARTIFACT", type=click.Path(path_type=Path))
@click.argument("out", metavar="OUT", type=click.Path(path_type=Path))
@click.argument("experts", metavar="EXPERT...", nargs=-1, required=True)
@_gates
@click.option(
    "--data", metavar="EXPERT=FILE", multiple=True,
    help="Where the text of an expert that goes is now; default: where the fit found it (repeatable).",
)  # fmt: skip
@placed
@JSON
@REMOTE
def remove_expert_command(
    folder: Path,
    out: Path,
    experts: tuple[str, ...],
    method: str | None,
    keep_gates: bool,
    data: tuple[str, ...],
    device: str,
    dtype: str | None,
    as_json: bool,
    trust_remote_code: bool,
) -> None:
    """Take experts out of an MoE.

    OUT is a copy of ARTIFACT without the experts EXPERT, given by name or by number from 0. Routers that were fitted in
    closed form are fitted again without their text, which is read once more; the other experts' text is not needed. All
    other routers keep the rows of the experts that stay.
    """
    subject = open_subject(folder, trust_remote_code=trust_remote_code)
    named = by_expert(data, subject.recipe)

    from frankenmoe.smaller.run import remove_expert

    with bars() as progress:
        result = remove_expert(
            subject,
            out,
            experts=experts,
            method=method,
            keep_gates=keep_gates,
            data=named,
            device=device,
            dtype=dtype,
            progress=progress,
        )
    show(result, as_json=as_json)


@click.command(
    "prune",
    epilog=example(
        "frankenmoe prune out/ --experts 4\nfrankenmoe prune out/ smaller/ --experts 4 --data maths=maths.txt"
    ),
)
@click.argument("folder", metavar="ARTIFACT", type=click.Path(path_type=Path))
@click.argument("out", metavar="[OUT]", required=False, type=click.Path(path_type=Path))
@click.option("--experts", type=COUNT, required=True, help="Number of experts that stay.")
@click.option(
    "--data", metavar="EXPERT=FILE", multiple=True,
    help="Text to rank and measure on, as file or hub dataset; default: the recipe's data or prompts (repeatable).",
)  # fmt: skip
@settings_options(PruneSettings)
@click.option("--per-layer", is_flag=True, help="Let every layer keep its own experts; OUT is a standard checkpoint.")
@_gates
@click.option("--keep-anyway", is_flag=True, help="Write OUT however much the loss rises.")
@placed
@JSON
@REMOTE
def prune_command(
    folder: Path,
    out: Path | None,
    experts: int,
    data: tuple[str, ...],
    per_layer: bool,
    method: str | None,
    keep_gates: bool,
    keep_anyway: bool,
    device: str,
    dtype: str | None,
    as_json: bool,
    trust_remote_code: bool,
    **options: Any,
) -> None:
    """Take out the experts that matter least.

    Ranks the experts on text: those without a token go first, then copies of others, then those whose outputs, weighted
    by the router, have the smallest norm (REAP). Prints the ranking and the held-out loss before and after. OUT is a
    copy of ARTIFACT with the experts that stay; without OUT nothing is written. Text given without EXPERT= has no
    label.
    """
    subject = open_subject(folder, trust_remote_code=trust_remote_code)
    names = [expert.name for expert in subject.recipe.experts]
    labelled = pairs(data, flag="--data", names=names, unlabelled=True, folder=Path.cwd())

    from frankenmoe.smaller.run import prune

    with bars() as progress:
        result = prune(
            subject,
            out,
            experts=experts,
            data=labelled,
            per_layer=per_layer,
            method=method,
            keep_gates=keep_gates,
            keep_anyway=keep_anyway,
            device=device,
            dtype=dtype,
            progress=progress,
            **given(options),
        )
    show(result, as_json=as_json)


def show(result: "Smaller", *, as_json: bool) -> None:
    """Prints what went and what stays, and a command to run next."""
    report = result.report
    if as_json:
        click.echo(json_text(result.to_dict()))
        return
    out = console()
    if "ranking" in report:
        out.print(_ranking(report))
        out.print(_losses(report))
    used, before = report["experts_per_token"], report["experts_per_token_before"]
    if report["removed"]:
        click.echo(printable(f"removed: {', '.join(report['removed'])}"))
    click.echo(printable(f"stay: {', '.join(report['experts'])}"))
    fitted = f"{report['gates']}, without the text of what went, at the earlier scale"
    kept = "rows kept" if report["gates"] == "kept" else fitted
    click.echo(f"routers: {kept}")
    if used != before:
        click.secho(f"a token uses {used} of the experts now, not {before}: there are no more", fg="yellow", err=True)
    if result.artifact is None:
        click.echo("nothing was written: name a folder OUT to write it")
        return
    click.echo(f"{result.artifact.form} artifact in {result.artifact.folder}")
    click.echo(f"next: {command('chat', result.artifact.folder)}")


def _ranking(report: Mapping[str, Any]) -> Table:
    """A row per expert, the first to go first."""
    table = Table(box=None, pad_edge=False)
    table.add_column("expert", overflow="fold")
    for name in ("share of output", "load"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", overflow="fold")
    for row in report["ranking"]:
        some = f"goes in {row['goes']} of {len(report['by_layer'])} layers" if report["by_layer"] else "goes"
        facts = [
            some if row["goes"] else "",
            "no token" if not row["load"] else "",
            f"equals {row['copy_of']}" if row["copy_of"] else "",
        ]
        words = cell(", ".join(filter(None, facts)))
        table.add_row(cell(row["expert"]), f"{row['saliency']:.1%}", f"{row['load']:.1%}", words)
    return table


def _losses(report: Mapping[str, Any]) -> Table:
    """Held-out loss by domain, before and after."""
    before, after = report["held_out_loss"]["before"], report["held_out_loss"]["after"]
    table = Table(box=None, pad_edge=False)
    table.add_column("held-out loss of", overflow="fold")
    for name in ("before", "after"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in after:
        table.add_row(cell(name), f"{before[name]:.4f}", f"{after[name]:.4f}")
    if len(after) > 1:
        table.add_row("mean", *(f"{fmean(row.values()):.4f}" for row in (before, after)), style="bold")
    return table
