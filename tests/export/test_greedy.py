"""llama.cpp writes the tokens that stock transformers writes, in every architecture and for every family it holds."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import frankenmoe as fm
import gguftools
import tiny
from family_cases import CASES, LONGROPE, SHARED, Case, write_recipe
from frankenmoe.errors import PlanError
from frankenmoe.export.check import kl
from frankenmoe.export.llama import Engine
from frankenmoe.export.run import export_gguf
from frankenmoe.families.archs import ARCHS

pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")

TOKENS = 200
CONTEXT = 256  # llama.cpp rounds it up to a multiple of this
PLACES = range(7, 231, 14)  # of a random text, most of them beyond every window here
EXACT = 1e-5  # nats; linear attention adds its epsilon elsewhere, which is 1e-6 here, all others are below 1e-8
# leads of the best token over the next one, in logits, that f16 arithmetic can turn around
CLOSE = 0.05

PLAIN_ROPE = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75}
MORE: dict[str, Case] = {
    "qwen3-plain": Case("qwen3", "qwen3_moe", {"head_dim": 8}),
    "qwen2-shared": Case("qwen2", "qwen2_moe", {}, SHARED | {"experts_per_token": 3}),
    "llama-deepseek": Case("llama", "deepseek", {}, SHARED | {"architecture": "deepseek", "experts_per_token": 1}),
    "phi3-short": replace(
        CASES["phi3-longrope"],
        config=CASES["phi3-longrope"].config
        | {"original_max_position_embeddings": CONTEXT, "max_position_embeddings": 4 * CONTEXT}
        | {"rope_parameters": LONGROPE | {"original_max_position_embeddings": CONTEXT}},
    ),
    "phi3-partial-plain": replace(
        CASES["phi3-partial"],
        config=CASES["phi3-partial"].config | {"rope_parameters": PLAIN_ROPE, "original_max_position_embeddings": 64},
    ),
    "qwen3_5-shared": replace(CASES["qwen3_5"], recipe=SHARED),
    "granite4-attention": replace(
        CASES["granite4-shared"], config=CASES["granite4-shared"].config | {"layer_types": ["attention"] * 4}
    ),
    "granite4-unrotated": replace(
        CASES["granite4"], config=CASES["granite4"].config | {"layer_types": ["attention"] * 4}
    ),
    "granite4-groups": replace(CASES["granite4"], config=CASES["granite4"].config | {"mamba_n_groups": 2}),
}
ALL = CASES | MORE
# case -> the architecture
ARCHITECTURE: dict[str, str] = {
    "llama": "llama",
    "llama-qwen": "llama",
    "mistral-qwen": "llama",
    "qwen2": "llama",
    "seed_oss": "llama",
    "seed_oss-plain": "llama",
    "helium": "llama",
    "phi3-longrope": "llama",
    "phi3-short": "llama",
    "mistral-window": "granite_swa",
    "phi3-window": "granite_swa",
    "qwen3-plain": "qwen3moe",
    "qwen2-shared": "qwen2moe",
    "llama-deepseek": "deepseek",
    "mistral-granite": "llama",
    "llama-biases": "granitemoe",
    "llama-shared": "granitemoe",
    "mistral-shared": "granitemoe",
    "granite": "granitemoe",
    "granite-shared": "granitemoe",
    "hyperclovax": "granitemoe",
    "ernie4_5": "ernie4_5-moe",
    "ernie4_5-shared": "ernie4_5-moe",
    "glm": "glm4moe",
    "glm-shared": "glm4moe",
    "phi3-partial-plain": "glm4moe",
    "lfm2": "lfm2moe",
    "qwen3_5": "qwen35moe",
    "qwen3_5-shared": "qwen35moe",
    "smollm3": "granite_swa",
    "smollm3-window": "granite_swa",
    "ministral": "granite_swa",
    "cohere2": "cohere2moe",
    "granite4": "granitehybrid",
    "granite4-shared": "granitehybrid",
    "granite4-attention": "granitemoe",
    "granite4-groups": "granitehybrid",
}
# case -> words of the reason
REFUSED: dict[str, str] = {
    "qwen3": "qwen3moe has no place for model.layers.0.self_attn.q_proj.bias",
    "olmo2": "FlexOlmo",
    "gemma": "gelu_pytorch_tanh",
    "phi3-partial": "glm4moe has no rope scaling 'longrope'",
    "granite4-unrotated": "granitehybrid needs a Mamba layer",
    "lfm2-bias": "lfm2moe has no place for model.layers.0.conv.conv.bias",
}
# an architecture each, for the tests that are not slow
QUICK = ("glm", "ernie4_5-shared", "lfm2", "qwen3_5", "smollm3-window", "granite4-shared", "cohere2", "phi3-longrope")


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
    assert set(ARCHITECTURE.values()) == {arch.name for arch in ARCHS}


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
    expected, leads = greedy(model, prompt, tokens=TOKENS)
    engine = Engine(exact.path, context=CONTEXT)
    assert engine.greedy(prompt, tokens=TOKENS) == expected
    assert divergence(engine, model, PLACES) < EXACT
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
