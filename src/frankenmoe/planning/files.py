"""The files beside the weights that decide what an MoE is, and what they were; parses none but the one it refuses."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from frankenmoe.checkpoint.fingerprint import sha256
from frankenmoe.checkpoint.header import parse_object
from frankenmoe.errors import SourceError
from frankenmoe.planning.sources import Source

GENERATION = "generation_config.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    GENERATION,
)
# what says which numbers the weights are and where they lie
CONFIGS = ("config.json", "model.safetensors.index.json")


def small_files(base: Source) -> tuple[Path, ...]:
    """Tokenizer, chat template and generation settings of the base, which come along unchanged."""
    return tuple(file for name in TOKENIZER_FILES if (file := base.folder / name).is_file())


def deciding_files(base: Source, sources: Iterable[Source]) -> tuple[Path, ...]:
    """Every small file that the plan depends on: all configs, and what comes along from the base."""
    configs = [source.folder / name for source in sources for name in CONFIGS]
    adapters = [source.adapter.folder / "adapter_config.json" for source in sources if source.adapter is not None]
    return tuple(dict.fromkeys((*(file for file in (*configs, *adapters) if file.is_file()), *small_files(base))))


def states(weights: Sequence[Path], small: Sequence[Path]) -> list[tuple[object, ...]]:
    """What every file is at this moment: of weights the size and time of change, of small files the SHA-256."""
    return [*sorted(map(_dated, weights)), *sorted(map(_hashed, small))]


def _dated(file: Path) -> tuple[object, ...]:
    try:
        status = file.stat()
    except OSError as error:  # a file that is gone has changed, too
        return str(file), error.strerror
    return str(file), status.st_size, status.st_mtime_ns


def _hashed(file: Path) -> tuple[object, ...]:
    try:
        return str(file), sha256(file)
    except OSError as error:
        return str(file), error.strerror


def check_small_files(base: Source) -> None:
    """SourceError for a file that should come along and cannot, which would be noticed after hours otherwise, or never:
    one that is no file (a link to a blob that is gone, say), or generation settings that are no JSON object."""
    for file in (base.folder / name for name in TOKENIZER_FILES):
        if os.path.lexists(file) and not file.is_file():
            raise SourceError(
                f"{file} is not a file{', but a link that leads to none' if file.is_symlink() else ''}",
                hint="fetch it again, or remove it if the base does without",
            )
    file = base.folder / GENERATION
    if not file.is_file():
        return
    try:
        parse_object(file.read_bytes())
    except (OSError, ValueError) as error:
        raise SourceError(
            f"{file} cannot be read as a JSON object: {error}",
            hint="fetch the file again, or remove it to generate with the defaults",
        ) from error
