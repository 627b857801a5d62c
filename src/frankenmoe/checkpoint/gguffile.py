"""Opens GGUF files with the gguf package: their metadata, and their tensors mapped from the file."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from frankenmoe.checkpoint.quantize import INSTALL
from frankenmoe.counted import counted
from frankenmoe.errors import ArtifactError

VALUES = "frankenmoe.cache_type_v"  # metadata: the type in which llama.cpp should keep values, if not float16
AGAIN = "export or fetch it again"


def open_gguf(file: Path) -> Any:
    """gguf's reader of a whole file. Raises ArtifactError if it is not GGUF or is truncated."""
    try:
        import gguf
    except ImportError as error:
        raise ArtifactError("reading a GGUF file needs the gguf package", hint=INSTALL) from error
    if not file.is_file():
        raise ArtifactError(f"{file} is not a file", hint="make one with `frankenmoe export`")
    with whole(file):
        reader = gguf.GGUFReader(file)
        size = max((int(t.data_offset) + int(t.n_bytes) for t in reader.tensors), default=0)
    if size > file.stat().st_size:
        raise ArtifactError(f"{file} is truncated: {counted(size - file.stat().st_size, 'byte')} missing", hint=AGAIN)
    return reader


def facts_of(reader: Any) -> dict[str, Any]:
    """Its metadata, without the tokenizer's."""
    return {name: reader.fields[name].contents() for name in reader.fields if not name.startswith("tokenizer.")}


@contextmanager
def whole(file: Path) -> Iterator[None]:
    """Turns every error of gguf's reader into an ArtifactError: it does not validate its input."""
    try:
        yield
    except Exception as error:  # of many classes
        raise ArtifactError(f"{file} is not a whole GGUF file: {error}", hint=AGAIN) from error
