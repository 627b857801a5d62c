"""Prints docs/reference.md: the help of every command, as the program itself gives it."""

import click

from frankenmoe.cli.app import app

HEAD = """# Reference

Made by `make reference` from the program's own help; a test holds it to that.
"""


def reference() -> str:
    """The page as one string."""
    parts = [HEAD, _section(app, "frankenmoe")]
    parts += [_section(command, f"frankenmoe {name}") for name, command in sorted(app.commands.items())]
    return "\n".join(parts)


def _section(command: click.Command, name: str) -> str:
    settings = {"info_name": name, "max_content_width": 80, "terminal_width": 80}
    with click.Context(command, **settings) as context:  # type: ignore[arg-type]
        return f"## {name}\n\n```text\n{command.get_help(context)}\n```\n"


if __name__ == "__main__":
    print(reference(), end="")
