"""Reports that a card must not quote: broken, of nothing, or with numbers that cannot be."""

import re
from pathlib import Path

import pytest
from test_card import EXPORT, PUBLISHED, put

from frankenmoe.artifact.folder import Artifact
from frankenmoe.errors import ArtifactError
from frankenmoe.publish.card import make_card


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("not json", "is not a report: "),
        ("[1]", "model is missing"),
        ("[" * 100_000, "nested too deeply"),
        ('{"kind": "frankenmoe audit"}', "model is missing"),
        (
            '{"kind": "frankenmoe audit", "model": {"experts": 3}, "text": {}, "routers": []}',
            "model.experts must be a list",
        ),
        (
            '{"kind": "frankenmoe audit", "model": {"experts": []}, "text": {}, "routers": []}',
            "routers must be a list with one router per layer",
        ),
        (
            '{"kind": "frankenmoe audit", "model": {"experts": []}, "text": {}, "answers": [], "routers": [{"layer": 0,'
            ' "path": "", "load": {"share": [1], "dead": []}, "domains": {"own_first": {"a": Infinity}}}]}',
            "own_first.a must be a finite number",
        ),
    ],
)
def test_a_report_that_cannot_be_read_is_named_with_its_key(artifact: Artifact, text: str, words: str) -> None:
    (artifact.folder / "reports").mkdir()
    file = artifact.folder / "reports" / "audit.json"
    file.write_text(text)
    with pytest.raises(ArtifactError, match=re.escape(words)) as caught:
        make_card(artifact)
    assert str(file) in str(caught.value)


def test_a_file_that_is_no_report_is_refused_where_it_was_asked_for(artifact: Artifact, tmp_path: Path) -> None:
    put(artifact, "something.json", {"a": 1})
    make_card(artifact)  # in the folder it may lie
    (tmp_path / "something.json").write_text("{}")
    with pytest.raises(ArtifactError, match="not a report that a card can quote"):
        make_card(artifact, reports=[tmp_path / "something.json"])


def test_a_score_of_a_task_nobody_knows_is_refused(artifact: Artifact) -> None:
    put(artifact, "leaderboard.json", PUBLISHED | {"scores": {"hellaswga": 3.0}})
    with pytest.raises(ArtifactError, match="hellaswga"):
        make_card(artifact)


@pytest.mark.parametrize("score", [float("nan"), float("inf"), -1, 4189, None])
def test_a_score_that_is_no_percentage_is_refused(artifact: Artifact, score: float | None) -> None:
    put(artifact, "leaderboard.json", PUBLISHED | {"scores": {"hellaswag": score}})
    with pytest.raises(ArtifactError, match=r"leaderboard\.json: (scores|hellaswag)"):
        make_card(artifact)


def test_a_measure_of_nothing_is_a_dash(artifact: Artifact) -> None:
    row = EXPORT[0] | {"check": {"kl": 0.5, "top1": 1, "perplexity_ratio": float("nan"), "tokens_per_second": 2}}
    put(artifact, "export.json", [row])
    assert "| 5.0e-01 | 100.0% | - | 2.0 |" in make_card(artifact).text
