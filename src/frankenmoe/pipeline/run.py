"""Recipe -> a folder with the model, its reports and exports. Runs the stages in order and skips unchanged ones."""

import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from frankenmoe.artifact.folder import Artifact, clear_building, partial_folder
from frankenmoe.errors import ArtifactError
from frankenmoe.moe.device import resolve
from frankenmoe.pipeline.after import AFTER
from frankenmoe.pipeline.job import Job, Stage, artifact_files
from frankenmoe.pipeline.model import MAKING
from frankenmoe.pipeline.state import State, Step, claimed, digest_of, is_done, prints, read_state, write_state
from frankenmoe.planning.buildable import check_buildable
from frankenmoe.progress import SILENT, Progress
from frankenmoe.recipe import Recipe
from frankenmoe.subject import Subject, open_subject


@dataclass(frozen=True)
class Done:
    """A stage of a run: one line about its result, how long it took, and whether this run did it (or skipped it)."""

    name: str
    summary: str
    seconds: float
    now: bool


@dataclass(frozen=True)
class Finished:
    """A finished run: the model and the stages in order."""

    artifact: Artifact
    steps: tuple[Done, ...]


def run(
    what: Subject | Recipe | str | Path,
    out: str | Path,
    *,
    device: str = "auto",
    dtype: str | None = None,
    progress: Progress = SILENT,
    on_step: Callable[[Done], None] = lambda done: None,
) -> Finished:
    """Runs every stage that a recipe asks for, in order, in the folder `out`; the model is in `out`/model.

    A stage is skipped if its recipe section, texts and inputs have the same content as before. If killed, the same call
    continues with the unfinished stage, and within it where the stage can resume. Models run on `device` and compute in
    `dtype`, which is not the type that weights are stored in. `on_step` is called after each stage.
    Raises subclasses of FrankenMoEError, for bad input before the first stage.
    """
    out = Path(os.path.realpath(out))
    subject = open_subject(what)
    if subject.artifact is not None:
        raise ArtifactError(f"{subject.origin} is an artifact, expected a recipe", hint="give the recipe's file")
    resolve(device)  # a missing device is an error even if the first stages need none
    job = Job(subject, out, device, dtype)
    stages = stages_of(job)
    _check(job, stages)
    with claimed(out):
        done = []
        for number, stage in enumerate(stages, 1):
            found = _step(job, stage, numbered(progress, f"{number}/{len(stages)} {stage.name}"))
            done.append(found)
            on_step(found)
        return Finished(job.artifact, tuple(done))


def stages_of(job: Job) -> tuple[Stage, ...]:
    """The stages that the recipe asks for, in order. Training without `fit` starts from the stage `virtual`."""
    wanted = {stage.name for stage in (*MAKING, *AFTER) if job.settings(stage.name)}
    if "train" in wanted and "fit" not in wanted:
        wanted.add("virtual")
    return tuple(stage for stage in (*MAKING, *AFTER) if stage.name in wanted)


def _check(job: Job, stages: Iterable[Stage]) -> None:
    """Raises what can be known to fail before the first stage."""
    build = job.settings("build")
    trained = job.recipe.train is not None
    check_buildable(job.plan, virtual=build.virtual, allow_identical=build.allow_identical or trained)
    for stage in stages:
        stage.check(job)


def _step(job: Job, stage: Stage, progress: Progress) -> Done:
    """Runs one stage or skips it. Its result is in the state file before the next stage starts."""
    state = read_state(job.out)
    settings = job.settings(stage.name)
    facts = [job.recipe.digest, settings and settings.model_dump(mode="json")]
    digest = digest_of(stage.name, facts, prints(stage.inputs(job), root=job.out))
    before = state.steps.get(stage.name)
    if before is not None and is_done(before, digest=digest, out=job.out):
        return Done(stage.name, before.summary, before.seconds, now=False)
    began = time.perf_counter()
    folder = None if stage.outputs else job.folder(stage.name)
    name, of, replacing = state.doing or ("", "", 0)
    begun = (name, of) == (stage.name, digest)
    if folder and begun and inode(folder) not in (0, replacing):
        # the earlier run was killed after the folder was complete, before the state file recorded it
        clear_building(folder)
    else:
        if folder and not begun:
            shutil.rmtree(partial_folder(folder), ignore_errors=True)  # started from inputs that have changed since
        others = {name: step for name, step in state.steps.items() if name != stage.name}
        old = (inode(folder) or inode(aside(folder))) if folder else 0
        with replaced(folder) if folder else nullcontext():
            # recorded first, so that the old result no longer counts as done
            state = State(others, (stage.name, digest, old))
            write_state(job.out, state)
            stage.run(job, progress)
    summary = stage.summary(job)
    outputs = stage.outputs(job) if stage.outputs else artifact_files(job.folder(stage.name))
    step = Step(digest, prints(outputs, root=job.out), summary, round(time.perf_counter() - began, 3))
    write_state(job.out, State({**state.steps, stage.name: step}))
    return Done(stage.name, summary, step.seconds, now=True)


def aside(folder: Path) -> Path:
    """Where the old folder is kept while a new one is made."""
    return folder.with_name(f"{folder.name}.old")


def inode(folder: Path) -> int:
    """Identifies a folder, even if another one takes its name later; 0 if there is none."""
    return folder.stat().st_ino if folder.is_dir() else 0


@contextmanager
def replaced(folder: Path) -> Iterator[None]:
    """Moves the old folder aside while a new one is made, and back if that fails."""
    old = aside(folder)
    if folder.is_dir():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    try:
        yield
    except BaseException:
        if old.is_dir() and not folder.exists():
            old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def numbered(progress: Progress, prefix: str) -> Progress:
    """The same progress, with `prefix` before the name of each activity."""
    return replace(progress, start=lambda stage, total, unit: progress.start(f"{prefix}: {stage}", total, unit))
