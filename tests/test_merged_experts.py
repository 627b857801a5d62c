"""A merged expert through the stages behind a build: training, evaluation, GGUF, card, and what leaves the machine."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import frankenmoe as fm
import gguftools
import tiny
from frankenmoe.artifact.folder import RECORD, open_artifact
from frankenmoe.errors import PlanError
from frankenmoe.evaluate.parents import dense_model
from frankenmoe.evaluate.parents import parents as distinct_parents
from frankenmoe.export.run import export_gguf
from frankenmoe.publish.card import make_card
from frankenmoe.publish.privacy import local_names
from frankenmoe.train.run import train
from train import corpus

gguf = pytest.importorskip("gguf")
Parents = dict[str, list[Path]]


@pytest.fixture
def recipe(parents: Parents, tmp_path: Path) -> Path:
    """A merged and a plain expert on a merged backbone; the models lie beside the recipe."""
    corpus.write_texts(tmp_path)
    return write(tmp_path, parents["llama"])


def write(tmp_path: Path, folders: list[Path]) -> Path:
    for index, folder in enumerate(folders):
        (tmp_path / f"model{index}").symlink_to(folder)
    merge = {"method": "task_arithmetic", "lambda": 0.5, "models": ["model1", "model2"], "base": "model0"}
    data: dict[str, Any] = {
        "base_model": "model0",
        "gate_mode": "random",
        "backbone": "average",
        "experts": [
            {"merge": merge, "name": "e0", "data": ["e0.txt"]},
            {"source_model": "model1", "name": "e1", "data": ["e1.txt"]},
        ],
    }
    file = tmp_path / "r.yml"
    file.write_text(yaml.safe_dump(data))
    return file


def test_training_keeps_the_merge(recipe: Path, tmp_path: Path) -> None:
    made = train(recipe, tmp_path / "deep" / "trained", settings=corpus.settings(what="routers,norms", steps=2))
    saved = open_artifact(made.artifact.folder).record["recipe"]
    assert saved["backbone"] == "average"
    assert saved["experts"][0]["merge"] == {
        "method": "task_arithmetic", "lambda": 0.5, "models": ["../../model1", "../../model2"], "base": "../../model0",
    }  # fmt: skip
    ids = tiny.ids()
    before, after = (fm.load(each).model(input_ids=ids).logits for each in (recipe, made.artifact.folder))
    assert after.isfinite().all()
    assert not torch.equal(before, after)
    for what, match in (("adapters", "expert e0 is a merge"), ("attention", "the parents' average")):
        with pytest.raises(PlanError, match=match):
            train(recipe, tmp_path / "out", settings=corpus.settings(what=what))
        assert not (tmp_path / "out").exists()


def test_the_parent_of_a_merged_expert_is_the_merge(recipe: Path, parents: Parents, tmp_path: Path) -> None:
    found = dict(distinct_parents(fm.plan(fm.Recipe.load(recipe))))
    assert list(found) == ["e0", "e1"]
    base, one, two = (load_file(folder / "model.safetensors") for folder in parents["llama"])
    model = dense_model(found["e0"], dtype=None)
    for name, tensor in model.state_dict().items():
        wanted = base[name] + 0.5 * (one[name] + two[name] - 2 * base[name])
        assert torch.allclose(tensor, wanted, atol=1e-6), name


def test_gguf_card_and_published_names(tmp_path: Path) -> None:
    recipe = write(tmp_path, gguftools.parents(tmp_path, "llama"))
    fm.build(recipe, tmp_path / "built")
    fm.build(recipe, tmp_path / "virtual", virtual=True)
    for form in ("built", "virtual"):
        settings = {"types": ["f32"], "check": False, "allow_random": True}
        export_gguf(tmp_path / form, tmp_path / f"{form}-gguf", **settings)
    files = [next((tmp_path / f"{form}-gguf").glob("*.gguf")) for form in ("built", "virtual")]
    one, two = ({tensor.name: tensor.data for tensor in gguf.GGUFReader(file).tensors} for file in files)
    assert one.keys() == two.keys()
    assert all((one[name] == two[name]).all() for name in one)
    card = make_card(tmp_path / "virtual").text
    assert "task_arithmetic, lambda 0.5 of model1, model2" in card
    assert "is the average of all parents'" in card
    record = json.loads((tmp_path / "virtual" / RECORD).read_text())
    record["recipe"]["experts"][0]["merge"] |= {"models": [str(tmp_path / "model1")], "base": str(tmp_path / "model0")}
    rewritten = local_names(open_artifact(tmp_path / "virtual")).rewriter.value(record)
    assert str(tmp_path) not in json.dumps(rewritten["recipe"])
    assert rewritten["recipe"]["experts"][0]["merge"]["base"]
