"""The `frankenmoe` command: parses, calls the library, prints; the only place that prints or exits."""

from frankenmoe.cli.app import main

__all__ = ["main"]
