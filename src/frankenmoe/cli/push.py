"""`frankenmoe push`: lists the files, asks for confirmation, uploads."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.table import Table

from frankenmoe.cli.options import REMOTE, example, json_option
from frankenmoe.cli.progress import bars
from frankenmoe.cli.show import console, gib, warn
from frankenmoe.cli.text import cell, json_text
from frankenmoe.subject import open_subject

if TYPE_CHECKING:
    from frankenmoe.publish.upload import Shipment


@click.command("push", epilog=example("frankenmoe push my-moe me/my-moe --dry-run"))
@click.argument("folder", metavar="ARTIFACT", type=click.Path(path_type=Path))
@click.argument("repo", metavar="ORG/NAME")
@click.option("--private", is_flag=True, help="Make a new repository private.")
@click.option("--files", help="Kinds to send: card, weights, gguf, reports, tokenizer (comma-separated).")
@click.option("--message", default="Upload with frankenmoe", show_default=True, help="Commit message.")
@click.option("--dry-run", is_flag=True, help="List the files, send nothing.")
@click.option("--yes", is_flag=True, help="Send without asking.")
@json_option("Print the list as JSON instead of a table.")
@REMOTE
def push_command(
    folder: Path,
    repo: str,
    private: bool,
    files: str | None,
    message: str,
    dry_run: bool,
    yes: bool,
    as_json: bool,
    trust_remote_code: bool,
) -> None:
    """Upload ARTIFACT to the Hugging Face hub as one commit.

    Lists files, sizes and licences, then asks before sending. If interrupted, the same command continues. Log in first
    with `hf auth login`.
    """
    from frankenmoe.publish.upload import prepare, send

    groups = [part.strip() for part in files.split(",") if part.strip()] if files is not None else None
    subject = open_subject(folder, trust_remote_code=trust_remote_code)
    with bars() as progress:
        shipment = prepare(subject, repo, private=private, groups=groups, progress=progress)
    if as_json:
        click.echo(json_text(shipment.to_dict()))
    else:
        _show(shipment)
    warn(shipment.warnings)
    if dry_run:
        return
    if not yes:
        if not sys.stdin.isatty():
            click.echo("nothing was sent: add --yes to send it", err=True)
            return
        click.confirm(f"send this to {repo}?", abort=True, err=True)
    page = send(shipment, message=message, bars=sys.stderr.isatty())
    click.echo(f"sent to {page}", err=as_json)


def _show(shipment: "Shipment") -> None:
    table = Table(box=None, pad_edge=False)
    table.add_column("file", overflow="fold")
    table.add_column("kind")
    table.add_column("size", justify="right", no_wrap=True)
    for item in shipment.items:
        table.add_row(cell(item.path), item.group, gib(item.size))
    table.add_row("total", "", gib(shipment.size), style="bold")
    out = console()
    out.print(table)
    where = "a private repository" if shipment.private else "a public repository"
    click.echo(f"to {shipment.repo}, {where} if it is new; licence: {shipment.declared or 'none'}")
    for source, found in shipment.licences:
        click.echo(f"  {source}: {found or 'no licence declared'}")
