"""What `frankenmoe families` says of programs agrees with what plans refuse and with what was run."""

import json
from collections.abc import Iterable
from pathlib import Path

import pytest

from frankenmoe.families.runtimes import LLAMACPP, LLAMACPP_LACKS, VLLM, VLLM_ROUNDED, pairs
from gguf_cases import ALL, ARCHITECTURE, REFUSED, WITH_VISION

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
PROGRAMS = {(pair.family, pair.fmt): pair.programs for pair in pairs()}


def of(names: Iterable[str]) -> set[tuple[str, str]]:
    """The (family, format) of cases."""
    return {(ALL[name].family, ALL[name].fmt) for name in names}


def test_only_pairs_that_ran_in_llama_cpp_count_as_run() -> None:
    said = {pair for pair, programs in PROGRAMS.items() if programs["llama.cpp"].how.startswith(LLAMACPP)}
    assert said == of(ARCHITECTURE) | {*WITH_VISION.values()}
    assert {pair for pair, programs in PROGRAMS.items() if programs["llama.cpp"].runs} == said


def test_models_that_export_refuses_are_named() -> None:
    assert set(LLAMACPP_LACKS) == of(REFUSED) & of(ARCHITECTURE) | {*WITH_VISION.values()}
    assert PROGRAMS["phi3", "glm4_moe"]["llama.cpp"].how == f"{LLAMACPP}; models with longrope are refused"
    assert PROGRAMS["llama", "mixtral"]["llama.cpp"].how == LLAMACPP


def test_only_pairs_that_ran_in_vllm_count_as_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """benchmarks/in_vllm.py builds and runs them; its result is kept."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    import in_vllm

    kept = json.loads((BENCHMARKS / "results" / "vllm-small.json").read_text())["rows"]
    goals = [(row["what"].split(": ")[0], bool(row["reached"])) for row in kept if row["limit"] or row["at_least"]]
    failed = {name for name, reached in goals if not reached}
    seen = {name: name not in failed for name, _ in goals}
    for dtype, said in (("float32", VLLM), ("bfloat16", VLLM_ROUNDED)):
        right, wrong = (
            {
                (toy.vision[0] if toy.vision else toy.family, toy.fmt)
                for name, toy in in_vllm.TOYS.items()
                if toy.dtype == dtype and seen.get(name) is wanted
            }
            for wanted in (True, False)
        )
        ran = {pair for pair, programs in PROGRAMS.items() if programs["vLLM"].how.split(";")[0] == said}
        assert ran == right - wrong
