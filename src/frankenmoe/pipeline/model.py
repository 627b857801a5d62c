"""The stages that make the model: routers are fitted and trained in virtual artifacts, then the model is built."""

from collections.abc import Iterator
from pathlib import Path

from frankenmoe.artifact.folder import open_artifact
from frankenmoe.artifact.healing import HealReport
from frankenmoe.artifact.reports import FitReport, TrainingReport
from frankenmoe.build.run import build
from frankenmoe.pipeline.job import Job, Stage, artifact_files, sources, texts
from frankenmoe.planning.names import expert_data
from frankenmoe.progress import Progress
from frankenmoe.subject import Subject, open_subject


def training_report(job: Job) -> Path:
    """The report of the stage `train`, which exists if the recipe has that section."""
    return job.folder("train") / "training.json"


def _healed(job: Job) -> Subject:
    """What routers are made for: the recipe, with healed experts if it asks for them."""
    if job.recipe.heal is None:
        return job.subject
    like = job.subject
    return open_subject(
        job.folder("heal") / "recipe.yml", dtype=like.dtype, cache=like.cache, trust_remote_code=like.trust_remote_code
    )


def _before_training(job: Job) -> Path:
    """The virtual artifact that training starts from."""
    return job.folder("fit" if job.recipe.fit else "virtual")


def _before_build(job: Job) -> Path | None:
    """The virtual artifact that the model is built from; None if it is built from the recipe."""
    last = "train" if job.recipe.train else "fit" if job.recipe.fit else None
    return job.folder(last) if last else None


def _heal_files(job: Job) -> Iterator[Path]:
    yield from sources(job)
    yield from texts(job, expert_data(job.recipe))


def _recipe_files(job: Job) -> Iterator[Path]:
    """The files that an artifact made from the recipe depends on."""
    if job.recipe.heal:
        yield from artifact_files(job.folder("heal"))
    yield from sources(job)
    yield from texts(job, expert_data(job.recipe))


def _training_files(job: Job) -> Iterator[Path]:
    yield from artifact_files(_before_training(job))
    yield from texts(job, expert_data(job.recipe))


def _build_files(job: Job) -> Iterator[Path]:
    before = _before_build(job)
    return artifact_files(before) if before else _recipe_files(job)


def _heal(job: Job, progress: Progress) -> None:
    from frankenmoe.backbone.run import heal_recipe

    assert job.recipe.heal is not None
    heal_recipe(job.subject, job.folder("heal"), settings=job.recipe.heal, progress=progress, **job.place)


def _make_virtual(job: Job, progress: Progress) -> None:
    build(
        _healed(job),
        job.folder("virtual"),
        virtual=True,
        allow_identical=True,
        device=job.device,
        progress=progress,
    )


def _fit(job: Job, progress: Progress) -> None:
    from frankenmoe.gates.run import fit

    fit(_healed(job), job.folder("fit"), settings=job.recipe.fit, progress=progress, **job.place)


def _train(job: Job, progress: Progress) -> None:
    from frankenmoe.train.run import train

    before = job.open(_before_training(job))
    train(before, job.folder("train"), settings=job.recipe.train, progress=progress, **job.place)


def _build(job: Job, progress: Progress) -> None:
    before = _before_build(job)
    subject = job.open(before) if before else _healed(job)
    # identical experts were checked before the first stage
    settings = job.settings("build")
    build(subject, job.model, settings=settings, allow_identical=True, device=job.device, progress=progress)


def _heal_summary(job: Job) -> str:
    found = HealReport.read(job.folder("heal") / "heal.json")
    change = f"held-out loss {found.means['before']:.4f} to {found.means['after']:.4f}"
    return f"{len(found.kept)} of {len(found.experts)} experts: {change}"


def _fit_summary(job: Job) -> str:
    found = FitReport.model_validate(open_artifact(job.folder("fit")).record["stages"][-1]["fit"])
    return f"{found.method}: held-out loss {found.after:.4f}, {found.own_expert:.4f} with the own expert forced"


def _train_summary(job: Job) -> str:
    found = TrainingReport.read(training_report(job))
    losses = found.mean_held_out_loss
    return f"{', '.join(found.what)}: held-out loss {losses.before:.4f} to {losses.best:.4f}"


def _build_summary(job: Job) -> str:
    size = sum(file.stat().st_size for file in artifact_files(job.model))
    return f"{job.artifact.form}, {size / 2**20:,.1f} MiB"


MAKING = (
    Stage("heal", _heal_files, _heal, _heal_summary),
    Stage("virtual", _recipe_files, _make_virtual, lambda job: f"routers by {job.recipe.gate_mode}"),
    Stage("fit", _recipe_files, _fit, _fit_summary),
    Stage("train", _training_files, _train, _train_summary),
    Stage("build", _build_files, _build, _build_summary),
)
