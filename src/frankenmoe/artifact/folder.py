"""The folder of an artifact, unfinished and finished. Does not import torch.

An unfinished artifact `out` is the folder `out.partial` next to it; one rename finishes it. Partial folders,
locks and checks of disk space of every other stage are here too.
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
from numpy.typing import NDArray

from frankenmoe import system
from frankenmoe.artifact.record import RECORD_VERSION, Form, read_record
from frankenmoe.checkpoint.fingerprint import sha256
from frankenmoe.checkpoint.header import header_bytes, read_header
from frankenmoe.checkpoint.jsonfile import check_size
from frankenmoe.checkpoint.links import ADAPTERS, check_links
from frankenmoe.checkpoint.reader import unmap
from frankenmoe.checkpoint.tensors import TensorRef
from frankenmoe.checkpoint.weights import SINGLE
from frankenmoe.checkpoint.writer import free_bytes, partial_of, write_atomic
from frankenmoe.counted import counted
from frankenmoe.errors import ArtifactError, FrankenMoEError

RECORD = "frankenmoe.json"
ROUTERS = "model-routers.safetensors"
STATISTICS = "router-statistics.safetensors"
UNFINISHED = "build.json"
LOCK = "build.lock"
GIB = 2**30

Routers = Mapping[str, tuple[str, tuple[int, ...], NDArray[np.uint8]]]
"""Name -> (safetensors dtype, shape, bytes)."""


@dataclass(frozen=True)
class Artifact:
    """A finished folder. `record` is its frankenmoe.json: recipe, sources, seeds, versions, what each stage did."""

    folder: Path
    record: Mapping[str, Any]

    @property
    def form(self) -> Form:
        return cast(Form, self.record["form"])

    @cached_property
    def routers(self) -> dict[str, TensorRef]:
        """Every gate by name, as references into the routers file."""
        return read_header(self.folder / ROUTERS)


def check_no_stray(folder: Path) -> None:
    """Raises ArtifactError if a whole model.safetensors was put beside the shards of a built artifact."""
    stray = folder / SINGLE
    if stray.exists():
        raise ArtifactError(
            f"{stray} was added after the build, and transformers would load it instead of the shards and the routers",
            hint=f"move it away; or move {RECORD} away and run `frankenmoe adopt`, which takes what transformers loads",
        )


def open_artifact(folder: Path) -> Artifact:
    """Opens a finished artifact. ArtifactError for a folder that is none, is unfinished, or has a later version.

    SourceError for a link out of the folder.
    """
    if not folder.is_dir():
        raise ArtifactError(f"{folder} is not a folder, expected an artifact", hint=_hint_unfinished(folder))
    file = folder / RECORD
    if not file.is_file():
        raise ArtifactError(
            f"{folder} holds no {RECORD}, so it is not an artifact of frankenmoe", hint=_hint_unfinished(folder)
        )
    check_links(folder, parts=ADAPTERS)
    record = read_record(file)
    if not (folder / ROUTERS).is_file():
        raise ArtifactError(f"{folder} has lost its {ROUTERS}", hint="build the artifact again")
    return Artifact(folder, record)


def _hint_unfinished(folder: Path) -> str:
    folder = folder.resolve()
    if partial_folder(folder).is_dir():
        return f"{partial_folder(folder)} is an unfinished build: run the same build command again to finish it"
    return "make one with `frankenmoe build RECIPE OUT`"


def partial_folder(out: Path) -> Path:
    """The folder in which `out` is made."""
    return partial_of(out)


@contextmanager
def growing(out: Path, *, digest: str) -> Iterator[Path]:
    """The locked partial folder of `out`. The caller fills it and gives it to `finish` or `become`.

    A partial folder that a killed run of the same plan (`digest`) left is resumed; one of another plan is rejected.
    After an error, a folder that this run made is removed, unless it has finished shards and the cause was the machine
    (a full disk, for example). Then the same command resumes from them.
    """
    refuse_occupied(out)
    partial = partial_folder(out)
    fresh = [folder for folder in (partial, *partial.parents) if not os.path.lexists(folder)]
    try:
        partial.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        _remove_empty(fresh)
        raise ArtifactError(
            f"{partial} cannot be made: {error.strerror}", hint="choose another output folder"
        ) from error
    with _locked(partial, out):
        try:
            refuse_occupied(out)  # once more: another process may have ended since
            _claim(partial, digest=digest)
            yield partial
        except Exception as error:
            if fresh and not _worth_keeping(partial, error):
                _remove_locked(partial)
                _remove_empty(fresh[1:])
            raise
    if not system.moves_open_files():
        with suppress(OSError):  # another process has just opened it
            _lock_of(partial).unlink(missing_ok=True)


def _locked(partial: Path, out: Path) -> IO[str]:
    """The open lock of a partial folder; ArtifactError if another process has it or the folder is not ours."""
    busy = ArtifactError(f"another process is building {out}, or has just done so", hint="wait for it to end")
    try:
        _refuse_foreign(partial)
        return lock_file(_lock_of(partial), busy=busy)
    except FileNotFoundError:
        raise busy from None
    except OSError as error:
        raise ArtifactError(
            f"{partial} cannot be used: {error.strerror}", hint="choose another output folder"
        ) from error


def _lock_of(partial: Path) -> Path:
    """The lock of a partial folder: in it, or beside it where a folder with an open file cannot be renamed."""
    return partial / LOCK if system.moves_open_files() else partial.with_name(f"{partial.name}.lock")


def lock_file(file: Path, *, busy: ArtifactError) -> IO[str]:
    """Opens and locks `file`; the lock is held until the result is closed. Raises `busy` if another process has it.

    The process that had it before may move or remove the file after we open it and before we lock it. Then it is busy.
    """
    lock = file.open("w", encoding="utf-8")
    try:
        system.lock(lock.fileno())
    except BlockingIOError:
        lock.close()
        raise busy from None
    except OSError:  # a file system without locks: other processes cannot be kept out
        return lock
    if not _still_there(file, lock):
        lock.close()
        raise busy
    return lock


def _still_there(path: Path, opened: IO[str]) -> bool:
    try:
        return os.path.samestat(os.fstat(opened.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _remove_locked(partial: Path) -> None:
    """Removes a partial folder; its claim and its lock go last, so that other processes still see that it is taken."""
    last = {UNFINISHED: 1, LOCK: 2}
    with suppress(OSError):
        for file in sorted(partial.iterdir(), key=lambda file: last.get(file.name, 0)):
            shutil.rmtree(file) if file.is_dir() else file.unlink()
        partial.rmdir()


def _worth_keeping(partial: Path, error: Exception) -> bool:
    """Whether finished shards are sound although the build failed. If so, the error's hint says it.

    Our own errors mean that the recipe, a source or the output is wrong, unless a system error caused them.
    """
    fault = isinstance(error, FrankenMoEError) and not (
        isinstance(error, ArtifactError) and isinstance(error.__cause__, OSError)
    )
    shards = len(list(partial.glob("model-*-of-*.safetensors")))
    if fault or not shards:
        return False
    if isinstance(error, FrankenMoEError):
        error.hint = (
            f"{error.hint}; the same command then continues from {counted(shards, 'finished shard')} in {partial}"
        )
    return True


def _remove_empty(folders: Iterable[Path]) -> None:
    """Removes folders, the innermost first, as far as they are empty."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def refuse_occupied(out: Path) -> None:
    """ArtifactError if `out` exists and is not an empty folder."""
    if os.path.lexists(out) and (not out.is_dir() or any(out.iterdir())):
        raise ArtifactError(
            f"{out} exists and is not empty, expected a new or empty folder",
            hint="choose another folder, or remove that one first",
        )
    if os.path.isdir(out) and os.path.samefile(out, os.curdir):
        raise ArtifactError(
            f"{out} is the folder you are in, expected one that can be replaced when the build is whole",
            hint=f"name a new folder, such as {out / 'moe'}",
        )
    if os.path.ismount(out):
        raise ArtifactError(
            f"{out} is the mount point of a disk, expected a folder that can be replaced by a rename",
            hint=f"choose a folder on that disk, such as {out / 'moe'}",
        )


def _refuse_foreign(partial: Path) -> None:
    """ArtifactError for a folder that has the name of an unfinished build but was not made by one."""
    names = {file.name for file in partial.iterdir()}
    foreign = sorted(names - {LOCK, f"{UNFINISHED}.partial"})
    if foreign and UNFINISHED not in names:
        if not partial.exists():  # the process that had it has just finished
            raise FileNotFoundError(partial)
        raise ArtifactError(
            f"{partial} is needed for the unfinished build, but it contains {foreign[0]} and no {UNFINISHED}",
            hint="choose another output folder, or move that one away",
        )


def _claim(partial: Path, *, digest: str) -> None:
    file, claim = partial / UNFINISHED, json.dumps({"plan": digest}).encode()
    if not file.exists():
        write_atomic(file, claim)
    elif file.read_bytes() != claim:
        raise ArtifactError(
            f"{partial} was begun from another recipe, dtype or shard size, or its sources have changed since",
            hint=f"remove {partial} to start over, or restore the original recipe and sources to finish it",
        )


def finish(partial: Path, out: Path, *, record: Mapping[str, Any]) -> Artifact:
    """Writes the record last, then renames the partial folder to `out`. Only then does it look finished."""
    write_atomic(partial / RECORD, record_bytes(record))
    become(partial, out)
    return open_artifact(out)


def become(partial: Path, out: Path) -> None:
    """Renames a partial folder that `growing` gave to `out`, and removes the files that were about the building."""
    try:
        if out.is_dir():
            out.rmdir()
        if not system.moves_open_files():
            unmap()
        partial.replace(out)
    except OSError as error:
        raise ArtifactError(
            f"{partial} is whole but cannot become {out}: {error.strerror}",
            hint=f"move the files that were added to {out} to another folder",
        ) from error
    # only now: without them a run killed before the rename could not be finished
    clear_building(out)
    system.sync_folder(out.parent)


@contextmanager
def whole_or_absent(folder: Path) -> Iterator[Path]:
    """A new, empty partial folder that replaces `folder` when the block ends. After an error it is removed.

    Takes no lock: this is for folders inside one that is locked already.
    """
    partial = partial_folder(folder)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    except BaseException:  # Ctrl-C too
        shutil.rmtree(partial, ignore_errors=True)
        raise


def check_disk(folder: Path, *, need: int, hint: str, spare: int = 0) -> None:
    """ArtifactError if the disk of `folder`, which need not exist yet, has less than `need` bytes free.

    `spare` are bytes in use now that will be free by then.
    """
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.is_dir())
    free = free_bytes(there) + spare
    if need > free:
        raise ArtifactError(
            f"{folder} has {free / GIB:.2f} GiB free, but {need / GIB:.2f} GiB are still to be written", hint=hint
        )


def clear_building(out: Path) -> None:
    """Removes the files about the building from a finished folder; a kill right after the rename leaves them."""
    for name in (UNFINISHED, LOCK):
        (out / name).unlink(missing_ok=True)


def small_hashes(folder: Path) -> dict[str, str]:
    """Name -> SHA-256 of every file of an artifact that cannot be compared with a source: routers, configs, tokenizer.

    Leaves out the body, the record, and the files about the building. SourceError for a file that is too large.
    """
    skipped, kept = {RECORD, UNFINISHED, LOCK}, {ROUTERS, STATISTICS}
    files = sorted(file for file in folder.iterdir() if file.is_file() and file.name not in skipped)
    small = [file for file in files if file.suffix not in (".safetensors", ".partial")]
    for file in small:
        check_size(file)
    return {file.name: sha256(file) for file in files if file.name in kept or file in small}


def write_routers(folder: Path, routers: Routers) -> None:
    """Writes model-routers.safetensors. The file appears whole or not at all."""
    write_atomic(folder / ROUTERS, routers_bytes(routers))


def routers_bytes(routers: Routers) -> bytes:
    """Gates as the bytes of a safetensors file."""
    entries = [(name, dtype, shape) for name, (dtype, shape, _) in routers.items()]
    head = header_bytes(entries, metadata={"format": "pt"})
    return head + b"".join(raw.tobytes() for _, _, raw in routers.values())


def record_bytes(record: Mapping[str, Any]) -> bytes:
    """A record as the bytes of frankenmoe.json."""
    return _json_bytes({"version": RECORD_VERSION, **record})


def write_json(file: Path, value: Mapping[str, Any]) -> None:
    """Writes an indented JSON file. The file appears whole or not at all."""
    write_atomic(file, _json_bytes(value))


def _json_bytes(value: Mapping[str, Any]) -> bytes:
    try:
        return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError:  # of a path with bytes that are no UTF-8, which Linux allows
        return (json.dumps(value, indent=2) + "\n").encode()
