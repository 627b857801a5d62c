"""The executor: goes through the steps a recipe asks for, does those that changed, remembers each; decides no more."""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from frankenmoe.artifact.folder import Artifact, clear_building, open_artifact, partial_folder
from frankenmoe.errors import ArtifactError
from frankenmoe.pipeline.job import MODEL, Job, Stage
from frankenmoe.pipeline.stages import check, stages_of
from frankenmoe.pipeline.state import State, Step, claimed, digest_of, is_done, prints, read_state, write_state
from frankenmoe.progress import SILENT, Progress
from frankenmoe.recipe import Recipe
from frankenmoe.subject import Subject, open_subject


@dataclass(frozen=True)
class Done:
    """One step in the summary: what it left in words, how long it took, and whether it was done now or before."""

    name: str
    said: str
    seconds: float
    now: bool


@dataclass(frozen=True)
class Finished:
    """A whole run: the artifact that came of it, and its steps in order."""

    artifact: Artifact
    steps: tuple[Done, ...]


def run(
    what: Subject | Recipe | str | Path,
    out: str | Path,
    *,
    progress: Progress = SILENT,
    on_step: Callable[[Done], None] = lambda done: None,
) -> Finished:
    """Does every stage that a recipe asks for, in order, in the folder `out`; the model is in `out`/model.

    A step whose recipe section, texts and earlier results are what they were, by content, is not done again. Killed at
    any moment, the same call goes on with the step that was being done, which itself goes on where it can. `on_step`
    hears of each step as it ends. Raises FrankenMoEError's children, for bad input before the first step.
    """
    out = Path(os.path.realpath(out))
    subject = open_subject(what)
    if subject.artifact is not None:
        raise ArtifactError(f"{subject.origin} is an artifact, expected a recipe", hint="name the recipe's file")
    job = Job(subject, out)
    stages = stages_of(job)
    check(job, stages)
    with claimed(out):
        done = []
        for number, stage in enumerate(stages, 1):
            found = _step(job, stage, numbered(progress, f"{number}/{len(stages)} {stage.name}"))
            done.append(found)
            on_step(found)
        return Finished(open_artifact(out / MODEL), tuple(done))


def _step(job: Job, stage: Stage, progress: Progress) -> Done:
    """One step, skipped if it can be; its result is remembered before the next begins."""
    state = read_state(job.out)
    digest = digest_of(stage.name, stage.settings(job), prints(stage.inputs(job), root=job.out))
    before = state.steps.get(stage.name)
    if before is not None and is_done(before, digest=digest, out=job.out):
        return Done(stage.name, before.said, before.seconds, now=False)
    began = time.perf_counter()
    folder = stage.folder(job) if stage.folder else None
    name, of, replacing = state.doing or ("", "", 0)
    begun = (name, of) == (stage.name, digest)
    # killed between the rename that made the folder whole and the line that says so
    adopted = begun and folder is not None and inode(folder) not in (0, replacing)
    if adopted and folder is not None:
        clear_building(folder)
    else:
        if folder and not begun:
            shutil.rmtree(partial_folder(folder), ignore_errors=True)  # begun from something that has changed since
        others = {name: step for name, step in state.steps.items() if name != stage.name}
        old = (inode(folder) or inode(aside(folder))) if folder else 0
        with replaced(folder) if folder else nullcontext():
            # from here on the old result must not look new
            state = State(others, (stage.name, digest, old))
            write_state(job.out, state)
            stage.act(job, progress)
    said = stage.said(job)
    step = Step(digest, prints(stage.outputs(job), root=job.out), said, round(time.perf_counter() - began, 3))
    write_state(job.out, State({**state.steps, stage.name: step}))
    return Done(stage.name, said, step.seconds, now=True)


def aside(folder: Path) -> Path:
    """Where the old folder is while a new one is made."""
    return folder.with_name(f"{folder.name}.old")


def inode(folder: Path) -> int:
    """What tells a folder from another that takes its name; 0 where there is none."""
    return folder.stat().st_ino if folder.is_dir() else 0


@contextmanager
def replaced(folder: Path) -> Iterator[None]:
    """For making a folder anew: the old one is out of the way meanwhile, and comes back if that fails."""
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
    """The same listener, which hears which step is at work as well."""
    return replace(progress, start=lambda stage, total, unit: progress.start(f"{prefix}: {stage}", total, unit))
