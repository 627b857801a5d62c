"""The folder of an artifact and its record: how it is made, opened, replaced in part, and reported on."""

from frankenmoe.artifact.folder import Artifact, open_artifact

__all__ = ["Artifact", "open_artifact"]
