"""Broken recipes, configs, headers, adapters, tokenizers, texts and records: used, or refused in a sentence."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import pytest

import forks
import fuzzing

FEW, MANY = 3, 100  # mutations of each kind
FIRST = int(os.environ.get("FUZZ_SEED", "0"))  # another number tries other mutations
WORK = "import json, sys, pathlib, fuzzing; world, report, cases = sys.argv[1:]; "
WORK += "fuzzing.work(pathlib.Path(world), json.loads(cases), pathlib.Path(report))"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fuzzing.make_world(tmp_path_factory.mktemp("fuzz") / "world")


def failures(world: Path, cases: Sequence[tuple[str, int]], *, report: Path) -> list[str]:
    """What goes wrong with these kinds and seeds, each with the command that repeats it; in processes with limits."""
    found: list[str] = []
    done = 0
    while done < len(cases):
        report.unlink(missing_ok=True)
        child = forks.run(WORK, world, report, json.dumps(cases[done:]))
        lines = [json.loads(line) for line in report.read_text().splitlines()] if report.exists() else []
        assert lines, f"nothing was tried: {child.stderr[-3000:]}"
        if lines[-1][-1] == fuzzing.BEGUN:  # the process died of it
            lines[-1][-1] = f"it ended the process with {child.returncode}: {child.stderr[-3000:]}"
        failed = (line for line in lines if line[-1] not in (None, fuzzing.BEGUN))
        found += [f"python tests/fuzzing.py {kind} {seed}\n{state}" for kind, seed, state in failed]
        done += len({(kind, seed) for kind, seed, _ in lines})
    return found


def test_a_fuzzer_that_cannot_fail_would_prove_nothing(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = fuzzing.Kind((("r.yml", "r.yml"),), (lambda random, data: data,), (("plan --no-such-option",),))
    monkeypatch.setitem(fuzzing.KINDS, "odd", kind)
    with pytest.raises(AssertionError, match="No such option"):
        fuzzing.try_one(world, "odd", 5)


def test_a_few_of_every_kind(world: Path, tmp_path: Path) -> None:
    cases = [(kind, FIRST + seed) for kind in fuzzing.KINDS for seed in range(FEW)]
    found = failures(world, cases, report=tmp_path / "report")
    assert not found, "\n\n".join(found)


@pytest.mark.slow
@pytest.mark.parametrize("kind", fuzzing.KINDS)
def test_a_hundred_of_every_kind(kind: str, world: Path, tmp_path: Path) -> None:
    fuzzing.try_unbroken(world, kind)
    found = failures(world, [(kind, FIRST + seed) for seed in range(MANY)], report=tmp_path / "report")
    assert not found, "\n\n".join(found)
