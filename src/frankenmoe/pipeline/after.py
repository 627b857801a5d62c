"""The stages that measure, export and describe the finished model. Each stage's code is imported when it runs."""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from pathlib import Path

from frankenmoe import system
from frankenmoe.artifact.reports import AuditReport, EvalReport, ExportReport, about
from frankenmoe.checkpoint.writer import write_atomic
from frankenmoe.counted import counted
from frankenmoe.data.given import Pair, pairs, user_path
from frankenmoe.errors import ArtifactError
from frankenmoe.pipeline.job import WORK, Job, Stage, artifact_files, sources, texts
from frankenmoe.pipeline.model import training_report
from frankenmoe.pipeline.state import files_below
from frankenmoe.planning.names import expert_data
from frankenmoe.progress import Progress
from frankenmoe.publish.card import README, is_by_hand, make_card, write_card
from frankenmoe.publish.found import PICTURE
from frankenmoe.publish.reports import TRAINING
from frankenmoe.publish.sections import gigabytes
from frankenmoe.recipe.sections import AuditSettings, CardSettings, EvalSettings, ExportSettings
from frankenmoe.recipe.settings import settings_with

GGUF = "gguf"


def _audit_inputs(job: Job) -> Iterator[Path]:
    settings: AuditSettings = job.settings("audit")
    yield from artifact_files(job.model)
    given = [file for _, file in _labelled(job, settings.data)]
    yield from texts(job, given or expert_data(job.recipe))


def _eval_inputs(job: Job) -> Iterator[Path]:
    settings: EvalSettings = job.settings("eval")
    yield from artifact_files(job.model)
    given = [*settings.texts.values(), *filter(None, (settings.data_dir, settings.general_text))]
    yield from texts(job, [*expert_data(job.recipe), *given])
    if settings.against_parents:
        yield from sources(job)


def _export_inputs(job: Job) -> Iterator[Path]:
    settings: ExportSettings = job.settings("export")
    yield from artifact_files(job.model)
    yield from texts(job, [*settings.imatrix, *settings.texts])


@contextmanager
def _scratch(job: Job, name: str) -> Iterator[Path]:
    """An empty folder for a stage that cannot resume its own work; it is removed afterwards."""
    folder = job.out / WORK / f"{name}.partial"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    yield folder
    shutil.rmtree(folder)


def _located(job: Job, name: str) -> str:
    """A file's absolute path, or a hub dataset's name."""
    return user_path(name, folder=job.recipe.folder)


def _labelled(job: Job, texts: Sequence[str]) -> list[Pair]:
    """(expert or None, text) for each text of the audit."""
    names = [expert.name for expert in job.recipe.experts]
    return pairs(texts, flag="audit: data", names=names, unlabelled=True, folder=job.recipe.folder)


def _audit(job: Job, progress: Progress) -> None:
    from frankenmoe.audit.run import audit

    settings: AuditSettings = job.settings("audit")
    with _scratch(job, "audit") as folder:
        made = audit(
            job.open(job.model),
            out=folder,
            data=_labelled(job, settings.data),
            settings=settings,
            progress=progress,
            **job.place,
        )
        _move(made, job.reports)


def _move(source: Path, target: Path) -> None:
    """Moves every file of a folder to another, each atomically."""
    target.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        file.replace(target / file.name)


def _audit_summary(job: Job) -> str:
    answers = AuditReport.read(job.reports / "audit.json").answers
    bad = [answer.key for answer in answers if answer.level == "bad"]
    return f"{counted(len(answers), 'question')}, " + (f"problems with {', '.join(bad)}" if bad else "no problems")


def _eval(job: Job, progress: Progress) -> None:
    from frankenmoe.evaluate.run import evaluate
    from frankenmoe.evaluate.score import Scoring

    settings: EvalSettings = job.settings("eval")
    report = evaluate(
        [job.open(job.model)],
        settings=settings,
        data_dir=_located(job, settings.data_dir) if settings.data_dir else None,
        general_text=_located(job, settings.general_text) if settings.general_text else None,
        texts={name: _located(job, file) for name, file in settings.texts.items()},
        scoring=Scoring(store=job.out / WORK / "answers"),
        progress=progress,
        **job.place,
    )
    job.reports.mkdir(parents=True, exist_ok=True)
    report.to_report(**about(job.artifact)).write(job.reports / "eval.json")


def _eval_summary(job: Job) -> str:
    report = EvalReport.read(job.reports / "eval.json")
    failed = sum(len(model.errors) for model in report.models)
    summary = report.verdict[0] if report.verdict else f"{counted(len(report.models), 'model')} measured."
    return f"{summary} {counted(failed, 'task')} failed." if failed else summary


def _export(job: Job, progress: Progress) -> None:
    from frankenmoe.export.run import check_files, export_gguf, token_notes, write_report

    section: ExportSettings = job.settings("export")
    found = {key: [_located(job, text) for text in getattr(section, key)] for key in ("imatrix", "texts")}
    settings = settings_with(section, found)
    with _scratch(job, "export") as folder:
        files = export_gguf(job.open(job.model), folder, settings=settings, progress=progress)
        checks = check_files(job.open(job.model), files, settings=settings, progress=progress)
        notes = token_notes(job.open(job.model), files, settings=settings)
        shutil.rmtree(job.model / GGUF, ignore_errors=True)
        _move(folder, job.model / GGUF)
    job.reports.mkdir(parents=True, exist_ok=True)
    files = [replace(file, notes=(*file.notes, *notes)) for file in files]
    write_report(files, checks, what=job.open(job.model), report=job.reports / "export.json")


def _check_export(job: Job) -> None:
    """Raises for a type, shape or tokenizer that llama.cpp does not have, before days of training."""
    from frankenmoe.export.files import check_output
    from frankenmoe.export.ollama import shape_of
    from frankenmoe.export.tokenizer import vocabulary_of
    from frankenmoe.planning.forecast import gguf_parts

    settings: ExportSettings = job.settings("export")
    parts = gguf_parts(job.plan)
    scratch = job.out / WORK / "export.partial"
    # an earlier run may have left its files, whose space is used again
    earlier = sum(map(system.disk_bytes, chain(files_below(scratch), files_below(job.model / GGUF))))
    check_output(
        parts,
        scratch / "none",
        types=settings.types,
        pad256=settings.pad256,
        importance=bool(settings.imatrix),
        spare=earlier,
    )
    vocabulary = vocabulary_of(parts)
    if settings.ollama:
        shape_of(vocabulary)


def _export_summary(job: Job) -> str:
    files = ExportReport.read(job.reports / "export.json").files
    return ", ".join(f"{file.type} {gigabytes(file.bytes)}" for file in files)


def _card(job: Job, progress: Progress) -> None:
    settings: CardSettings = job.settings("card")
    subject = job.open(job.model)
    if settings.prompts:
        from frankenmoe.publish.samples import sample

        sample(subject, settings, progress=progress, **job.place)
    if job.recipe.train is not None:
        # next to the other reports, so that it is pushed with them
        job.reports.mkdir(exist_ok=True)
        write_atomic(job.reports / TRAINING, training_report(job).read_bytes())
    write_card(subject, make_card(subject, settings=settings))


def _card_summary(job: Job) -> str:
    lacking = (job.model / README).read_text(encoding="utf-8").partition("## Not in this card")[2].count("\n- ")
    return f"README.md, {lacking} parts missing" if lacking else "README.md, nothing missing"


def _card_inputs(job: Job) -> Iterator[Path]:
    yield from artifact_files(job.model)
    # except the reports that this stage itself writes
    yield from (file for file in files_below(job.reports) if file.name not in ("samples.json", TRAINING))
    yield training_report(job)
    yield from (source.folder / README for source in job.plan.sources)


def _check_card(job: Job) -> None:
    """Raises ArtifactError for a README.md written by hand, which this stage would have to replace."""
    file = job.model / README
    if is_by_hand(file):
        raise ArtifactError(
            f"{file} was written or changed by hand, and `card:` in {job.recipe.origin} would replace it",
            hint="move it away, and put its text into `card: description` in the recipe",
        )


AFTER = (
    Stage(
        "audit",
        _audit_inputs,
        _audit,
        _audit_summary,
        outputs=lambda job: [job.reports / "audit.json", job.reports / "audit.html"],
    ),
    Stage("eval", _eval_inputs, _eval, _eval_summary, outputs=lambda job: [job.reports / "eval.json"]),
    Stage(
        "export",
        _export_inputs,
        _export,
        _export_summary,
        outputs=lambda job: [job.reports / "export.json", *files_below(job.model / GGUF)],
        check=_check_export,
    ),
    Stage(
        "card",
        _card_inputs,
        _card,
        _card_summary,
        outputs=lambda job: [job.model / README, *job.model.glob(PICTURE), *job.reports.glob("samples.json")],
        check=_check_card,
    ),
)
