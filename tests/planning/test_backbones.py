"""Backbones made of the parents': tensors against numpy, groups, adapters, merged experts, what `auto` means."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

import frankenmoe as fm
import tiny
from frankenmoe.checkpoint.cast import decode
from frankenmoe.checkpoint.tensors import Merge, TensorWrite
from frankenmoe.checkpoint.values import materialize
from frankenmoe.errors import PlanError
from frankenmoe.planning.backbone import kept_beside
from frankenmoe.planning.candidates import candidates
from frankenmoe.planning.groups import group_of
from refusals import refused

Parents = dict[str, list[Path]]
Q, NORM, EMBED, HEAD = (
    "model.layers.1.self_attn.q_proj.weight",
    "model.layers.0.input_layernorm.weight",
    "model.embed_tokens.weight",
    "lm_head.weight",
)
EVERY = (Q, NORM, EMBED, HEAD)


def planned(file: Path, **keys: Any) -> fm.Plan:
    return fm.plan(fm.Recipe.load(file), **keys)


def numbers(write: TensorWrite) -> Any:
    return decode(materialize(write), dtype=write.dtype).reshape(write.shape)


def backbone(plan: fm.Plan) -> dict[str, Any]:
    return {write.name: numbers(write) for write in plan.backbone}


def weights(folder: Path) -> dict[str, Any]:
    return load_file(folder / "model.safetensors")


def copied(base: Path, folder: Path, *, part: str, by: float = 0.01, seed: int = 3) -> Path:
    """A parent that differs from the base in the tensors whose names contain `part`."""
    model = AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if part in name:
                parameter += by * torch.randn_like(parameter)
    model.save_pretrained(folder)
    tiny.make_tokenizer().save_pretrained(folder)
    return folder


def tuned(parent: Path, folder: Path, targets: list[str]) -> Path:
    """A random LoRA on a parent, in `folder`; alpha / rank is 0.5."""
    torch.manual_seed(5)
    config = LoraConfig(r=4, lora_alpha=2, target_modules=targets, init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(parent), config).save_pretrained(folder)
    return folder


def lora_term(folder: Path, name: str) -> Any:
    stored = load_file(folder / "adapter_model.safetensors")
    stem = f"base_model.model.{name.removesuffix('.weight')}"
    return 0.5 * stored[f"{stem}.lora_B.weight"] @ stored[f"{stem}.lora_A.weight"]


@pytest.mark.parametrize(
    ("written", "formula"),
    [
        ("average", lambda base, one, two: (one + two) / 2),
        ({"method": "average", "weights": {"e0": 3}}, lambda base, one, two: (3 * one + two) / 4),
        ("task_arithmetic", lambda base, one, two: one + two - base),
        (
            {"method": "task_arithmetic", "lambda": 0.7, "weights": {"e1": -0.5}},
            lambda base, one, two: base + 0.7 * ((one - base) - 0.5 * (two - base)),
        ),
        # with every difference kept, ties is the mean of those that have the sign of their sum
        ({"method": "ties", "lambda": 0.5}, lambda base, one, two: base + 0.5 * elected(one - base, two - base)),
    ],
)
def test_a_backbone_is_what_its_formula_gives(written: Any, formula: Any, parents: Parents, tmp_path: Path) -> None:
    base, one, two = parents["llama"]
    made = planned(tiny.write_recipe(tmp_path / "r.yml", base, [one, two], backbone=written))
    found, sides = backbone(made), [weights(folder) for folder in (base, one, two)]
    for name in EVERY:
        assert np.allclose(found[name], formula(*(side[name] for side in sides)), atol=1e-6), name


def elected(one: Any, two: Any) -> Any:
    sign = np.sign(one + two)
    kept = np.stack([np.sign(one) == sign, np.sign(two) == sign])
    return (kept * np.stack([one, two])).sum(0) / np.maximum(kept.sum(0), 1)


def test_the_settings_reach_the_merge_and_every_tensor_has_a_seed_of_its_own(parents: Parents, tmp_path: Path) -> None:
    base, one, two = parents["llama"]
    asked = {"method": "dare_ties", "lambda": 0.9, "density": 0.3, "weights": {"e1": 2}}
    steps = []
    for seed in (1, 2):
        made = planned(tiny.write_recipe(tmp_path / "r.yml", base, [one, two], backbone=asked, seed=seed))
        steps += [write.steps[0] for write in made.backbone]
        assert all(len(write.inputs) == 3 for write in made.backbone)
    merges = [step for step in steps if isinstance(step, Merge)]
    assert {(m.method, m.weights, m.scale, m.density) for m in merges} == {("dare_ties", (1.0, 2.0), 0.9, 0.3)}
    assert len({merge.seed for merge in merges}) == len(steps)
    made = planned(tiny.write_recipe(tmp_path / "r.yml", base, [one, two], backbone={"method": "slerp", "t": 0.25}))
    assert {(write.steps[0].method, write.steps[0].t) for write in made.backbone} == {("slerp", 0.25)}


def test_each_group_by_its_own_method(parents: Parents, tmp_path: Path) -> None:
    base, one, two = parents["qwen3"]
    asked = {"attention": {"method": "task_arithmetic", "lambda": 0.5}, "norms": "average", "head": "task_arithmetic"}
    made = planned(tiny.write_recipe(tmp_path / "r.yml", base, [one, two], backbone=asked))
    found, sides = backbone(made), [weights(folder) for folder in (base, one, two)]
    first, second, third = ({name: side[name] for name in found} for side in sides)
    for name, numbers_ in found.items():
        b, x, y = first[name], second[name], third[name]
        wanted = {
            "attention": b + 0.5 * (x + y - 2 * b), "norms": (x + y) / 2, "embeddings": b, "head": x + y - b,
        }[group_of(name)]  # fmt: skip
        assert np.allclose(numbers_, wanted, atol=1e-6), name
    assert {group_of(name) for name in found} == {"attention", "norms", "embeddings", "head"}
    assert group_of("model.layers.0.self_attn.q_norm.weight") == "norms"
    reasons = {name: why for source, name, why in made.unused if source == str(one)}
    assert reasons == {EMBED: "the backbone comes from the base"}


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("transformer.wte.weight", "embeddings"), ("transformer.wpe.weight", "embeddings"),
        ("transformer.h.0.ln_1.bias", "norms"), ("transformer.ln_f.weight", "norms"),
        ("gpt_neox.embed_in.weight", "embeddings"), ("embed_out.weight", "head"),
        ("gpt_neox.layers.0.attention.dense.bias", "attention"), ("gpt_neox.final_layer_norm.bias", "norms"),
        ("transformer.h.0.mlp.c_fc.weight", "ffn"), ("transformer.word_embeddings.weight", "embeddings"),
    ],
)  # fmt: skip
def test_groups_of_families_without_a_table(name: str, group: str) -> None:
    assert group_of(name) == group


def test_a_tied_head_follows_the_embeddings(tmp_path: Path) -> None:
    folders = [tiny.make_parent(tmp_path / str(seed), seed=seed, tie_word_embeddings=True) for seed in range(3)]
    recipe = tiny.write_recipe(tmp_path / "r.yml", folders[0], folders[1:], backbone={"embeddings": "average"})
    found = backbone(planned(recipe))
    assert HEAD not in found
    assert np.allclose(found[EMBED], sum(weights(folder)[EMBED] for folder in folders[1:]) / 2)
    model = fm.load(recipe).model
    assert np.allclose(model.lm_head.weight.numpy(), found[EMBED])


def test_parents_with_adapters_count_with_them(parents: Parents, tmp_path: Path) -> None:
    base, _, _ = parents["llama"]
    tuned(base, tmp_path / "a", ["q_proj", "up_proj"])
    tuned(base, tmp_path / "b", ["q_proj", "v_proj"])
    recipe = tmp_path / "r.yml"
    experts = [{"source_model": str(base), "adapter": "a"}, {"source_model": f"{base}+{tmp_path / 'b'}"}]
    asked = {"method": "task_arithmetic", "lambda": 0.7}
    recipe.write_text(
        json.dumps({"base_model": str(base), "gate_mode": "random", "experts": experts, "backbone": asked})
    )
    made, was = planned(recipe), weights(base)
    terms = [lora_term(tmp_path / each, Q) for each in "ab"]
    assert np.allclose(backbone(made)[Q], was[Q] + 0.7 * (terms[0] + terms[1]), atol=1e-6)
    by_name = {write.name: write for write in made.backbone}
    assert by_name[EMBED].is_copy  # all of them have the base's
    assert by_name["model.layers.0.self_attn.k_proj.weight"].is_copy
    # the second adapter leaves the FFNs alone; nothing of either is unused
    assert [name for _, name, _ in made.unused if "lora" in name] == []
    ids = tiny.ids()
    fm.build(recipe, tmp_path / "built")
    built = AutoModelForCausalLM.from_pretrained(tmp_path / "built")
    assert torch.allclose(fm.load(recipe).model(input_ids=ids).logits, built(input_ids=ids).logits, atol=1e-4)
    assert fm.verify(tmp_path / "built")


def test_an_adapter_on_the_base_is_part_of_the_base(parents: Parents, tmp_path: Path) -> None:
    base, one, two = parents["llama"]
    tuned(base, tmp_path / "a", ["q_proj"])
    there = Path(f"{base}+{tmp_path / 'a'}")
    recipe = tiny.write_recipe(tmp_path / "r.yml", there, [one, two], backbone="task_arithmetic")
    was, x, y = (weights(folder)[Q] for folder in (base, one, two))
    moved = was + lora_term(tmp_path / "a", Q)
    assert np.allclose(backbone(planned(recipe))[Q], x + y - moved, atol=1e-6)
    tiny.write_recipe(recipe, there, [one, two], backbone={"norms": "average", "embeddings": "average"})
    assert np.allclose(backbone(planned(recipe))[Q], moved, atol=1e-6)
    tiny.write_recipe(recipe, there, [one, two], backbone="average")
    facts = ("average takes nothing from the base", "would be lost")
    refused("plan", recipe, inside=tmp_path, facts=facts, hint="drop the adapter")


def with_merge(recipe: Path, base: Path, merge: dict[str, Any], other: Path, **keys: Any) -> Path:
    experts = [{"merge": merge, "name": "merged", **keys.pop("expert", {})}, {"source_model": str(other)}]
    data = {"base_model": str(base), "gate_mode": "random", "experts": experts} | keys
    recipe.write_text(yaml.safe_dump(data))
    return recipe


@pytest.mark.parametrize("how", ["base", "task_arithmetic"])
def test_a_merged_expert_is_the_model_that_one_would_merge_by_hand(how: str, parents: Parents, tmp_path: Path) -> None:
    base, one, two = parents["llama"]
    tuned(two, tmp_path / "a", ["up_proj", "q_proj"])
    merge = {
        "method": "task_arithmetic", "models": [str(one), f"{two}+{tmp_path / 'a'}"], "lambda": 0.6, "weights": [1, 2],
    }  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(base)
    was, x, y = (weights(folder) for folder in (base, one, two))
    state = {}
    for name, tensor in model.state_dict().items():
        term = lora_term(tmp_path / "a", name) if "up_proj" in name or "q_proj" in name else 0
        state[name] = torch.tensor(was[name] + 0.6 * ((x[name] - was[name]) + 2 * (y[name] + term - was[name])))
        assert state[name].shape == tensor.shape
    model.load_state_dict(state)
    model.save_pretrained(tmp_path / "hand")
    by_hand = tiny.write_recipe(tmp_path / "hand.yml", base, [tmp_path / "hand", one], backbone=how)
    recipe = with_merge(tmp_path / "r.yml", base, merge, one, backbone=how)
    made, wanted = planned(recipe), planned(by_hand)
    for ours, theirs in zip(made.writes, wanted.writes, strict=True):
        assert ours.name == theirs.name
        assert np.allclose(numbers(ours), numbers(theirs), atol=1e-5), ours.name
    ids = tiny.ids()
    fm.build(recipe, tmp_path / "built")
    fm.build(recipe, tmp_path / "virtual", virtual=True)
    found = [fm.load(each).model(input_ids=ids).logits for each in (recipe, tmp_path / "built", tmp_path / "virtual")]
    found.append(AutoModelForCausalLM.from_pretrained(tmp_path / "built")(input_ids=ids).logits)
    expected = fm.load(by_hand).model(input_ids=ids).logits
    assert all(torch.allclose(each, expected, atol=1e-4) for each in found)
    assert fm.verify(tmp_path / "built")
    assert fm.verify(tmp_path / "virtual")
    fm.extract(tmp_path / "virtual", tmp_path / "dense", expert="merged")
    dense = weights(tmp_path / "dense")
    up = "model.layers.0.mlp.up_proj.weight"
    assert np.allclose(dense[up], state[up].numpy(), atol=1e-5)
    assert {str(source.name) for source in made.sources} == {str(base), str(one), f"{two}+{tmp_path / 'a'}"}
    # nothing of the merged models' FFNs is unused, and adapters on attention only where the backbone is the base's
    unused = {name for source, name, _ in made.unused if source != str(base)}
    assert not any(".mlp." in name for name in unused)
    assert any("q_proj.lora" in name for name in unused) == (how == "base")


def test_noise_and_scale_come_after_the_merge(parents: Parents, tmp_path: Path) -> None:
    base, one, two = parents["llama"]
    merge = {"method": "average", "models": [str(one), str(two)]}
    changes = {"noise_scale": 0.01, "residual_scale": 0.5}
    made = planned(with_merge(tmp_path / "r.yml", base, merge, one, expert=changes))
    down = made.nodes[0].ffn[0]["down_proj.weight"]
    assert [type(step).__name__ for step in down.steps] == ["Merge", "Noise", "Scale"]
    name = "model.layers.0.mlp.down_proj.weight"
    mean = (weights(one)[name] + weights(two)[name]) / 2
    off = numbers(down) / 0.5 - mean
    assert 0.008 < off.std() < 0.012


def test_equal_merges_are_one_expert(parents: Parents, tmp_path: Path) -> None:
    base, one, two = parents["llama"]
    merge = {"method": "dare_ties", "density": 0.5, "models": [str(one), str(two)]}
    experts = [{"merge": merge, "name": name} for name in "ab"] + [{"source_model": str(one)}]
    recipe = tmp_path / "r.yml"
    recipe.write_text(yaml.safe_dump({"base_model": str(base), "gate_mode": "random", "experts": experts}))
    assert planned(recipe).identical_experts == ((0, 1),)
    other = {**merge, "density": 0.4}
    experts[1]["merge"] = other
    recipe.write_text(yaml.safe_dump({"base_model": str(base), "gate_mode": "random", "experts": experts}))
    assert planned(recipe).identical_experts == ()


# what auto means


def test_auto_is_the_base_where_only_ffns_differ(parents: Parents, tmp_path: Path) -> None:
    base = parents["llama"][0]
    ours = [copied(base, tmp_path / str(seed), part=".mlp.", seed=seed) for seed in range(2)]
    made = planned(tiny.write_recipe(tmp_path / "r.yml", base, ours, backbone="auto"))
    assert (made.choice.from_base, made.backbone_open) == (True, False)
    assert "no parent differs" in made.choice.why
    assert all(write.is_copy for write in made.backbone)
    assert not any("differ from the base" in text for text in made.warnings)


def test_auto_without_data_adds_most_of_what_the_parents_learnt(parents: Parents, tmp_path: Path) -> None:
    base, one, two = parents["llama"]
    made = planned(tiny.write_recipe(tmp_path / "r.yml", base, [one, two], prompts=True, gate_mode="logistic"))
    assert str(made.choice) == "attention, norms: average; embeddings, head: base"  # these moved far
    assert not made.backbone_open
    x, y = (weights(folder)[Q] for folder in (one, two))
    assert np.allclose(backbone(made)[Q], (x + y) / 2, atol=1e-6)


def test_auto_with_data_waits_for_a_measurement(parents: Parents, tmp_path: Path) -> None:
    base, one, two = parents["llama"]
    (tmp_path / "text.txt").write_text("some text")
    experts = [
        {"source_model": str(one), "name": "e0", "data": ["text.txt"]},
        {"source_model": str(two), "name": "e1", "positive_prompts": ["p"]},
    ]
    recipe = tmp_path / "r.yml"
    recipe.write_text(json.dumps({"base_model": str(base), "experts": experts}))
    made = planned(recipe)
    assert made.backbone_open
    words = [str(each) for each in candidates(made)]
    assert words[:3] == ["base", "average", "task_arithmetic, lambda 0.7"]
    assert "regmean" in words
    fixed = fm.plan(fm.Recipe.load(recipe).with_backbone("average"))
    assert (fixed.backbone_open, str(fixed.choice), [str(each) for each in candidates(fixed)]) == (
        False, "average", ["average"],
    )  # fmt: skip
    assert fixed.digest != made.digest
    # regmean needs text too; its stand-in has the same tensors
    waits = fm.plan(fm.Recipe.load(recipe).with_backbone("regmean"))
    assert (waits.backbone_open, str(waits.choice)) == (True, "average")


def test_auto_of_one_parent_and_of_odd_parents(parents: Parents, tmp_path: Path) -> None:
    base, one, _ = parents["llama"]
    made = planned(tiny.write_recipe(tmp_path / "r.yml", base, [one, one], backbone="auto"))
    assert str(made.choice) == "average"
    assert all(write.is_copy for write in made.backbone)
    odd = tiny.make_parent(tmp_path / "odd", seed=7, num_key_value_heads=4)
    made = planned(tiny.write_recipe(tmp_path / "r.yml", base, [one, odd], backbone="auto"))
    assert made.choice.from_base
    assert "another shape" in made.choice.why
    tuned(base, tmp_path / "a", ["q_proj"])
    there = Path(f"{base}+{tmp_path / 'a'}")
    made = planned(tiny.write_recipe(tmp_path / "r.yml", there, [one, base], backbone="auto"))
    assert made.choice.from_base
    assert "adapter" in made.choice.why


@pytest.mark.parametrize(("mode", "expected"), [("hidden", True), ("random", True), ("logistic", False)])
def test_without_backbone_mergekits_gate_modes_keep_the_base(
    mode: str, expected: bool, parents: Parents, tmp_path: Path
) -> None:
    base, one, two = parents["llama"]
    made = planned(tiny.write_recipe(tmp_path / "r.yml", base, [one, two], prompts=True, gate_mode=mode))
    assert made.choice.from_base == expected
    lost = [text for text in made.warnings if "differ from the base outside their FFNs" in text]
    assert bool(lost) == expected
    if lost:
        assert lost[0].startswith("e0 and e1 differ")
        assert f"gate_mode {mode}" in made.choice.why


def test_what_is_refused(parents: Parents, tmp_path: Path) -> None:
    base, one, _ = parents["llama"]
    wide = tiny.make_parent(tmp_path / "wide", seed=7, num_key_value_heads=4)
    recipe = tiny.write_recipe(tmp_path / "r.yml", base, [one, wide], backbone={"attention": "average"})
    facts = (str(wide), "k_proj.weight is [16, 32] against [32, 32]")
    refused("plan", recipe, inside=tmp_path, facts=facts, hint="backbone: base")
    assert planned(tiny.write_recipe(recipe, base, [one, wide], backbone={"norms": "average"})).backbone
    merge = {"method": "average", "models": [str(one), str(tmp_path / "nowhere")]}
    refused("plan", with_merge(recipe, base, merge, one), inside=tmp_path, facts=(str(tmp_path / "nowhere"),), hint="")
    thick = tiny.make_parent(tmp_path / "thick", seed=7, intermediate_size=64)
    merge = {"method": "average", "models": [str(one), str(thick)]}
    refused("plan", with_merge(recipe, base, merge, one), inside=tmp_path, facts=("FFN width 48 against 64",), hint="")


@pytest.mark.parametrize(
    "written",
    [
        "average",
        {"method": "ties", "lambda": 0.7, "density": 0.5, "weights": {"e0": 2}},
        {"attention": "task_arithmetic", "norms": "average"},
        {"method": "dare_linear", "density": 0.5},
        "base",
    ],
)
def test_a_backbone_stays_as_it_is_beside_one_more_expert(written: Any, parents: Parents, tmp_path: Path) -> None:
    base, one, two = parents["llama"]
    other = tiny.make_parent(tmp_path / "other", seed=9)
    before = planned(tiny.write_recipe(tmp_path / "r.yml", base, [one, two], backbone=written))
    larger = fm.Recipe.load(tiny.write_recipe(tmp_path / "s.yml", base, [one, two, other]))
    after = fm.plan(larger.with_backbone(kept_beside(before.choice, "e2")))
    was, found = backbone(before), backbone(after)
    assert all(np.allclose(found[name], was[name], atol=1e-6) for name in was)


def test_no_expert_can_be_added_to_slerp(parents: Parents, tmp_path: Path) -> None:
    base, one, two = parents["llama"]
    made = planned(tiny.write_recipe(tmp_path / "r.yml", base, [one, two], backbone="slerp"))
    with pytest.raises(PlanError, match="exactly two parents"):
        kept_beside(made.choice, "e2")
