"""A recipe on its way to a folder, and what a stage is; does not know which stages there are."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from frankenmoe.artifact.folder import Artifact, open_artifact
from frankenmoe.data.given import user_path
from frankenmoe.pipeline.state import files_below
from frankenmoe.planning import Plan
from frankenmoe.progress import Progress
from frankenmoe.recipe import Expert, Recipe
from frankenmoe.recipe.sections import BuildSettings
from frankenmoe.subject import Subject, open_subject, same_plan

MODEL = "model"
WORK = "work"  # what later steps stand on: virtual artifacts, megabytes
REPORTS = "reports"
BODY = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "recipe.yml")


@dataclass(frozen=True)
class Job:
    """A recipe on its way to a folder."""

    subject: Subject
    out: Path
    _opened: dict[Path, Subject] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def recipe(self) -> Recipe:
        return self.subject.recipe

    @property
    def model(self) -> Path:
        """The artifact that is handed over in the end."""
        return self.out / MODEL

    @property
    def reports(self) -> Path:
        return self.model / REPORTS

    @property
    def plan(self) -> Plan:
        """What the recipe becomes."""
        return self.subject.plan

    @property
    def build(self) -> BuildSettings:
        return self.recipe.build or BuildSettings()

    @property
    def artifact(self) -> Artifact:
        """The finished model."""
        return open_artifact(self.model)

    def open(self, folder: Path) -> Subject:
        """An artifact that an earlier stage made; its plan is not made again where the recipe is the same."""
        artifact = open_artifact(folder)
        known = self._opened.get(folder)
        if known is None or known.artifact is None or known.artifact.record != artifact.record:
            trusted = self.subject.trust_remote_code
            like = next((each for each in (self.subject, *self._opened.values()) if same_plan(artifact, each)), None)
            self._opened[folder] = known = open_subject(artifact, like=like, trust_remote_code=trusted)
        return known


@dataclass(frozen=True)
class Stage:
    """A step. `inputs` and `outputs` are files whose content counts, `settings` plain data that does.

    Outputs are what a later run checks before it skips the step. `act` does the work, `said` is its line in the
    summary, read from disk. `folder` is given where the result is a folder that appears whole.
    """

    name: str
    settings: Callable[[Job], Any]
    inputs: Callable[[Job], Iterable[Path]]
    outputs: Callable[[Job], Iterable[Path]]
    act: Callable[[Job, Progress], None]
    said: Callable[[Job], str]
    folder: Callable[[Job], Path] | None = None
    check: Callable[[Job], None] = lambda job: None


def sources(job: Job) -> Iterator[Path]:
    """What the recipe's sources hold: weights, configs, tokenizers."""
    yield from job.plan.source_files
    yield from (source.folder / "config.json" for source in job.plan.sources)
    yield from job.plan.small_files


def texts(job: Job, names: Iterable[str]) -> Iterator[Path]:
    """Those of the names that are files; what lies on the hub is named by its name."""
    for name in names:
        file = Path(user_path(name, folder=job.recipe.folder))
        yield from files_below(file) if file.is_dir() else [file]


def expert_data(experts: Iterable[Expert]) -> Iterator[str]:
    """The data of all experts, nested ones too."""
    for expert in experts:
        yield from expert.data
        yield from expert_data(expert.experts)


def artifact_files(folder: Path) -> Iterator[Path]:
    """What makes an artifact the model it is: not its card, reports and exports."""
    for pattern in BODY:
        yield from folder.glob(pattern)
