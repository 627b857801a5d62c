"""The stages that look at the finished model or make something of it: audit, eval, export, card.

Each imports its stage when it is its turn. Nothing here computes; what a stage can say of its result is in its report.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

from frankenmoe.artifact import ROUTERS, open_artifact, write_json
from frankenmoe.building import versions
from frankenmoe.checkpoint.fingerprint import sha256
from frankenmoe.checkpoint.writer import write_atomic
from frankenmoe.errors import ArtifactError
from frankenmoe.progress import Progress
from frankenmoe.publish.card import README, is_ours, make_card, write_card
from frankenmoe.publish.found import PICTURE
from frankenmoe.publish.reports import TRAINING
from frankenmoe.publish.sections import gigabytes
from frankenmoe.recipestages import Audit, Card, Eval, Export
from frankenmoe.running.job import WORK, Job, Stage, artifact_files, expert_data, sources, texts
from frankenmoe.running.model import training_report
from frankenmoe.running.state import files_below

GGUF = "gguf"
CHECKED_BY_ITSELF = 2 * 10**9  # bytes of a GGUF file


def _section(job: Job, key: str) -> Any:
    section = getattr(job.recipe, key)
    assert section is not None
    return section


def _settings(key: str) -> Callable[[Job], Any]:
    return lambda job: _section(job, key).model_dump(mode="json")


def _audit_inputs(job: Job) -> Iterator[Path]:
    section: Audit = _section(job, "audit")
    yield from artifact_files(job.model)
    yield from texts(job, [text.rpartition("=")[2] for text in section.data] or expert_data(job.recipe.experts))


def _eval_inputs(job: Job) -> Iterator[Path]:
    section: Eval = _section(job, "eval")
    yield from artifact_files(job.model)
    given = [*section.texts.values(), *([section.data_dir] if section.data_dir else [])]
    yield from texts(job, [*expert_data(job.recipe.experts), *given])
    if section.against_parents:
        yield from sources(job)


def _export_inputs(job: Job) -> Iterator[Path]:
    section: Export = _section(job, "export")
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


def _absolute(job: Job, name: str) -> str:
    """A text as seen from anywhere: a file by its whole path, a hub dataset by its name."""
    file = job.recipe.folder / Path(name).expanduser()
    return str(file) if file.exists() else name


def _audit(job: Job, progress: Progress) -> None:
    from frankenmoe.auditing import TOKENS, audit

    section: Audit = _section(job, "audit")
    labelled = (text.rpartition("=") for text in section.data)
    with _scratch(job, "audit") as folder:
        made = audit(
            job.model,
            out=folder,
            data=[(label or None, _absolute(job, name)) for label, _, name in labelled],
            prompt=section.prompt,
            tokens=section.tokens or TOKENS,
            trust_remote_code=job.trust_remote_code,
            progress=progress,
        )
        _move(made, job.reports)


def _move(source: Path, target: Path) -> None:
    """Every file of a folder to another, where each appears whole."""
    target.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        file.replace(target / file.name)


def _audit_said(job: Job) -> str:
    answers = json.loads((job.reports / "audit.json").read_bytes())["answers"]
    bad = [answer["key"] for answer in answers if answer["level"] == "bad"]
    return f"{len(answers)} questions, " + (f"bad news on {', '.join(bad)}" if bad else "no bad news")


def _eval(job: Job, progress: Progress) -> None:
    from frankenmoe.evaluate.run import Settings
    from frankenmoe.evaluating import evaluate

    section: Eval = _section(job, "eval")
    report = evaluate(
        [job.model],
        tasks=",".join(section.tasks) or None,
        data_dir=Path(_absolute(job, section.data_dir)) if section.data_dir else None,
        texts={name: Path(_absolute(job, file)) for name, file in section.texts.items()},
        limit=section.limit,
        against_parents=section.against_parents,
        settings=Settings(store=job.out / WORK / "answers"),
        trust_remote_code=job.trust_remote_code,
        progress=progress,
    )
    job.reports.mkdir(parents=True, exist_ok=True)
    write_json(job.reports / "eval.json", _about(job, "eval") | report.to_dict())


def _eval_said(job: Job) -> str:
    report = json.loads((job.reports / "eval.json").read_bytes())
    failed = sum(len(model["errors"]) for model in report["models"])
    said = report["verdict"][0] if report["verdict"] else f"{len(report['models'])} models measured"
    return f"{said} {failed} tasks failed." if failed else said


def _export(job: Job, progress: Progress) -> None:
    from frankenmoe.exporting import check_files, export_gguf

    section: Export = _section(job, "export")
    with _scratch(job, "export") as folder:
        files = export_gguf(
            job.model,
            folder,
            types=section.types,
            imatrix=[_absolute(job, text) for text in section.imatrix],
            pad256=section.pad256,
            allow_random=section.allow_random,
            trust_remote_code=job.trust_remote_code,
            progress=progress,
        )
        small = [file for file in files if file.bytes < CHECKED_BY_ITSELF]
        wanted = {None: small, True: files, False: []}[section.check]
        checks = {}
        if wanted:
            texts = [_absolute(job, text) for text in section.texts]
            found = check_files(
                job.model, wanted, texts=texts, trust_remote_code=job.trust_remote_code, progress=progress
            )
            checks = {check.path: check.to_dict() for check in found}
        rows = [file.to_dict() | {"path": file.path.name, "check": checks.get(file.path)} for file in files]
        shutil.rmtree(job.model / GGUF, ignore_errors=True)
        _move(folder, job.model / GGUF)
    job.reports.mkdir(parents=True, exist_ok=True)
    write_json(job.reports / "export.json", _about(job, "export") | {"files": rows})


def _check_export(job: Job) -> None:
    """A type, a shape or a tokenizer that llama.cpp does not have is told before days of training."""
    from frankenmoe.export.run import check_output, disk_bytes
    from frankenmoe.export.tokenizer import read_vocabulary
    from frankenmoe.planning.forecast import subject_of_plan

    section: Export = _section(job, "export")
    subject = subject_of_plan(job.plan)
    scratch = job.out / WORK / "export.partial"
    # a run that was done or killed has its files on the disk already, and need not find room for them twice
    earlier = sum(map(disk_bytes, chain(files_below(scratch), files_below(job.model / GGUF))))
    check_output(
        subject,
        scratch / "none",
        types=section.types,
        pad256=section.pad256,
        importance=bool(section.imatrix),
        spare=earlier,
    )
    read_vocabulary(subject.folder, subject.config, rows=subject.family.dims(subject.config).vocab)


def _export_said(job: Job) -> str:
    files = json.loads((job.reports / "export.json").read_bytes())["files"]
    return ", ".join(f"{file['type']} {gigabytes(file['bytes'])}" for file in files)


def _about(job: Job, kind: str) -> dict[str, Any]:
    """What a report is of, so that a card does not quote it for another model."""
    artifact = open_artifact(job.model)
    return {
        "kind": f"frankenmoe {kind}",
        "version": 1,
        "recipe_digest": artifact.record["recipe_digest"],
        "routers_sha256": sha256(artifact.folder / ROUTERS),
        "versions": versions(),
    }


def _card(job: Job, progress: Progress) -> None:
    section: Card = _section(job, "card")
    artifact = open_artifact(job.model)
    if section.prompts:
        from frankenmoe.sampling import sample

        sample(
            artifact,
            section.prompts,
            max_new_tokens=section.max_new_tokens,
            temperature=section.temperature,
            seed=section.seed,
            trust_remote_code=job.trust_remote_code,
            progress=progress,
        )
    if job.recipe.train is not None:
        # beside the other reports, so that it is pushed with them
        job.reports.mkdir(exist_ok=True)
        write_atomic(job.reports / TRAINING, training_report(job).read_bytes())
    card = make_card(artifact, settings=section, trust_remote_code=job.trust_remote_code)
    write_card(artifact, card)


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
