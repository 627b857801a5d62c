"""The small files beside the weights on which a plan depends, and the state of all its files."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from frankenmoe.checkpoint.fingerprint import sha256
from frankenmoe.checkpoint.header import parse_object
from frankenmoe.checkpoint.jsonfile import check_size
from frankenmoe.checkpoint.weights import INDEX
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
# what prepares pictures and videos
PROCESSOR_FILES = ("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json")
# files that describe the weights
CONFIGS = ("config.json", INDEX)


def small_files(base: Source, *, processor: bool = False) -> tuple[Path, ...]:
    """Tokenizer, chat template and generation settings of the base, which are copied unchanged.

    With `processor`, also the settings for pictures and videos.
    """
    names = TOKENIZER_FILES + (PROCESSOR_FILES if processor else ())
    return tuple(file for name in names if (file := base.folder / name).is_file())


def deciding_files(base: Source, sources: Iterable[Source], *, processor: bool = False) -> tuple[Path, ...]:
    """Every small file that the plan depends on: all configs, and the files copied from the base."""
    configs = [source.folder / name for source in sources for name in CONFIGS]
    adapters = [source.adapter.folder / "adapter_config.json" for source in sources if source.adapter is not None]
    small = small_files(base, processor=processor)
    return tuple(dict.fromkeys((*(file for file in (*configs, *adapters) if file.is_file()), *small)))


def states(weights: Sequence[Path], small: Sequence[Path]) -> list[tuple[object, ...]]:
    """The present state of every file: size and time of change of weights, SHA-256 of small files."""
    return [*sorted(map(_dated, weights)), *sorted(map(_hashed, small))]


def _dated(file: Path) -> tuple[object, ...]:
    try:
        status = file.stat()
    except OSError as error:  # a missing file counts as changed
        return str(file), error.strerror
    return str(file), status.st_size, status.st_mtime_ns


def _hashed(file: Path) -> tuple[object, ...]:
    try:
        return str(file), sha256(file)
    except OSError as error:
        return str(file), error.strerror


def check_small_files(base: Source) -> None:
    """Raises SourceError for a file that cannot be copied, such as a broken link, and for broken generation settings.

    Otherwise the error would come after hours, or never.
    """
    for file in (base.folder / name for name in (*TOKENIZER_FILES, *PROCESSOR_FILES)):
        if os.path.lexists(file) and not file.is_file():
            raise SourceError(
                f"{file} is not a file{', but a link that leads to none' if file.is_symlink() else ''}",
                hint="fetch it again, or remove it if the base does without",
            )
        if file.is_file():
            check_size(file)
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
