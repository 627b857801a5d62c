"""Artifact or recipe -> GGUF files.

Imports torch only to make a recipe's routers, to measure importance, or to check files against the source.
"""

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from frankenmoe.artifact.folder import ROUTERS, Artifact, write_json, write_routers
from frankenmoe.artifact.record import BODY_STAGES
from frankenmoe.artifact.reports import ExportReport, about, versions
from frankenmoe.checkpoint.header import read_header
from frankenmoe.errors import ArtifactError
from frankenmoe.export.begun import Begun, reported
from frankenmoe.export.files import GgufFile, check_output, export_files
from frankenmoe.export.ollama import shape_of, write_modelfiles
from frankenmoe.export.tokenizer import vocabulary_of
from frankenmoe.planning.buildable import check_buildable
from frankenmoe.planning.forecast import gguf_parts
from frankenmoe.planning.gguf import layout
from frankenmoe.planning.parts import Parts
from frankenmoe.progress import SILENT, Progress
from frankenmoe.recipe import RANDOM_MODES, Recipe
from frankenmoe.recipe.sections import ExportSettings
from frankenmoe.recipe.settings import settings_with
from frankenmoe.subject import Subject, open_subject

if TYPE_CHECKING:
    from frankenmoe.export.arrow import Compared
    from frankenmoe.export.check import Checked
    from frankenmoe.export.importance import Measured
    from frankenmoe.export.peft import PeftFolder
    from frankenmoe.moe.load import MoE

IMATRIX_LENGTH = 512  # tokens of a calibration block
IMATRIX_BLOCKS = 128
REPORT = "export.json"
SMALL_FILE = 2 * 10**9  # bytes; smaller files are checked by default
CHECK_LENGTH = 128  # tokens of a text
CHECK_BLOCKS = 8
CHECK_POSITIONS = 24  # per text


def export_gguf(
    what: Subject | Recipe | Artifact | str | Path,
    out: str | Path,
    *,
    settings: ExportSettings | None = None,
    threads: int | None = None,
    progress: Progress = SILENT,
    resume: bool = False,
    **changes: Any,
) -> list[GgufFile]:
    """Writes GGUF files of an artifact, or of a recipe after making its routers.

    `changes` are settings by name, such as types=["q4_k_m"]. The default types are a q4 and a q5 that fit the shape.
    Random routers are rejected unless `allow_random`. With `resume`, files that the same call finished before it was
    interrupted, and that have no report yet, are kept. Raises subclasses of FrankenMoEError; see `export_files`.
    """
    subject = open_subject(what)
    settings = settings_with(settings or ExportSettings(), changes)
    with gguf_parts_of(subject, allow_random=settings.allow_random, progress=progress) as parts:
        begun = Begun.of(subject, Path(out), settings) if resume else None
        finished = begun.finished() if begun else frozenset[Path]()
        _, _, paths = check_output(
            parts,
            Path(out),
            types=settings.types,
            pad256=settings.pad256,
            importance=bool(settings.imatrix),
            finished=finished,
        )
        vocabulary = vocabulary_of(parts) if settings.ollama else None
        shape = shape_of(vocabulary) if vocabulary else None
        found = _importance(subject, parts, settings, progress) if settings.imatrix else None
        if begun and set(paths) - finished:
            begun.note(paths)
        files = export_files(
            parts,
            Path(out),
            types=settings.types,
            pad256=settings.pad256,
            importance=found.importance if found else None,
            notes=(
                *count_notes(subject),
                *(starved_notes(parts, found) if found else ()),
                *(shape.notes if shape else ()),
            ),
            finished=finished,
            threads=threads,
            progress=progress,
        )
        if vocabulary is not None:
            write_modelfiles(files, shape, vocabulary, parts)
        return files


def _importance(subject: Subject, parts: Parts, settings: ExportSettings, progress: Progress) -> "Measured":
    from frankenmoe.data.blocks import text_blocks
    from frankenmoe.data.documents import read_documents
    from frankenmoe.export.importance import measure

    moe = subject.load(progress=progress)
    length = min(IMATRIX_LENGTH, int(moe.model.config.max_position_embeddings))
    documents = read_documents(settings.imatrix, folder=Path.cwd())
    blocks = text_blocks(documents, moe.tokenizer(), length=length, limit=IMATRIX_BLOCKS)
    progress.start("measuring importance", len(blocks), "blocks")
    return measure(
        moe, layout(parts, pad256=settings.pad256), [block.ids for block in blocks], on_step=progress.advance
    )


def count_notes(subject: Subject) -> tuple[str, ...]:
    """A sentence if the files have another number of experts per token than the model."""
    used, own = subject.experts_per_token, subject.own_experts_per_token
    return () if used in (None, own) else (f"experts per token: {used} in this file, {own} in the model itself",)


def starved_notes(parts: Parts, found: "Measured") -> tuple[str, ...]:
    """A sentence about experts that got too few tokens of the calibration text."""
    if not found.starved:
        return ()
    names = parts.experts
    shown = ", ".join(f"{names[expert]} in layer {layer} ({tokens})" for layer, expert, tokens in found.starved[:4])
    more = f" and {len(found.starved) - 4} more" if len(found.starved) > 4 else ""
    return (
        f"too few of {found.tokens} calibration tokens reached {shown}{more}; the importance of their columns was "
        "measured with all text forced through them",
    )


def check_files(
    what: Subject | Recipe | Artifact | str | Path,
    files: Sequence[GgufFile],
    *,
    settings: ExportSettings | None = None,
    threads: int | None = None,
    progress: Progress = SILENT,
) -> "list[Checked]":
    """Runs files in llama.cpp and their source in transformers (float32), and compares logits and replies.

    `settings` select the files, by default small ones, and the texts.
    """
    settings = settings or ExportSettings()
    files = [file for file in files if _is_checked(file, settings)]
    if not files:
        return []
    from frankenmoe.export.check import check, reference, steps
    from frankenmoe.export.samples import PROMPTS

    subject = open_subject(what)
    front = vocabulary_of(subject.parts).front
    moe = subject.load(dtype="float32", progress=progress)
    tokenizer = moe.tokenizer()
    passages = _passages(moe, tokenizer, settings)
    progress.start("running the source", len(passages) + len(PROMPTS), "texts")
    source = reference(moe, tokenizer, texts=passages, front=front, positions=CHECK_POSITIONS, on_step=progress.advance)
    found = []
    for file in files:
        total = steps(passages, positions=CHECK_POSITIONS, prompts=len(source.prompts))
        progress.start(f"checking {file.type}", total, "positions")
        found.append(check(file.path, source, threads=threads, on_step=progress.advance))
    return found


def _passages(moe: "MoE", tokenizer: Any, settings: ExportSettings) -> list[Sequence[int]]:
    """The texts to compare on, as ids: those of the settings, else a few short ones."""
    from frankenmoe.data.blocks import text_blocks
    from frankenmoe.data.documents import read_documents
    from frankenmoe.data.rows import Document
    from frankenmoe.export.samples import TEXTS

    length = min(CHECK_LENGTH, int(moe.model.config.max_position_embeddings))
    if settings.texts:
        documents = read_documents(settings.texts, folder=Path.cwd())
        blocks = text_blocks(documents, tokenizer, length=length, limit=CHECK_BLOCKS)
    else:
        alone = [text_blocks([Document(text=text)], tokenizer, length=length, limit=1) for text in TEXTS]
        blocks = [block for found in alone for block in found]
    return [block.ids for block in blocks]


def export_adapters(
    what: Subject | Recipe | Artifact | str | Path,
    out: str | Path,
    *,
    settings: ExportSettings | None = None,
    progress: Progress = SILENT,
) -> "tuple[PeftFolder, list[Compared]]":
    """Writes the adapter experts as PEFT LoRAs, with peft.json: how far PEFT's models of them are from the MoE.

    Compared are the base, each LoRA alone and Arrow, on `texts`; nothing with `check=False`. Raises PlanError for an
    MoE that is more than adapters on one base, ArtifactError if `out` exists.
    """
    from frankenmoe.export import peft

    subject, settings = open_subject(what), settings or ExportSettings()
    if settings.check is not False:
        from frankenmoe.export.arrow import require

        require()
    made = peft.export_peft(subject, Path(out), progress=progress)
    try:
        found = _compared(subject, made, settings, progress) if settings.check is not False else []
    except BaseException:  # Ctrl-C too
        shutil.rmtree(made.folder)
        raise
    report = {**made.to_dict(), **_about(subject), "compared": [each.to_dict() for each in found]}
    write_json(made.folder / peft.REPORT, report)
    return made, found


def _compared(subject: Subject, made: "PeftFolder", settings: ExportSettings, progress: Progress) -> "list[Compared]":
    from frankenmoe.export.arrow import compare
    from frankenmoe.export.check import reference

    moe = subject.load(dtype="float32", progress=progress)
    tokenizer = moe.tokenizer()
    passages = _passages(moe, tokenizer, settings)
    progress.start("running the source", len(passages), "texts")
    source = reference(moe, tokenizer, texts=passages, prompts=(), positions=CHECK_POSITIONS, on_step=progress.advance)
    del moe
    progress.start("comparing with PEFT", len(made.experts) + 2, "models")
    return compare(made, subject.plan, source, on_step=progress.advance)


def _is_checked(file: GgufFile, settings: ExportSettings) -> bool:
    return file.bytes < SMALL_FILE if settings.check is None else settings.check


def token_notes(
    what: Subject | Recipe | Artifact | str | Path, files: Sequence[GgufFile], *, settings: ExportSettings | None = None
) -> list[str]:
    """A sentence if llama.cpp splits some texts otherwise than the source.

    Only for files that are too large to be checked by default. Their vocabulary is small enough for it.
    """
    settings = settings or ExportSettings()
    if settings.check is not None or all(_is_checked(file, settings) for file in files):
        return []
    from frankenmoe.data.hardtext import HARD
    from frankenmoe.export.probe import split_otherwise
    from frankenmoe.export.samples import PROMPTS
    from frankenmoe.moe.dense import load_tokenizer

    parts = open_subject(what).parts
    texts = [text for text in (*PROMPTS, *HARD) if text.strip()]
    odd = split_otherwise(vocabulary_of(parts), load_tokenizer(parts.folder), texts)
    if not odd:
        return []
    count = f"{len(odd)} of {len(texts)} texts"
    return [f"llama.cpp splits {count} into other tokens than the source, such as {odd[0]!r:.60}"]


def write_report(
    files: Sequence[GgufFile],
    checks: "Sequence[Checked]",
    *,
    what: Subject | Recipe | Artifact | str | Path,
    report: Path | None = None,
) -> Path:
    """Writes export.json, by default next to the files: the model, and each file with its comparison to the source.

    Entries of earlier exports are kept if their files are next to the report and of the same model.
    """
    report = report or files[0].path.parent / REPORT
    now = _about(open_subject(what))
    kept: dict[str, Any] = {}
    with suppress(ArtifactError):
        before = ExportReport.read(report)
        if (before.recipe_digest, before.routers_sha256) == (now["recipe_digest"], now.get("routers_sha256")):
            kept = {file.path: file for file in before.files if (report.parent / file.path).is_file()}
    found = {check.path: check.to_dict() for check in checks}
    kept |= {file.path.name: file.to_dict() | {"path": file.path.name, "check": found.get(file.path)} for file in files}
    ExportReport.model_validate({**now, "files": list(kept.values())}).write(report)
    for folder in {file.path.parent for file in files}:
        reported(folder, {file.path.name for file in files if file.path.parent == folder})
    return report


def _about(subject: Subject) -> dict[str, Any]:
    """Identifies the model of a report. The routers of a recipe are not stored, so they have no hash."""
    if subject.artifact is None:
        return {"recipe_digest": subject.recipe.digest, "versions": versions()}
    return about(subject.artifact)


@contextmanager
def gguf_parts_of(subject: Subject, *, allow_random: bool, progress: Progress) -> Iterator[Parts]:
    """The parts of a subject with its gates. The routers of a recipe are stored in a temporary folder."""
    if subject.built:
        _check_set(subject, allow_random=allow_random)
        yield subject.parts
        return
    gguf_parts(subject.planned)  # raises what llama.cpp does not support before routers are made
    if subject.artifact is None:
        check_buildable(subject.planned, virtual=True, allow_identical=True)
    _check_set(subject, allow_random=allow_random or (subject.artifact is None and subject.planned.all_identical))
    if subject.artifact is not None:
        yield subject.parts
        return
    gguf_parts(subject.resolved(progress).plan)  # once more: by now the backbone is known
    with tempfile.TemporaryDirectory() as folder:
        write_routers(Path(folder), subject.routers(progress).routers)
        yield subject.parts.with_gates(read_header(Path(folder) / ROUTERS))


def _check_set(subject: Subject, *, allow_random: bool) -> None:
    """Raises ArtifactError for random gates, which neither the gate mode nor a later stage has set."""
    stages = subject.artifact.record.get("stages") or [] if subject.artifact else []
    stages = [stage for stage in stages if stage.get("stage") not in BODY_STAGES]
    modes = [stage.get("gate_mode") for stage in stages] if subject.artifact else [subject.recipe.gate_mode]
    later = any(stage.get("stage") not in ("build", "routers") for stage in stages)
    random = not later and all(mode in RANDOM_MODES for mode in modes)
    if random and len(subject.recipe.experts) > 1 and not allow_random:
        raise ArtifactError(
            f"the routers of {subject.origin} are random: gate_mode random, and no later fit or training",
            hint="fit them first, or add --allow-random",
        )
