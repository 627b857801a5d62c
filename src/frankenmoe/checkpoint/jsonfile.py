"""Reads the small JSON files beside weights: configs and indexes."""

from pathlib import Path
from typing import Any

from frankenmoe.checkpoint.header import parse_object
from frankenmoe.errors import SourceError


def read_object(file: Path, *, hint: str) -> dict[str, Any]:
    """The JSON object in a file. Raises SourceError if it is missing, no file or no object."""
    if file.exists() and not file.is_file():  # reading a pipe would never return
        raise SourceError(f"{file} is not a file", hint=hint)
    try:
        return parse_object(file.read_bytes())
    except FileNotFoundError:
        raise SourceError(f"{file.parent} has no {file.name}", hint=hint) from None
    except OSError as error:
        raise SourceError(f"{file} cannot be read: {error.strerror}", hint="check its permissions") from error
    except ValueError as error:
        raise SourceError(f"{file} is not a JSON object: {error}", hint=hint) from error
