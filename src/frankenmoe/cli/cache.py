"""`frankenmoe cache`: lists and clears the user's cache."""

from datetime import datetime

import click
from rich.table import Table

from frankenmoe.cache import KINDS, cache_folder, clear, entries
from frankenmoe.cli.options import JSON, example
from frankenmoe.cli.show import console, gib
from frankenmoe.cli.text import json_text, printable
from frankenmoe.counted import counted

KIND = click.argument("kind", required=False, type=click.Choice(KINDS))


@click.group("cache", invoke_without_command=True, epilog=example("frankenmoe cache\nfrankenmoe cache clear routers"))
@JSON
@click.pass_context
def cache_command(context: click.Context, as_json: bool) -> None:
    """List what is kept in the cache, or remove it.

    Kept are routers, backbones, scores, distances of parents, what transformers said and CPU kernels. The cache is in
    $XDG_CACHE_HOME/frankenmoe, by default ~/.cache/frankenmoe. Everything in it can be computed again.
    """
    if context.invoked_subcommand is not None:
        return
    found = [entry for kind in KINDS for entry in entries(kind)]
    if as_json:
        rows = [
            {"kind": each.kind, "name": each.name, "path": str(each.path), "bytes": each.bytes, "used": each.used}
            for each in found
        ]
        click.echo(json_text(rows))
        return
    table = Table(box=None, pad_edge=False)
    table.add_column("kind", no_wrap=True)
    table.add_column("name", overflow="fold")
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("last used", no_wrap=True)
    for each in found:
        used = datetime.fromtimestamp(each.used).strftime("%Y-%m-%d %H:%M")
        table.add_row(each.kind, printable(each.name), gib(each.bytes), used)
    console().print(table)
    click.echo(
        f"{counted(len(found), 'entry', 'entries')}, {gib(sum(each.bytes for each in found))}, in {cache_folder('')}"
    )


@cache_command.command("clear", epilog=example("frankenmoe cache clear"))
@KIND
def clear_command(kind: str | None) -> None:
    """Remove all entries, or those of one kind."""
    freed = sum(clear(each) for each in ((kind,) if kind else KINDS))
    click.echo(f"removed {gib(freed)}")
