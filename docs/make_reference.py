"""Prints docs/reference.md: the help of every command, as the program itself gives it."""

import click

from frankenmoe.cli.app import app

HEAD = """# Reference

Made by `make reference` from the `--help` of every command.
"""


def reference() -> str:
    """The page as one string."""
    with click.Context(app, info_name="frankenmoe", terminal_width=80, **app.context_settings) as root:
        parts = [HEAD, _section(root)]
        for name, command in sorted(app.commands.items()):
            with click.Context(command, info_name=name, parent=root) as context:
                parts.append(_section(context))
    return "\n".join(parts)


def _section(context: click.Context) -> str:
    return f"## {context.command_path}\n\n```text\n{context.command.get_help(context)}\n```\n"


if __name__ == "__main__":
    print(reference(), end="")
