"""Experts `as_adapter`: the base's FFNs plus what a parent's FFNs have learnt, in every form."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import frankenmoe as fm
import tiny
from frankenmoe.cache import cache_folder
from frankenmoe.moe.adapter import LoraLinear
from frankenmoe.planning import asadapter
from frankenmoe.recipe import Recipe
from frankenmoe.recipe.train import TrainSettings
from frankenmoe.train.run import train
from refusals import cli, copy_of, refused, spoil

Parents = dict[str, list[Path]]
BOTH = {"base_model": "{base}", "gate_mode": "random", "experts_per_token": 2}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def write(file: Path, base: Path, experts: list[dict[str, Any]], **keys: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"base_model": str(base), "gate_mode": "random", "experts": experts} | keys))
    return file


def two(file: Path, parents: list[Path], settings: dict[str, Any], **keys: Any) -> Path:
    """A recipe of two fine-tunes as adapters."""
    base, *others = parents
    rows = [
        {"source_model": str(parent), "name": f"e{index}", "as_adapter": settings}
        for index, parent in enumerate(others)
    ]
    return write(file, base, rows, **keys)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tiny.ids()).logits


def truncated(base: Path, model: Path, folder: Path, *, rank: int) -> Path:
    """The base with its FFNs plus torch's own truncated decomposition of the difference."""
    copy_of(base, folder)
    ours = load_file(model / "model.safetensors")

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name, before in tensors.items():
            if ".mlp." in name and before.dim() == 1:
                tensors[name] = ours[name]
            elif ".mlp." in name:
                u, s, v = torch.linalg.svd((ours[name] - before).double(), full_matrices=False)
                tensors[name] = (before + (u[:, :rank] * s[:rank]) @ v[:rank]).to(before.dtype)

    return spoil(folder, change)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox"])
def test_every_form_computes_the_truncated_difference(family: str, parents: Parents, tmp_path: Path) -> None:
    base, *others = parents[family]
    dense = [truncated(base, parent, tmp_path / f"dense{index}", rank=5) for index, parent in enumerate(others)]
    expected = logits(fm.load(tiny.write_recipe(tmp_path / "dense.yml", base, dense)).model)
    recipe = two(tmp_path / "r.yml", parents[family], {"rank": 5})
    models = [fm.load(recipe).model]
    virtual = fm.build(recipe, tmp_path / "virtual", virtual=True)
    models.append(fm.load(virtual).model)
    if family != "gpt_neox":
        built = fm.build(recipe, tmp_path / "built")
        models.append(AutoModelForCausalLM.from_pretrained(built.folder))
        fm.verify(built)
    fm.verify(virtual)
    for model in models:
        assert torch.allclose(logits(model), expected, atol=2e-4)
    whole = logits(fm.load(tiny.write_recipe(tmp_path / "whole.yml", base, others)).model)
    assert not torch.allclose(expected, whole, atol=0.01)


def test_the_virtual_form_keeps_the_adapters_low_rank(parents: Parents, tmp_path: Path) -> None:
    model = fm.load(two(tmp_path / "r.yml", parents["llama"], {"rank": 3})).model
    found = [module for module in model.modules() if isinstance(module, LoraLinear)]
    assert len(found) == 2 * 2 * 3
    assert {module.a.shape[0] for module in found} == {3}
    weights = {module.base.weight.data_ptr() for module in found}
    assert len(weights) == 2 * 3, "both experts must share the base's matrices"


def test_the_plan_knows_the_size_without_extracting(parents: Parents, tmp_path: Path) -> None:
    recipe = two(tmp_path / "r.yml", parents["llama"], {"rank": 4})
    before = fm.plan(Recipe.load(recipe))
    assert not cache_folder("adapters").exists()
    rows = before.to_dict()["as_adapter"]
    size = 2 * 3 * 4 * (32 + 48) * 4
    assert [(row["bytes"], row["instead_of"], row["extracted"]) for row in rows] == [
        (size, 2 * 3 * 32 * 48 * 4, False)
    ] * 2
    after = fm.plan(Recipe.load(recipe), weights=True)
    assert after.bill == before.bill
    assert all(row["extracted"] for row in after.to_dict()["as_adapter"])
    whole = fm.plan(Recipe.load(tiny.write_recipe(tmp_path / "whole.yml", *_split(parents["llama"]))))
    ffn = 2 * 3 * 32 * 48 * 4
    assert whole.bill.memory_virtual - after.bill.memory_virtual == 2 * ffn - (ffn + 2 * size)
    assert after.bill.memory_built == whole.bill.memory_built
    outcome = cli("plan", recipe)
    assert outcome.code == 0, outcome.stderr
    assert "rank 4" in outcome.stdout


def _split(folders: list[Path]) -> tuple[Path, list[Path]]:
    base, *others = folders
    return base, others


def test_an_energy_has_no_certain_size_until_it_is_extracted(parents: Parents, tmp_path: Path) -> None:
    recipe = Recipe.load(two(tmp_path / "r.yml", parents["llama"], {"energy": 0.5}))
    before, after = fm.plan(recipe), fm.plan(recipe, weights=True)
    assert [row["certain"] for row in before.to_dict()["as_adapter"]] == [False, False]
    assert any("energy" in text for text in before.warnings)
    assert [row["certain"] for row in after.to_dict()["as_adapter"]] == [True, True]
    assert not any("energy" in text for text in after.warnings)
    assert fm.plan(recipe).bill == after.bill, "a plan without weights looks into the cache"


def test_it_is_extracted_once(parents: Parents, tmp_path: Path) -> None:
    recipe = two(tmp_path / "r.yml", parents["llama"], {"rank": 4})
    fm.plan(Recipe.load(recipe), weights=True)
    (first, second) = sorted(cache_folder("adapters").iterdir())
    times = [(folder / "adapter_model.safetensors").stat().st_mtime_ns for folder in (first, second)]
    fm.load(recipe)
    assert [(folder / "adapter_model.safetensors").stat().st_mtime_ns for folder in (first, second)] == times
    assert "e0 of" in cli("cache").stdout
    # another setting or another state of a source is another adapter
    fm.plan(Recipe.load(two(tmp_path / "s.yml", parents["llama"], {"rank": 5})), weights=True)
    assert len(list(cache_folder("adapters").iterdir())) == 4


def test_an_adapter_that_another_process_has_extracted_meanwhile_stays(
    parents: Parents, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extract = asadapter.write_adapter
    kept: list[os.stat_result] = []

    def slow(model: Any, base: Any, names: Any, folder: Path, **options: Any) -> Any:
        found = extract(model, base, names, folder, **options)
        theirs = folder.with_name(folder.name.partition(".")[0])
        shutil.copytree(folder, theirs)
        kept.append((theirs / asadapter.WEIGHTS).stat())
        return found

    monkeypatch.setattr(asadapter, "write_adapter", slow)
    made = fm.plan(Recipe.load(two(tmp_path / "r.yml", parents["llama"], {"rank": 4})), weights=True)
    files = [file for each in made.extracted.values() for file in each.files]
    assert [file.stat().st_ino for file in files] == [each.st_ino for each in kept]
    assert len(list(cache_folder("adapters").iterdir())) == len(kept) == 2


@pytest.mark.parametrize("form", ["virtual", "built"])
def test_an_artifact_has_its_own_copy(form: str, parents: Parents, tmp_path: Path) -> None:
    recipe = two(tmp_path / "r.yml", parents["llama"], {"rank": 4}, name="moe")
    expected = logits(fm.load(recipe).model)
    made = fm.build(recipe, tmp_path / "out", virtual=form == "virtual")
    files = sorted(str(path.relative_to(made.folder)) for path in made.folder.rglob("adapter_*"))
    assert files == [
        f"adapters/extracted-e{index}/adapter_{name}"
        for index in (0, 1)
        for name in ("config.json", "model.safetensors")
    ]
    assert not [row for row in made.record["sources"] if "cache" in row["file"]]
    shutil.rmtree(tmp_path / "cache")
    shutil.move(made.folder, tmp_path / "moved")
    assert torch.allclose(logits(fm.load(tmp_path / "moved").model), expected, atol=1e-5)
    outcome = cli("verify", tmp_path / "moved")
    assert outcome.code == 0, outcome.stderr
    assert not (tmp_path / "cache" / "frankenmoe" / "adapters").exists()
    file = tmp_path / "moved" / "adapters" / "extracted-e1" / "adapter_model.safetensors"
    spoiled = bytearray(file.read_bytes())
    spoiled[-4000:] = bytes(4000)
    file.write_bytes(spoiled)
    refused("verify", tmp_path / "moved", inside=tmp_path, facts=("adapter_model.safetensors",), hint="source")


@pytest.mark.parametrize("link", ["adapters", "adapters/extracted-e1", "adapters/extracted-e1/adapter_config.json"])
def test_a_link_to_adapters_outside_the_artifact_is_refused(link: str, parents: Parents, tmp_path: Path) -> None:
    recipe = two(tmp_path / "r.yml", parents["llama"], {"rank": 4})
    place = fm.build(recipe, tmp_path / "out", virtual=True).folder / link
    shutil.move(place, tmp_path / "elsewhere")
    place.symlink_to(tmp_path / "elsewhere")
    facts = (f"{place} is a link to {tmp_path / 'elsewhere'}, outside its folder",)
    for command in ("verify", "card"):
        refused(command, tmp_path / "out", inside=tmp_path, facts=facts, hint="put there what it links to")
    place.unlink()
    (tmp_path / "elsewhere").rename(place.with_name("inside"))
    place.symlink_to("inside")
    outcome = cli("verify", tmp_path / "out")
    assert outcome.code == 0, outcome.stderr


def test_the_parents_still_give_their_attention_to_a_merged_backbone(parents: Parents, tmp_path: Path) -> None:
    base, *others = parents["llama"]
    keys: dict[str, Any] = {"backbone": "average"}
    low = fm.plan(Recipe.load(two(tmp_path / "r.yml", parents["llama"], {"rank": 4}, **keys)), weights=True)
    whole = fm.plan(Recipe.load(tiny.write_recipe(tmp_path / "whole.yml", base, others, **keys)), weights=True)
    assert low.backbone == whole.backbone
    assert all(str(ref.file).startswith(str(others[0].parent)) for write in low.backbone for ref in write.sources)
    assert [distance.groups["attention"] for distance in low.distances] == [
        distance.groups["attention"] for distance in whole.distances
    ]
    # and in the running model: averaged attention over the low-rank FFNs
    dense = [truncated(base, parent, tmp_path / f"dense{index}", rank=4) for index, parent in enumerate(others)]
    for folder, parent in zip(dense, others, strict=True):
        ours = load_file(parent / "model.safetensors")
        spoil(folder, lambda tensors, ours=ours: tensors.update({n: ours[n] for n in tensors if ".mlp." not in n}))
    expected = logits(fm.load(tiny.write_recipe(tmp_path / "dense.yml", base, dense, **keys)).model)
    assert torch.allclose(logits(fm.load(tmp_path / "r.yml").model), expected, atol=2e-4)


def test_nested_and_shared_experts_may_be_adapters_too(parents: Parents, tmp_path: Path) -> None:
    base, one, two_ = map(str, parents["qwen2"])
    low = {"as_adapter": {"rank": 4}}
    group = [{"source_model": one, "name": "a", **low}, {"source_model": two_, "name": "b", **low}]
    experts = [{"experts": group, "name": "g", "experts_per_token": 2}, {"source_model": base, "name": "c"}]
    shared = [{"source_model": two_, "name": "s", **low}]
    recipe = write(tmp_path / "r.yml", Path(base), experts, shared_experts=shared)
    made = fm.plan(Recipe.load(recipe), weights=True)
    assert {path: each.folder for path, each in made.extracted.items()} == {
        (0, 0): f"extracted-{_marked('g/a')}",
        (0, 1): f"extracted-{_marked('g/b')}",
        (-1, 0): f"extracted-{_marked('shared/s')}",
    }
    expected = logits(fm.load(recipe).model)
    fm.build(recipe, tmp_path / "out", virtual=True)
    assert torch.allclose(logits(fm.load(tmp_path / "out").model), expected, atol=1e-5)


def _marked(name: str) -> str:
    from frankenmoe.planning.asadapter import folder_of

    return folder_of(name).removeprefix("extracted-")


def test_a_given_adapter_is_not_extracted_again(parents: Parents, tmp_path: Path) -> None:
    base, model, _ = parents["llama"]
    fm.extract_lora(model, tmp_path / "lora", base=base, rank=4)
    row = {"source_model": str(model), "name": "e", "as_adapter": {"rank": 4}}
    given = write(tmp_path / "g.yml", base, [row | {"adapter": "lora"}], experts_per_token=1)
    fresh = write(tmp_path / "f.yml", base, [row], experts_per_token=1)
    made = fm.plan(Recipe.load(given), weights=True)
    assert not made.extracted
    assert not cache_folder("adapters").exists()
    assert torch.allclose(logits(fm.load(given).model), logits(fm.load(fresh).model), atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "facts", "hint"),
    [
        ({"rank": 0}, ("as_adapter.rank must be at least 1", "found 0"), ""),
        ({"energy": 1.5}, ("as_adapter.energy must be at most 1", "found 1.5"), ""),
        ({"energy": 0.5, "rank": 4}, ("as_adapter.energy must stand alone",), "keep rank"),
        ({"ranks": 4}, ("ranks is not a known key",), "rank"),
        ("high", ("as_adapter must be",), ""),
    ],
)
def test_settings_that_cannot_be(
    settings: Any, facts: tuple[str, ...], hint: str, parents: Parents, tmp_path: Path
) -> None:
    recipe = two(tmp_path / "r.yml", parents["llama"], settings)
    refused("plan", recipe, inside=tmp_path, facts=facts, hint=hint)


def test_sources_that_cannot_be(parents: Parents, tmp_path: Path) -> None:
    base, model, _ = parents["llama"]
    low = {"as_adapter": True}
    cases = [
        ({"source_model": str(base), **low}, ("the same linear layers", "nothing to extract"), "fine-tune"),
        ({"source_model": f"{base}+{model}", **low}, ("as_adapter must come with a whole model",), "delete as_adapter"),
        ({"merge": {"method": "average", "models": [str(model)]}, **low}, ("absent beside merge",), "models"),
    ]
    for number, (row, facts, hint) in enumerate(cases):
        recipe = write(tmp_path / f"{number}.yml", base, [row | {"name": "e"}], experts_per_token=1)
        (tmp_path / "cache" / "frankenmoe" / "adapters").mkdir(parents=True, exist_ok=True)
        refused("build", recipe, tmp_path / "out", inside=tmp_path, facts=facts, hint=hint)


def test_true_means_the_default_rank(parents: Parents, tmp_path: Path) -> None:
    base, model, _ = parents["llama"]
    recipe = write(tmp_path / "r.yml", base, [{"source_model": str(model), "as_adapter": True}], experts_per_token=1)
    made = fm.plan(Recipe.load(recipe))
    assert made.to_dict()["as_adapter"][0]["rank"] == [32, 32]
    assert Recipe.load(recipe).to_dict()["experts"][0]["as_adapter"] == {}


def test_training_goes_on_from_the_extracted_adapter(parents: Parents, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("to be or not to be, that is the question. " * 200)
    recipe = two(tmp_path / "r.yml", parents["llama"], {"rank": 3})
    fm.build(recipe, tmp_path / "virtual", virtual=True)
    for what, path in (("routers", "extracted-e0"), ("adapters", "e0")):
        out = tmp_path / f"trained-{what}"
        train(
            tmp_path / "virtual", out, settings=TrainSettings(what=(what,), steps=2, block=32, batch=2, rate=1e-4),
            keep_anyway=True,
            data={name: [str(tmp_path / "text.txt")] for name in ("e0", "e1")},
        )  # fmt: skip
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        before, after = (logits(fm.load(folder).model) for folder in (tmp_path / "virtual", out))
        assert not torch.equal(before, after)
        assert torch.allclose(before, after, atol=0.5)
        assert (out / "adapters" / path / "adapter_config.json").is_file()
        assert cli("verify", out).code == 0
    rows = json.loads((out / "frankenmoe.json").read_text())["recipe"]["experts"]
    assert [(row["adapter"], row["as_adapter"]) for row in rows] == [
        ("adapters/e0", {"rank": 3}),
        ("adapters/e1", {"rank": 3}),
    ]
    config = json.loads((out / "adapters" / "e0" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(parents["llama"][0])
