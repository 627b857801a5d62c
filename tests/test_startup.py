"""What every command imports, by the cases of benchmarks/startup.py; not how long that takes."""

import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import startup  # noqa: E402

sys.path.remove(str(BENCHMARKS))
LIGHT = [case for case in startup.CASES if "torch" not in case.needs]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("startup")
    startup.prepare(folder)  # which builds both forms, and so remembers what transformers says of them
    return folder


@pytest.mark.parametrize("case", LIGHT, ids=[case.name for case in LIGHT])
def test_a_command_imports_only_what_it_needs(case: Any, work: Path) -> None:
    assert set(startup.imported(case, work)) <= set(case.needs)


def test_the_benchmark_has_every_command() -> None:
    from frankenmoe.cli.app import app

    tried = {case.words.split()[0] for case in startup.CASES}
    # the first two are other commands in a row, `serve` does not end, the others import what `fit` and `verify` do
    assert set(app.commands) - tried == {"demo", "run", "serve", "add-expert", "remove-expert", "prune", "adopt"}
