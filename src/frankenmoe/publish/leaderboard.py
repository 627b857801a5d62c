"""The six tasks of the Open LLM Leaderboard v1 as it wrote them into cards, and scores that it published.

The names are those of the leaderboard's own pull requests, so that scores can be compared with published ones.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal
from typing import Any, Self

from pydantic import model_validator

from frankenmoe.artifact.reports import StageReport
from frankenmoe.errors import ArtifactError
from frankenmoe.recipe.refusals import refusal
from frankenmoe.suggest import did_you_mean

PLACES = Decimal("0.01")


@dataclass(frozen=True, slots=True)
class Task:
    """How one task is named in a model index, and how many documents it has."""

    dataset_name: str
    dataset_type: str
    config: str | None
    split: str
    shots: int
    metric: str
    metric_name: str | None
    documents: int


TASKS: Mapping[str, Task] = {
    "arc_challenge": Task(
        "AI2 Reasoning Challenge (25-Shot)",
        "ai2_arc",
        "ARC-Challenge",
        "test",
        25,
        "acc_norm",
        "normalized accuracy",
        1172,
    ),
    "hellaswag": Task(
        "HellaSwag (10-Shot)", "hellaswag", None, "validation", 10, "acc_norm", "normalized accuracy", 10042
    ),
    "mmlu": Task("MMLU (5-Shot)", "cais/mmlu", "all", "test", 5, "acc", "accuracy", 14042),
    "truthfulqa": Task("TruthfulQA (0-shot)", "truthful_qa", "multiple_choice", "validation", 0, "mc2", None, 817),
    "winogrande": Task("Winogrande (5-shot)", "winogrande", "winogrande_xl", "validation", 5, "acc", "accuracy", 1267),
    "gsm8k": Task("GSM8k (5-shot)", "gsm8k", "main", "test", 5, "acc", "accuracy", 1319),
}


@dataclass(frozen=True, slots=True)
class Origin:
    """Who measured: a name and the page where it can be looked up."""

    name: str
    url: str


def known(task: str) -> str:
    """`task` itself; ArtifactError for a name that is not one of the six."""
    if task not in TASKS:
        raise ArtifactError(f"{task!r} is not a task of the leaderboard", hint=did_you_mean(task, TASKS))
    return task


class LeaderboardReport(StageReport):
    """leaderboard.json: scores of this model that somebody else measured, in percent by task. A person writes it."""

    name = "leaderboard"

    source: Origin
    scores: dict[str, float | None]

    @model_validator(mode="after")
    def _in_percent(self) -> Self:
        odd = next((f"{task} {score:g}" for task, score in self.published.items() if not 0 <= score <= 100), None)
        if odd or not self.published:
            raise refusal(
                f"are in percent, from 0 to 100, found {odd or 'none'}", hint="correct that file", at=("scores",)
            )
        return self

    @property
    def published(self) -> dict[str, float]:
        """The scores that are there."""
        return {known(task): score for task, score in self.scores.items() if score is not None}


def rounded(percent: float | Decimal) -> Decimal:
    """Rounds to two places, halves away from zero, as the leaderboard does: 39.925 becomes 39.93."""
    # through text: 39.925 is a little less than itself in binary
    return Decimal(str(percent)).quantize(PLACES, rounding=ROUND_HALF_UP)


def average(scores: Mapping[str, float]) -> Decimal | None:
    """`Avg.`: the plain mean of all six, in percent; None if one is missing."""
    if set(scores) != set(TASKS):
        return None
    return rounded(sum((Decimal(str(scores[task])) for task in TASKS), Decimal()) / len(TASKS))


def ordered(tasks: Iterable[str]) -> list[str]:
    """Tasks in the leaderboard's order."""
    given = set(map(known, tasks))
    return [task for task in TASKS if task in given]


def eval_results(scores: Mapping[str, float], *, origin: Origin | None) -> Sequence[Any]:
    """The scores (percent) as huggingface_hub's EvalResult, from which it makes a card's `model-index`."""
    from huggingface_hub import EvalResult

    return [
        EvalResult(
            task_type="text-generation",
            task_name="Text Generation",
            dataset_type=TASKS[task].dataset_type,
            dataset_name=TASKS[task].dataset_name,
            dataset_config=TASKS[task].config,
            dataset_split=TASKS[task].split,
            dataset_args={"num_few_shot": TASKS[task].shots},
            metric_type=TASKS[task].metric,
            metric_name=TASKS[task].metric_name,
            metric_value=float(rounded(scores[task])),
            source_name=origin.name if origin else None,
            source_url=origin.url if origin else None,
        )
        for task in ordered(scores)
    ]
