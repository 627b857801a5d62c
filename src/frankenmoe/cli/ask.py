"""What a person or a pipe says next in a conversation; knows nothing of who answers."""

import sys

import click

from frankenmoe.cli.text import is_unicode


def is_terminal() -> bool:
    """Whether a person writes; Python has no stdin where the shell has closed it."""
    return sys.stdin is not None and sys.stdin.isatty()


def ask() -> str | None:
    """A line from the person or the pipe; None at its end. Empty lines are asked for again."""
    while True:
        if is_terminal():
            click.echo("> ", nl=False, err=True)
        try:
            line = sys.stdin.readline() if sys.stdin else ""
        except UnicodeDecodeError:
            line = "\udcff"
        if not is_unicode(line):
            raise click.UsageError("what you write must be UTF-8 text")
        if not line:
            return None
        if line.strip():
            return line.rstrip("\n")
