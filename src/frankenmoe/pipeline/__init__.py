"""One recipe, every stage that it asks for; knows in which order and when again, not how a stage does its work."""

from frankenmoe.pipeline.run import Done, Finished, run

__all__ = ["Done", "Finished", "run"]
