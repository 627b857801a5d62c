"""How far parents are from their base, against numpy; what is sampled, remembered and left out; how `plan` shows it."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

import frankenmoe as fm
import tiny
from frankenmoe.cache import cache_folder
from frankenmoe.planning.distance import Distance
from frankenmoe.planning.groups import group_of
from refusals import cli

Parents = dict[str, list[Path]]


def distances(file: Path, base: Path, parents: list[Path], **keys: Any) -> tuple[Distance, ...]:
    return fm.plan(fm.Recipe.load(tiny.write_recipe(file, base, parents, **keys))).distances


def relative(base: dict[str, Any], parent: dict[str, Any]) -> dict[str, float]:
    """|parent - base| / |base| of every group, in float64."""
    sums: dict[str, list[float]] = {}
    for name, was in base.items():
        now = parent[name].astype(np.float64)
        row = sums.setdefault(group_of(name), [0.0, 0.0])
        row[0] += float(np.square(now - was).sum())
        row[1] += float(np.square(was, dtype=np.float64).sum())
    return {group: (difference / whole) ** 0.5 for group, (difference, whole) in sums.items()}


def test_small_parents_are_measured_whole(parents: Parents, tmp_path: Path) -> None:
    base, one, two = parents["qwen3"]
    found = distances(tmp_path / "r.yml", base, [one, two, base])
    weights = [load_file(folder / "model.safetensors") for folder in (base, one, two, base)]
    for each, parent in zip(found, weights[1:], strict=True):
        assert not each.sampled
        assert dict(each.groups) == pytest.approx(relative(weights[0], parent), rel=1e-5)
    assert set(found[0].groups) == {"attention", "norms", "embeddings", "head", "ffn"}
    assert [each.differs for each in found] == [True, True, False]
    assert [each.expert for each in found] == ["e0", "e1", "e2"]


def test_large_tensors_are_sampled_and_said_to_be(tmp_path: Path) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "vocab_size": 1024, "head_dim": 64, "num_hidden_layers": 1}
    base = tiny.make_parent(tmp_path / "base", **sizes)
    other = AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    other.save_pretrained(tmp_path / "other")
    (found,) = distances(tmp_path / "r.yml", base, [tmp_path / "other"], experts_per_token=1)
    wanted = relative(*(load_file(folder / "model.safetensors") for folder in (base, tmp_path / "other")))
    assert found.sampled
    assert dict(found.groups) == pytest.approx(wanted, rel=0.03)
    assert found.groups["norms"] == pytest.approx(wanted["norms"], rel=1e-5)  # these are whole


def test_an_adapter_counts_as_the_weights_it_gives(parents: Parents, tmp_path: Path) -> None:
    base, one, _ = parents["llama"]
    torch.manual_seed(5)
    config = LoraConfig(r=4, lora_alpha=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    tuned = get_peft_model(AutoModelForCausalLM.from_pretrained(one), config)
    tuned.save_pretrained(tmp_path / "lora")
    tuned.merge_and_unload().save_pretrained(tmp_path / "merged")
    with_adapter = Path(f"{one}+{tmp_path / 'lora'}")
    apart, merged, plain = distances(tmp_path / "r.yml", base, [with_adapter, tmp_path / "merged", one])
    assert dict(apart.groups) == pytest.approx(dict(merged.groups), rel=1e-5)
    assert apart.groups["attention"] != pytest.approx(plain.groups["attention"], rel=1e-3)
    assert apart.groups["norms"] == plain.groups["norms"]
    # the base's own adapter is part of the base
    (found,) = distances(tmp_path / "r.yml", with_adapter, [tmp_path / "merged"], experts_per_token=1)
    assert max(each or 0.0 for each in found.groups.values()) < 1e-6
    assert not found.differs


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_conversion_is_no_difference(dtype: torch.dtype, parents: Parents, tmp_path: Path) -> None:
    base = parents["llama"][0]
    AutoModelForCausalLM.from_pretrained(base).to(dtype).save_pretrained(tmp_path / "half")
    for one, two in ((base, tmp_path / "half"), (tmp_path / "half", base)):
        (found,) = distances(tmp_path / "r.yml", one, [two], experts_per_token=1)
        assert set(found.groups.values()) == {0.0}


def test_odd_shapes_and_numbers_are_unknown_and_count_as_different(parents: Parents, tmp_path: Path) -> None:
    base = parents["llama"][0]
    wide = tiny.make_parent(tmp_path / "wide", seed=7, num_key_value_heads=4)
    broken = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        broken.model.norm.weight[3] = torch.nan
    broken.save_pretrained(tmp_path / "broken")
    one, two = distances(tmp_path / "r.yml", base, [wide, tmp_path / "broken"])
    assert (one.groups["attention"], two.groups["norms"]) == (None, None)
    assert one.differs
    assert two.differs
    json.loads(json.dumps([one.to_dict(), two.to_dict()], allow_nan=False))


def test_configs_alone_have_no_distance(parents: Parents, tmp_path: Path) -> None:
    base, one, _ = parents["llama"]
    config = tmp_path / "config-only"
    config.mkdir()
    (config / "config.json").write_text((one / "config.json").read_text())
    found = distances(tmp_path / "r.yml", base, [config, one])
    assert [each.expert for each in found] == ["e1"]
    assert distances(tmp_path / "r.yml", config, [one, base]) == ()
    recipe = tiny.write_recipe(tmp_path / "r.yml", base, [config, one], backbone="auto")
    made = fm.plan(fm.Recipe.load(recipe))
    assert made.choice.from_base
    assert f"weights of {config}" in made.choice.why


def test_a_distance_is_remembered_until_a_file_changes(
    parents: Parents, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("frankenmoe.planning.distance.WORTH_KEEPING", 0)
    base = parents["llama"][0]
    other = tiny.make_parent(tmp_path / "other", seed=8)
    (first,) = distances(tmp_path / "r.yml", base, [other], experts_per_token=1)
    (entry,) = cache_folder("distances").iterdir()
    kept = json.loads(entry.read_text())
    assert kept["groups"] == dict(first.groups)
    assert "distances" in cli("cache").stdout
    # what the cache says is used by a process that has not measured yet
    monkeypatch.setattr("frankenmoe.planning.distance._memory", dict)
    entry.write_text(json.dumps(kept | {"groups": dict.fromkeys(kept["groups"], 0.25)}))
    (again,) = distances(tmp_path / "r.yml", base, [other], experts_per_token=1)
    assert set(again.groups.values()) == {0.25}
    entry.write_text("damaged")
    assert distances(tmp_path / "r.yml", base, [other], experts_per_token=1) == (first,)
    os.utime(other / "model.safetensors", ns=(1, 1))
    entry.write_text(json.dumps(kept | {"groups": dict.fromkeys(kept["groups"], 0.25)}))
    assert distances(tmp_path / "r.yml", base, [other], experts_per_token=1) == (first,)


def test_plan_shows_them_within_80_columns(parents: Parents, tmp_path: Path) -> None:
    base, one, two = parents["llama"]
    experts = [
        {"source_model": str(one), "name": "a-rather-long-name-of-an-expert-that-is-cut"},
        {"source_model": str(two), "name": "two"},
        {"source_model": str(base), "name": "three"},
    ]
    recipe = tmp_path / "r.yml"
    recipe.write_text(json.dumps({"base_model": str(base), "gate_mode": "random", "experts": experts}))
    shown = cli("plan", recipe)
    lines = shown.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    (at,) = [number for number, line in enumerate(lines) if line.startswith("distance of the parents")]
    assert lines[at + 1].split() == ["expert", "attention", "norms", "embeddings", "head", "FFN"]
    found = {each.expert: each.groups for each in fm.plan(fm.Recipe.load(recipe)).distances}
    assert lines[at + 3].split() == ["two", *(f"{each:.2%}" for each in found["two"].values())]
    assert lines[at + 4].split() == ["three", *["0"] * 5]
    assert "backbone  " in shown.stdout
    assert "differ from the base outside their FFNs" in shown.stderr
    data = json.loads(cli("plan", recipe, "--json").stdout)["backbone"]
    assert data["groups"] == dict.fromkeys(("attention", "norms", "embeddings", "head"), "base")
    assert data["distances"][1] == {"expert": "two", "source": str(two), **found["two"], "sampled": False}
    # copies of the base: no table
    copies = tiny.write_recipe(recipe, base, [base, base])
    assert "distance of the parents" not in cli("plan", copies).stdout
