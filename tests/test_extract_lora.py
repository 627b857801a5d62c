"""`extract-lora` beside PEFT, mergekit and numpy; what it reports; what it refuses."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import frankenmoe as fm
import tiny
from frankenmoe.evaluate.perplexity import mean_loss
from frankenmoe.moe.dense import load_tokenizer
from refusals import cli, copy_of, refused, spoil, tree

Parents = dict[str, list[Path]]
TEXT = "the quick brown fox jumps over the lazy dog, and then it does so again. " * 30


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}


def terms(folder: Path) -> dict[str, torch.Tensor]:
    """Name of a weight -> B A of an adapter whose scale is 1 everywhere."""
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["rank_pattern"] == config["alpha_pattern"]
    assert config["r"] == config["lora_alpha"]
    tensors = {name: tensor.float() for name, tensor in load_file(folder / "adapter_model.safetensors").items()}
    return {
        name.removeprefix("base_model.model.").replace(".lora_A", ""): tensors[name.replace("_A.", "_B.")] @ tensor
        for name, tensor in tensors.items()
        if ".lora_A." in name
    }


def is_linear(name: str) -> bool:
    return re.search(r"\.\d+\.(self_attn|mlp)\.\w+_proj\.weight$", name) is not None


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tiny.ids()).logits


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("size", [{"rank": 6}, {"energy": 0.9}, {}], ids=str)
def test_every_layer_is_as_near_as_the_exact_decomposition(
    family: str, size: dict[str, Any], parents: Parents, tmp_path: Path
) -> None:
    base, model, _ = parents[family]
    made = fm.extract_lora(model, tmp_path / "lora", base=base, **size)
    ours, theirs, found = weights(model), weights(base), terms(tmp_path / "lora")
    assert set(found) == {name for name in theirs if is_linear(name)}
    rows = {f"{row.module}.weight": row for row in made.layers}
    for name, term in found.items():
        delta = ours[name] - theirs[name]
        squares = np.linalg.svd(delta.double().numpy(), compute_uv=False) ** 2
        rank = min(size.get("rank", 32), *delta.shape)
        if "energy" in size:
            rank = int(np.searchsorted(np.cumsum(squares), 0.9 * squares.sum())) + 1
        assert rows[name].rank == rank
        error = float((delta - term).double().square().sum())
        assert error <= squares[rank:].sum() * 1.002 + 1e-5 * squares.sum()
        assert rows[name].kept == pytest.approx(squares[:rank].sum(), rel=0.002)
    assert 0 < made.energy_kept <= 1
    if "energy" in size:
        assert made.energy_kept >= 0.9


def test_peft_and_a_recipe_compute_the_base_plus_the_difference(parents: Parents, tmp_path: Path) -> None:
    base, model, _ = parents["llama"]
    made = fm.extract_lora(model, tmp_path / "lora", base=base, energy=0.8)
    assert len({row.rank for row in made.layers}) > 1, "the ranks must differ, or the patterns are not tested"
    folded = AutoModelForCausalLM.from_pretrained(base)
    state = folded.state_dict()
    for name, term in terms(tmp_path / "lora").items():
        state[name].add_(term)
    expected = logits(folded)
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "lora")
    assert torch.allclose(logits(tuned), expected, atol=1e-4)
    assert not torch.allclose(logits(AutoModelForCausalLM.from_pretrained(base)), expected, atol=0.1)
    # as a source, it gives its FFNs to an expert and, on the base, its attention to the backbone
    name = f"{base}+{tmp_path / 'lora'}"
    recipe = {"base_model": name, "gate_mode": "random", "experts": [{"source_model": name, "name": n} for n in "ab"]}
    (tmp_path / "r.yml").write_text(json.dumps(recipe))
    assert torch.allclose(logits(fm.load(tmp_path / "r.yml").model), expected, atol=1e-4)


def test_a_full_rank_gives_the_model_where_the_rest_is_equal(parents: Parents, tmp_path: Path) -> None:
    base, model, _ = parents["qwen3"]
    mixed = copy_of(base, tmp_path / "mixed")
    ours = load_file(model / "model.safetensors")
    spoil(mixed, lambda tensors: tensors.update({name: ours[name] for name in tensors if is_linear(name)}))
    made = fm.extract_lora(mixed, tmp_path / "lora", base=base, energy=1.0)
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "lora")
    assert torch.allclose(logits(tuned), logits(AutoModelForCausalLM.from_pretrained(mixed)), atol=1e-3)
    assert set(made.left_out.values()) == {0.0}


def test_mergekit_extracts_the_same(parents: Parents, tmp_path: Path) -> None:
    """Its products of both factors are ours, where it decomposes a layer."""
    from click.testing import CliRunner
    from mergekit.scripts.extract_lora import main

    base, model, _ = parents["llama"]
    theirs = tmp_path / "theirs"
    options = ["--model", str(model), "--base-model", str(base), "--out-path", str(theirs), "--max-rank", "6"]
    done = CliRunner().invoke(main, options)
    assert done.exit_code == 0, done.output
    fm.extract_lora(model, tmp_path / "ours", base=base, rank=6)
    config, tensors = (
        json.loads((theirs / "adapter_config.json").read_text()),
        load_file(next(theirs.glob("*.safetensors"))),
    )
    assert config["lora_alpha"] == config["r"]
    found = terms(tmp_path / "ours")
    for name, term in found.items():
        key = f"base_model.model.{name.removesuffix('.weight')}.lora_{{}}.weight"
        product = tensors[key.format("B")].float() @ tensors[key.format("A")].float()
        assert float((term - product).norm() / product.norm()) < 0.02, name


def test_what_is_left_out_is_reported(parents: Parents, tmp_path: Path) -> None:
    base, model, _ = parents["qwen2"]
    made = fm.extract_lora(model, tmp_path / "lora", base=base, rank=2)
    ours, theirs = weights(model), weights(base)
    groups = {
        "embeddings": lambda name: "embed_tokens" in name,
        "head": lambda name: name == "lm_head.weight",
        "biases": lambda name: name.endswith("bias"),
        "norms": lambda name: "norm" in name,
    }
    assert set(made.left_out) == set(groups)
    for group, belongs in groups.items():
        names = list(filter(belongs, theirs))
        change = sum(float((ours[name] - theirs[name]).square().sum()) for name in names)
        expected = (change / sum(float(theirs[name].square().sum()) for name in names)) ** 0.5
        assert made.left_out[group] == pytest.approx(expected, rel=1e-4), group


def test_losses_are_those_of_the_three_models(parents: Parents, tmp_path: Path) -> None:
    base, model, _ = parents["llama"]
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    outcome = cli("extract-lora", model, tmp_path / "lora", "--base", base, "--rank", 8, "--text", text, "--json")
    assert outcome.code == 0, outcome.stderr
    report = json.loads(outcome.stdout)
    tokenizer = load_tokenizer(base)
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "lora")
    models = {
        "base": AutoModelForCausalLM.from_pretrained(base),
        "model": AutoModelForCausalLM.from_pretrained(model),
        "adapter": tuned,
    }
    (row,) = report["losses"].values()
    for name, running in models.items():
        assert row[name] == pytest.approx(mean_loss(running, tokenizer, TEXT, block=256), rel=1e-4), name
    better = row["base"] > row["model"]
    share = (row["base"] - row["adapter"]) / (row["base"] - row["model"]) if better else None
    assert row["advantage_kept"] == (pytest.approx(share) if better else None)
    assert report == json.loads((tmp_path / "lora" / "extraction.json").read_text())
    assert report["groups"]["ffn"]["layers"] == 6
    assert report["bytes"] == sum(row["bytes"] for row in report["layers"])


def test_the_table_says_what_was_kept(parents: Parents, tmp_path: Path) -> None:
    base, model, _ = parents["llama"]
    outcome = cli("extract-lora", model, tmp_path / "lora", "--base", base, "--energy", 0.5)
    assert outcome.code == 0, outcome.stderr
    assert re.search(r"attention\s+8\s+\d+", outcome.stdout)
    assert re.search(r"embeddings\s+left out", outcome.stdout)
    assert "source_model:" in outcome.stdout


def _narrow(tensors: dict[str, torch.Tensor]) -> None:
    name = "model.layers.1.self_attn.q_proj.weight"
    tensors[name] = tensors[name][:, :-1].contiguous()


def _quantized(tensors: dict[str, torch.Tensor]) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(torch.int8)


def _broken(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.mlp.down_proj.weight"][3, 2] = float("nan")


@pytest.mark.parametrize(
    ("spoiled", "facts", "hint"),
    [
        (_narrow, ("model.layers.1.self_attn.q_proj.weight", "[32, 31]"), "two different models"),
        (_quantized, ("is quantized", "model.layers.0.mlp.up_proj.weight"), "dequantize"),
        (_broken, ("model.layers.1.mlp.down_proj.weight", "NaN at [3, 2]"), "broken"),
    ],
)
def test_a_model_that_cannot_be_decomposed(
    spoiled: Callable[..., Any], facts: tuple[str, ...], hint: str, parents: Parents, tmp_path: Path
) -> None:
    base, model, _ = parents["llama"]
    bad = spoil(copy_of(model, tmp_path / "bad"), spoiled)
    refused("extract-lora", bad, tmp_path / "lora", "--base", base, inside=tmp_path, facts=facts, hint=hint)


@pytest.mark.parametrize(
    ("options", "facts", "hint"),
    [
        (("--base", "{base}", "--rank", 4), ("has the same linear layers",), "fine-tune"),
        (("--base", "{folder}/nowhere"), ("nowhere",), "relative path"),
        (("--base", "{other}"), ("does not fit",), "family"),
        (("--base", "{base}", "--text", "{folder}/none.txt"), ("none.txt",), ""),
        (
            ("--base", "{base}", "--text", "{folder}/short.txt"),
            ("short.txt has too few tokens", "1, expected at least 64"),
            "more text",
        ),
        (
            (
                "--base",
                "{base}+{folder}",
            ),
            ("adapter_config.json",),
            "",
        ),
    ],
)
def test_bad_input(
    options: tuple[Any, ...], facts: tuple[str, ...], hint: str, parents: Parents, tmp_path: Path
) -> None:
    base, model, _ = parents["llama"]
    (tmp_path / "short.txt").write_text("a")
    names = {"base": base, "folder": tmp_path, "other": parents["qwen2"][0]}
    given = [str(option).format(**names) for option in options]
    who = base if "has the same" in facts[0] else model
    refused("extract-lora", who, tmp_path / "lora", *given, inside=tmp_path, facts=facts, hint=hint)


@pytest.mark.parametrize(
    ("options", "fact"),
    [
        (("--rank", 0), "at least 1"),
        (("--energy", 1.5), "at most 1"),
        (("--energy", 0), "more than 0"),
        (("--rank", 4, "--energy", 0.5), "not both"),
    ],
)
def test_options_out_of_range(options: tuple[Any, ...], fact: str, parents: Parents, tmp_path: Path) -> None:
    base, model, _ = parents["llama"]
    outcome = cli("extract-lora", model, tmp_path / "lora", "--base", base, *options)
    assert outcome.code == 2
    assert fact in outcome.stderr
    assert tree(tmp_path) == {}
    keys = {key.removeprefix("--"): value for key, value in zip(options[::2], options[1::2], strict=True)}
    with pytest.raises(fm.FrankenMoEError):
        fm.extract_lora(model, tmp_path / "lora", base=base, **keys)


def test_an_adapter_is_no_model_to_extract_from(parents: Parents, tmp_path: Path) -> None:
    base, model, _ = parents["llama"]
    fm.extract_lora(model, tmp_path / "lora", base=base, rank=2)
    before = tree(tmp_path)
    refused(
        "extract-lora", f"{base}+{tmp_path / 'lora'}", tmp_path / "again", "--base", base, inside=tmp_path,
        facts=("has an adapter",), hint="already",
    )  # fmt: skip
    assert tree(tmp_path) == before
    refused(
        "extract-lora", model, tmp_path / "lora", "--base", base, inside=tmp_path, facts=("not empty",), hint="another",
    )  # fmt: skip
