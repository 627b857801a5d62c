"""Artifact or recipe -> GGUF files; the library's and the CLI's way to export.

Does not import torch unless a recipe's routers must first be made, or importance or a check needs the model to run.
"""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from frankenmoe.artifact import ROUTERS, Artifact, open_artifact, write_json, write_routers
from frankenmoe.building import check_buildable, is_recipe, load_recipe, make_routers
from frankenmoe.checkpoint.fingerprint import sha256
from frankenmoe.checkpoint.header import parse_object, read_header
from frankenmoe.errors import ArtifactError
from frankenmoe.export.run import GgufFile, check_output, export_files
from frankenmoe.export.subject import of_artifact, of_plan, routers_were_set
from frankenmoe.planning import plan
from frankenmoe.planning.forecast import subject_of_plan
from frankenmoe.planning.gguf import Subject, layout
from frankenmoe.progress import SILENT, Progress
from frankenmoe.recipe import RANDOM_MODES, Recipe

if TYPE_CHECKING:
    from frankenmoe.export.check import Checked
    from frankenmoe.export.importance import Measured

IMATRIX_LENGTH = 512  # tokens of a block of calibration
IMATRIX_BLOCKS = 128
REPORT = "export.json"
CHECK_LENGTH = 128  # tokens of a text
CHECK_BLOCKS = 8
CHECK_POSITIONS = 24  # of every text


def export_gguf(
    what: Recipe | Artifact | str | Path,
    out: str | Path,
    *,
    types: Sequence[str] = (),
    imatrix: Sequence[str] = (),
    pad256: bool = False,
    threads: int | None = None,
    allow_random: bool = False,
    trust_remote_code: bool = False,
    progress: Progress = SILENT,
) -> list[GgufFile]:
    """Writes GGUF files of an artifact of either form, or of a recipe, whose routers are then made first.

    Without `types`: a q4 and a q5 that suit the shape. Routers that only chance has set are refused unless
    `allow_random`. Raises FrankenMoEError's children; see `export_files`.
    """
    with subject_of(what, allow_random=allow_random, trust_remote_code=trust_remote_code, progress=progress) as subject:
        check_output(subject, Path(out), types=types, pad256=pad256, importance=bool(imatrix))
        found = _importance(what, subject, imatrix, pad256, trust_remote_code, progress) if imatrix else None
        return export_files(
            subject,
            Path(out),
            types=types,
            pad256=pad256,
            importance=found.importance if found else None,
            notes=starved_notes(subject, found) if found else (),
            threads=threads,
            progress=progress,
        )


def _importance(
    what: Recipe | Artifact | str | Path,
    subject: Subject,
    data: Sequence[str],
    pad256: bool,
    trust_remote_code: bool,
    progress: Progress,
) -> "Measured":
    from frankenmoe.data.blocks import text_blocks
    from frankenmoe.data.documents import read_documents
    from frankenmoe.export.importance import measure
    from frankenmoe.loading import load

    moe = load(what, trust_remote_code=trust_remote_code)
    length = min(IMATRIX_LENGTH, int(moe.model.config.max_position_embeddings))
    blocks = text_blocks(read_documents(data, folder=Path.cwd()), moe.tokenizer(), length=length, limit=IMATRIX_BLOCKS)
    progress.start("weighing columns", len(blocks), "blocks")
    return measure(moe, layout(subject, pad256=pad256), [block.ids for block in blocks], on_step=progress.advance)


def starved_notes(subject: Subject, found: "Measured") -> tuple[str, ...]:
    """A sentence about experts that the calibration text hardly reached, and what was done about them."""
    if not found.starved:
        return ()
    names = [node.name for node in subject.nodes]
    shown = ", ".join(f"{names[expert]} in layer {layer} ({tokens})" for layer, expert, tokens in found.starved[:4])
    more = f" and {len(found.starved) - 4} more" if len(found.starved) > 4 else ""
    return (
        f"of {found.tokens} tokens of calibration too few reached {shown}{more}; their columns were weighed on text "
        "that every expert was made to read",
    )


def check_files(
    what: Recipe | Artifact | str | Path,
    files: Sequence[GgufFile],
    *,
    texts: Sequence[str] = (),
    threads: int | None = None,
    trust_remote_code: bool = False,
    progress: Progress = SILENT,
) -> "list[Checked]":
    """Runs every file in llama.cpp beside its source in transformers (float32) and compares what they say.

    `texts` are text files, JSONL files or hub datasets; without any, a few short texts of our own.
    """
    from frankenmoe.data.blocks import text_blocks
    from frankenmoe.data.documents import Document, read_documents
    from frankenmoe.export.check import check, reference, steps
    from frankenmoe.export.samples import PROMPTS, TEXTS
    from frankenmoe.loading import load

    moe = load(what, dtype="float32", trust_remote_code=trust_remote_code)
    tokenizer = moe.tokenizer()
    length = min(CHECK_LENGTH, int(moe.model.config.max_position_embeddings))
    if texts:
        blocks = text_blocks(read_documents(texts, folder=Path.cwd()), tokenizer, length=length, limit=CHECK_BLOCKS)
    else:
        alone = [text_blocks([Document(text=text)], tokenizer, length=length, limit=1) for text in TEXTS]
        blocks = [block for found in alone for block in found]
    passages = [block.ids for block in blocks]
    progress.start("asking the source", len(passages) + len(PROMPTS), "texts")
    source = reference(moe, tokenizer, texts=passages, positions=CHECK_POSITIONS, on_step=progress.advance)
    found = []
    for file in files:
        total = steps(passages, positions=CHECK_POSITIONS, prompts=len(PROMPTS))
        progress.start(f"checking {file.type}", total, "positions")
        found.append(check(file.path, source, threads=threads, on_step=progress.advance))
    return found


def write_report(
    files: Sequence[GgufFile],
    checks: "Sequence[Checked]",
    *,
    what: Recipe | Artifact | str | Path,
) -> Path:
    """export.json beside the files: of which model they are, what each is and how it compares with its source.

    Rows of earlier runs stay while their files are there and are of the same model, so that a card can quote them.
    """
    folder = files[0].path.parent
    report = folder / REPORT
    about = _about(what)
    kept: dict[str, Any] = {}
    if report.is_file():
        with suppress(ValueError, AttributeError, KeyError, TypeError):
            before = parse_object(report.read_bytes())
            if {key: before.get(key) for key in about} == about:
                kept = {entry["path"]: entry for entry in before["files"] if (folder / entry["path"]).is_file()}
    found = {check.path: check.to_dict() | {"path": check.path.name} for check in checks}
    kept |= {file.path.name: file.to_dict() | {"path": file.path.name, "check": found.get(file.path)} for file in files}
    write_json(report, {"kind": "frankenmoe export", "version": 1, **about, "files": list(kept.values())})
    return report


def _about(what: Recipe | Artifact | str | Path) -> dict[str, str]:
    """Which model a report is of, in the words by which a card knows its own."""
    if isinstance(what, str | Path) and not is_recipe(what):
        what = open_artifact(Path(what))
    if isinstance(what, Artifact):
        return {"recipe_digest": what.record["recipe_digest"], "routers_sha256": sha256(what.folder / ROUTERS)}
    return {"recipe_digest": load_recipe(what).digest}


@contextmanager
def subject_of(
    what: Recipe | Artifact | str | Path, *, allow_random: bool, trust_remote_code: bool, progress: Progress
) -> Iterator[Subject]:
    """The subject of an artifact or a recipe; a recipe's routers live in a temporary folder meanwhile."""
    if isinstance(what, str | Path) and not is_recipe(what):
        what = open_artifact(Path(what))
    if isinstance(what, Artifact):
        if not (allow_random or routers_were_set(what)):
            raise _random(str(what.folder))
        yield of_artifact(what, trust_remote_code=trust_remote_code)
        return
    made = plan(load_recipe(what), weights=True, trust_remote_code=trust_remote_code)
    check_buildable(made, virtual=True, allow_identical=True)
    subject_of_plan(made)  # says what llama.cpp cannot before routers are made
    if made.recipe.gate_mode in RANDOM_MODES and made.experts > 1 and not (allow_random or made.all_identical):
        raise _random(made.recipe.origin)
    with tempfile.TemporaryDirectory() as folder:
        write_routers(Path(folder), make_routers(made, progress, trust_remote_code=trust_remote_code).routers)
        yield of_plan(made, read_header(Path(folder) / ROUTERS))


def _random(where: str) -> ArtifactError:
    return ArtifactError(
        f"the routers of {where} were never set: gate_mode random left them to chance",
        hint="fit them first, or say --allow-random to export the MoE as it is",
    )
