"""A recipe on its way to a folder, and what a stage is; does not know which stages there are."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from frankenmoe.planning import Plan, plan
from frankenmoe.progress import Progress
from frankenmoe.recipe import Expert, Recipe
from frankenmoe.recipestages import Build
from frankenmoe.running.state import files_below

MODEL = "model"
WORK = "work"  # what later steps stand on: virtual artifacts, megabytes
REPORTS = "reports"
BODY = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "recipe.yml")


@dataclass(frozen=True)
class Job:
    """A recipe on its way to a folder."""

    recipe: Recipe
    out: Path
    trust_remote_code: bool = False

    @property
    def model(self) -> Path:
        """The artifact that is handed over in the end."""
        return self.out / MODEL

    @property
    def reports(self) -> Path:
        return self.model / REPORTS

    @cached_property
    def plan(self) -> Plan:
        """What the recipe becomes; read once, before anything is made."""
        return plan(self.recipe, weights=True, trust_remote_code=self.trust_remote_code)

    @property
    def build(self) -> Build:
        return self.recipe.build or Build.model_validate({})


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
        file = job.recipe.folder / Path(name).expanduser()
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
