"""vLLM loads what is built and says what transformers and frankenmoe say, in an environment that has vLLM."""

import json
from pathlib import Path
from typing import Any

import pytest

from frankenmoe.demo.real import package_file
from frankenmoe.errors import SourceError

pytestmark = pytest.mark.slow
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
FORMATS = ("mixtral", "qwen2_moe", "qwen3_moe", "flex_olmo")


@pytest.fixture
def peer(monkeypatch: pytest.MonkeyPatch) -> Any:
    """benchmarks/in_vllm.py, whose environment must be there."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    import in_vllm

    if not in_vllm.is_made():
        pytest.skip("vLLM has no environment here: `python benchmarks/in_vllm.py --make` makes it (3.5 GB)")
    return in_vllm


def same_everywhere(peer: Any, folder: Path, prompt: tuple[int, ...]) -> None:
    rows = peer.compared(folder.name, folder, prompt)
    assert {row.what: row.value for row in rows if row.at_least} == {
        f"{folder.name}: greedy tokens as in {who}": peer.TOKENS for who in ("transformers", "frankenmoe")
    }


@pytest.mark.parametrize("fmt", FORMATS)
def test_a_built_moe_writes_the_same_tokens(fmt: str, peer: Any, tmp_path: Path) -> None:
    folder = peer.toy(fmt, tmp_path)
    assert json.loads((folder / "config.json").read_text())["model_type"] == fmt
    same_everywhere(peer, folder, peer.PROMPT)


def test_every_format_of_the_script_is_tested(peer: Any) -> None:
    assert tuple(peer.FORMATS) == FORMATS


@pytest.mark.real
def test_a_real_one_writes_the_same_tokens(peer: Any, tmp_path: Path) -> None:
    try:
        package_file()
    except SourceError as error:
        pytest.skip(f"{error}: {error.hint}")
    same_everywhere(peer, *peer.real(tmp_path))


def test_deepseek_needs_code_from_the_hub(peer: Any, tmp_path: Path) -> None:
    """As README and guide say: without a network, and without trusting code, vLLM does not load this format."""
    with pytest.raises(RuntimeError, match="trust_remote_code=True"):
        peer.vllm(peer.toy("deepseek", tmp_path), peer.PROMPT, tokens=1)
