"""Thousands of broken recipes, configs, headers, adapters, tokenizers and records: computed with, or refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import frankenmoe
import fuzzing

SOURCES = (Path(frankenmoe.__file__).parents[1], Path(__file__).parent)
FEW, MANY = 4, 110  # mutations of each kind
FIRST = int(os.environ.get("FUZZ_SEED", "0"))  # another one tries other mutations


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fuzzing.make_world(tmp_path_factory.mktemp("fuzz") / "world")


def broken_by(kind: str, seeds: range, *, world: Path, report: Path) -> list[str]:
    """What goes wrong with these seeds, each with the command that repeats it; in processes with limits."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, SOURCES))}
    found, first = [], seeds.start
    while first < seeds.stop:
        words = [sys.executable, fuzzing.__file__, kind, str(first), str(seeds.stop), str(world), str(report)]
        child = subprocess.run(words, capture_output=True, text=True, env=environment)
        lines = [json.loads(line) for line in report.read_text().splitlines()] if report.exists() else []
        assert lines, f"what is not broken fails: {child.stderr[-3000:]}"
        seed, state = lines[-1]
        if state == fuzzing.BEGUN:  # the process died of it
            found.append(f"{seed} ended the process with {child.returncode}: {child.stderr[-3000:]}")
        elif child.returncode:
            raise AssertionError(f"{kind} {seed}: {child.stderr[-3000:]}")
        first = seed + 1
    found += [f"{seed}: {state}" for seed, state in lines if state not in (None, fuzzing.BEGUN)]
    return [f"python tests/fuzzing.py {kind} {each}" for each in found]


def test_a_fuzzer_that_finds_nothing_would_be_none(tmp_path: Path, world: Path, capfd: pytest.CaptureFixture) -> None:
    """An invented command fails, so that failures are seen to be reported with their seed."""
    with pytest.raises(AssertionError, match="exit code 2"):
        fuzzing.inside(tmp_path, "plan --no-such-option")


@pytest.mark.parametrize("kind", fuzzing.KINDS)
@pytest.mark.parametrize("count", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
def test_what_is_broken_is_computed_with_or_refused(kind: str, count: int, world: Path, tmp_path: Path) -> None:
    found = broken_by(kind, range(FIRST, FIRST + count), world=world, report=tmp_path / "report")
    assert not found, "\n\n".join(found)
