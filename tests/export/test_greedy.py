"""llama.cpp writes the tokens that stock transformers writes, in every architecture and for every family it holds."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.activations import GELUTanh

import frankenmoe as fm
import gguftools
import tiny
from family_cases import write_recipe
from frankenmoe.errors import PlanError
from frankenmoe.export.check import kl
from frankenmoe.export.importance import measure
from frankenmoe.export.llama import Engine
from frankenmoe.export.run import export_gguf
from frankenmoe.families.archs import ARCHS
from frankenmoe.planning.gguf import layout
from frankenmoe.subject import open_subject
from gguf_cases import ALL, ARCHITECTURE, CONTEXT, REFUSED, WITH_VISION

pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")

TOKENS = 200
PLACES = range(7, 231, 14)  # of a random text, most of them beyond every window here
EXACT = 1e-5  # nats; linear attention adds its epsilon elsewhere, which is 1e-6 here, all others are below 1e-8
# leads of the best token over the next one, in logits, that f16 arithmetic can turn around
CLOSE = 0.05

# an architecture each, for the tests that are not slow
QUICK = (
    *("glm", "ernie4_5-shared", "lfm2", "qwen3_5", "smollm3-window", "granite4-shared", "cohere2", "phi3-longrope"),
    *("nemotron_h", "gemma4"),
)


def built(root: Path, name: str) -> tuple[Path, Any]:
    """(a built MoE of three random parents of a case, the same in stock transformers)."""
    case = ALL[name]
    tokenizer = gguftools.bpe("qwen2" if case.family.startswith("qwen3_5") else "gpt-2")
    sizes = {"max_position_embeddings": CONTEXT} | case.sizes | {"vocab_size": len(tokenizer)}
    sizes["max_position_embeddings"] = max(CONTEXT, sizes["max_position_embeddings"])
    folders = [tiny.make_parent(root / str(seed), case.family, seed=seed, **sizes) for seed in range(3)]
    for folder in folders:
        tokenizer.save_pretrained(folder)
    keys = {"experts_per_token": 2} | case.recipe
    recipe = write_recipe(root / "r.yml", replace(case, recipe=keys), folders[0], folders)
    folder = fm.build(recipe, root / "built").folder
    if case.fmt == "deepseek":  # its class is remote code
        return folder, fm.load(folder).model
    return folder, AutoModelForCausalLM.from_pretrained(folder, **case.loading).eval()


def logits(model: Any, ids: list[int]) -> torch.Tensor:
    """All logits of a text, read at once: cached Mamba layers of transformers 5.23 compute something else."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()


def greedy(model: Any, ids: list[int], *, tokens: int) -> tuple[tuple[int, ...], list[float]]:
    """The most likely tokens one after the other, and how far each leads the next one."""
    found, leads = list(ids), []
    for _ in range(tokens):
        best = logits(model, found)[-1].topk(2)
        found.append(int(best.indices[0]))
        leads.append(float(best.values[0] - best.values[1]))
    return tuple(found[len(ids) :]), leads


class TableGelu(torch.nn.Module):
    """GELU as llama.cpp computes it: from a table of float16 numbers."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.gelu(x.half().float(), approximate="tanh").half().float()


def with_its_gelu(model: Any) -> Any:
    """The model with llama.cpp's GELU, where it has one; SiLU is exact there."""
    for module in model.modules():
        if isinstance(getattr(module, "act_fn", None), GELUTanh):
            module.act_fn = TableGelu()
    return model


def text(vocab: int, length: int) -> list[int]:
    return tiny.ids(length, batch=1, vocab=vocab, seed=7)[0].tolist()


def divergence(engine: Engine, model: Any, places: range) -> float:
    """The mean KL divergence of llama.cpp from transformers at places of a random text, in nats."""
    vocab = model.config.vocab_size
    ids = text(vocab, places[-1] + 1)
    logprobs_TV = logits(model, ids).log_softmax(-1).numpy()
    found = [kl(logprobs_TV[place], engine.next_token(ids[: place + 1], top=vocab)) for place in places]
    return sum(found) / len(found)


def test_every_case_and_architecture_is_here() -> None:
    assert {*ARCHITECTURE, *REFUSED} == set(ALL)
    assert {*ARCHITECTURE.values(), *WITH_VISION} == {arch.name for arch in ARCHS}


@pytest.mark.parametrize("name", QUICK)
def test_distributions_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    folder, model = built(tmp_path, name)
    (file,) = export_gguf(folder, tmp_path / "out", types=["f32"], allow_random=True)
    assert gguftools.architecture(file.path) == ARCHITECTURE[name]
    assert divergence(Engine(file.path, context=CONTEXT), model, PLACES[::4]) < EXACT


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURE)
def test_two_hundred_tokens_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    folder, model = built(tmp_path, name)
    exact, half = export_gguf(folder, tmp_path / "out", types=["f32", "f16"], allow_random=True)
    assert gguftools.architecture(exact.path) == ARCHITECTURE[name]
    prompt = text(model.config.vocab_size, 24)
    engine = Engine(exact.path, context=CONTEXT)
    assert divergence(engine, model, PLACES) < EXACT
    expected, leads = greedy(with_its_gelu(model), prompt, tokens=TOKENS)
    assert engine.greedy(prompt, tokens=TOKENS) == expected
    engine = Engine(half.path, context=CONTEXT)
    assert divergence(engine, model, PLACES) < 1e-3
    found = engine.greedy(prompt, tokens=TOKENS)
    first = next((place for place in range(TOKENS) if found[place] != expected[place]), None)
    assert first is None or leads[first] < CLOSE


@pytest.mark.parametrize("name", REFUSED)
def test_what_it_cannot_say_is_refused_by_name(name: str, tmp_path: Path) -> None:
    folder, _ = built(tmp_path, name)
    with pytest.raises(PlanError) as caught:
        export_gguf(folder, tmp_path / "out", types=["f16"], allow_random=True)
    assert REFUSED[name] in str(caught.value)


# case -> matrices of attention and its like whose inputs are measured
MEASURED = {
    "phi3-short": {"attn_q", "attn_k", "attn_v", "attn_output"},
    "lfm2": {"attn_q", "attn_k", "attn_v", "attn_output", "shortconv.in_proj", "shortconv.out_proj"},
    "qwen3_5": {
        *("attn_q", "attn_k", "attn_v", "attn_output"),
        *("attn_qkv", "attn_gate", "ssm_alpha", "ssm_beta"),
    },
    "granite4-shared": {"attn_q", "attn_k", "attn_v", "attn_output"},
    "nemotron_h": {"attn_q", "attn_k", "attn_v", "attn_output"},
}


@pytest.mark.parametrize("name", MEASURED)
def test_importance_is_measured_where_modules_have_other_names(name: str, tmp_path: Path) -> None:
    folder, _ = built(tmp_path, name)
    found = measure(fm.load(folder), layout(open_subject(folder).parts), [text(97, 64)])
    names = {tensor.split(".", 2)[2].removesuffix(".weight") for tensor in found.importance}
    assert {tensor for tensor in names if not tensor.startswith("ffn_")} == MEASURED[name]
    gate = set() if name == "nemotron_h" else {"ffn_gate_exps"}
    assert {tensor for tensor in names if tensor.endswith("_exps")} == {"ffn_up_exps", "ffn_down_exps"} | gate
    assert all(np.isfinite(rows_PC).all() for rows_PC in found.importance.values())
