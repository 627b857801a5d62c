"""What stages report, one class per kind of report. The same class writes the file and reads it. Does not import torch.

Everything that another stage reads is a field here. Other keys belong to the stage that wrote them: they are kept.
"""

import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from statistics import mean
from typing import Annotated, Any, ClassVar, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError, model_validator

from frankenmoe.artifact.folder import ROUTERS, Artifact, write_json
from frankenmoe.artifact.record import AnyText
from frankenmoe.checkpoint.fingerprint import sha256
from frankenmoe.checkpoint.header import parse_object
from frankenmoe.checkpoint.jsonfile import small_bytes
from frankenmoe.errors import ArtifactError
from frankenmoe.recipe.refusals import first_problem, refusal

VERSION = 1
HINT = "run the stage that wrote it again, or remove the file"

# L layers, E experts


def _none_for_nan(value: Any) -> Any:
    return None if value != value else value


Measure = Annotated[float | None, BeforeValidator(_none_for_nan)]
"""A number, or None if it was not measured."""


class ReportPart(BaseModel):
    """A part of a report."""

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)


class StageReport(ReportPart):
    """A report on an artifact. `recipe_digest` and `routers_sha256` say which artifact, in which state."""

    name: ClassVar[str]

    kind: str = ""
    version: int = VERSION
    recipe_digest: str | None = None
    routers_sha256: str | None = None
    versions: dict[str, str] = {}

    @classmethod
    def read(cls, file: Path) -> Self:
        """The report in a file; ArtifactError for another kind or version of report."""
        return cls.parse(read_object(file), file=file)

    @classmethod
    def parse(cls, data: Mapping[str, Any], *, file: Path) -> Self:
        """The report in plain data that was read from `file`."""
        found = data.get("kind") or cls._kind()
        if found != cls._kind():
            raise ArtifactError(f"{file} is of the kind {found!r}, expected {cls._kind()!r}", hint=HINT)
        if data.get("version", VERSION) != VERSION:
            raise ArtifactError(
                f"{file} is of version {data['version']!r}, this frankenmoe reads version {VERSION}",
                hint="update frankenmoe, or run the stage that wrote it again",
            )
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise ArtifactError(f"{file}: {first_problem(error)}"[:300], hint=HINT) from error

    @classmethod
    def _kind(cls) -> str:
        return f"frankenmoe {cls.name}"

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data."""
        return self.model_dump(by_alias=True) | {"kind": self._kind()}

    def write(self, file: Path) -> None:
        """Writes the report as JSON. The file appears whole or not at all."""
        write_json(file, self.to_dict())


def read_object(file: Path) -> dict[str, Any]:
    """A JSON file that holds an object."""
    try:
        return parse_object(small_bytes(file))
    except OSError as error:
        raise ArtifactError(f"{file} cannot be read: {error.strerror}", hint="check the path") from error
    except ValueError as error:
        raise ArtifactError(f"{file} is not a report: {error}", hint=HINT) from error


def about(artifact: Artifact) -> dict[str, Any]:
    """The fields of a report that say which artifact it is about, and what made it."""
    return {
        "recipe_digest": artifact.record["recipe_digest"],
        "routers_sha256": sha256(artifact.folder / ROUTERS),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """The versions of frankenmoe and of what it computes with."""
    packages = {name: version(name) for name in ("frankenmoe", "torch", "transformers")}
    return {**packages, "python": platform.python_version()}


class ExpertLoad(ReportPart):
    """The share of tokens that each expert got, which sums to 1, and the experts that got none."""

    share: tuple[float, ...]
    dead: tuple[int, ...] = ()


class OwnShare(ReportPart):
    """Domain -> share of its tokens whose first expert is the domain's own; None for text without an expert."""

    own_first: dict[str, float | None] = {}


class RouterReport(ReportPart):
    """One router. `path` is empty for the router of a layer, and leads to the expert for a nested one."""

    layer: int
    path: AnyText
    load: ExpertLoad
    domains: OwnShare | None = None


class AuditedModel(ReportPart):
    experts: tuple[AnyText, ...]


class ReadText(ReportPart):
    tokens: int


class AuditAnswer(ReportPart):
    """What the audit says about one question. `level` is good, mind or bad."""

    level: AnyText
    sentence: AnyText
    key: AnyText = ""


class AuditReport(StageReport):
    """audit.json: which experts get the tokens, and what is wrong with that."""

    name = "audit"

    model: AuditedModel
    text: dict[str, ReadText]
    answers: tuple[AuditAnswer, ...] = ()
    routers: tuple[RouterReport, ...]
    record: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _has_routers(self) -> Self:
        if not self.outer:
            raise refusal("must be a list with one router per layer, found none", hint=HINT, at=("routers",))
        return self

    @property
    def outer(self) -> tuple[RouterReport, ...]:
        """The routers of the layers, without nested ones."""
        return tuple(router for router in self.routers if not router.path)

    @property
    def shares(self) -> tuple[tuple[float, ...], ...]:
        """The share of every expert in every layer, [L, E]."""
        return tuple(router.load.share for router in self.outer)

    @property
    def dead(self) -> list[tuple[int, int]]:
        """(layer, expert) of every expert that got no token."""
        return [(router.layer, expert) for router in self.outer for expert in router.load.dead]

    @property
    def tokens(self) -> int:
        return sum(text.tokens for text in self.text.values())

    @property
    def own(self) -> dict[str, list[float]]:
        """Domain -> share of its tokens whose first expert is its own, layer by layer."""
        found: dict[str, list[float]] = {}
        for router in self.outer:
            for domain, share in (router.domains.own_first if router.domains else {}).items():
                if share is not None:
                    found.setdefault(domain, []).append(share)
        return found


class TaskScore(ReportPart):
    """The score of one task as a share, with its standard error. `value` is None if the task failed."""

    value: Measure = None
    stderr: Measure = None
    documents: int = 0


class DomainLoss(ReportPart):
    nats_per_token: float


class EvaluatedModel(ReportPart):
    """One model. `kind` is moe, model, or a rival: base, parent, merge, random gates, own expert forced or best
    parent per text. Memory is in bytes. `experts_per_token` is that of a mixture; older reports do not have it."""

    name: AnyText
    kind: AnyText
    experts_per_token: int | None = None
    tasks: dict[str, TaskScore] = {}
    domains: dict[str, DomainLoss] = {}
    tokens_per_second: Measure = None
    memory_bytes: int | None = None
    errors: tuple[AnyText, ...] = ()

    @property
    def scores(self) -> dict[str, float]:
        """Task -> score in percent, of the tasks that did not fail."""
        return {name: 100 * task.value for name, task in self.tasks.items() if task.value is not None}

    @property
    def loss(self) -> dict[str, float]:
        """Domain -> held-out loss in nats per token."""
        return {name: domain.nats_per_token for name, domain in self.domains.items()}


class EvalReport(StageReport):
    """eval.json: what models score and cost, side by side."""

    name = "eval"

    models: tuple[EvaluatedModel, ...]
    verdict: tuple[AnyText, ...] = ()
    kept: dict[str, dict[str, float]] = {}

    @property
    def moe(self) -> EvaluatedModel | None:
        return next((model for model in self.models if model.kind == "moe"), None)

    @property
    def documents(self) -> dict[str, int]:
        """Task -> the fewest documents that any model was scored on."""
        found: dict[str, int] = {}
        for model in self.models:
            for name in model.scores:
                found[name] = min(found.get(name, model.tasks[name].documents), model.tasks[name].documents)
        return found


class FileCheck(ReportPart):
    """A GGUF file beside its source: divergence in nats, share of equal best tokens, perplexity as a factor."""

    kl: Measure = None
    top1: Measure = None
    perplexity_ratio: Measure = None
    tokens_per_second: Measure = None


class ExportedFile(ReportPart):
    """One GGUF file. `path` is its name beside the report; `check` is None if it was not compared."""

    path: AnyText
    type: AnyText
    bytes: int
    bits_per_weight: float
    check: FileCheck | None = None
    notes: tuple[AnyText, ...] = ()

    @property
    def name(self) -> str:
        return Path(self.path).name


class ExportReport(StageReport):
    """export.json: the files that were made for llama.cpp."""

    name = "export"

    files: tuple[ExportedFile, ...]


class TraceStep(ReportPart):
    """A token and its first expert in every layer; -1 if a choice was dropped."""

    token: AnyText
    experts: tuple[int, ...]


class Sample(ReportPart):
    """A prompt and the reply. `trace` covers the first tokens of both."""

    prompt: AnyText
    reply: AnyText
    trace: tuple[TraceStep, ...] = ()


class SampleSettings(ReportPart):
    max_new_tokens: int
    temperature: float
    seed: int


class SamplesReport(StageReport):
    """samples.json: the model's replies to prompts."""

    name = "samples"

    experts: tuple[AnyText, ...]
    settings: SampleSettings
    samples: tuple[Sample, ...]


class BeforeAndAfter(ReportPart):
    """A value before training, in the best state and in the last state."""

    model_config = ConfigDict(allow_inf_nan=True)

    before: float
    best: float
    after: float


class TrainingReport(StageReport):
    """training.json: what was trained, on what, and the held-out loss in nats per token."""

    name = "training"

    settings: dict[str, Any]
    data: dict[str, Any]
    steps: int
    best_step: int
    improved: bool
    mean_held_out_loss: BeforeAndAfter

    @property
    def what(self) -> tuple[str, ...]:
        """What was trained."""
        return tuple(self.settings.get("what") or ("routers",))

    @property
    def kept(self) -> float:
        """The mean held-out loss of the state that was kept."""
        losses = self.mean_held_out_loss
        return losses.best if self.improved else losses.after


class FitLosses(ReportPart):
    """Held-out loss by expert, in nats per token. `own_expert`: every text goes to its own expert."""

    model_config = ConfigDict(allow_inf_nan=True)

    before: dict[str, float] | None = None
    after: dict[str, float]
    own_expert: dict[str, float]


class FitReport(ReportPart):
    """The `fit` entry of a stage in the record: how routers were fitted."""

    method: AnyText
    text: dict[str, ReadText]
    held_out_loss: FitLosses

    @property
    def before(self) -> float | None:
        """The mean held-out loss with the earlier routers."""
        losses = self.held_out_loss.before
        return mean(losses.values()) if losses else None

    @property
    def after(self) -> float:
        return mean(self.held_out_loss.after.values())

    @property
    def own_expert(self) -> float:
        return mean(self.held_out_loss.own_expert.values())


REPORTS: Mapping[str, type[StageReport]] = {
    report.name: report for report in (AuditReport, EvalReport, ExportReport, SamplesReport, TrainingReport)
}
