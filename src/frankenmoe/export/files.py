"""Parts -> GGUF files of the requested types."""

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from frankenmoe import system
from frankenmoe.artifact.folder import check_disk
from frankenmoe.checkpoint.quantize import require
from frankenmoe.checkpoint.writer import partial_of
from frankenmoe.errors import ArtifactError, PlanError
from frankenmoe.export.head import head_bytes
from frankenmoe.export.tokenizer import vocabulary_of
from frankenmoe.export.write import Importance, Target, write_files
from frankenmoe.families.llamacpp import FILE_TYPES, FileType
from frankenmoe.planning.gguf import GgufLayout, layout, suggestion
from frankenmoe.planning.parts import Parts
from frankenmoe.progress import SILENT, Progress
from frankenmoe.suggest import did_you_mean


@dataclass(frozen=True)
class GgufFile:
    """A written file. `holds` is the number of weights per type, `notes` are sentences for the user."""

    path: Path
    type: str
    bytes: int
    bits_per_weight: float
    holds: Mapping[str, int]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"path": str(self.path)}


def file_types(names: Sequence[str]) -> tuple[FileType, ...]:
    """The types of a list such as ["q4_0", "q5_k_m"]. Raises PlanError for an unknown one, with a suggestion."""
    for name in names:
        if name.lower() not in FILE_TYPES:
            raise PlanError(
                f"{name!r} is not a GGUF file type, expected one of {', '.join(FILE_TYPES)}",
                hint=did_you_mean(name.lower(), list(FILE_TYPES)),
            )
    return tuple(FILE_TYPES[name] for name in dict.fromkeys(name.lower() for name in names))


def default_types(found: GgufLayout) -> tuple[FileType, ...]:
    """A q4 and a q5: K-quants if this model's shape allows them, otherwise the plain types."""
    wanted = ("q4_k_m", "q5_k_m") if found.survives(FILE_TYPES["q4_k_m"]) else ("q4_0", "q5_0")
    return tuple(FILE_TYPES[name] for name in wanted)


def export_files(
    model: Parts,
    out: Path,
    *,
    types: Sequence[str] = (),
    pad256: bool = False,
    importance: Importance | None = None,
    notes: Sequence[str] = (),
    finished: Collection[Path] = (),
    threads: int | None = None,
    progress: Progress = SILENT,
) -> list[GgufFile]:
    """Writes a file per type, all in one pass over the weights, each whole or not at all.

    `out` is a folder, which is made if needed, or a name that ends in .gguf for a single type. The default of `types`
    is a q4 and a q5 that suit the model's shape. `notes` are added to those of every file. `finished` files are
    described, but not written again.

    Raises PlanError (a type or an MoE that llama.cpp does not support), SourceError (tokenizer, broken weights),
    NumericsError, ArtifactError (the file exists, the disk is too small).
    """
    found, kinds, paths = check_output(
        model, out, types=types, pad256=pad256, importance=importance is not None, finished=finished
    )
    held = {kind.name: found.types(kind, imatrix=importance is not None) for kind in kinds}
    vocabulary = vocabulary_of(model)
    targets = [
        Target(
            path=path,
            head=head_bytes(model, found, vocabulary, kind, held[kind.name]),
            types=held[kind.name],
            tensor_bytes=found.tensor_bytes(kind, imatrix=importance is not None),
        )
        for kind, path in zip(kinds, paths, strict=True)
    ]
    for target in targets:
        if target.path in finished and target.path.stat().st_size != target.size:
            raise _taken(target.path)
    wanted = [target for target in targets if target.path not in finished]
    _check_disk(paths, sum(target.size for target in wanted))
    paths[0].parent.mkdir(parents=True, exist_ok=True)
    if wanted:
        names = ", ".join(kind.name for kind, path in zip(kinds, paths, strict=True) if path not in finished)
        progress.start(f"writing {names}", sum(target.tensor_bytes for target in wanted), "B")
        write_files(
            wanted,
            found.tensors,
            threads=threads or system.cores(),
            importance=importance,
            on_bytes=progress.advance,
        )
    notes = (*notes, *vocabulary.notes)
    return [_describe(found, kind, target, notes) for kind, target in zip(kinds, targets, strict=True)]


def check_output(
    model: Parts,
    out: Path,
    *,
    types: Sequence[str],
    pad256: bool,
    importance: bool,
    spare: int = 0,
    finished: Collection[Path] = (),
) -> tuple[GgufLayout, tuple[FileType, ...], list[Path]]:
    """(layout, types, paths) of an export. Raises the errors of an export before any slow work.

    `spare` are bytes that are in use now and will be free by then. Of the paths, only `finished` ones may exist.
    """
    found = layout(model, pad256=pad256)
    kinds = file_types(types) or default_types(found)
    paths = _paths(model, out, kinds)
    taken = next((path for path in paths if os.path.lexists(path) and path not in finished), None)
    if taken is not None:
        raise _taken(taken)
    for name in sorted({name for kind in kinds for name in found.types(kind, imatrix=importance).values()}):
        require(name, importance=importance)
    _check_disk(paths, sum(found.tensor_bytes(kind, imatrix=importance) for kind in kinds), spare=spare)
    return found, kinds, paths


def _describe(found: GgufLayout, kind: FileType, target: Target, notes: Sequence[str]) -> GgufFile:
    advice = suggestion(found, kind)
    return GgufFile(
        path=target.path,
        type=kind.name,
        bytes=target.size,
        bits_per_weight=target.size * 8 / found.weights,
        holds=found.weights_by_type(target.types),
        notes=(*found.notes, *notes, *([advice] if advice else [])),
    )


def _taken(path: Path) -> ArtifactError:
    return ArtifactError(f"{path} exists already", hint="choose another folder, or remove that file first")


def is_file_name(out: Path) -> bool:
    """Whether the `out` of an export is the name of its only file, and not a folder."""
    return out.suffix == ".gguf" and not out.is_dir()


def _paths(model: Parts, out: Path, kinds: Sequence[FileType]) -> list[Path]:
    """The paths of the files. Raises ArtifactError if their folder is a file."""
    if is_file_name(out):
        if len(kinds) > 1:
            raise ArtifactError(
                f"{out} is one file, but {len(kinds)} types were asked for",
                hint="give a folder, or a single type with --types",
            )
        paths = [out]
    else:
        stem = system.file_name(model.name, default="moe")
        paths = [out / f"{stem}-{kind.name.upper()}.gguf" for kind in kinds]
    if os.path.lexists(paths[0].parent) and not paths[0].parent.is_dir():
        raise ArtifactError(f"{paths[0].parent} is not a folder", hint="choose another folder")
    return paths


def _check_disk(paths: Sequence[Path], need: int, *, spare: int = 0) -> None:
    leftover = sum(map(system.disk_bytes, map(partial_of, paths)))  # of a killed export, which is overwritten
    hint = "choose a folder on another disk, or fewer or smaller types"
    check_disk(paths[0].parent, need=need, hint=hint, spare=spare + leftover)
