"""vLLM loads what is built and says what transformers and frankenmoe say, in an environment that has vLLM."""

import json
from pathlib import Path
from typing import Any

import pytest

from frankenmoe.demo.real import package_file
from frankenmoe.errors import SourceError
from frankenmoe.families import FORMATS

pytestmark = pytest.mark.slow
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
# toys that vLLM writes otherwise, those on which it crashes, and those it writes alike (mended: with a fault of vLLM
# corrected, which in_vllm_once.py names); benchmarks/results/vllm-small.json has what was seen
OTHERWISE = (
    *("lfm2", "lfm2-untied", "cohere2", "cohere-untied", "phi3-partial-tied"),
    *("qwen3_moe-biased", "qwen3_vl-biased", "smollm3-biased", "cohere-biased"),
)
CRASHING = ("glm", "phi3-partial")
ROUNDED = ("qwen3_5",)
ALIKE = (
    *("mixtral", "mistral", "phi3", "helium", "qwen2_moe", "seed_oss", "qwen3_moe", "flex_olmo", "granite"),
    *("granite-shared", "llama-shared", "hyperclovax", "ernie4_5", "ernie4_5-shared", "glm-shared", "smollm3"),
    *("ministral", "granite4", "cohere", "gemma3", "gemma4", "qwen3_vl", "phi3-partial-shared", "cohere2-mended"),
    *("lfm2-mended", "lfm2-untied-mended", "glm-mended", "phi3-partial-mended"),
)


@pytest.fixture
def peer(monkeypatch: pytest.MonkeyPatch) -> Any:
    """benchmarks/in_vllm.py, whose environment must be there."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    import in_vllm

    if not in_vllm.is_made():
        pytest.skip("vLLM has no environment here: `python benchmarks/in_vllm.py --make` makes it (3.5 GB)")
    return in_vllm


def same_everywhere(peer: Any, name: str, folder: Path, prompt: tuple[int, ...], toy: Any) -> None:
    rows = peer.compared(name, folder, prompt, toy)
    assert {row.what: row.value for row in rows if row.at_least} == {
        f"{name}: greedy tokens as in {who}": peer.TOKENS for who in ("transformers", "frankenmoe")
    }


@pytest.mark.parametrize("name", ALIKE)
def test_a_built_moe_writes_the_same_tokens(name: str, peer: Any, tmp_path: Path) -> None:
    toy = peer.TOYS[name]
    folder = peer.built(toy, tmp_path)
    assert json.loads((folder / "config.json").read_text())["architectures"] == [FORMATS[toy.fmt].architecture]
    same_everywhere(peer, name, folder, peer.PROMPT, toy)


@pytest.mark.parametrize("name", OTHERWISE)
def test_faults_of_vllm_are_still_there(name: str, peer: Any, tmp_path: Path) -> None:
    """Where one is gone, `frankenmoe families` and docs/build.md must no longer tell of it."""
    toy = peer.TOYS[name]
    rows = peer.compared(name, peer.built(toy, tmp_path), peer.PROMPT, toy)
    assert [row.reached for row in rows if row.at_least] == [False, False]


@pytest.mark.parametrize("name", CRASHING)
def test_vllm_on_a_cpu_still_crashes_without_a_shared_expert(name: str, peer: Any, tmp_path: Path) -> None:
    toy = peer.TOYS[name]
    with pytest.raises(RuntimeError, match="SIGFPE"):
        peer.vllm(peer.built(toy, tmp_path), peer.PROMPT, toy, tokens=1)


@pytest.mark.parametrize("name", ROUNDED)
def test_a_built_moe_is_as_near_to_float32(name: str, peer: Any, tmp_path: Path) -> None:
    toy = peer.TOYS[name]
    rows = peer.compared(name, peer.built(toy, tmp_path), peer.PROMPT, toy)
    assert [row.reached for row in rows if row.limit] == [True, True]


def test_every_toy_of_the_script_is_here(peer: Any) -> None:
    assert {*ALIKE, *OTHERWISE, *CRASHING, *ROUNDED} == set(peer.TOYS)


@pytest.mark.real
def test_a_real_one_writes_the_same_tokens(peer: Any, tmp_path: Path) -> None:
    try:
        package_file()
    except SourceError as error:
        pytest.skip(f"{error}: {error.hint}")
    same_everywhere(peer, "real", *peer.real(tmp_path), peer.TOYS["mixtral"])


def test_deepseek_needs_code_from_the_hub(peer: Any, tmp_path: Path) -> None:
    """As README and guide say: without a network, and without trusting code, vLLM does not load this format."""
    from in_vllm_toys import DEEPSEEK

    with pytest.raises(RuntimeError, match="trust_remote_code=True"):
        peer.vllm(peer.built(DEEPSEEK, tmp_path), peer.PROMPT, DEEPSEEK, tokens=1)
