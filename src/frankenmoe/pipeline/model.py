"""The stages that make the model: virtual artifacts that are fitted and trained, then the one that is handed over."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from frankenmoe.artifact.folder import open_artifact
from frankenmoe.artifact.reports import FitReport, TrainingReport
from frankenmoe.build.run import build
from frankenmoe.pipeline.job import WORK, Job, Stage, artifact_files, expert_data, sources, texts
from frankenmoe.progress import Progress


def chain(job: Job) -> list[str]:
    """The stages that make virtual artifacts before the model, in order; the first starts from the recipe.

    Fitting makes its artifact itself; training starts from one that was made by the recipe's gate mode.
    """
    asked = [key for key in ("fit", "train") if getattr(job.recipe, key) is not None]
    return ["virtual", *asked] if asked == ["train"] else asked


def _work(job: Job, name: str) -> Path:
    return job.out / WORK / name


def _previous(job: Job) -> Path | None:
    """The last virtual artifact before the model, None where it is built from the recipe."""
    names = chain(job)
    return _work(job, names[-1]) if names else None


def _build_virtual(job: Job, progress: Progress) -> None:
    build(job.subject, _work(job, "virtual"), virtual=True, allow_identical=True, progress=progress)


def _build_model(job: Job, progress: Progress) -> None:
    before = _previous(job)
    subject = job.open(before) if before else job.subject
    # whether identical experts make sense was asked before the first step
    build(subject, job.model, settings=job.build, allow_identical=True, progress=progress)


def _model_said(job: Job) -> str:
    size = sum(file.stat().st_size for file in artifact_files(job.model))
    return f"{open_artifact(job.model).form}, {size / 2**20:,.1f} MiB"


def _model_inputs(job: Job) -> list[Path]:
    before = _previous(job)
    return list(artifact_files(before)) if before else _from_recipe(job)


def _fit(job: Job, progress: Progress) -> None:
    from frankenmoe.gates.run import fit

    fit(job.subject, _work(job, "fit"), settings=job.recipe.fit, progress=progress)


def _fit_said(job: Job) -> str:
    found = FitReport.model_validate(open_artifact(_work(job, "fit")).record["stages"][-1]["fit"])
    return f"{found.method}: held-out loss {found.after:.4f}, {found.own_expert:.4f} with every text's own expert"


def _start_of_training(job: Job) -> Path:
    names = chain(job)
    return _work(job, names[names.index("train") - 1])


def _train(job: Job, progress: Progress) -> None:
    from frankenmoe.train.run import train

    train(job.open(_start_of_training(job)), _work(job, "train"), settings=job.recipe.train, progress=progress)


def training_report(job: Job) -> Path:
    """What training found, where the recipe asks for it."""
    return _work(job, "train") / "training.json"


def _train_said(job: Job) -> str:
    found = TrainingReport.read(training_report(job))
    losses = found.mean_held_out_loss
    return f"{', '.join(found.what)}: held-out loss {losses.before:.4f} to {losses.best:.4f}"


def _from_recipe(job: Job) -> list[Path]:
    """What an artifact that is made of the recipe itself comes from."""
    return [*sources(job), *texts(job, expert_data(job.recipe.experts))]


def _section(job: Job, key: str) -> Any:
    section = getattr(job.recipe, key)
    return section.model_dump(mode="json") if section is not None else None


CHAIN: Mapping[str, Stage] = {
    "virtual": Stage(
        name="virtual",
        settings=lambda job: job.recipe.digest,
        inputs=_from_recipe,
        outputs=lambda job: artifact_files(_work(job, "virtual")),
        act=_build_virtual,
        said=lambda job: f"routers by {job.recipe.gate_mode}",
        folder=lambda job: _work(job, "virtual"),
    ),
    "fit": Stage(
        name="fit",
        settings=lambda job: [job.recipe.digest, _section(job, "fit")],
        inputs=_from_recipe,
        outputs=lambda job: artifact_files(_work(job, "fit")),
        act=_fit,
        said=_fit_said,
        folder=lambda job: _work(job, "fit"),
    ),
    "train": Stage(
        name="train",
        settings=lambda job: [job.recipe.digest, _section(job, "train")],
        inputs=lambda job: [
            *artifact_files(_start_of_training(job)),
            *texts(job, expert_data(job.recipe.experts)),
        ],
        outputs=lambda job: artifact_files(_work(job, "train")),
        act=_train,
        said=_train_said,
        folder=lambda job: _work(job, "train"),
    ),
}
MODEL_STAGE = Stage(
    name="build",
    settings=lambda job: [job.recipe.digest, job.build.model_dump(mode="json")],
    inputs=_model_inputs,
    outputs=lambda job: artifact_files(job.model),
    act=_build_model,
    said=_model_said,
    folder=lambda job: job.model,
)
