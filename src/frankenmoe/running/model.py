"""The stages that make the model: virtual artifacts that are trained, then the artifact that is handed over."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from frankenmoe.artifact import open_artifact
from frankenmoe.building import build
from frankenmoe.progress import Progress
from frankenmoe.running.job import WORK, Job, Stage, artifact_files, expert_data, sources, texts


def chain(job: Job) -> list[str]:
    """The recipe's stages that change the model, in order."""
    return [key for key in CHAIN if getattr(job.recipe, key) is not None]


def _previous(job: Job) -> Path | None:
    """The last virtual artifact before the model, None where it is built from the recipe."""
    keys = chain(job)
    return job.out / WORK / keys[-1] if keys else None


def _before(job: Job, key: str) -> Path:
    """The virtual artifact that a stage of the chain starts from."""
    names = ["virtual", *chain(job)]
    return job.out / WORK / names[names.index(key) - 1]


def _build_virtual(job: Job, progress: Progress) -> None:
    build(
        job.recipe,
        job.out / WORK / "virtual",
        virtual=True,
        allow_identical=True,
        trust_remote_code=job.trust_remote_code,
        progress=progress,
    )


def _build_model(job: Job, progress: Progress) -> None:
    before = _previous(job)
    what: Any = open_artifact(before) if before else job.recipe
    build(
        what,
        job.model,
        virtual=job.build.virtual,
        allow_identical=True,  # whether that makes sense was asked before the first step
        trust_remote_code=job.trust_remote_code,
        progress=progress,
    )


def _model_said(job: Job) -> str:
    size = sum(file.stat().st_size for file in artifact_files(job.model))
    return f"{open_artifact(job.model).form}, {size / 2**20:,.1f} MiB"


def _model_inputs(job: Job) -> Iterator[Path]:
    before = _previous(job)
    yield from artifact_files(before) if before else sources(job)
    if not before:
        yield from texts(job, expert_data(job.recipe.experts))


def _train(job: Job, progress: Progress) -> None:
    from frankenmoe.training import train

    train(
        open_artifact(_before(job, "train")),
        job.out / WORK / "train",
        settings=job.recipe.train,
        trust_remote_code=job.trust_remote_code,
        progress=progress,
    )


def training_report(job: Job) -> Path:
    """What training found, where the recipe asks for it."""
    return job.out / WORK / "train" / "training.json"


def _train_said(job: Job) -> str:
    found = json.loads(training_report(job).read_bytes())
    mean = found["mean_held_out_loss"]
    what = job.recipe.train.what if job.recipe.train else ()
    return f"{', '.join(what)}: held-out loss {mean['before']:.4f} to {mean['best']:.4f}"


VIRTUAL = Stage(
    name="virtual",
    settings=lambda job: job.recipe.digest,
    inputs=lambda job: [*sources(job), *texts(job, expert_data(job.recipe.experts))],
    outputs=lambda job: artifact_files(job.out / WORK / "virtual"),
    act=_build_virtual,
    said=lambda job: f"routers by {job.recipe.gate_mode}",
    folder=lambda job: job.out / WORK / "virtual",
)
MODEL_STAGE = Stage(
    name="build",
    settings=lambda job: [job.recipe.digest, job.build.model_dump(mode="json")],
    inputs=_model_inputs,
    outputs=lambda job: artifact_files(job.model),
    act=_build_model,
    said=_model_said,
    folder=lambda job: job.model,
)
# recipe key -> the stage that makes a virtual artifact of the one before it, in the order they are done
CHAIN: Mapping[str, Stage] = {
    "train": Stage(
        name="train",
        settings=lambda job: [job.recipe.digest, job.recipe.train.to_dict() if job.recipe.train else None],
        inputs=lambda job: [*artifact_files(_before(job, "train")), *texts(job, expert_data(job.recipe.experts))],
        outputs=lambda job: artifact_files(job.out / WORK / "train"),
        act=_train,
        said=_train_said,
        folder=lambda job: job.out / WORK / "train",
    ),
}
