"""The table of stages: what asks for each, what it comes from, what it leaves, and the call that does it.

Each imports its stage when it is its turn. Nothing here computes; what a stage can say of its result is in reports.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from frankenmoe.artifact import open_artifact
from frankenmoe.building import build, check_buildable
from frankenmoe.errors import ArtifactError
from frankenmoe.planning import Plan, plan
from frankenmoe.progress import Progress
from frankenmoe.publish.card import README, is_ours, make_card, write_card
from frankenmoe.recipe import Expert, Recipe
from frankenmoe.recipestages import Audit, Build, Card, Eval, Export
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


def stages_of(job: Job) -> tuple[Stage, ...]:
    """The steps that this recipe asks for, in order."""
    recipe = job.recipe
    chain = [stage for key, stage in CHAIN.items() if getattr(recipe, key, None) is not None]
    first = [VIRTUAL] if chain else []
    after = [stage for key, stage in AFTER.items() if getattr(recipe, key) is not None]
    return (*first, *chain, MODEL_STAGE, *after)


def check(job: Job, stages: Iterable[Stage]) -> None:
    """Everything that can be known to fail, before the first step."""
    changing = any(stage.name in CHAIN for stage in stages)
    check_buildable(job.plan, virtual=job.build.virtual, allow_identical=job.build.allow_identical or changing)
    for stage in stages:
        stage.check(job)


# the model: built from the recipe, or from the last of the virtual artifacts that stages before it made


def _sources(job: Job) -> Iterator[Path]:
    """What the recipe's sources hold: weights, configs, tokenizers."""
    yield from job.plan.source_files
    yield from (source.folder / "config.json" for source in job.plan.sources)
    yield from job.plan.small_files


def _texts(job: Job, names: Iterable[str]) -> Iterator[Path]:
    """Those of the names that are files; what lies on the hub is named by its name."""
    for name in names:
        file = job.recipe.folder / Path(name).expanduser()
        yield from files_below(file) if file.is_dir() else [file]


def expert_data(experts: Iterable[Expert]) -> Iterator[str]:
    """The data of all experts, nested ones too."""
    for expert in experts:
        yield from expert.data
        yield from expert_data(expert.experts)


def _artifact_files(folder: Path) -> Iterator[Path]:
    """What makes an artifact the model it is: not its card, reports and exports."""
    for pattern in BODY:
        yield from folder.glob(pattern)


def _previous(job: Job) -> Path | None:
    """The last virtual artifact before the model."""
    chain = [key for key in CHAIN if getattr(job.recipe, key, None) is not None]
    return job.out / WORK / (chain[-1] if chain else "virtual") if chain else None


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
    size = sum(file.stat().st_size for file in _artifact_files(job.model))
    return f"{open_artifact(job.model).form}, {size / 2**20:,.1f} MiB"


def _model_inputs(job: Job) -> Iterator[Path]:
    before = _previous(job)
    yield from _artifact_files(before) if before else _sources(job)
    if not before:
        yield from _texts(job, expert_data(job.recipe.experts))


VIRTUAL = Stage(
    name="virtual",
    settings=lambda job: job.recipe.digest,
    inputs=lambda job: [*_sources(job), *_texts(job, expert_data(job.recipe.experts))],
    outputs=lambda job: _artifact_files(job.out / WORK / "virtual"),
    act=_build_virtual,
    said=lambda job: f"routers by {job.recipe.gate_mode}",
    folder=lambda job: job.out / WORK / "virtual",
)
MODEL_STAGE = Stage(
    name="build",
    settings=lambda job: [job.recipe.digest, job.build.model_dump(mode="json")],
    inputs=_model_inputs,
    outputs=lambda job: _artifact_files(job.model),
    act=_build_model,
    said=_model_said,
    folder=lambda job: job.model,
)
# recipe key -> the stage that makes a virtual artifact of the one before it
CHAIN: Mapping[str, Stage] = {}


# what is found out about the model, and made of it


def _section(job: Job, key: str) -> Any:
    section = getattr(job.recipe, key)
    assert section is not None
    return section


def _settings(key: str) -> Callable[[Job], Any]:
    return lambda job: _section(job, key).model_dump(mode="json")


def _audit_inputs(job: Job) -> Iterator[Path]:
    section: Audit = _section(job, "audit")
    yield from _artifact_files(job.model)
    yield from _texts(job, section.data or expert_data(job.recipe.experts))


def _eval_inputs(job: Job) -> Iterator[Path]:
    section: Eval = _section(job, "eval")
    yield from _artifact_files(job.model)
    yield from _texts(job, [*expert_data(job.recipe.experts), *([section.data_dir] if section.data_dir else [])])
    if section.against_parents:
        yield from _sources(job)


def _export_inputs(job: Job) -> Iterator[Path]:
    section: Export = _section(job, "export")
    yield from _artifact_files(job.model)
    yield from _texts(job, [section.imatrix] if section.imatrix else [])


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
    card = make_card(artifact, settings=section, trust_remote_code=job.trust_remote_code)
    write_card(artifact, card)


def _card_said(job: Job) -> str:
    lacking = (job.model / README).read_text().partition("## Not in this card")[2].count("\n- ")
    return f"README.md, {lacking} things not in it" if lacking else "README.md, nothing missing"


def _card_inputs(job: Job) -> Iterator[Path]:
    yield from _artifact_files(job.model)
    yield from (file for file in files_below(job.reports) if file.name != "samples.json")
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
    "card": Stage(
        name="card",
        settings=_settings("card"),
        inputs=_card_inputs,
        outputs=lambda job: [job.model / README, *job.reports.glob("samples.json")],
        act=_card,
        said=_card_said,
        check=_check_card,
    ),
}
