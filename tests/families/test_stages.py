"""Every stage on every family: it works on the virtual and the built form, or refuses in one sentence."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

import frankenmoe as fm
import tiny
from family_cases import CASES, Case, apart, logits, make_parent, write_recipe
from frankenmoe.audit.run import audit
from frankenmoe.errors import PlanError
from frankenmoe.evaluate.run import evaluate
from frankenmoe.evaluate.score import Scoring
from frankenmoe.recipe.train import TrainSettings
from frankenmoe.train.run import train

# one case of each family and format, without a shared expert
STAGED = {
    (case.family, case.fmt): name for name, case in reversed(CASES.items()) if not case.recipe.get("shared_experts")
}
# norms after the FFN: what it adds is not proportional to its output
UNHEALED = {"olmo2", "gemma3_text", "gemma4_text"}
# a list of kinds of layers -> how many of them a small model has
LISTED = {"layer_types": 2, "layers_block_type": 3}
SMALL: dict[str, Any] = {"tokens": 512, "block": 16}


def words(file: Path, letters: str, *, count: int = 2000) -> Path:
    """Text of these letters only."""
    file.write_text("".join(random.Random(letters).choices(letters, k=count)))
    return file


def shallow(case: Case) -> Case:
    """The same with two layers; three where only one of three has an FFN."""
    kinds = {key: case.config[key][:count] for key, count in LISTED.items() if key in case.config}
    return replace(case, config=case.config | {"num_hidden_layers": 2} | kinds)


def near(folder: Path, base: Path, case: Case, *, seed: int) -> Path:
    """The base moved a tenth of the way towards another random model, as a fine-tune is."""
    model, goal = (
        AutoModelForCausalLM.from_pretrained(each)
        for each in (base, make_parent(folder.with_name(f"{folder.name}-goal"), case, seed=seed))
    )
    with torch.no_grad():
        for one, other in zip(model.parameters(), goal.parameters(), strict=True):
            one.lerp_(other, 0.1)
    model.save_pretrained(folder)
    tiny.make_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", STAGED.values())
def test_every_stage_works_on_every_family(name: str, tmp_path: Path) -> None:
    case = shallow(CASES[name])
    base = make_parent(tmp_path / "base", case)
    parents = [near(tmp_path / f"e{seed}", base, case, seed=seed) for seed in (1, 2, 3)]
    texts = [words(tmp_path / f"{index}.txt", letters) for index, letters in enumerate(("abcdef", "uvwxyz", "012345"))]
    path = write_recipe(tmp_path / "r.yml", case, base, parents[:2], gate_mode="ridge", backbone="base")
    recipe = yaml.safe_load(path.read_text())
    for expert, text in zip(recipe["experts"], texts, strict=False):
        expert["data"] = [str(text)]
    path.write_text(yaml.safe_dump(recipe | {"fit": SMALL}, sort_keys=False))

    virtual = fm.build(path, tmp_path / "virtual", virtual=True)  # fits the routers
    built = fm.build(path, tmp_path / "built")
    ids = tiny.ids()
    assert apart(*(logits(fm.load(each).model, ids) for each in (virtual, built))) < 1e-5

    average = write_recipe(tmp_path / "a.yml", case, base, parents[:2], backbone="average")
    assert torch.isfinite(logits(fm.load(average).model, ids)).all()

    audit(built, out=tmp_path / "audit", tokens=128)
    report = evaluate([built.folder], texts={"one": str(texts[0])}, limit=4, scoring=Scoring())
    assert report.results

    # the extracted expert is a dense model of the family: the same from both forms
    dense = [fm.extract(each, tmp_path / f"x-{each.form}", expert="e1") for each in (virtual, built)]
    models = [AutoModelForCausalLM.from_pretrained(folder).eval() for folder in dense]
    assert models[0].config.model_type == AutoModelForCausalLM.from_pretrained(base).config.model_type
    assert apart(*(logits(model, ids) for model in models)) < 1e-5

    settings = TrainSettings(what=("routers", "norms", "attention", "adapters"), steps=2, batch=2, block=16, rank=2)
    trained = train(virtual, tmp_path / "trained", settings=settings, keep_anyway=True)
    assert torch.isfinite(logits(fm.load(trained.artifact).model, ids)).all()

    fm.fit(built, method="logistic", keep_anyway=True, **SMALL)
    more = fm.add_expert(virtual, tmp_path / "more", source=str(parents[2]), name="e2", data=[str(texts[2])], **SMALL)
    assert torch.isfinite(logits(fm.load(tmp_path / "more").model, ids)).all()
    assert more

    if case.family in UNHEALED:
        with pytest.raises(PlanError, match="cannot be healed"):
            fm.heal(virtual, tmp_path / "healed", **SMALL)
    else:
        fm.heal(virtual, tmp_path / "healed", **SMALL)
        assert torch.isfinite(logits(fm.load(tmp_path / "healed").model, ids)).all()
