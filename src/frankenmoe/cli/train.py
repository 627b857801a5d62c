"""`frankenmoe train`: its options and its table of losses."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from frankenmoe.cli.options import JSON, REMOTE, example, placed
from frankenmoe.cli.progress import bars
from frankenmoe.cli.settings import by_expert, given, settings_options
from frankenmoe.cli.text import cell, json_text
from frankenmoe.counted import counted
from frankenmoe.errors import PlanError
from frankenmoe.recipe.settings import settings_with
from frankenmoe.recipe.train import TrainSettings
from frankenmoe.subject import open_subject


@click.command(
    "train",
    epilog=example(
        "frankenmoe train recipe.yml trained/ --data verse=verse.txt\n"
        "frankenmoe train trained/ more/ --what routers,attention,norms --steps 500"
    ),
)
@click.argument("what", metavar="ARTIFACT|RECIPE", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--data", multiple=True, metavar="NAME=FILE", help="Text of an expert (repeatable).")
@settings_options(TrainSettings)
@click.option("--keep-anyway", is_flag=True, help="Write the result even if it is worse.")
@click.option("--shard", is_flag=True, help="Shard weights over the launcher's processes (FSDP2).")
@click.option("--report-to", multiple=True, help="Tracker: wandb or tensorboard (repeatable).")
@placed
@JSON
@REMOTE
def train_command(
    what: Path,
    out: Path,
    data: tuple[str, ...],
    keep_anyway: bool,
    shard: bool,
    report_to: tuple[str, ...],
    device: str,
    dtype: str | None,
    as_json: bool,
    trust_remote_code: bool,
    **options: Any,
) -> None:
    """Train the routers or other parts of an MoE, into OUT.

    Frozen weights stay mapped from their sources. The state with the lowest held-out loss is kept; if no state is
    better than the first, nothing is written. If interrupted or killed, the same command continues to the same losses.
    """
    subject = open_subject(what, trust_remote_code=trust_remote_code)
    named = by_expert(data, subject.recipe, form="NAME=FILE")
    settings = settings_with(subject.recipe.train or TrainSettings(), given(options))
    try:
        from frankenmoe.train.run import train
    except ImportError as error:
        raise PlanError(
            f"training needs the library {error.name}, which is not installed", hint="pip install 'frankenmoe[train]'"
        ) from error

    with bars() as progress:
        found = train(
            subject,
            out,
            data=named or None,
            settings=settings,
            keep_anyway=keep_anyway,
            device=device,
            dtype=dtype,
            report_to=report_to,
            shard=shard,
            progress=progress,
        )
    if as_json:
        click.echo(json_text(found.report))
    else:
        _show(found.report, found.artifact.folder)


def _show(report: Mapping[str, Any], folder: Path) -> None:
    """Prints held-out loss before and after per domain, the largest load, and a command to run next."""
    from rich.table import Table

    from frankenmoe.cli.show import command, console

    losses, means, loads = report["held_out_loss"], report["mean_held_out_loss"], report["largest_load"]
    table = Table(box=None, pad_edge=False)
    table.add_column("held-out loss", no_wrap=True)
    for name in ("before", "kept", "change"):
        table.add_column(name, justify="right")
    kept = "best" if report["improved"] else "after"
    rows = {name: (losses["before"][name], losses[kept][name]) for name in losses["before"]}
    rows["mean"] = (means["before"], means[kept])
    for name, (before, after) in rows.items():
        table.add_row(cell(name), f"{before:.4f}", f"{after:.4f}", f"{after - before:+.4f}")
    table.add_row("largest load of an expert", f"{loads['before']:.0%}", f"{loads[kept]:.0%}", "")
    console().print(table)
    if not report["improved"]:
        click.secho("warning: worse than before training, kept because of --keep-anyway", fg="yellow", err=True)
    elif report["best_step"] != report["steps"]:
        click.echo(f"kept step {report['best_step']} of {report['steps']}; later steps were not better")
    click.echo(f"{counted(report['parameters'], 'trained parameter')}; artifact in {folder}")
    click.echo(f"next: {command('chat', folder)}")
