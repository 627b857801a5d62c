"""Oracles 5 and 9 on trained artifacts: whatever was trained, virtual == built == stock; and the body stays."""

import hashlib
import json
import sys
from pathlib import Path

import pytest
import torch

import frankenmoe as fm
import tiny
from frankenmoe.train.run import train
from refusals import copy_of

sys.path.append(str(Path(__file__).parents[1] / "train"))
import corpus

CLOSE = 1e-5
Parents = dict[str, list[Path]]
ALL = "routers,adapters,norms,attention,experts,embeddings"


def hashes(folder: Path) -> dict[str, str]:
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in folder.rglob("*.safetensors")
        if file.name != "model-routers.safetensors"
    }


def check_forms(folder: Path, built: Path) -> torch.Tensor:
    """Logits of a trained virtual artifact, after checking that all its forms agree."""
    ids = tiny.ids()
    fm.build(folder, built)
    fm.verify(folder)
    fm.verify(built)
    first = corpus.logits(fm.load(folder).model, ids)
    for other in (fm.load(folder / "recipe.yml").model, fm.load(built).model, corpus.stock(built)):
        assert float((corpus.logits(other, ids) - first).abs().max()) < CLOSE
    return first


@pytest.mark.parametrize(
    ("family", "what"),
    [("llama", "routers"), ("mistral", "adapters,attention"), ("qwen3", "routers,norms,experts"), ("llama", ALL)],
)
def test_trained_virtual_equals_built_equals_stock(family: str, what: str, parents: Parents, tmp_path: Path) -> None:
    recipe = corpus.recipe(tmp_path, parents[family])
    before = corpus.logits(fm.load(recipe).model, tiny.ids())
    sources = [hashes(parent) for parent in parents[family]]
    data = corpus.write_texts(tmp_path)
    found = train(recipe, tmp_path / "out", data=data, settings=corpus.settings(what=what))
    assert found.report["improved"]
    after = check_forms(tmp_path / "out", tmp_path / "built")
    assert float((after - before).abs().max()) > 1e-3
    assert [hashes(parent) for parent in parents[family]] == sources
    assert torch.equal(corpus.logits(fm.load(recipe).model, tiny.ids()), before), "training wrote into mapped sources"


def test_a_trained_artifact_learns_on(parents: Parents, tmp_path: Path) -> None:
    """Adapters keep their rank, whole tensors of an earlier run survive one that does not train them."""
    data = corpus.write_texts(tmp_path)
    recipe = corpus.recipe(tmp_path, parents["llama"])
    train(recipe, tmp_path / "one", data=data, settings=corpus.settings(what="norms,adapters"))
    found = train(tmp_path / "one", tmp_path / "two", data=data, settings=corpus.settings(what="adapters,attention"))
    check_forms(tmp_path / "two", tmp_path / "built")
    config = json.loads((tmp_path / "two/adapters/e0/adapter_config.json").read_text())
    assert (config["r"], config["rank_pattern"]) == (4, {})
    norms = [(tmp_path / each / "model-trained.safetensors").read_bytes() for each in ("one", "two")]
    assert norms[0] == norms[1]
    assert [stage["stage"] for stage in found.artifact.record["stages"]] == ["routers", "train", "train"]
    assert found.report["mean_held_out_loss"]["best"] < found.report["mean_held_out_loss"]["before"]


def test_a_trained_artifact_can_be_moved_away_from_its_sources(parents: Parents, tmp_path: Path) -> None:
    """Norms and adapters go with it; sources that the recipe names relative to it are where they were."""
    folder = tmp_path / "work"
    folder.mkdir()
    own = [copy_of(parent, tmp_path / parent.name) for parent in parents["llama"]]
    data = corpus.write_texts(tmp_path)
    recipe = corpus.recipe(folder, [Path("..") / parent.name for parent in own])
    train(recipe, folder / "out", data=data, settings=corpus.settings(what="norms,adapters"))
    ids, there = tiny.ids(), tmp_path / "a" / "b" / "moe"
    before = corpus.logits(fm.load(folder / "out").model, ids)
    there.parent.mkdir(parents=True)
    (folder / "out").rename(there)
    recipe.unlink()
    folder.rmdir()
    assert torch.equal(corpus.logits(fm.load(there).model, ids), before)


def test_scale_noise_and_adapter_of_the_recipe_survive_training(parents: Parents, tmp_path: Path) -> None:
    data = corpus.write_texts(tmp_path)
    base, one, two = parents["llama"]
    experts = [
        {"source_model": str(one), "name": "e0", "noise_relative": 0.1, "residual_scale": 0.7},
        {"source_model": str(two), "name": "e1", "residual_scale": 1.3},
    ]
    recipe = tiny.write_recipe(tmp_path / "r.yml", base, [], experts=experts)
    train(recipe, tmp_path / "out", data=data, settings=corpus.settings(what="adapters,experts"))
    check_forms(tmp_path / "out", tmp_path / "built")


def test_a_shared_and_gated_expert_learns_too(parents: Parents, tmp_path: Path) -> None:
    data = corpus.write_texts(tmp_path)
    shared = [{"source_model": str(parents["qwen2"][0]), "positive_prompts": ["anything at all"]}]
    recipe = corpus.recipe(tmp_path, parents["qwen2"], shared_experts=shared, gate_mode="hidden")
    train(recipe, tmp_path / "out", data=data, settings=corpus.settings(what="routers,adapters"))
    check_forms(tmp_path / "out", tmp_path / "built")
    assert (tmp_path / "out/adapters").is_dir()
    assert len(list((tmp_path / "out/adapters").iterdir())) == 3


def test_peft_loads_the_adapters(parents: Parents, tmp_path: Path) -> None:
    """The folders are PEFT's own format: the base with an expert's adapter computes what that expert does."""
    from peft import PeftModel

    data = corpus.write_texts(tmp_path)
    base = parents["llama"][0]
    recipe = tiny.write_recipe(tmp_path / "r.yml", base, [base, base])
    train(recipe, tmp_path / "out", data=data, settings=corpus.settings(what="routers,adapters"))
    alone = tiny.write_recipe(
        tmp_path / "alone.yml", base, [],
        experts=[{"source_model": str(base), "adapter": str(tmp_path / "out/adapters/e1")}], experts_per_token=1,
    )  # fmt: skip
    model = PeftModel.from_pretrained(corpus.stock(base), tmp_path / "out/adapters/e1").eval()
    ids = tiny.ids()
    assert float((corpus.logits(model, ids) - corpus.logits(fm.load(alone).model, ids)).abs().max()) < CLOSE


def test_a_built_artifact_gets_new_routers_on_the_same_body(parents: Parents, tmp_path: Path) -> None:
    data = corpus.write_texts(tmp_path)
    fm.build(corpus.recipe(tmp_path, parents["llama"]), tmp_path / "built")
    before = hashes(tmp_path / "built")
    old = (tmp_path / "built/model-routers.safetensors").read_bytes()
    train(tmp_path / "built", tmp_path / "out", data=data, settings=corpus.settings())
    assert hashes(tmp_path / "out") == before == hashes(tmp_path / "built")
    assert (tmp_path / "built/model-routers.safetensors").read_bytes() == old
    assert (tmp_path / "out/model-routers.safetensors").read_bytes() != old
    body = "model-00001-of-00001.safetensors"
    assert (tmp_path / "out" / body).samefile(tmp_path / "built" / body)
    fm.verify(tmp_path / "out")
    ids = tiny.ids()
    ours, stock = fm.load(tmp_path / "out").model, corpus.stock(tmp_path / "out")
    assert float((corpus.logits(ours, ids) - corpus.logits(stock, ids)).abs().max()) < CLOSE
