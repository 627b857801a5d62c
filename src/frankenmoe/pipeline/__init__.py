"""Runs every stage that a recipe asks for, in order."""

from frankenmoe.pipeline.run import Done, Finished, run

__all__ = ["Done", "Finished", "run"]
