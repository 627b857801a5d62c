"""Gates for routers whose scores are sigmoids: they route as the softmax they were fitted for."""

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Phi3Config

import tiny
from frankenmoe.families import FORMATS
from frankenmoe.gates.closed import level, ridge, spread, sums_of
from frankenmoe.gates.fit import LOW
from frankenmoe.gates.fitted import fit_plan
from frankenmoe.gates.statistics import Moments, RouterText, start, with_text
from frankenmoe.moe.router import Router
from frankenmoe.recipe.sections import FitSettings
from frankenmoe.subject import open_subject

SHARED = Path(__file__).parents[3] / "shared"
DOMAINS = ("french", "math", "python", "shakespeare")
SIGMOIDS = [name for name, fmt in FORMATS.items() if fmt.router.score == "sigmoid"]


@pytest.mark.parametrize("name", SIGMOIDS)
def test_weights_are_those_of_the_softmax(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    far = 3 * torch.randn(16, generator=generator)
    clouds = [far + torch.randn(16, generator=generator) + torch.randn(300, 16, generator=generator) for _ in range(4)]
    found = start(layers=1, hidden=16)
    for index, states_ND in enumerate(clouds):
        moments = Moments(layers=1, hidden=16)
        moments.add(0, states_ND)
        found = with_text(found, RouterText(f"e{index}", tuple(float(index == other) for other in range(4))), moments)
    sums = sums_of(found, 0)
    rows_CD = ridge(sums)
    gate_CD = (2 * rows_CD / spread(rows_CD, sums)).float()
    states_ND, rule = torch.cat(clouds), FORMATS[name].router
    soft = Router(gate_CD, top_k=2, renormalize=True)(states_ND)
    as_it_is = Router(gate_CD, top_k=2, renormalize=True, rule=rule)(states_ND)
    low = Router(gate_CD - (LOW * level(sums)).float(), top_k=2, renormalize=True, rule=rule)(states_ND)
    assert torch.equal(soft.ids_TK, low.ids_TK)
    error, before = ((each.weights_TK - soft.weights_TK).abs().mean() for each in (low, as_it_is))
    assert error < 0.01
    assert error < 0.1 * before


def as_phi3(source: Path, folder: Path) -> Path:
    """A Llama model as the Phi-3 model that computes the same."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    kept = {key: value for key, value in model.config.to_dict().items() if hasattr(Phi3Config(), key)}
    context = kept["max_position_embeddings"]
    fused = AutoModelForCausalLM.from_config(
        Phi3Config(**kept | {"model_type": "phi3", "sliding_window": None, "original_max_position_embeddings": context})
    )
    own = model.state_dict()
    parts = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
    for name, tensor in fused.state_dict().items():
        whole = next((each for each in parts if each in name), "")
        tensor.copy_(torch.cat([own[name.replace(whole, part)] for part in parts.get(whole, ("",))]))
    assert torch.equal(model(tiny.ids(8)).logits, fused(tiny.ids(8)).logits)
    fused.save_pretrained(folder)
    for file in source.glob("token*"):
        shutil.copy(file, folder)
    return folder


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared is not there: this needs parents trained on real text")
@pytest.mark.parametrize("method", ["ridge", "logistic", "regret"])
@torch.no_grad()
def test_fitted_gates_close_as_much_of_the_gap_as_those_of_a_softmax(method: str, tmp_path: Path) -> None:
    parents = [as_phi3(SHARED / "models" / f"expert-{each}", tmp_path / each) for each in DOMAINS]
    base = as_phi3(SHARED / "models" / "base", tmp_path / "base")
    closed = {}
    for fmt in ("mixtral", "glm4_moe"):
        experts = [
            {"source_model": str(parent), "name": each, "data": [str(SHARED / "text" / f"{each}.train.txt")]}
            for each, parent in zip(DOMAINS, parents, strict=True)
        ]
        recipe = tiny.write_recipe(tmp_path / f"{fmt}.yml", base, [], experts=experts, architecture=fmt)
        subject = open_subject(recipe)
        assert subject.plan.fmt.name == fmt
        made = fit_plan(subject.plan, method=method, moe=subject.load(), settings=FitSettings(tokens=4000))
        loss = {key: sum(each.values()) for key, each in made.report["held_out_loss"].items()}
        closed[fmt] = (loss["before"] - loss["after"]) / (loss["before"] - loss["own_expert"])
    assert closed["glm4_moe"] >= closed["mixtral"] - 0.02, closed
