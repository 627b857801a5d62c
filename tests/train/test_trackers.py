"""Losses, rates and held-out losses reach the trackers that were asked for."""

from pathlib import Path
from typing import Any

import corpus
import pytest
from accelerate import tracking
from accelerate.utils import LoggerType

from frankenmoe.errors import PlanError
from frankenmoe.train.run import train

Parents = dict[str, list[Path]]


class Remembering(tracking.GeneralTracker):
    """A tracker that keeps everything in memory."""

    name = "tensorboard"
    requires_logging_directory = True
    rows: list[tuple[int, dict[str, float]]]
    settings: dict[str, Any]
    finished: bool

    def __init__(self, run_name: str, logging_dir: str) -> None:
        super().__init__()
        type(self).rows, type(self).settings, type(self).finished = [], {}, False

    @property
    def tracker(self) -> None:
        return None

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.settings.update(values)

    def log(self, values: dict[str, float], step: int) -> None:
        self.rows.append((step, values))

    def finish(self) -> None:
        type(self).finished = True


def test_trackers_get_every_step_and_every_look(
    parents: Parents, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "_available_trackers", [LoggerType.TENSORBOARD])
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "tensorboard", Remembering)
    text, recipe = corpus.write_texts(tmp_path), corpus.recipe(tmp_path, parents["llama"])
    settings = corpus.settings(what="routers,norms")
    report = train(recipe, tmp_path / "out", data=text, settings=settings, report_to=["tensorboard"]).report
    steps = [(step, row) for step, row in Remembering.rows if "loss" in row]
    assert [(step, row["loss"]) for step, row in steps] == list(enumerate(report["losses"], start=1))
    assert all(row["gradient_norm"] > 0 for _, row in steps)
    assert steps[-1][1]["rate_router"] < settings.router_rate
    looks = {step: row["held_out/e0"] for step, row in Remembering.rows if "held_out/e0" in row}
    assert looks == {look["step"]: look["loss"]["e0"] for look in report["looks"]}
    assert (Remembering.settings["steps"], Remembering.settings["what"]) == (6, "('routers', 'norms')")
    assert Remembering.finished


def test_a_tracker_that_is_not_installed_is_refused(parents: Parents, tmp_path: Path) -> None:
    text, recipe = corpus.write_texts(tmp_path), corpus.recipe(tmp_path, parents["llama"])
    with pytest.raises(PlanError, match="no tracker tensorbord"):
        train(recipe, tmp_path / "out", data=text, settings=corpus.settings(), report_to=["tensorbord"])
