"""Oracles 1, 2, 3, 4, 5 and 7 of the design on whole models: what an MoE must equal, known beforehand."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import frankenmoe as fm
import tiny
from frankenmoe.artifact.folder import ROUTERS
from frankenmoe.checkpoint.reader import open_checkpoint

CLOSE = 1e-5
Parents = dict[str, list[Path]]


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


def stock(folder: Path) -> Any:
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    return model.eval()


def difference(one: torch.Tensor, two: torch.Tensor) -> float:
    return float((one - two).abs().max())


def three_forms(recipe: Path, tmp_path: Path, **loading: Any) -> list[torch.Tensor]:
    """Logits of the recipe, the virtual artifact, the built artifact, and the built one in stock transformers."""
    ids = tiny.ids()
    fm.build(recipe, tmp_path / "virtual", virtual=True)
    fm.build(recipe, tmp_path / "built")
    loaded = [fm.load(what).model for what in (recipe, tmp_path / "virtual", tmp_path / "built")]
    return [logits(model, ids) for model in (*loaded, stock(tmp_path / "built"))]


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("top_k", [1, 2])
def test_virtual_equals_built_equals_stock(family: str, top_k: int, parents: Parents, tmp_path: Path) -> None:
    recipe = tiny.write_recipe(
        tmp_path / "r.yml",
        parents[family][0],
        parents[family][1:],
        prompts=True,
        gate_mode="hidden_avg",
        experts_per_token=top_k,
    )
    first, *others = three_forms(recipe, tmp_path)
    assert first.std() > 0.1
    assert [difference(first, other) < CLOSE for other in others] == [True] * 3


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_heads_wider_than_their_share_of_the_hidden_size(family: str, tmp_path: Path) -> None:
    head_dim = 12
    assert head_dim * tiny.SIZES["num_attention_heads"] != tiny.SIZES["hidden_size"]
    own = [tiny.make_parent(tmp_path / str(seed), family, seed=seed, head_dim=head_dim) for seed in range(2)]
    first, *others = three_forms(tiny.write_recipe(tmp_path / "r.yml", own[0], own), tmp_path)
    assert [difference(first, other) < CLOSE for other in others] == [True] * 3
    assert json.loads((tmp_path / "built" / "config.json").read_text())["head_dim"] == head_dim
    assert fm.plan(fm.Recipe.load(tmp_path / "r.yml")).bill.kv_per_token == 2 * 2 * 2 * 2 * head_dim


@pytest.mark.parametrize("prompted", [True, False])
def test_qwen_shared_expert_gated_and_ungated(prompted: bool, parents: Parents, tmp_path: Path) -> None:
    base, one, two = parents["qwen2"]
    shared = {"source_model": str(base)} | ({"positive_prompts": ["anything at all"]} if prompted else {})
    recipe = tiny.write_recipe(
        tmp_path / "r.yml", base, [one, two], prompts=True, gate_mode="hidden", shared_experts=[shared]
    )
    first, *others = three_forms(recipe, tmp_path)
    assert [difference(first, other) < CLOSE for other in others] == [True] * 3
    config = json.loads((tmp_path / "built" / "config.json").read_text())
    assert config["shared_expert_intermediate_size"] == tiny.SIZES["intermediate_size"]


def test_llama_with_a_prompted_shared_expert_becomes_qwen_moe(parents: Parents, tmp_path: Path) -> None:
    base, one, two = parents["llama"]
    recipe = tiny.write_recipe(
        tmp_path / "r.yml", base, [one, two], prompts=True, gate_mode="hidden",
        shared_experts=[{"source_model": str(base), "positive_prompts": ["anything"]}],
    )  # fmt: skip
    first, *others = three_forms(recipe, tmp_path)
    assert fm.plan(fm.Recipe.load(recipe)).fmt.name == "qwen2_moe"
    assert [difference(first, other) < CLOSE for other in others] == [True] * 3


@pytest.mark.parametrize("top_k", [1, 2])
def test_deepseek_loads_without_remote_code(top_k: int, parents: Parents, tmp_path: Path) -> None:
    base, one, two = parents["llama"]
    recipe = tiny.write_recipe(
        tmp_path / "r.yml", base, [one, two], prompts=True, gate_mode="hidden", experts_per_token=top_k,
        shared_experts=[{"source_model": str(base)}], architecture="deepseek",
    )  # fmt: skip
    fm.build(recipe, tmp_path / "built")
    assert json.loads((tmp_path / "built" / "config.json").read_text())["architectures"] == ["DeepseekForCausalLM"]
    ids = tiny.ids()
    assert difference(logits(fm.load(recipe).model, ids), logits(fm.load(tmp_path / "built").model, ids)) < CLOSE


@pytest.mark.parametrize("family", [*tiny.FAMILIES, tiny.UNLISTED])
def test_identical_experts_are_the_dense_parent(family: str, parents: Parents, tmp_path: Path) -> None:
    base = parents[family][0]
    recipe = tiny.write_recipe(tmp_path / "r.yml", base, [base] * 3)
    made = fm.plan(fm.Recipe.load(recipe))
    assert made.all_identical
    assert made.equals_base
    ids = tiny.ids()
    assert difference(logits(fm.load(recipe).model, ids), logits(stock(base), ids)) < CLOSE


@pytest.mark.parametrize("changed", ["nothing", "one byte", "activation"])
def test_a_copy_of_a_source_is_one_expert_with_it(changed: str, tmp_path: Path) -> None:
    """If every byte is equal, also beyond those that a plan compares, and the FFN does the same with them."""
    size = {"hidden_size": 256, "intermediate_size": 1500, "num_hidden_layers": 1}  # 1.5 MB a matrix
    base, one = (tiny.make_parent(tmp_path / name, seed=seed, **size) for seed, name in enumerate(("base", "one")))
    shutil.copytree(one, tmp_path / "two")
    if changed == "activation":
        tiny.edit_config(tmp_path / "two", hidden_act="relu")
    recipe = tiny.write_recipe(tmp_path / "r.yml", base, [one, base, tmp_path / "two"])
    if changed == "one byte":
        ref = open_checkpoint(tmp_path / "two").tensors["model.layers.0.mlp.down_proj.weight"]
        with ref.file.open("r+b") as file:
            file.seek(ref.end - 4097 - 2)
            byte = file.read(1)
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte[0] ^ 1]))
    made = fm.plan(fm.Recipe.load(recipe), weights=True)
    assert made.identical_experts == ((0, 2),)
    model = fm.load(recipe).model
    groups = [group.members for group in model.model.layers[0].mlp.groups]
    assert groups == ([(0, 2), (1,)] if changed == "nothing" else [(0,), (1,), (2,)])


def test_one_expert_is_dense(parents: Parents, tmp_path: Path) -> None:
    base = parents["llama"][0]
    recipe = tiny.write_recipe(tmp_path / "r.yml", base, [base], experts_per_token=1)
    ids = tiny.ids()
    assert difference(logits(fm.load(recipe).model, ids), logits(stock(base), ids)) < CLOSE


@pytest.mark.parametrize("family", [*tiny.FAMILIES, tiny.UNLISTED])
def test_all_experts_of_one_parent_are_the_base_with_its_ffn(family: str, parents: Parents, tmp_path: Path) -> None:
    base, parent, _ = parents[family]
    recipe = tiny.write_recipe(tmp_path / "r.yml", base, [parent] * 2)
    dense = stock(base)
    state = {name: value for name, value in stock(parent).state_dict().items() if ".mlp." in name}
    assert state
    dense.load_state_dict(state, strict=False)
    ids = tiny.ids()
    assert difference(logits(fm.load(recipe).model, ids), logits(dense, ids)) < CLOSE
    assert not fm.plan(fm.Recipe.load(recipe)).equals_base


def test_permuting_experts_with_their_gate_rows_changes_nothing(parents: Parents, tmp_path: Path) -> None:
    base, one, two = parents["llama"]
    keys = {"prompts": True, "gate_mode": "hidden"}
    recipe = tiny.write_recipe(tmp_path / "r.yml", base, [base, one, two], **keys)
    permuted = fm.Recipe.load(recipe).to_dict()
    permuted["experts"] = permuted["experts"][::-1]
    (tmp_path / "p.yml").write_text(json.dumps(permuted))
    ids = tiny.ids()
    assert difference(logits(fm.load(recipe).model, ids), logits(fm.load(tmp_path / "p.yml").model, ids)) < CLOSE


def test_copied_tensors_are_byte_equal_and_every_source_tensor_is_accounted_for(
    parents: Parents, tmp_path: Path
) -> None:
    base, one, two = parents["llama"]
    recipe = tiny.write_recipe(tmp_path / "r.yml", base, [one, two])
    artifact = fm.build(recipe, tmp_path / "built")
    made = fm.plan(fm.Recipe.load(recipe))
    body = {}
    for file in artifact.folder.glob("model-0*.safetensors"):
        body |= load_file(file)
    sources = {str(folder): load_file(folder / "model.safetensors") for folder in (base, one, two)}
    used = set()
    for write in made.writes:
        (ref,) = write.inputs
        folder = str(ref.file.parent)
        assert torch.equal(body[write.name], sources[folder][ref.name])
        used.add((folder, ref.name))
    unused = {(source, name) for source, name, _ in made.unused}
    everything = {(folder, name) for folder, tensors in sources.items() for name in tensors}
    assert used | unused == everything
    assert not used & unused


def test_noise_and_scale_are_the_same_in_both_forms_and_from_run_to_run(parents: Parents, tmp_path: Path) -> None:
    base = parents["llama"][0]
    experts = [
        {"source_model": str(base), "noise_relative": 0.1},
        {"source_model": str(base), "noise_scale": 0.02, "residual_scale": 0.5},
        {"source_model": str(base)},
    ]
    recipe = tmp_path / "r.yml"
    recipe.write_text(json.dumps({"base_model": str(base), "gate_mode": "random", "experts": experts, "seed": 7}))
    first, *others = three_forms(recipe, tmp_path)
    assert [difference(first, other) < CLOSE for other in others] == [True] * 3
    made = fm.plan(fm.Recipe.load(recipe))
    assert made.identical_experts == ()
    noisy = load_file(tmp_path / "built" / "model-00001-of-00001.safetensors")
    clean = load_file(base / "model.safetensors")
    name = "model.layers.0.block_sparse_moe.experts.{}.w2.weight"
    source = clean["model.layers.0.mlp.down_proj.weight"]
    assert 0.05 < float((noisy[name.format(0)] - source).std() / source.std()) < 0.15
    assert 0.015 < float((noisy[name.format(1)] - source * 0.5).std() / 0.5) < 0.025


def test_average_backbone_is_the_mean_of_the_experts_parents(parents: Parents, tmp_path: Path) -> None:
    base, one, two = parents["llama"]
    recipe = tiny.write_recipe(tmp_path / "r.yml", base, [one, two], backbone="average")
    first, *others = three_forms(recipe, tmp_path)
    assert [difference(first, other) < CLOSE for other in others] == [True] * 3
    name = "model.layers.1.self_attn.q_proj.weight"
    body = load_file(tmp_path / "built" / "model-00001-of-00001.safetensors")
    donors = [load_file(folder / "model.safetensors")[name] for folder in (one, two)]
    assert difference(body[name], (donors[0] + donors[1]) / 2) < 1e-7


def test_adapter_experts_stay_low_rank_and_equal_peft(parents: Parents, tmp_path: Path) -> None:
    one = parents["llama"][1]
    torch.manual_seed(5)
    settings = LoraConfig(
        r=4, lora_alpha=12, target_modules=["gate_proj", "up_proj", "down_proj"], init_lora_weights=False
    )
    tuned = get_peft_model(stock(one), settings)
    tuned.save_pretrained(tmp_path / "lora")
    experts = [{"source_model": str(one), "adapter": "lora"}, {"source_model": f"{one}+{tmp_path / 'lora'}"}]
    recipe = tmp_path / "r.yml"
    recipe.write_text(json.dumps({"base_model": str(one), "gate_mode": "random", "experts": experts}))
    assert fm.plan(fm.Recipe.load(recipe)).all_identical
    ids = tiny.ids()
    expected = logits(tuned, ids)
    moe = fm.load(recipe).model
    assert any(name.endswith("down_proj.a") for name, _ in moe.named_parameters())
    assert difference(logits(moe, ids), expected) < CLOSE
    fm.build(recipe, tmp_path / "built", allow_identical=True)
    assert difference(logits(stock(tmp_path / "built"), ids), expected) < 5 * CLOSE


def test_an_moe_as_an_expert_two_levels_deep(parents: Parents, tmp_path: Path) -> None:
    base, one, two = parents["llama"]
    leaf = [{"source_model": str(folder)} for folder in (base, one, two)]
    inner = {"name": "inner", "experts": [leaf[1], leaf[2]], "experts_per_token": 1}
    outer = {"name": "outer", "experts": [inner, leaf[0]], "experts_per_token": 2}
    recipe = tmp_path / "r.yml"
    recipe.write_text(
        json.dumps(
            {"base_model": str(base), "gate_mode": "random", "experts": [outer, leaf[1]], "experts_per_token": 1}
        )
    )
    fm.build(recipe, tmp_path / "virtual", virtual=True)
    ids = tiny.ids()
    moe = fm.load(tmp_path / "virtual")
    out, trace = moe.forward_with_trace(ids)
    assert difference(out.logits, logits(fm.load(recipe).model, ids)) < CLOSE
    assert {layer.path for layer in trace.layers} == {"", "0", "0.0"}
    with pytest.raises(fm.FrankenMoEError, match="nested experts"):
        fm.build(recipe, tmp_path / "built")
    # every leaf the same: whatever the routers say, it is the dense model
    same = json.loads(recipe.read_text().replace(str(one), str(base)).replace(str(two), str(base)))
    (tmp_path / "same.yml").write_text(json.dumps(same))
    assert difference(logits(fm.load(tmp_path / "same.yml").model, ids), logits(stock(base), ids)) < CLOSE


def test_a_source_used_many_times_is_held_once(parents: Parents, tmp_path: Path) -> None:
    base = parents["llama"][0]
    moe = fm.load(tiny.write_recipe(tmp_path / "r.yml", base, [base] * 16)).model
    experts = moe.model.layers[0].mlp.experts
    assert len({expert.gate_proj.weight.data_ptr() for expert in experts}) == 1
    distinct = {parameter.data_ptr(): parameter.numel() for parameter in moe.parameters()}
    dense = sum(parameter.numel() for parameter in stock(base).parameters())
    assert sum(distinct.values()) == dense + 2 * 16 * tiny.SIZES["hidden_size"]


def test_trace_has_the_shapes_and_the_choices(parents: Parents, tmp_path: Path) -> None:
    base, one, two = parents["qwen3"]
    moe = fm.load(tiny.write_recipe(tmp_path / "r.yml", base, [base, one, two]))
    ids = tiny.ids(length=7)
    out, trace = moe.forward_with_trace(ids)
    assert out.logits.shape == (2, 7, 128)
    layer = trace.layer(1)
    assert layer.ids_TK.shape == layer.weights_TK.shape == (14, 2)
    assert layer.logits_TE.shape == (14, 3)
    assert torch.equal(layer.logits_TE.topk(2).indices, layer.ids_TK)
    assert torch.allclose(layer.weights_TK.sum(-1), torch.ones(14))


def test_generation_with_a_cache_equals_generation_without(parents: Parents, tmp_path: Path) -> None:
    base, one, two = parents["llama"]
    moe = fm.load(tiny.write_recipe(tmp_path / "r.yml", base, [one, two], prompts=True, gate_mode="hidden")).model
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    ids = tiny.ids(batch=1)
    assert torch.equal(moe.generate(ids, use_cache=True, **settings), moe.generate(ids, use_cache=False, **settings))


def test_routers_lie_in_their_own_file_and_the_body_never_has_a_plain_name(parents: Parents, tmp_path: Path) -> None:
    base, one, two = parents["llama"]
    artifact = fm.build(tiny.write_recipe(tmp_path / "r.yml", base, [one, two]), tmp_path / "out")
    names = {file.name for file in artifact.folder.iterdir()}
    assert "model-00001-of-00001.safetensors" in names
    assert "model.safetensors" not in names
    with safe_open(artifact.folder / ROUTERS, "pt") as routers:
        assert sorted(routers.keys()) == [f"model.layers.{layer}.block_sparse_moe.gate.weight" for layer in range(2)]
