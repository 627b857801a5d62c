"""What `frankenmoe families` says of programs agrees with what plans refuse and with what was run."""

import json
from pathlib import Path

import pytest

from frankenmoe.families.runtimes import IN_VLLM, LLAMACPP, LLAMACPP_LACKS, VLLM, pairs
from gguf_cases import ALL, ARCHITECTURE, REFUSED

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
PROGRAMS = {(pair.family, pair.fmt): pair.programs for pair in pairs()}


def of(names: object) -> set[tuple[str, str]]:
    """The (family, format) of cases."""
    return {(ALL[name].family, ALL[name].fmt) for name in names}  # type: ignore[attr-defined]


def test_only_pairs_that_ran_in_llama_cpp_count_as_run() -> None:
    said = {pair for pair, programs in PROGRAMS.items() if programs["llama.cpp"].how.startswith(LLAMACPP)}
    assert said == of(ARCHITECTURE)
    assert {pair for pair, programs in PROGRAMS.items() if programs["llama.cpp"].runs} == said


def test_models_that_export_refuses_are_named() -> None:
    assert set(LLAMACPP_LACKS) == of(REFUSED) & of(ARCHITECTURE)
    assert PROGRAMS["phi3", "glm4_moe"]["llama.cpp"].how == f"{LLAMACPP}; models with longrope are refused"
    assert PROGRAMS["llama", "mixtral"]["llama.cpp"].how == LLAMACPP


def test_only_pairs_that_ran_in_vllm_count_as_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """benchmarks/in_vllm.py builds and runs them; its result is kept."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    import in_vllm

    rows = {row["what"]: row for row in json.loads((BENCHMARKS / "results" / "vllm-small.json").read_text())["rows"]}
    right, wrong = set(), set()
    for name, toy in in_vllm.TOYS.items():
        row = rows[f"{name}: greedy tokens as in transformers"]
        (right if row["reached"] else wrong).add((toy.family, toy.fmt))
    assert {pair for pair, known in IN_VLLM.items() if known == in_vllm_says(pair)} == right
    assert {pair for pair in wrong if not PROGRAMS[pair]["vLLM"].runs} == wrong


def in_vllm_says(pair: tuple[str, str]) -> object:
    return PROGRAMS[pair]["vLLM"] if PROGRAMS[pair]["vLLM"].how == VLLM else None
