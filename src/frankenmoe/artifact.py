"""The folder an MoE lives in: its record, its routers, its index, and the way from unfinished to finished.

Knows nothing of recipes, plans or torch. While it is made, an artifact `out` is the folder `out.partial` beside it; one
rename makes it whole.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from frankenmoe.checkpoint.fingerprint import sha256
from frankenmoe.checkpoint.header import header_bytes, parse_object, read_header
from frankenmoe.checkpoint.tensors import TensorRef
from frankenmoe.checkpoint.writer import write_atomic
from frankenmoe.errors import ArtifactError, FrankenMoEError

RECORD = "frankenmoe.json"
ROUTERS = "model-routers.safetensors"
STATISTICS = "router-statistics.safetensors"
INDEX = "model.safetensors.index.json"
UNFINISHED = "build.json"
LOCK = "build.lock"
STAGED = "replacing"
ORDER = "order.json"
RECORD_VERSION = 1
# what a record must say, and as which kind of value
FIELDS: Mapping[str, type] = {
    "recipe": dict,
    "recipe_folder": str,
    "recipe_folder_from_here": str,
    "dtype": str,
    "base_config": dict,
    "experts": list,
    "shared_experts": list,
    "experts_per_token": int,
    "sources": list,
    "configs": list,
    "files": dict,
}

KINDS: Mapping[type, str] = {dict: "a mapping", list: "a list", str: "a text", int: "a whole number"}

Form = Literal["virtual", "built"]
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


def open_artifact(folder: Path) -> Artifact:
    """Opens a finished artifact; ArtifactError for a folder that is none, is unfinished, or is of a later version."""
    if not folder.is_dir():
        raise ArtifactError(f"{folder} is not a folder, expected an artifact", hint=_hint_unfinished(folder))
    file = folder / RECORD
    if not file.is_file():
        raise ArtifactError(
            f"{folder} holds no {RECORD}, so it is not an artifact of frankenmoe", hint=_hint_unfinished(folder)
        )
    try:
        record = parse_object(file.read_bytes())
    except OSError as error:
        raise ArtifactError(f"{file} cannot be read: {error.strerror}", hint="check its permissions") from error
    except ValueError as error:
        raise ArtifactError(f"{file} is not JSON: {error}", hint="build the artifact again") from error
    if record.get("form") not in ("virtual", "built"):
        raise ArtifactError(f"{file} does not describe an artifact", hint="build the artifact again")
    if record.get("version") != RECORD_VERSION:
        raise ArtifactError(
            f"{file} is of version {record.get('version')}, this frankenmoe reads version {RECORD_VERSION}",
            hint="update frankenmoe, or build the artifact again",
        )
    _check_fields(file, record)
    if not (folder / ROUTERS).is_file():
        raise ArtifactError(f"{folder} has lost its {ROUTERS}", hint="build the artifact again")
    return Artifact(folder, record)


def _check_fields(file: Path, record: Mapping[str, Any]) -> None:
    """ArtifactError for a record that lacks something, as one edited by hand or made by an earlier frankenmoe does."""
    wanted = dict(FIELDS) | ({"format": str} if record["form"] == "built" else {})
    for key, kind in wanted.items():
        value = record.get(key)
        names = value if isinstance(value, list) and key.endswith("experts") else []
        odd = (key == "experts" and not names) or isinstance(value, bool) or (isinstance(value, str) and "\0" in value)
        if odd or not isinstance(value, kind) or not all(isinstance(name, str) for name in names):
            said = f"{key} {record[key]!r:.40}" if key in record else f"no {key}"
            raise ArtifactError(
                f"{file} has {said}, expected {KINDS[kind]}",
                hint="it was edited, or an earlier frankenmoe made it: build the artifact again",
            )
    for key, words in (("sources", ("file", "bytes", "fingerprint", "sha256")), ("configs", ("file", "sha256"))):
        rows = record[key]
        if not all(isinstance(row, dict) and row.keys() >= set(words) and type(row["file"]) is str for row in rows):
            raise ArtifactError(
                f"{file} has {key} that do not each say {', '.join(words)}",
                hint="it was edited: build the artifact again",
            )


def _hint_unfinished(folder: Path) -> str:
    folder = folder.resolve()
    if partial_folder(folder).is_dir():
        return f"{partial_folder(folder)} is an unfinished build: run the same build command again to finish it"
    return "make one with `frankenmoe build RECIPE OUT`"


def partial_folder(out: Path) -> Path:
    """Where `out` grows until it is whole."""
    return out.with_name(f"{out.name}.partial")


@contextmanager
def growing(out: Path, *, digest: str) -> Iterator[Path]:
    """The partial folder of `out`, to be filled and then given to `finish`; nobody else may fill it meanwhile.

    A partial folder left by a killed run of the same plan (`digest`) is handed out as it is, to go on with; one of
    another plan is refused. After an error what *this* run began is removed again, unless it had finished shards and
    the machine was at fault (a full disk, say): then the same command goes on from them.
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
            _claim(partial, out=out, digest=digest)
            yield partial
        except Exception as error:
            if fresh and not _worth_keeping(partial, error):
                _remove_locked(partial)
                _remove_empty(fresh[1:])
            raise


def _locked(partial: Path, out: Path) -> IO[str]:
    """The open lock of a partial folder, nobody else's until it is closed; ArtifactError where it cannot be had.

    Whoever had it before may have moved or removed the folder between our opening and our locking the file.
    """
    busy = ArtifactError(f"another process is building {out}, or has just done so", hint="wait for it to end")
    try:
        _refuse_foreign(partial)
        lock = (partial / LOCK).open("w")
    except FileNotFoundError:
        raise busy from None
    except OSError as error:
        raise ArtifactError(
            f"{partial} cannot be used: {error.strerror}", hint="choose another output folder"
        ) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise busy from None
    except OSError:  # a file system without locks: there nobody can be kept out
        return lock
    if not _still_there(partial / LOCK, lock):
        lock.close()
        raise busy
    return lock


def _still_there(path: Path, opened: IO[str]) -> bool:
    try:
        return os.path.samestat(os.fstat(opened.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _remove_locked(partial: Path) -> None:
    """Removes a partial folder, what shows that it is ours and its lock last: whoever looks meanwhile sees both."""
    last = {UNFINISHED: 1, LOCK: 2}
    with suppress(OSError):
        for file in sorted(partial.iterdir(), key=lambda file: last.get(file.name, 0)):
            shutil.rmtree(file) if file.is_dir() else file.unlink()
        partial.rmdir()


def _worth_keeping(partial: Path, error: Exception) -> bool:
    """Whether finished shards are sound although the build failed; told to the user where that is so.

    An error of ours accuses the recipe, a source or what was written, except where the system's own error is behind it.
    """
    fault = isinstance(error, FrankenMoEError) and not (
        isinstance(error, ArtifactError) and isinstance(error.__cause__, OSError)
    )
    shards = len(list(partial.glob("model-*-of-*.safetensors")))
    if fault or not shards:
        return False
    if isinstance(error, FrankenMoEError):
        error.hint = f"{error.hint}; the same command then goes on from {shards} finished shards in {partial}"
    return True


def _remove_empty(folders: Iterable[Path]) -> None:
    """Removes folders, the innermost first, except where somebody else has put something."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def refuse_occupied(out: Path) -> None:
    """ArtifactError where `out` exists and is not an empty folder."""
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
            f"{out} is where a disk is mounted, expected a folder that can appear whole by a rename",
            hint=f"choose a folder on that disk, such as {out / 'moe'}",
        )


def _refuse_foreign(partial: Path) -> None:
    """ArtifactError for a folder that only happens to have the name of an unfinished build."""
    names = {file.name for file in partial.iterdir()}
    foreign = sorted(names - {LOCK, f"{UNFINISHED}.partial"})
    if foreign and UNFINISHED not in names:
        if not partial.exists():  # whoever had it has finished while we looked
            raise FileNotFoundError(partial)
        raise ArtifactError(
            f"{partial}, where the build is to grow, holds {foreign[0]} and no {UNFINISHED}, so it is not ours",
            hint="choose another output folder, or move that one away",
        )


def _claim(partial: Path, *, out: Path, digest: str) -> None:
    file, claim = partial / UNFINISHED, json.dumps({"plan": digest}).encode()
    if not file.exists():
        write_atomic(file, claim)
    elif file.read_bytes() != claim:
        raise ArtifactError(
            f"{partial} was begun from another recipe, dtype or shard size, or its sources have changed since",
            hint=f"remove {partial} to start over, or bring recipe and sources back to finish it",
        )


def finish(partial: Path, out: Path, *, record: Mapping[str, Any]) -> Artifact:
    """Writes the record last, then renames the partial folder to `out`: from here on it looks finished, and is."""
    write_atomic(partial / RECORD, record_bytes(record))
    try:
        if out.is_dir():
            out.rmdir()
        partial.replace(out)
    except OSError as error:
        raise ArtifactError(
            f"{partial} is whole but cannot become {out}: {error.strerror}",
            hint=f"move away what has been put into {out} meanwhile",
        ) from error
    # only now: without them a run killed before the rename could not be finished
    clear_building(out)
    descriptor = os.open(out.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return open_artifact(out)


def clear_building(out: Path) -> None:
    """Removes from a finished folder what spoke of its building; a kill right after the rename leaves it."""
    for name in (UNFINISHED, LOCK):
        (out / name).unlink(missing_ok=True)


def small_hashes(folder: Path) -> dict[str, str]:
    """Name -> SHA-256 of every file of an artifact that has no source to be compared with: all but the other weights.

    The record is left out, and what is about the building.
    """
    skipped, kept = {RECORD, UNFINISHED, LOCK}, {ROUTERS, STATISTICS}
    files = (file for file in folder.iterdir() if file.is_file() and file.name not in skipped)
    return {
        file.name: sha256(file)
        for file in sorted(files)
        if file.name in kept or file.suffix not in (".safetensors", ".partial")
    }


def write_routers(folder: Path, routers: Routers) -> None:
    """Writes model-routers.safetensors, whole or not at all."""
    write_atomic(folder / ROUTERS, routers_bytes(routers))


def routers_bytes(routers: Routers) -> bytes:
    """Gates as the safetensors file they are kept in."""
    entries = [(name, dtype, shape) for name, (dtype, shape, _) in routers.items()]
    head = header_bytes(entries, metadata={"format": "pt"})
    return head + b"".join(raw.tobytes() for _, _, raw in routers.values())


def replace_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Puts new files in the place of old ones, all or none of them once this has been called again after a kill.

    They are written beside the old ones first and then renamed one after the other, in order.
    """
    finish_replacing(folder)
    staged = folder / STAGED
    growing_stage = folder / f"{STAGED}.partial"
    shutil.rmtree(growing_stage, ignore_errors=True)
    growing_stage.mkdir()
    try:
        for name, data in files.items():
            write_atomic(growing_stage / name, data)
        write_atomic(growing_stage / ORDER, json.dumps(list(files)).encode())
        growing_stage.replace(staged)
    except BaseException:
        shutil.rmtree(growing_stage, ignore_errors=True)
        raise
    finish_replacing(folder)


def finish_replacing(folder: Path) -> None:
    """Goes on with a replacement that a kill cut short; does nothing where there is none."""
    staged = folder / STAGED
    if not staged.is_dir():
        return
    for name in json.loads((staged / ORDER).read_bytes()):
        if (staged / name).exists():
            (staged / name).replace(folder / name)
    shutil.rmtree(staged)


def record_bytes(record: Mapping[str, Any]) -> bytes:
    """A record as the file it is kept in."""
    return _json_bytes({"version": RECORD_VERSION, **record})


def write_json(file: Path, value: Mapping[str, Any]) -> None:
    """A JSON file a person can read, whole or not at all."""
    write_atomic(file, _json_bytes(value))


def _json_bytes(value: Mapping[str, Any]) -> bytes:
    try:
        return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError:  # of a path with bytes that are no UTF-8, which Linux allows
        return (json.dumps(value, indent=2) + "\n").encode()
