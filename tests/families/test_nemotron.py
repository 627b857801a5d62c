"""Nemotron-H: FFNs without a gate, layers without an FFN, files that say `backbone`, in every tool."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import frankenmoe as fm
import gguftools
import tiny
from family_cases import CASES, LONG, apart, logits, make_parent, write_recipe
from frankenmoe.export.run import export_gguf
from frankenmoe.families import FAMILIES, is_neutral
from frankenmoe.families.values import odd_value
from frankenmoe.moe.grouping import group_experts
from frankenmoe.moe.trace import outer_blocks
from refusals import refused

CASE = CASES["nemotron_h"]
LAYERS = (1, 3)  # those with an FFN


@pytest.fixture
def parents(tmp_path: Path) -> list[Path]:
    return [make_parent(tmp_path / f"p{seed}", CASE, seed=seed) for seed in range(3)]


def stock(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def made_adapter(base: Path, folder: Path, *, modules: list[str]) -> Path:
    """A PEFT adapter on a stock model, with random values."""
    torch.manual_seed(len(folder.name))
    config = LoraConfig(r=3, lora_alpha=5, target_modules=modules, task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
    model.save_pretrained(folder)
    return folder


def test_only_layers_with_an_ffn_have_experts(parents: list[Path], tmp_path: Path) -> None:
    plan = fm.plan(fm.Recipe.load(write_recipe(tmp_path / "r.yml", CASE, parents[0], parents)))
    assert plan.layers == 5
    assert plan.expert_layers == LAYERS
    assert list(plan.routers) == [f"backbone.layers.{layer}.mixer.gate.weight" for layer in LAYERS]
    assert {why for *_, why in plan.unused} == {"the backbone comes from the base"}
    assert plan.config["hybrid_override_pattern"] == "ME*EM"
    moe = fm.load(tmp_path / "r.yml")
    assert tuple(outer_blocks(moe.model)) == LAYERS
    _, trace = moe.forward_with_trace(tiny.ids())
    assert [each.layer for each in trace.layers] == list(LAYERS)


def test_adapters_are_experts_at_dense_work_and_equal_pefts_merge(parents: list[Path], tmp_path: Path) -> None:
    base = parents[0]
    folders = [
        made_adapter(base, tmp_path / f"lora{'x' * index}", modules=["up_proj", "down_proj"]) for index in (1, 2)
    ]
    recipe = write_recipe(tmp_path / "r.yml", CASE, base, [f"{base}+{folder}" for folder in folders])
    moe = fm.load(recipe)
    for block in outer_blocks(moe.model).values():
        (group,) = group_experts(block.experts)
        assert group.base is not None
        assert list(group.base.into) == ["up_proj"]
    fm.build(recipe, tmp_path / "built")
    ids = tiny.ids(LONG)
    assert apart(logits(moe.model, ids), logits(stock(tmp_path / "built"), ids)) < 5e-6
    for index, folder in enumerate(folders):
        merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).merge_and_unload()
        out = fm.extract(tmp_path / "built", tmp_path / f"e{index}", expert=f"e{index}")
        assert apart(logits(merged.eval(), ids), logits(stock(out), ids)) < 5e-6


def test_an_adapter_on_the_base_changes_mamba_and_attention(parents: list[Path], tmp_path: Path) -> None:
    base, modules = parents[0], ["in_proj", "q_proj", "o_proj"]
    folder = made_adapter(base, tmp_path / "lora", modules=modules)
    merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).merge_and_unload().eval()
    ids = tiny.ids(LONG)
    # NVIDIA's own code says `backbone` where transformers says `model`
    tensors = load_file(folder / "adapter_model.safetensors")
    renamed = {name.replace(".model.layers.", ".backbone.layers."): tensor for name, tensor in tensors.items()}
    assert renamed.keys() != tensors.keys()
    for names in (tensors, renamed):
        save_file(names, folder / "adapter_model.safetensors")
        recipe = write_recipe(tmp_path / "r.yml", CASE, Path(f"{base}+{folder}"), [base, base])
        assert apart(logits(merged, ids), logits(fm.load(recipe).model, ids)) < 5e-6


def test_files_say_backbone_whichever_words_a_source_has(parents: list[Path], tmp_path: Path) -> None:
    base = parents[0]
    file = base / "model.safetensors"
    tensors = load_file(file)
    assert all(name.startswith(("backbone.", "lm_head.")) for name in tensors)
    before = logits(stock(base), tiny.ids())
    save_file({name.replace("backbone.", "model."): tensor for name, tensor in tensors.items()}, file)
    recipe = write_recipe(tmp_path / "r.yml", CASE, base, [base, parents[1]])
    virtual = fm.build(recipe, tmp_path / "virtual", virtual=True)
    out = fm.extract(virtual, tmp_path / "e0", expert="e0")
    assert load_file(out / "model.safetensors").keys() == tensors.keys()
    assert apart(before, logits(stock(out), tiny.ids())) == 0


def test_what_transformers_and_llamacpp_hold_is_recognized(tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    tokenizer = gguftools.bpe("gpt-2")
    parents = [make_parent(tmp_path / str(seed), CASE, seed=seed, vocab_size=len(tokenizer)) for seed in range(3)]
    for folder in parents:
        tokenizer.save_pretrained(folder)
    built = fm.build(write_recipe(tmp_path / "r.yml", CASE, parents[0], parents), tmp_path / "built").folder
    model = stock(built)
    model.save_pretrained(tmp_path / "saved")
    state = {key: tensor.contiguous() for key, tensor in model.state_dict().items()}
    assert "model.layers.1.mixer.experts.up_proj" in state
    model.config.save_pretrained(tmp_path / "packed")
    save_file(state, tmp_path / "packed" / "model.safetensors")
    for folder in ("saved", "packed"):
        found = fm.verify_after(built, tmp_path / folder)
        assert found.verdict.endswith("bit for bit"), found.verdict
    (file,) = export_gguf(built, tmp_path / "gguf", types=["f16"], allow_random=True)
    assert fm.verify_after(built, file.path).ok
    # an expert that is another one
    name = "model.layers.3.mixer.experts.up_proj"
    save_file(state | {name: state[name].flip(0).contiguous()}, tmp_path / "packed" / "model.safetensors")
    assert not fm.verify_after(built, tmp_path / "packed").ok


def test_the_lora_of_a_fine_tune_is_the_fine_tune(parents: list[Path], tmp_path: Path) -> None:
    base, ids = parents[0], tiny.ids(LONG)
    near, goal = (AutoModelForCausalLM.from_pretrained(each) for each in parents[:2])
    with torch.no_grad():
        for (name, one), other in zip(near.named_parameters(), goal.parameters(), strict=True):
            if one.dim() == 2 and not any(word in name for word in ("embeddings", "lm_head", "out_proj")):
                one.lerp_(other, 0.1)
    near.save_pretrained(tmp_path / "near")
    tiny.make_tokenizer().save_pretrained(tmp_path / "near")
    made = fm.extract_lora(tmp_path / "near", tmp_path / "lora", base=str(base), rank=36)
    merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), made.folder).merge_and_unload()
    assert apart(logits(near.eval(), ids), logits(merged.eval(), ids)) < 1e-4


def test_experts_go_one_by_one_and_layer_by_layer(parents: list[Path], tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox " * 400)
    recipe = write_recipe(tmp_path / "r.yml", CASE, parents[0], parents, experts_per_token=2)
    built = fm.build(recipe, tmp_path / "built")
    fm.remove_expert(built, tmp_path / "two", experts=["e1"])
    assert fm.load(tmp_path / "two").experts == ("e0", "e2")
    data = [(name, str(text)) for name in ("e0", "e1", "e2")]
    smaller = fm.prune(built, tmp_path / "pruned", experts=2, per_layer=True, data=data, keep_anyway=True)
    assert len(smaller.report["by_layer"]) == len(LAYERS)
    assert torch.isfinite(logits(fm.load(tmp_path / "pruned").model, tiny.ids())).all()


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ({"hybrid_override_pattern": "M*M"}, "has no layer with an FFN, expected at least one"),
        ({"hybrid_override_pattern": "M-?"}, "kind of layer '?', expected M, *, -, E or a word for one"),
        ({"layers_block_type": ["mamba", None]}, "kind of layer None, expected M"),
        ({"layers_block_type": 5}, "has no num_hidden_layers, expected a whole number"),
    ],
)
def test_odd_patterns_are_refused(own: dict[str, Any], said: str, parents: list[Path], tmp_path: Path) -> None:
    file = parents[1] / "config.json"
    config = json.loads(file.read_text())
    del config["layers_block_type"]
    file.write_text(json.dumps(config | own))
    recipe = write_recipe(tmp_path / "r.yml", CASE, parents[1], [parents[1]] * 2)
    refused("plan", recipe, inside=tmp_path, facts=(said,), hint="")


def test_the_list_of_layers_counts_whatever_number_stands_beside_it() -> None:
    family = FAMILIES["nemotron_h"]
    config = {"hidden_size": 36, "num_attention_heads": 6, "intermediate_size": 52, "vocab_size": 101}
    config |= {"hybrid_override_pattern": "M-*-", "num_hidden_layers": 9, "model_type": "nemotron_h"}
    assert odd_value(family, config) is None
    assert family.dims(config).layers == 4
    assert is_neutral(family, config, "own_experts")
    assert not is_neutral(family, config | {"hybrid_override_pattern": "ME*-"}, "own_experts")
