"""benchmarks/real.py: its text is split by document, its merges and shares are what they say, its rows are kept."""

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import tiny
from frankenmoe.data.blocks import text_blocks
from frankenmoe.data.rows import Document
from frankenmoe.gates.states import mean_loss

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function from the name of a file in benchmarks/ to its module."""
    monkeypatch.syspath_prepend(BENCHMARKS)

    def load(name: str) -> ModuleType:
        return __import__(name)

    return load


def test_manual_pages_lose_their_requests_and_keep_their_letters(module: Any) -> None:
    head = '.\\" a comment\n.TH LS 1\n.SH \\(:UBERSICHT\n'
    page = head + '\\fBls\\fP [\\-a] \\[u00E9]t\\(\'e \\[:u]ber stra\\(sse\n.B "fett"\n'
    assert module("real_text")._unroffed(page) == "ÜBERSICHT\nls [-a] été über straße\nfett"


def test_held_out_documents_are_not_trained_on(module: Any) -> None:
    documents = [f"document {index} " + "word " * 400 for index in range(300)]
    text = module("real_text")._gathered(iter([*documents, *documents, "too short"]))
    number = lambda part: {line.split()[1] for line in part.split("document")[1:] for line in [f"x{line}"]}  # noqa: E731
    assert len(text.held_out) <= 55_000
    assert not number(text.train) & number(text.held_out)
    assert "too short" not in text.train + text.held_out
    assert module("real_text")._gathered(iter(documents[:5])) is None


def test_merges_of_one_tensor(module: Any) -> None:
    merges = module("real_bed").MERGES
    base = torch.tensor([1.0, 1.0, 1.0, 1.0])
    parents = [base + torch.tensor([4.0, -2.0, 1.0, 0.5]), base + torch.tensor([2.0, 6.0, -1.0, 0.25])]
    assert merges["average"](base, parents).tolist() == [4.0, 3.0, 1.0, 1.375]
    assert merges["task arithmetic 1.0"](base, parents).tolist() == [7.0, 5.0, 1.0, 1.75]
    # of each, the larger half is kept: [4, -2, 0, 0] and [2, 6, 0, 0]; signs +, +; so (4 + 2) / 2 and 6 alone
    assert merges["ties 0.5"](base, parents).tolist() == [4.0, 7.0, 1.0, 1.0]


def test_nats_by_block_are_the_mean_loss(module: Any, parents: dict[str, list[Path]]) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(parents["llama"][0]).eval()
    blocks = text_blocks([Document(text="some words " * 20, closed=False)], tiny.make_tokenizer(), length=32)
    nats = module("real_bed").nats(model, blocks)
    assert len(nats) == len(blocks)
    assert sum(nats) / sum(block.targets for block in blocks) == pytest.approx(mean_loss(model, blocks), rel=1e-5)


def test_passes_count_layers_forward_and_backward(module: Any, parents: dict[str, list[Path]]) -> None:
    from transformers import AutoModelForCausalLM
    from transformers.models.llama import modeling_llama

    plain = modeling_llama.LlamaDecoderLayer.forward
    passes = module("real_once").Passes()
    try:
        passes.watch(modeling_llama.LlamaDecoderLayer)
        model = AutoModelForCausalLM.from_pretrained(parents["llama"][0])
        ids = tiny.ids(12, batch=2)
        with torch.no_grad():
            model(input_ids=ids)
        assert (passes.forward, passes.backward, len(passes.layers)) == (2 * 24, 0, 2)
        model(input_ids=ids, labels=ids).loss.backward()
        assert (passes.forward, passes.backward) == (4 * 24, 2 * 24)
    finally:
        modeling_llama.LlamaDecoderLayer.forward = plain


@pytest.mark.slow
def test_rows_are_kept_and_a_second_run_measures_nothing(shared_models: Path, tmp_path: Path) -> None:
    def run(*more: str) -> dict[str, Any]:
        out = tmp_path / "result.json"
        command = [sys.executable, str(BENCHMARKS / "real.py"), "--smoke", "--parents", "toys", "--only", "dense"]
        command += ["--runs", str(tmp_path / "runs"), "--work", str(tmp_path), "--out", str(out), *more]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(out.read_text())
        return found

    first = run()["rows"]
    assert [row["what"] for row in first[:2]] == [
        "toys: base: held-out loss",
        "toys: parents, own text: held-out loss",
    ]
    assert first[1]["value"] < first[0]["value"]
    assert run("--kept")["rows"] == first
