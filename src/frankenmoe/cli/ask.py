"""Reads the user's messages in a conversation from a terminal or a pipe."""

import sys

import click

from frankenmoe.cli.text import is_unicode


def is_terminal() -> bool:
    """Whether stdin is a terminal. Python has no stdin if the shell has closed it."""
    return sys.stdin is not None and sys.stdin.isatty()


def ask() -> str | None:
    """The next line that is not empty; None at the end of input."""
    while True:
        if is_terminal():
            click.echo("> ", nl=False, err=True)
        try:
            line = sys.stdin.readline() if sys.stdin else ""
        except UnicodeDecodeError:
            line = "\udcff"
        if not is_unicode(line):
            raise click.UsageError("input must be UTF-8 text")
        if not line:
            return None
        if line.strip():
            return line.rstrip("\n")
