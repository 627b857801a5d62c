"""What `frankenmoe families` says of programs agrees with what plans refuse and with what was tried."""

from frankenmoe.families.runtimes import LLAMACPP, VLLM_TRIED, pairs

# what tests/real/test_vllm.py builds and runs
IN_VLLM = {("llama", "mixtral"), ("qwen2", "qwen2_moe"), ("qwen3", "qwen3_moe"), ("olmo2", "flex_olmo")}
PROGRAMS = {(pair.family, pair.fmt): pair.programs for pair in pairs()}


def test_only_pairs_that_ran_in_vllm_count_as_tried() -> None:
    assert {pair for pair, programs in PROGRAMS.items() if programs["vLLM"].how == VLLM_TRIED} == IN_VLLM


def test_longrope_that_export_refuses_is_named() -> None:
    assert PROGRAMS["phi3", "mixtral"]["llama.cpp"].how == f"{LLAMACPP}; models with longrope are refused"
    assert PROGRAMS["llama", "mixtral"]["llama.cpp"].how == LLAMACPP
