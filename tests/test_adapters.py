"""LoRA adapters as PEFT computes them: in every form, beside a residual scale, on the base; what is none is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import frankenmoe as fm
import tiny
from frankenmoe.checkpoint.lorasettings import check_settings, lora_scale
from frankenmoe.checkpoint.reader import Adapter
from refusals import refused

FFN = ["gate_proj", "up_proj", "down_proj"]
Parents = dict[str, list[Path]]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tiny.ids()).logits


def tune(parent: Path, folder: Path, *, targets: list[str], **settings: Any) -> Any:
    """Saves a random LoRA on a parent in `folder`; returns PEFT's model."""
    torch.manual_seed(5)
    config = LoraConfig(r=4, lora_alpha=3, target_modules=targets, init_lora_weights=False, **settings)
    tuned = get_peft_model(AutoModelForCausalLM.from_pretrained(parent), config)
    tuned.save_pretrained(folder)
    return tuned.eval()


def recipe_of(file: Path, base: str, experts: list[dict[str, Any]]) -> Path:
    file.write_text(json.dumps({"base_model": base, "gate_mode": "random", "experts": experts}))
    return file


def forms(recipe: Path, folder: Path) -> list[torch.Tensor]:
    fm.build(recipe, folder / "virtual", virtual=True, allow_identical=True)
    fm.build(recipe, folder / "built", allow_identical=True)
    models = [fm.load(recipe).model, fm.load(folder / "virtual").model]
    return [logits(model) for model in (*models, AutoModelForCausalLM.from_pretrained(folder / "built"))]


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"alpha_pattern": {"down_proj": 9}}], ids=str)
def test_an_adapter_computes_what_peft_computes(settings: dict[str, Any], parents: Parents, tmp_path: Path) -> None:
    one = parents["llama"][1]
    expected = logits(tune(one, tmp_path / "lora", targets=FFN, **settings))
    recipe = recipe_of(tmp_path / "r.yml", str(one), [{"source_model": str(one), "adapter": "lora"}] * 2)
    assert all(torch.allclose(found, expected, atol=1e-4) for found in forms(recipe, tmp_path))
    assert not torch.allclose(logits(AutoModelForCausalLM.from_pretrained(one)), expected, atol=0.01)


@pytest.mark.parametrize(
    ("base", "adapter", "held"),
    [
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float16, torch.float32),
    ],
    ids=str,
)
def test_an_adapter_is_held_in_the_type_that_loses_nothing(
    base: torch.dtype, adapter: torch.dtype, held: torch.dtype, parents: Parents, tmp_path: Path
) -> None:
    one = parents["llama"][1]
    tune(one, tmp_path / "lora", targets=FFN).to(adapter).save_pretrained(tmp_path / "lora")
    AutoModelForCausalLM.from_pretrained(one).to(base).save_pretrained(tmp_path / "base")
    recipe = recipe_of(tmp_path / "r.yml", "base", [{"source_model": "base", "adapter": "lora"}] * 2)
    stored = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {adapter}
    experts = fm.load(recipe).model.model.layers[0].mlp.experts
    lora = experts[0].down_proj
    assert (lora.a.dtype, lora.base.weight.dtype) == (held, base)
    (name,) = [name for name in stored if "layers.0.mlp.down_proj.lora_A" in name]
    assert torch.equal(lora.a, stored[name].to(held))


def test_residual_scale_counts_for_the_adapter_too(parents: Parents, tmp_path: Path) -> None:
    one = parents["llama"][1]
    dense = tune(one, tmp_path / "lora", targets=FFN).merge_and_unload()
    for layer in dense.model.layers:
        layer.mlp.down_proj.weight.data *= 0.25
    expert = {"source_model": str(one), "adapter": "lora", "residual_scale": 0.25}
    recipe = recipe_of(tmp_path / "r.yml", str(one), [expert] * 2)
    assert all(torch.allclose(found, logits(dense), atol=1e-4) for found in forms(recipe, tmp_path))
    built = load_file(tmp_path / "built" / "model-00001-of-00001.safetensors")
    name = "model.layers.1.block_sparse_moe.experts.0.w2.weight"
    assert torch.allclose(built[name], dense.model.layers[1].mlp.down_proj.weight.data, atol=1e-6)


def test_an_adapter_on_the_base_changes_the_backbone(parents: Parents, tmp_path: Path) -> None:
    base = parents["llama"][0]
    tuned = tune(base, tmp_path / "lora", targets=["q_proj", "o_proj", "up_proj"])
    recipe = recipe_of(
        tmp_path / "r.yml", f"{base}+{tmp_path / 'lora'}", [{"source_model": f"{base}+{tmp_path / 'lora'}"}] * 2
    )
    assert all(torch.allclose(found, logits(tuned), atol=1e-4) for found in forms(recipe, tmp_path))
    # and where the base is no expert, its FFN's part is left out for that reason
    recipe = recipe_of(tmp_path / "r.yml", f"{base}+{tmp_path / 'lora'}", [{"source_model": str(base)}] * 2)
    reasons = {why for _, name, why in fm.plan(fm.Recipe.load(recipe)).unused if "lora" in name}
    assert reasons == {"the base's own FFN is not among the experts"}


@pytest.mark.parametrize("command", ["plan", "build"])
def test_embedding_lora_on_the_base_is_refused(command: str, parents: Parents, tmp_path: Path) -> None:
    base, one, two = parents["llama"]
    tune(base, tmp_path / "lora", targets=["embed_tokens", "q_proj"])
    recipe = tiny.write_recipe(tmp_path / "r.yml", Path(f"{base}+{tmp_path / 'lora'}"), [one, two])
    facts = (str(tmp_path / "lora"), "embed_tokens.base_layer.weight and 2 more", "expected pairs of")
    out = [tmp_path / "out"] if command == "build" else []
    refused(command, recipe, *out, inside=tmp_path, facts=facts, hint="merge_and_unload")


def test_embedding_lora_on_an_expert_is_left_out_and_said(parents: Parents, tmp_path: Path) -> None:
    base, one, _ = parents["llama"]
    tune(one, tmp_path / "lora", targets=["embed_tokens", "up_proj"])
    recipe = tiny.write_recipe(tmp_path / "r.yml", base, [base, Path(f"{one}+{tmp_path / 'lora'}")])
    made = fm.plan(fm.Recipe.load(recipe))
    reasons = {why for _, name, why in made.unused if "embedding" in name}
    assert reasons == {"the adapter changes the backbone, and an expert is an FFN only"}


def test_another_kind_of_tensor_on_an_experts_ffn_is_refused(parents: Parents, tmp_path: Path) -> None:
    base, one, _ = parents["llama"]
    tune(one, tmp_path / "lora", targets=["up_proj"])
    file = tmp_path / "lora" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.model.layers.1.mlp.up_proj.lora_magnitude_vector"] = torch.ones(48)
    from safetensors.torch import save_file

    save_file(tensors, file)
    recipe = tiny.write_recipe(tmp_path / "r.yml", base, [base, Path(f"{one}+{tmp_path / 'lora'}")])
    refused("plan", recipe, inside=tmp_path, facts=("up_proj.lora_magnitude_vector",), hint="merge_and_unload")


def test_every_setting_of_peft_at_its_default_is_understood(parents: Parents, tmp_path: Path) -> None:
    base = parents["llama"][0]
    tune(base, tmp_path / "lora", targets=["up_proj"])
    file = tmp_path / "lora" / "adapter_config.json"
    written = json.loads(file.read_text())
    assert len(written) > 30  # whatever the installed PEFT knows
    file.write_text(json.dumps(written | {"new": None, "newer": False, "newest": {}, "newest_of_all": []}))
    recipe = tiny.write_recipe(tmp_path / "r.yml", base, [base, Path(f"{base}+{tmp_path / 'lora'}")])
    assert not fm.plan(fm.Recipe.load(recipe)).problems


@pytest.mark.parametrize("gate_mode", ["random", "centroid"])
def test_whole_modules_beside_the_pairs_are_left_out_and_said(gate_mode: str, parents: Parents, tmp_path: Path) -> None:
    base, one, two = parents["llama"]
    tune(one, tmp_path / "lora", targets=["up_proj"], modules_to_save=["embed_tokens", "lm_head"])
    keys = {"gate_mode": gate_mode} | ({"backbone": "average"} if gate_mode == "centroid" else {})
    recipe = tiny.write_recipe(
        tmp_path / "r.yml", base, [two, Path(f"{one}+{tmp_path / 'lora'}")], prompts=True, **keys
    )
    made = fm.plan(fm.Recipe.load(recipe))
    said = [text for text in made.warnings if "holds more than low-rank pairs" in text]
    assert len(said) == 1
    assert "and 1 more" in said[0]
    left = {name for _, name, _ in made.unused if "lm_head" in name or "embed_tokens" in name}
    assert "base_model.model.lm_head.weight" in left


def test_a_whole_ffn_matrix_beside_the_pairs_is_refused(parents: Parents, tmp_path: Path) -> None:
    base, one, _ = parents["llama"]
    tune(one, tmp_path / "lora", targets=["up_proj"], modules_to_save=["down_proj"])
    recipe = tiny.write_recipe(tmp_path / "r.yml", base, [base, Path(f"{one}+{tmp_path / 'lora'}")])
    refused("plan", recipe, inside=tmp_path, facts=("mlp.down_proj.weight", "expected pairs"), hint="merge_and_unload")


@pytest.mark.parametrize(
    ("pattern", "matches"),
    [
        ("up_proj", True),
        (r"model\.layers\.0\.mlp\.up_proj", True),
        (r".*layers\.[01]\.mlp\.(up|down)_proj", True),
        (r"layers\.1\.mlp\.up_proj", False),
        (r"layers.\d+.mlp.up_proj", True),
        ("p_proj", False),
    ],
)
def test_alpha_patterns_match_as_in_peft(pattern: str, matches: bool, tmp_path: Path) -> None:
    from peft.utils.other import get_pattern_key

    name = "model.layers.0.mlp.up_proj"
    assert (get_pattern_key([pattern], name) == pattern) is matches
    adapter = Adapter(tmp_path, {"lora_alpha": 2, "alpha_pattern": {pattern: 6}}, {})
    assert lora_scale(adapter, name, rank=2) == (3 if matches else 1)


# the fields that PEFT 0.4, 0.10, 0.14 and 0.18 write into every adapter_config.json, with what they are if nobody sets
# them, and what LLaMA-Factory, unsloth and ms-swift put there
PEFT_4 = {
    "auto_mapping": None, "base_model_name_or_path": "org/name", "bias": "none", "fan_in_fan_out": False,
    "inference_mode": True, "init_lora_weights": True, "layers_pattern": None, "layers_to_transform": None,
    "lora_alpha": 16, "lora_dropout": 0.05, "modules_to_save": None, "peft_type": "LORA", "r": 8, "revision": None,
    "target_modules": ["up_proj", "down_proj"], "task_type": "CAUSAL_LM",
}  # fmt: skip
PEFT_10 = PEFT_4 | {
    "alpha_pattern": {}, "rank_pattern": {}, "loftq_config": {}, "megatron_config": None,
    "megatron_core": "megatron.core", "use_rslora": False, "use_dora": False, "layer_replication": None,
}  # fmt: skip
PEFT_14 = PEFT_10 | {"eva_config": None, "exclude_modules": None, "lora_bias": False}
PEFT_18 = PEFT_14 | {
    "alora_invocation_tokens": None, "arrow_config": None, "corda_config": None, "ensure_weight_tying": False,
    "peft_version": "0.18.0", "qalora_group_size": 16, "target_parameters": None, "trainable_token_indices": None,
    "use_qalora": False,
}  # fmt: skip
UNSLOTH = PEFT_18 | {
    "auto_mapping": {"base_model_class": "LlamaForCausalLM", "parent_library": "x", "unsloth_fixed": True},
    "target_modules": "(?:.*?(?:language|text).*?(?:mlp).*?(?:up_proj|down_proj).*?)",
}
SWIFT = PEFT_10 | {"lora_dtype": None, "lorap_emb_lr": 1e-6, "lorap_lr_ratio": 16.0, "use_qa_lora": False}


@pytest.mark.parametrize("config", [PEFT_4, PEFT_10, PEFT_14, PEFT_18, UNSLOTH, SWIFT])
def test_what_trainers_write_is_understood(config: dict[str, Any], tmp_path: Path) -> None:
    check_settings(Adapter(tmp_path, config, {}))
    assert lora_scale(Adapter(tmp_path, config, {}), "model.layers.0.mlp.up_proj", rank=8) == 2


def test_what_peft_does_without_settings(tmp_path: Path) -> None:
    adapter = Adapter(tmp_path, {"peft_type": "LORA", "init_lora_weights": None}, {})
    check_settings(adapter)
    assert lora_scale(adapter, "up_proj", rank=16) == LoraConfig().lora_alpha / 16
