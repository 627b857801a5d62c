"""Reports on disk: each class reads what it wrote, what was written before it existed, and nothing else."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from frankenmoe.artifact.reports import REPORTS, AuditReport, ExportReport, TrainingReport
from frankenmoe.errors import ArtifactError

# as the stages wrote them before reports were classes; a training report then named neither its kind nor its version
EARLIER: dict[str, dict[str, Any]] = {
    "training": {
        "from": "/models/moe",
        "settings": {"what": ["routers"], "steps": 6},
        "data": {"maths": ["maths.txt"]},
        "parameters": 512,
        "steps": 6,
        "best_step": 4,
        "improved": True,
        "held_out_loss": {"before": {"maths": 4.5}, "best": {"maths": 4.25}, "after": {"maths": 4.3}},
        "mean_held_out_loss": {"before": 4.5, "best": 4.25, "after": 4.3},
        "largest_load": {"before": 0.5, "best": 0.5, "after": 0.6},
        "looks": [{"step": 0, "mean": 4.5}],
        "losses": [4.6, 4.4],
    },
    "audit": {
        "kind": "frankenmoe audit",
        "version": 1,
        "finished": "2026-11-29T00:00:00+00:00",
        "versions": {"frankenmoe": "0.1.0"},
        "subject": {"what": "virtual artifact", "path": "/models/moe", "name": "moe"},
        "recipe_digest": "d",
        "recipe": {"base_model": "org/base"},
        "record": {"stages": []},
        "model": {"experts": ["a", "b"], "layers": 1},
        "text": {"a": {"tokens": 10, "origin": ["a.txt"], "own_expert": 0, "digest": "x"}},
        "answers": [{"key": "load", "level": "bad", "sentence": "b gets nothing"}],
        "routers": [
            {
                "layer": 0,
                "path": "",
                "load": {"share": [1.0, 0.0], "dead": [1], "cv": 1.0},
                "domains": {"own_first": {"a": 1.0, "other": None}, "information": 0.0},
                "sentences": [],
            }
        ],
    },
    "eval": {
        "harness": "h",
        "kind": "frankenmoe eval",
        "models": [
            {
                "name": "moe",
                "kind": "moe",
                "tasks": {"mmlu": {"value": 0.25, "stderr": None, "documents": 4, "metric": "acc"}},
                "domains": {"a": {"nats_per_token": 4.5, "blocks": 2}},
                "tokens_per_second": 10.0,
                "memory_bytes": 100,
                "errors": [],
            }
        ],
        "verdict": ["It is as good as its base."],
    },
    "export": {
        "kind": "frankenmoe export",
        "version": 1,
        "recipe_digest": "d",
        "files": [
            {
                "path": "moe-Q4_0.gguf",
                "type": "q4_0",
                "bytes": 100,
                "bits_per_weight": 4.5,
                "holds": {"Q4_0": 10},
                "notes": ["a note"],
                "check": {"kl": 0.5, "top1": 1, "perplexity_ratio": 1.0, "tokens_per_second": 2.0, "positions": 3},
            }
        ],
    },
    "samples": {
        "kind": "frankenmoe samples",
        "version": 1,
        "finished": "2026-11-29T00:00:00+00:00",
        "recipe_digest": "d",
        "routers_sha256": "r",
        "experts": ["a", "b"],
        "settings": {"max_new_tokens": 4, "temperature": 0.0, "seed": 0},
        "samples": [{"prompt": "p", "reply": "r", "trace": [{"token": "t", "experts": [0, 1]}]}],
    },
}


def plain(value: object) -> Any:
    return json.loads(json.dumps(value))


def among(written: Any, earlier: Any) -> Any:
    """`written` without the keys that `earlier` does not have, at any depth."""
    if isinstance(earlier, dict):
        return {key: among(written[key], value) for key, value in earlier.items()}
    if isinstance(earlier, list):
        return [among(each, value) for each, value in zip(written, earlier, strict=True)]
    return written


@pytest.mark.parametrize("kind", REPORTS)
def test_an_earlier_report_is_read_and_keeps_all_its_keys(kind: str, tmp_path: Path) -> None:
    file = tmp_path / f"{kind}.json"
    file.write_text(json.dumps(EARLIER[kind]))
    report = REPORTS[kind].read(file)
    written = plain(report.to_dict())
    assert among(written, EARLIER[kind]) == EARLIER[kind]
    assert (written["kind"], written["version"]) == (f"frankenmoe {kind}", 1)
    report.write(tmp_path / "again.json")
    assert plain(REPORTS[kind].read(tmp_path / "again.json").to_dict()) == written


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version": 2}, "is of version 2, this frankenmoe reads version 1"),
        ({"kind": "frankenmoe eval"}, "is of the kind 'frankenmoe eval', expected 'frankenmoe audit'"),
        ({"model": {"experts": "a"}}, "model.experts must be a list"),
        ({"routers": []}, "routers must be a list with one router per layer"),
        ({"answers": [{"level": "bad", "sentence": 3}]}, "sentence must be text"),
    ],
)
def test_what_is_no_such_report_is_one_sentence(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    file = tmp_path / "audit.json"
    file.write_text(json.dumps(EARLIER["audit"] | change))
    with pytest.raises(ArtifactError, match=words) as caught:
        AuditReport.read(file)
    assert str(file) in caught.value.message
    assert len(caught.value.message.splitlines()) == 1


@pytest.mark.parametrize("text", ["no json", "[]", "3", "[" * 100_000])
def test_a_file_that_is_no_object_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ArtifactError, match=r"a\.json is not a report"):
        TrainingReport.read(tmp_path / "a.json")
    with pytest.raises(ArtifactError, match="cannot be read"):
        TrainingReport.read(tmp_path / "none.json")


def test_a_run_that_ended_in_nan_can_be_reported(tmp_path: Path) -> None:
    losses = {"before": 4.5, "best": 4.25, "after": math.nan}
    TrainingReport.model_validate(EARLIER["training"] | {"mean_held_out_loss": losses}).write(tmp_path / "t.json")
    assert TrainingReport.read(tmp_path / "t.json").kept == 4.25


def test_a_measure_of_nothing_is_none() -> None:
    (row,) = EARLIER["export"]["files"]
    report = ExportReport.model_validate({"files": [row | {"check": row["check"] | {"kl": math.nan}}]})
    (file,) = report.files
    assert file.check is not None
    assert file.check.kl is None


def test_names_with_bytes_that_are_no_text_are_kept(tmp_path: Path) -> None:
    (row,) = EARLIER["export"]["files"]
    ExportReport.model_validate({"files": [row | {"path": "a\udcff.gguf"}]}).write(tmp_path / "e.json")
    assert ExportReport.read(tmp_path / "e.json").files[0].name == "a\udcff.gguf"
