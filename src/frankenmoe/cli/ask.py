"""What a person or a pipe says next in a conversation; knows nothing of who answers."""

import sys

import click

from frankenmoe.cli.text import is_unicode


def ask() -> str | None:
    """A line from the person or the pipe; None at its end. Empty lines are asked for again."""
    while True:
        if sys.stdin.isatty():
            click.echo("> ", nl=False, err=True)
        try:
            line = sys.stdin.readline()
        except UnicodeDecodeError:
            line = "\udcff"
        if not is_unicode(line):
            raise click.UsageError("what you write must be UTF-8 text")
        if not line:
            return None
        if line.strip():
            return line.rstrip("\n")
