"""An MoE of SmolLM2-135M-Instruct and two cheap relatives, in every form: a real tokenizer, chat template and shape."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import frankenmoe as fm
import gguftools
import tiny
from frankenmoe.demo.real import make_base, package_file
from frankenmoe.errors import SourceError
from frankenmoe.moe.generate import reply
from refusals import cli, copy_of

pytestmark = pytest.mark.real
QUESTION = "What is the capital of France?"


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base as a checkpoint; tests are skipped where its package is absent."""
    try:
        package_file()
    except SourceError as error:
        pytest.skip(f"{error}: {error.hint}")
    return make_base(tmp_path_factory.mktemp("real") / "base")


@pytest.fixture(scope="session")
def relatives(smollm2: Path) -> list[Path]:
    """Two models near the base: all matrices changed by about 1 % of their norm."""
    found = []
    for seed in range(2):
        folder = copy_of(smollm2, smollm2.with_name(f"relative-{seed}"))
        generator = torch.Generator().manual_seed(seed)
        tensors = load_file(folder / "model.safetensors")
        for name, tensor in tensors.items():
            if tensor.dim() == 2 and "embed" not in name:
                noise = torch.randn(tensor.shape, generator=generator)
                tensors[name] = (tensor.float() + 0.01 * tensor.float().std() * noise).to(tensor.dtype)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        found.append(folder)
    return found


@pytest.fixture
def recipe(smollm2: Path, relatives: list[Path], tmp_path: Path) -> Path:
    keys: dict[str, Any] = {"experts_per_token": 2, "dtype": "bfloat16", "gate_mode": "random", "backbone": "base"}
    return tiny.write_recipe(tmp_path / "moe.yml", smollm2, relatives, **keys)


def text(moe: fm.MoE) -> torch.Tensor:
    found: torch.Tensor = moe.tokenizer()(f"{QUESTION} Paris is the capital.", return_tensors="pt")["input_ids"]
    return found


def test_the_base_writes_english_through_its_chat_template(smollm2: Path, tmp_path: Path) -> None:
    alone = tiny.write_recipe(tmp_path / "alone.yml", smollm2, [smollm2], experts_per_token=1)
    moe = fm.load(alone)
    said = reply(moe, moe.tokenizer(), [{"role": "user", "content": QUESTION}], max_new_tokens=16)
    assert "Paris" in said.text
    assert (
        moe.tokenizer()
        .apply_chat_template([{"role": "user", "content": QUESTION}], tokenize=False)
        .startswith("<|im_start|>")
    )


def test_a_recipe_runs_and_its_experts_differ_a_little(recipe: Path, smollm2: Path) -> None:
    moe = fm.load(recipe)
    base = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.bfloat16)
    ids = text(moe)
    with torch.no_grad():
        ours, theirs = (model(input_ids=ids, labels=ids) for model in (moe.model, base))
    assert ours.logits.shape == (*ids.shape, 49152)
    assert 0 < abs(float(ours.loss - theirs.loss)) < 0.5


@pytest.mark.slow
def test_every_form_computes_the_same(recipe: Path, tmp_path: Path) -> None:
    built = fm.build(recipe, tmp_path / "built")
    virtual = fm.build(recipe, tmp_path / "virtual", virtual=True)
    fm.verify(built.folder)
    ours = fm.load(built, dtype="float32")
    ids = text(ours)
    stock = AutoModelForCausalLM.from_pretrained(built.folder, dtype=torch.float32)
    with torch.no_grad():
        expected = stock(input_ids=ids).logits
        for moe in (ours, fm.load(virtual, dtype="float32")):
            assert torch.allclose(moe.model(input_ids=ids).logits, expected, atol=2e-3)
    assert sum(file.stat().st_size for file in virtual.folder.rglob("*")) < 20e6


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "largest"), [("q8_0", 0.05), ("q4_k_m", 1.0)])
def test_llama_cpp_runs_it_quantized(kind: str, largest: float, recipe: Path, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    (file,) = fm.export_gguf(recipe, tmp_path / "gguf", types=[kind], allow_random=True)
    assert 0 < gguftools.greatest_kl(file.path, fm.load(recipe)) < largest


@pytest.mark.slow
def test_chat_answers_from_the_command_line(recipe: Path) -> None:
    outcome = cli("chat", recipe, "--prompt", QUESTION, "--max-new-tokens", "16")
    assert outcome.code == 0
    assert "Paris" in outcome.stdout
