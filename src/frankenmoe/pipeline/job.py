"""One run of a recipe, and what a stage of it consists of."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from frankenmoe.artifact.folder import Artifact, open_artifact
from frankenmoe.data.given import user_path
from frankenmoe.pipeline.state import files_below
from frankenmoe.planning import Plan
from frankenmoe.progress import Progress
from frankenmoe.recipe import Recipe
from frankenmoe.recipe.sections import BuildSettings
from frankenmoe.subject import Subject, open_subject, same_plan

MODEL = "model"
WORK = "work"  # virtual artifacts that later stages start from (megabytes), scratch folders and cached answers
REPORTS = "reports"
BODY = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "recipe.yml")


@dataclass(frozen=True)
class Job:
    """A recipe and the folder that its run writes to. Models run on `device` and compute in `dtype`."""

    subject: Subject
    out: Path
    device: str = "auto"
    dtype: str | None = None
    _opened: dict[Path, Subject] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def recipe(self) -> Recipe:
        return self.subject.recipe

    @property
    def plan(self) -> Plan:
        """The plan. Until the first stage that measures, an open backbone is left open."""
        return self.subject.plan if self.subject.settled else self.subject.planned

    @property
    def model(self) -> Path:
        """The folder of the finished model."""
        return self.out / MODEL

    @property
    def reports(self) -> Path:
        return self.model / REPORTS

    @property
    def artifact(self) -> Artifact:
        """The finished model."""
        return open_artifact(self.model)

    @property
    def place(self) -> dict[str, Any]:
        """Where and in which type a stage runs models, as arguments of its function."""
        return {"device": self.device, "dtype": self.dtype}

    def settings(self, stage: str) -> Any:
        """The recipe's section of a stage, None if there is none. `build` has defaults."""
        return getattr(self.recipe, stage, None) or (BuildSettings() if stage == "build" else None)

    def folder(self, stage: str) -> Path:
        """Where a stage that makes an artifact puts it."""
        return self.model if stage == "build" else self.out / WORK / stage

    def open(self, folder: Path) -> Subject:
        """An artifact that an earlier stage made. A plan of the same recipe is reused."""
        artifact = open_artifact(folder)
        known = self._opened.get(folder)
        if known is None or known.artifact is None or known.artifact.record != artifact.record:
            trusted = self.subject.trust_remote_code
            like = next((each for each in (self.subject, *self._opened.values()) if same_plan(artifact, each)), None)
            self._opened[folder] = known = open_subject(artifact, like=like, trust_remote_code=trusted)
        return known


@dataclass(frozen=True)
class Stage:
    """A stage. It runs again if the recipe's model, its section `name` or the content of its `inputs` has changed.

    `run` does the work. `summary` is one line about the result, read from disk. A later run skips the stage only if
    its `outputs` are unchanged; without `outputs`, the result is the artifact in `job.folder(name)`. `check` raises
    what can be known to fail before the first stage.
    """

    name: str
    inputs: Callable[[Job], Iterable[Path]]
    run: Callable[[Job, Progress], None]
    summary: Callable[[Job], str]
    outputs: Callable[[Job], Iterable[Path]] | None = None
    check: Callable[[Job], None] = lambda job: None


def sources(job: Job) -> Iterator[Path]:
    """The files of the recipe's sources: weights, configs, tokenizers."""
    yield from job.subject.planned.source_files  # what was measured depends on these and on texts
    yield from (source.folder / "config.json" for source in job.plan.sources)
    yield from job.plan.small_files


def texts(job: Job, names: Iterable[str]) -> Iterator[Path]:
    """The local files among files and hub datasets; a dataset gives a path that does not exist."""
    for name in names:
        file = Path(user_path(name, folder=job.recipe.folder))
        yield from files_below(file) if file.is_dir() else [file]


def artifact_files(folder: Path) -> Iterator[Path]:
    """The files that define an artifact's model: not its card, reports and exports."""
    for pattern in BODY:
        yield from folder.glob(pattern)
