"""Finds the local folder of a source, and downloads it from the hub if necessary."""

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from frankenmoe.errors import SourceError, first_line

RELATIVE_PATHS = "relative paths in a recipe start at the recipe's folder, those of options at the current folder"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)
_TEXTS = ["*.json", "*.model", "*.txt", "*.jinja", "README.md", "LICENSE*"]
_WEIGHTS = ["*.safetensors"]
_PICKLES = ("*.bin", "*.pt", "*.pth")
# sub-folders that nobody asks for hold other formats of the model; Mistral's `consolidated` files hold the same weights
_DUPLICATES = ["*/*", "consolidated*"]


def resolve(
    name: str, *, revision: str | None, folder: Path, weights: bool = True, subfolders: Sequence[str] = ()
) -> Path:
    """The folder of the source called `name`: a folder (relative to `folder`, `~` allowed), else a model on the hub.

    A hub model is downloaded into the Hugging Face cache; with HF_HUB_OFFLINE=1 it must be there already. Without
    `weights`, only its config, tokenizer and licence are downloaded. Of its sub-folders only `subfolders` are. Raises
    SourceError if it cannot be found.
    """
    path = local_path(name, folder=folder)
    if os.path.isdir(path):
        if revision is not None:
            raise SourceError(
                f"source {name!r} is the folder {path}, which has no revision {revision!r}",
                hint="leave the revision out, or rename the folder if you mean the model on the hub",
            )
        return path
    if os.path.lexists(path):
        raise SourceError(
            f"source {name!r} is {path}, expected a folder", hint="name the folder that the weights are in"
        )
    if not _HUB_ID.fullmatch(name):
        raise SourceError(
            f"source {name!r} is neither a folder, looked for at {path}, nor a hub id like org/name",
            hint=backslash_hint(name, folder=folder) or RELATIVE_PATHS,
        )
    snapshot = _download(name, revision=revision, weights=weights, subfolders=subfolders)
    if weights:
        _require_weights(name, snapshot, subfolders)
    return snapshot


def hub_cache() -> Path:
    """The folder of the Hugging Face cache."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def backslash_hint(name: str, *, folder: Path) -> str | None:
    """What to write in place of a path with backslashes, as Windows has them; None for any other path."""
    slashes = name.replace("\\", "/")
    if slashes != name:
        there = ", which is there" if os.path.exists(local_path(slashes, folder=folder)) else ""
        return f"write the path with forward slashes instead of backslashes: {slashes}{there}"
    if any(letter < " " for letter in name):
        return (
            "between double quotes a backslash begins an escape; write the path with forward slashes, or between "
            "single quotes"
        )
    return None


def is_folder(name: str, *, folder: Path) -> bool:
    """Whether `resolve` takes a name for a local folder, and not for a model on the hub."""
    return os.path.isdir(local_path(name, folder=folder))


def local_path(name: str, *, folder: Path) -> Path:
    """The absolute path that a user's text means: `~` expanded, a relative path joined to `folder`."""
    return Path(os.path.abspath(folder / os.path.expanduser(name)))


def _download(name: str, *, revision: str | None, weights: bool, subfolders: Sequence[str]) -> Path:
    # imported here because it takes longer than planning local folders
    from huggingface_hub import snapshot_download

    # without the weights, their index would name missing files
    ignored = _DUPLICATES if weights else [*_DUPLICATES, "*.safetensors.index.json"]
    allowed = _TEXTS + _WEIGHTS if weights else _TEXTS
    try:
        found = Path(snapshot_download(name, revision=revision, allow_patterns=allowed, ignore_patterns=ignored))
        if subfolders:  # of the same commit, whose name the folder has
            snapshot_download(name, revision=found.name, allow_patterns=[f"{each}/*" for each in subfolders])
        return found
    except Exception as error:  # the HTTP libraries below the client have errors of their own
        raise _explained(error, name=name, revision=revision) from error


def _require_weights(name: str, snapshot: Path, subfolders: Sequence[str]) -> None:
    """Raises SourceError if there are no weights. Cached pickles pass: `open_checkpoint` rejects them by name."""
    folders = (snapshot, *(snapshot / each for each in subfolders))
    if not any(any(folder.glob(pattern)) for folder in folders for pattern in (*_WEIGHTS, *_PICKLES)):
        raise SourceError(
            f"source {name!r} has no safetensors weights in {snapshot}",
            hint="if the hub has it pickled only (*.bin), load it with transformers, save it with "
            "save_pretrained(folder, safe_serialization=True) and name that folder; if offline, download it first",
        )


def _explained(error: Exception, *, name: str, revision: str | None) -> SourceError:
    from huggingface_hub import constants, errors

    which = f"source {name!r}" + (f" at revision {revision!r}" if revision else "")
    match error:
        case errors.GatedRepoError():
            reason, hint = "is gated on the hub", "accept its terms on its page, then log in with `hf auth login`"
        case errors.RevisionNotFoundError():
            reason, hint = "does not exist on the hub", "look up its branches, tags and commits on its page"
        case errors.RepositoryNotFoundError():
            reason, hint = "does not exist on the hub", "check the spelling; if it is private, `hf auth login` first"
        case errors.HFValidationError():
            reason, hint = "is no valid hub id", "check the spelling; a folder must exist to be taken for one"
        case errors.LocalEntryNotFoundError() if constants.HF_HUB_OFFLINE:
            reason, hint = "is not complete in the cache", "unset HF_HUB_OFFLINE to download it, or name a local folder"
        case errors.LocalEntryNotFoundError():
            reason, hint = "cannot be downloaded and is not in the cache", "check the network, or name a local folder"
        case _:
            reason, hint = f"cannot be downloaded: {first_line(error)}", "check the network and the free disk space"
    return SourceError(f"{which} {reason}", hint=hint)


def stream_rows(name: str, *, revision: str | None, config: str | None, split: str) -> Iterator[dict[str, Any]]:
    """The rows of a hub dataset, streamed. Raises SourceError if they cannot be read.

    Needs the library `datasets`. With HF_HUB_OFFLINE=1 only cached datasets are found.
    """
    datasets = _datasets(f"dataset {name!r} is on the hub")
    which = f"dataset {name!r}" + (f" at revision {revision!r}" if revision else "") + f", split {split!r}"
    try:
        yield from datasets.load_dataset(name, config, split=split, revision=revision, streaming=True)
    except GeneratorExit:
        raise
    except Exception as error:  # of the hub's client, of fsspec, of pyarrow
        raise SourceError(
            f"{which} cannot be read: {first_line(error)}",
            hint="check the spelling and the network, and write org/name:config:split where it has several",
        ) from error


def parquet_rows(file: Path) -> Iterator[dict[str, Any]]:
    """The rows of a local parquet file, streamed. Raises SourceError if they cannot be read. Needs `datasets`."""
    datasets = _datasets(f"{file} is a parquet file")
    try:
        yield from datasets.load_dataset("parquet", data_files=str(file), split="train", streaming=True)
    except GeneratorExit:
        raise
    except Exception as error:  # of pyarrow
        raise SourceError(
            f"{file} cannot be read as parquet: {first_line(error)}", hint="fetch the file again"
        ) from error


def _datasets(what: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise SourceError(
            f"{what}, and reading it needs the library `datasets`, which is not installed",
            hint="pip install 'frankenmoe[train]'",
        ) from None
    return datasets


def is_hub_id(name: str) -> bool:
    """Whether `name` has the form org/name; does not check that the model exists."""
    return _HUB_ID.fullmatch(name) is not None
