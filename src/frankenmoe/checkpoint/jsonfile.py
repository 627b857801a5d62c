"""Reads the small files beside weights, such as configs, indexes and tokenizers; none is larger than a limit."""

import stat
from pathlib import Path
from typing import Any

from frankenmoe.checkpoint.header import parse_object
from frankenmoe.errors import SourceError

MOST = 2**28  # bytes; the largest vocabularies and indexes have a tenth of it


def check_size(file: Path) -> None:
    """Raises SourceError for what is no file, or too large to be a config or a tokenizer; OSError if it is absent."""
    status = file.stat()
    if not stat.S_ISREG(status.st_mode):  # reading a pipe would never return
        raise SourceError(f"{file} is not a file", hint="fetch the file again, or remove it")
    size = status.st_size
    if size > MOST:
        raise SourceError(
            f"{file} has {size:,} bytes, expected at most {MOST:,}", hint="fetch the file again, or remove it"
        )


def small_bytes(file: Path) -> bytes:
    """The content of a small file. Raises SourceError for what `check_size` refuses; OSError if it cannot be read."""
    check_size(file)
    return file.read_bytes()


def read_object(file: Path, *, hint: str) -> dict[str, Any]:
    """The JSON object in a file. Raises SourceError if it is missing, no file or no object."""
    try:
        return parse_object(small_bytes(file))
    except FileNotFoundError:
        raise SourceError(f"{file.parent} has no {file.name}", hint=hint) from None
    except OSError as error:
        raise SourceError(f"{file} cannot be read: {error.strerror}", hint="check its permissions") from error
    except ValueError as error:
        raise SourceError(f"{file} is not a JSON object: {error}", hint=hint) from error
