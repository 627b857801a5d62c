"""Scores as the Open LLM Leaderboard v1 wrote them, against the index and average of a model that it scored."""

from decimal import Decimal
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCardData

from frankenmoe.errors import ArtifactError
from frankenmoe.publish.leaderboard import TASKS, Origin, average, eval_results, ordered, rounded

RAIDEN = {
    "arc_challenge": 41.89,
    "hellaswag": 66.2,
    "mmlu": 26.24,
    "truthfulqa": 39.18,
    "winogrande": 63.61,
    "gsm8k": 2.43,
}
PAGE = Origin(
    "Open LLM Leaderboard",
    "https://huggingface.co/spaces/HuggingFaceH4/open_llm_leaderboard?query=Kquant03/Raiden-16x3.43B",
)
GOLDEN = Path(__file__).parent / "raiden.yml"


def test_raidens_scores_give_raidens_index() -> None:
    data = ModelCardData(model_name="Raiden-16x3.43B", eval_results=list(eval_results(RAIDEN, origin=PAGE)))
    assert yaml.safe_load(data.to_yaml()) == yaml.safe_load(GOLDEN.read_text())


def test_raidens_average_is_rounded_as_the_leaderboard_did() -> None:
    assert average(RAIDEN) == Decimal("39.93")


def test_there_is_no_average_of_five() -> None:
    assert average(dict.fromkeys(list(TASKS)[:5], 50.0)) is None


@pytest.mark.parametrize(("value", "text"), [(39.925, "39.93"), (66.2, "66.20"), (0.005, "0.01"), (2.4349, "2.43")])
def test_halves_are_rounded_up(value: float, text: str) -> None:
    assert str(rounded(value)) == text


def test_tasks_stand_in_the_leaderboards_order() -> None:
    assert ordered(["gsm8k", "arc_challenge", "mmlu"]) == ["arc_challenge", "mmlu", "gsm8k"]


def test_a_task_nobody_knows_is_refused_with_the_nearest() -> None:
    with pytest.raises(ArtifactError, match="'hellaswg'") as caught:
        ordered(["hellaswg"])
    assert "hellaswag" in str(caught.value)


def test_without_an_origin_no_source_is_claimed() -> None:
    (result,) = eval_results({"mmlu": 30.0}, origin=None)
    assert result.source_name is result.source_url is None
