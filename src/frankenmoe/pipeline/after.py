"""The stages that look at the finished model or make something of it: audit, eval, export, card.

Each imports its stage when it is its turn. Nothing here computes; what a stage can say of its result is in its report.
"""

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

from frankenmoe.artifact.reports import AuditReport, EvalReport, ExportReport, about
from frankenmoe.checkpoint.writer import write_atomic
from frankenmoe.data.given import Pair, pairs, user_path
from frankenmoe.errors import ArtifactError
from frankenmoe.pipeline.job import WORK, Job, Stage, artifact_files, expert_data, sources, texts
from frankenmoe.pipeline.model import training_report
from frankenmoe.pipeline.state import files_below
from frankenmoe.progress import Progress
from frankenmoe.publish.card import README, is_ours, make_card, write_card
from frankenmoe.publish.found import PICTURE
from frankenmoe.publish.reports import TRAINING
from frankenmoe.publish.sections import gigabytes
from frankenmoe.recipe.sections import AuditSettings, CardSettings, EvalSettings, ExportSettings

GGUF = "gguf"


def _section(job: Job, key: str) -> Any:
    section = getattr(job.recipe, key)
    assert section is not None
    return section


def _settings(key: str) -> Callable[[Job], Any]:
    return lambda job: _section(job, key).model_dump(mode="json")


def _audit_inputs(job: Job) -> Iterator[Path]:
    section: AuditSettings = _section(job, "audit")
    yield from artifact_files(job.model)
    given = [file for _, file in _labelled(job, section.data)]
    yield from texts(job, given or expert_data(job.recipe.experts))


def _eval_inputs(job: Job) -> Iterator[Path]:
    section: EvalSettings = _section(job, "eval")
    yield from artifact_files(job.model)
    given = [*section.texts.values(), *([section.data_dir] if section.data_dir else [])]
    yield from texts(job, [*expert_data(job.recipe.experts), *given])
    if section.against_parents:
        yield from sources(job)


def _export_inputs(job: Job) -> Iterator[Path]:
    section: ExportSettings = _section(job, "export")
    yield from artifact_files(job.model)
    yield from texts(job, [*section.imatrix, *section.texts])


@contextmanager
def _scratch(job: Job, name: str) -> Iterator[Path]:
    """An empty folder for a stage that must not find its own half-finished work; nothing of it stays."""
    folder = job.out / WORK / f"{name}.partial"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    yield folder
    shutil.rmtree(folder)


def _located(job: Job, name: str) -> str:
    """A text as seen from anywhere: a file by its whole path, a hub dataset by its name."""
    return user_path(name, folder=job.recipe.folder)


def _labelled(job: Job, texts: Sequence[str]) -> list[Pair]:
    """The texts of an audit, with the experts they belong to."""
    names = [expert.name for expert in job.recipe.experts]
    return pairs(texts, flag="audit: data", names=names, unlabelled=True, folder=job.recipe.folder)


def _audit(job: Job, progress: Progress) -> None:
    from frankenmoe.audit.run import audit

    section: AuditSettings = _section(job, "audit")
    with _scratch(job, "audit") as folder:
        made = audit(
            job.open(job.model),
            out=folder,
            data=_labelled(job, section.data),
            settings=section,
            progress=progress,
        )
        _move(made, job.reports)


def _move(source: Path, target: Path) -> None:
    """Every file of a folder to another, where each appears whole."""
    target.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        file.replace(target / file.name)


def _audit_said(job: Job) -> str:
    answers = AuditReport.read(job.reports / "audit.json").answers
    bad = [answer.key for answer in answers if answer.level == "bad"]
    return f"{len(answers)} questions, " + (f"bad news on {', '.join(bad)}" if bad else "no bad news")


def _eval(job: Job, progress: Progress) -> None:
    from frankenmoe.evaluate.run import evaluate
    from frankenmoe.evaluate.score import Scoring

    section: EvalSettings = _section(job, "eval")
    report = evaluate(
        [job.open(job.model)],
        settings=section,
        data_dir=_located(job, section.data_dir) if section.data_dir else None,
        texts={name: _located(job, file) for name, file in section.texts.items()},
        scoring=Scoring(store=job.out / WORK / "answers"),
        progress=progress,
    )
    job.reports.mkdir(parents=True, exist_ok=True)
    report.to_report(**about(job.artifact)).write(job.reports / "eval.json")


def _eval_said(job: Job) -> str:
    report = EvalReport.read(job.reports / "eval.json")
    failed = sum(len(model.errors) for model in report.models)
    said = report.verdict[0] if report.verdict else f"{len(report.models)} models measured"
    return f"{said} {failed} tasks failed." if failed else said


def _export(job: Job, progress: Progress) -> None:
    from frankenmoe.export.run import check_files, export_gguf, files_to_check, write_report

    section: ExportSettings = _section(job, "export")
    with _scratch(job, "export") as folder:
        files = export_gguf(
            job.open(job.model),
            folder,
            settings=section,
            imatrix=[_located(job, text) for text in section.imatrix],
            progress=progress,
        )
        wanted = files_to_check(files, section)
        texts = [_located(job, text) for text in section.texts]
        checks = check_files(job.open(job.model), wanted, texts=texts, progress=progress) if wanted else []
        shutil.rmtree(job.model / GGUF, ignore_errors=True)
        _move(folder, job.model / GGUF)
    job.reports.mkdir(parents=True, exist_ok=True)
    write_report(files, checks, what=job.open(job.model), report=job.reports / "export.json")


def _check_export(job: Job) -> None:
    """A type, a shape or a tokenizer that llama.cpp does not have is told before days of training."""
    from frankenmoe.export.files import check_output, disk_bytes
    from frankenmoe.export.tokenizer import read_vocabulary
    from frankenmoe.planning.forecast import gguf_parts

    section: ExportSettings = _section(job, "export")
    parts = gguf_parts(job.plan)
    scratch = job.out / WORK / "export.partial"
    # a run that was done or killed has its files on the disk already, and need not find room for them twice
    earlier = sum(map(disk_bytes, chain(files_below(scratch), files_below(job.model / GGUF))))
    check_output(
        parts,
        scratch / "none",
        types=section.types,
        pad256=section.pad256,
        importance=bool(section.imatrix),
        spare=earlier,
    )
    read_vocabulary(parts.folder, parts.config, rows=parts.stock[1].dims(parts.config).vocab)


def _export_said(job: Job) -> str:
    files = ExportReport.read(job.reports / "export.json").files
    return ", ".join(f"{file.type} {gigabytes(file.bytes)}" for file in files)


def _card(job: Job, progress: Progress) -> None:
    section: CardSettings = _section(job, "card")
    subject = job.open(job.model)
    if section.prompts:
        from frankenmoe.publish.samples import sample

        sample(subject, section, progress=progress)
    if job.recipe.train is not None:
        # beside the other reports, so that it is pushed with them
        job.reports.mkdir(exist_ok=True)
        write_atomic(job.reports / TRAINING, training_report(job).read_bytes())
    write_card(subject, make_card(subject, settings=section))


def _card_said(job: Job) -> str:
    lacking = (job.model / README).read_text().partition("## Not in this card")[2].count("\n- ")
    return f"README.md, {lacking} things not in it" if lacking else "README.md, nothing missing"


def _card_inputs(job: Job) -> Iterator[Path]:
    yield from artifact_files(job.model)
    # but for what this stage itself puts there
    yield from (file for file in files_below(job.reports) if file.name not in ("samples.json", TRAINING))
    yield training_report(job)
    yield from (source.folder / README for source in job.plan.sources)


def _check_card(job: Job) -> None:
    """A card that a person wrote is not to be found in the way when everything else is done."""
    file = job.model / README
    if file.is_file() and not is_ours(file.read_text(encoding="utf-8", errors="replace")):
        raise ArtifactError(
            f"{file} was written or changed by hand, and `card:` in {job.recipe.origin} asks for a new one",
            hint="move it away, and put its words under `card: description` in the recipe",
        )


AFTER: Mapping[str, Stage] = {
    "audit": Stage(
        name="audit",
        settings=_settings("audit"),
        inputs=_audit_inputs,
        outputs=lambda job: [job.reports / "audit.json", job.reports / "audit.html"],
        act=_audit,
        said=_audit_said,
    ),
    "eval": Stage(
        name="eval",
        settings=_settings("eval"),
        inputs=_eval_inputs,
        outputs=lambda job: [job.reports / "eval.json"],
        act=_eval,
        said=_eval_said,
    ),
    "export": Stage(
        name="export",
        settings=_settings("export"),
        inputs=_export_inputs,
        outputs=lambda job: [job.reports / "export.json", *files_below(job.model / GGUF)],
        act=_export,
        said=_export_said,
        check=_check_export,
    ),
    "card": Stage(
        name="card",
        settings=_settings("card"),
        inputs=_card_inputs,
        outputs=lambda job: [job.model / README, *job.model.glob(PICTURE), *job.reports.glob("samples.json")],
        act=_card,
        said=_card_said,
        check=_check_card,
    ),
}
