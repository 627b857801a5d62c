"""`frankenmoe heal`: its options and its table of losses."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from frankenmoe.cli.options import JSON, REMOTE, example, placed
from frankenmoe.cli.progress import bars
from frankenmoe.cli.settings import by_expert, given, settings_options
from frankenmoe.cli.show import command, console, warn
from frankenmoe.cli.text import cell, json_text, printable
from frankenmoe.counted import counted
from frankenmoe.recipe.sections import HealSettings
from frankenmoe.subject import open_subject

if TYPE_CHECKING:
    from frankenmoe.artifact.healing import HealReport


@click.command(
    "heal",
    epilog=example("frankenmoe heal recipe.yml healed/\nfrankenmoe heal out/ healed/ --data maths=maths.txt --rank 64"),
)
@click.argument("what", metavar="ARTIFACT|RECIPE", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--data", metavar="EXPERT=FILE", multiple=True,
    help="An expert's text, as file or hub dataset; default: the recipe's data (repeatable).",
)  # fmt: skip
@settings_options(HealSettings)
@placed
@JSON
@REMOTE
def heal_command(
    what: Path,
    out: Path,
    data: tuple[str, ...],
    device: str,
    dtype: str | None,
    as_json: bool,
    trust_remote_code: bool,
    **options: Any,
) -> None:
    """Refit experts to the MoE's backbone.

    OUT becomes a virtual artifact. An expert was trained with its parent's attention and embeddings, but the MoE has
    one backbone for all. Each layer's down projection is solved in closed form, so that on the expert's text the MoE's
    states follow the parent's. No training. An expert is changed only if its loss on held-out text falls by more than
    one standard error. If interrupted or killed, the same command continues.
    """
    subject = open_subject(what, trust_remote_code=trust_remote_code)
    named = by_expert(data, subject.recipe)
    if subject.artifact is None:
        warn(subject.planned.warnings)

    from frankenmoe.backbone.run import heal

    with bars() as progress:
        found = heal(subject, out, data=named, device=device, dtype=dtype, progress=progress, **given(options))
    if as_json:
        click.echo(json_text(found.to_dict()))
    else:
        _show(found.report, found.artifact.folder)


def _show(report: "HealReport", folder: Path) -> None:
    """Prints the losses by expert, what was not healed and why, and a command to run next."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("held-out loss of", overflow="fold")
    for name in ("parent", "before", "healed", "+-", "kept"):
        table.add_column(name, justify="right", no_wrap=True)
    for expert in report.tried:
        losses = (expert.parent, expert.before, expert.after, expert.noise)
        table.add_row(
            cell(expert.name), *(f"{loss:.4f}" for loss in losses), f"{expert.step:.0%}" if expert.kept else "no"
        )
    if len(report.tried) > 1:
        table.add_row("mean", *(f"{loss:.4f}" for loss in report.means.values()), "", "", style="bold")
    console().print(table)
    for expert in report.experts:
        if expert.reason:
            click.echo(f"{printable(expert.name)} was not healed: {printable(expert.reason)}", err=True)
    if not report.kept:
        click.secho(
            "no expert's held-out loss fell by more than one standard error, so none was changed", fg="yellow", err=True
        )
    click.echo(f"{counted(len(report.kept), 'expert')} changed, {report.bytes / 2**20:,.1f} MiB; artifact in {folder}")
    click.echo(f"next: {command('chat', folder)}")
