"""What a plan says beside the bill: notes per format, licences, refusals of DeepSeek, KV bytes, how equal is equal."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

import frankenmoe as fm
import tiny
from frankenmoe.planning.configs import odd_heads

WEAKER = "llama.cpp does not renormalise the top-k weights"
NO_LLAMA3 = "drops the llama3 rotary factors"
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32, "rope_theta": 5000.0,
}  # fmt: skip
Parents = dict[str, list[Path]]


def planned(file: Path, base: Path, experts: list[Path], **keys: Any) -> fm.Plan:
    return fm.plan(fm.Recipe.load(tiny.write_recipe(file, base, experts, **keys)))


# formats in other programs


@pytest.mark.parametrize(
    ("family", "keys", "told"),
    [
        ("qwen2", {"experts_per_token": 2}, True),
        ("qwen2", {"experts_per_token": 1}, True),
        ("qwen2", {"experts_per_token": 3}, False),  # all are chosen, so their weights sum to one anyway
        ("llama", {"architecture": "qwen"}, True),
        ("llama", {"architecture": "deepseek"}, True),
        ("llama", {"architecture": "deepseek", "experts_per_token": 1}, False),  # nobody renormalises a single one
        ("llama", {}, False),
        ("qwen3", {}, False),
    ],
)
def test_formats_that_llama_cpp_computes_otherwise(
    family: str, keys: dict[str, Any], told: bool, parents: Parents, tmp_path: Path
) -> None:
    made = planned(tmp_path / "r.yml", parents[family][0], parents[family], **keys)
    assert not made.problems or keys.get("architecture") == "deepseek"
    found = [text for text in made.warnings if WEAKER in text]
    assert len(found) == told
    assert made.fmt is not None
    assert all(text.startswith(f"{made.fmt.title}: ") for text in found)


def test_llama3_rotary_factors_that_llama_cpp_loses(tmp_path: Path) -> None:
    own = [tiny.make_parent(tmp_path / str(seed), seed=seed, rope_parameters=LLAMA3) for seed in range(2)]
    told = {
        architecture: any(
            NO_LLAMA3 in text for text in planned(tmp_path / "r.yml", own[0], own, architecture=architecture).warnings
        )
        for architecture in ("mixtral", "qwen")
    }
    assert told == {"mixtral": False, "qwen": True}


def test_plain_rotary_settings_are_not_warned_of(parents: Parents, tmp_path: Path) -> None:
    base, *others = parents["llama"]
    assert not any(
        NO_LLAMA3 in text for text in planned(tmp_path / "r.yml", base, others, architecture="qwen").warnings
    )


IN_VLLM = {
    "windows": "reach one token further than transformers",
    "tied": "with a tied head it writes nonsense",
    "untied": "uses the embeddings as the head",
    "biases": "lacks attention biases",
}
WINDOWS = {"layer_types": ["sliding_attention", "full_attention"], "num_hidden_layers": 2}


@pytest.mark.parametrize(
    ("family", "changes", "told"),
    [
        ("cohere2", WINDOWS | {"sliding_window": 8, "tie_word_embeddings": True}, ["windows"]),
        ("cohere2", WINDOWS | {"sliding_window": 64, "attention_bias": True}, ["untied", "biases"]),
        ("cohere", {"tie_word_embeddings": True}, []),
        ("lfm2", {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2}, ["untied"]),
        ("glm", {"tie_word_embeddings": True}, ["tied"]),
        ("qwen3", {"attention_bias": True}, ["biases"]),
        ("qwen3", {}, []),
        ("smollm3", {"attention_bias": True}, ["biases"]),
        ("glm", {}, []),
    ],
)
def test_what_vllm_computes_otherwise(family: str, changes: dict[str, Any], told: list[str], tmp_path: Path) -> None:
    """benchmarks/in_vllm.py runs such models in vLLM."""
    own = [tiny.make_parent(tmp_path / str(seed), family, seed=seed, **changes) for seed in range(2)]
    made = planned(tmp_path / "r.yml", own[0], own)
    assert not made.problems
    assert [key for key, words in IN_VLLM.items() if any(words in text for text in made.warnings)] == told


# DeepSeek


def deepseek(tmp_path: Path, family: str = "llama", **changes: Any) -> fm.Plan:
    own = [tiny.make_parent(tmp_path / str(seed), family, seed=seed, **changes) for seed in range(2)]
    shared = [{"source_model": str(own[1])}]
    return planned(tmp_path / "r.yml", own[0], own, shared_experts=shared, architecture="deepseek")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rope_parameters": LLAMA3}, "rope scaling 'llama3'"),
        ({"head_dim": 16}, "head_dim 16"),
        ({"mlp_bias": True}, "mlp_bias True"),
    ],
)
def test_what_deepseek_cannot_say(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    made = deepseek(tmp_path, **changes)
    assert made.fmt is not None
    assert made.fmt.name == "deepseek"
    assert [problem for problem in made.problems if words in problem]
    with pytest.raises(fm.FrankenMoEError, match="DeepSeek"):
        fm.build(made.recipe, tmp_path / "out")


def test_deepseek_has_no_window(tmp_path: Path) -> None:
    assert [problem for problem in deepseek(tmp_path, "mistral", sliding_window=16).problems if "window" in problem]


def test_deepseek_can_say_an_ordinary_llama_and_two_words_of_rotary_scaling(tmp_path: Path) -> None:
    made = deepseek(tmp_path / "plain")
    assert not made.problems
    assert made.config["rope_scaling"] is None
    # its own code takes a dictionary of these two and no other
    linear = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}
    made = deepseek(tmp_path / "linear", rope_parameters=linear)
    assert not made.problems
    assert made.config["rope_scaling"] == {"type": "linear", "factor": 2.0}
    assert made.config["rope_parameters"] == linear
    assert any("transformers and vLLM need remote code" in text for text in made.warnings)


# licences


@pytest.mark.parametrize(
    ("base", "other", "differ", "silent"),
    [
        ("mit", "mit", False, False),
        ("mit", "apache-2.0", True, False),
        ("mit", None, False, True),
        (None, None, False, True),
    ],
)
def test_licences(base: str | None, other: str | None, differ: bool, silent: bool, tmp_path: Path) -> None:
    folders = [tiny.make_parent(tmp_path / str(seed), seed=seed) for seed in range(2)]
    for folder, licence in zip(folders, (base, other), strict=True):
        if licence:
            (folder / "README.md").write_text(f"---\nlanguage: en\nlicense: {licence}\n---\nlicense: none of these\n")
    warnings = planned(tmp_path / "r.yml", folders[0], folders).warnings
    assert [text for text in warnings if "different licences" in text] == (
        [f"the sources are under different licences: {other}, {base}"] if differ else []
    )
    named = [str(folder) for folder, licence in zip(folders, (base, other), strict=True) if licence is None]
    assert [text for text in warnings if "no licence" in text] == (
        [f"no licence is declared in {', '.join(named)}"] if silent else []
    )


@pytest.mark.parametrize(("said", "differ", "silent"), [("mit", 0, 0), ("apache-2.0", 1, 0), (None, 0, 1)])
def test_adapters_have_licences_too(said: str | None, differ: int, silent: int, tmp_path: Path) -> None:
    parent, lora = tiny.make_parent(tmp_path / "parent", seed=0), tmp_path / "lora"
    model = AutoModelForCausalLM.from_pretrained(parent)
    get_peft_model(model, LoraConfig(target_modules=["up_proj"])).save_pretrained(lora)
    (parent / "README.md").write_text("---\nlicense: mit\n---\n")
    (lora / "README.md").write_text(f"---\nlicense: {said}\n---\n" if said else "")
    experts = [{"source_model": str(parent), "adapter": str(lora)}, {"source_model": str(parent)}]
    recipe = tiny.write_recipe(tmp_path / "r.yml", parent, [], experts=experts)
    warnings = fm.plan(fm.Recipe.load(recipe)).warnings
    assert sum(text == "the sources are under different licences: apache-2.0, mit" for text in warnings) == differ
    assert sum(text == f"no licence is declared in the adapter {lora}" for text in warnings) == silent


# the bill


def test_active_parameters_of_nested_experts(parents: Parents, tmp_path: Path) -> None:
    base = parents["llama"][0]
    leaf = {"source_model": str(base)}
    inner = {"experts": [leaf] * 4, "experts_per_token": 3}
    wide = {"experts": [inner, leaf, leaf], "experts_per_token": 2}
    recipe = fm.Recipe.parse(
        tiny.write_recipe(
            tmp_path / "r.yml", base, [base], experts=[wide, leaf, leaf], experts_per_token=2
        ).read_text(),
        folder=tmp_path,
        origin="r.yml",
    )
    bill = fm.plan(recipe).bill
    ffn = 2 * 3 * tiny.SIZES["hidden_size"] * tiny.SIZES["intermediate_size"]
    # a token takes the inner mixture's three and one leaf within the first expert, then one more leaf
    assert bill.active == bill.shared + (3 + 1 + 1) * ffn
    assert bill.total == bill.shared + (4 + 2 + 2) * ffn
    assert bill.per_expert == 6 * ffn


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("falcon", {"multi_query": True}),
        ("falcon", {"multi_query": False}),
        ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
        ("gpt_bigcode", {"multi_query": True}),
        ("gpt_bigcode", {"multi_query": False}),
        ("gpt_neox", {}),
    ],
)
def test_kv_bytes_are_those_of_transformers_cache(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    heads = "n_head" if family == "gpt_bigcode" else "num_attention_heads"  # the name its own class counts from
    sizes = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, heads: 4} | changes
    config = AutoConfig.for_model(family, **sizes)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float16)
    model.save_pretrained(tmp_path / "model")
    cache = model(tiny.ids(5, batch=1), use_cache=True).past_key_values
    stored = sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))
    made = planned(tmp_path / "r.yml", tmp_path / "model", [tmp_path / "model"] * 2)
    assert made.bill.kv_per_token == stored / 5


def test_families_that_are_multi_query_unless_they_say_otherwise() -> None:
    assert odd_heads({"model_type": "falcon", "num_attention_heads": 71}) == 1
    assert odd_heads({"model_type": "gpt_neox", "num_attention_heads": 71}) == 71


# how equal is equal


def test_equal_in_every_byte_or_only_in_what_was_compared(tmp_path: Path) -> None:
    small, large = (
        tiny.make_parent(tmp_path / name, intermediate_size=width) for name, width in (("small", 48), ("large", 16_384))
    )
    for parent in (small, large):
        shutil.copytree(parent, tmp_path / f"{parent.name}-copy")
    copies = {
        parent: planned(tmp_path / "r.yml", parent, [parent, tmp_path / f"{parent.name}-copy"])
        for parent in (small, large)
    }
    assert [made.all_identical for made in copies.values()] == [True, True]
    assert "are bit-identical: this MoE computes exactly its base" in copies[small].warnings[0]
    assert "are identical in every block compared: this MoE computes its base" in copies[large].warnings[0]
    assert [made.to_dict()["identical_sampled"] for made in copies.values()] == [False, True]
    with pytest.raises(fm.FrankenMoEError, match="in every block compared"):
        fm.build(copies[large].recipe, tmp_path / "out")
    # one and the same file needs no comparing
    assert "bit-identical" in planned(tmp_path / "r.yml", large, [large, large]).warnings[0]


# what of a folder is not read


def test_a_second_set_of_weights_is_named_and_the_one_of_transformers_taken(tmp_path: Path, parents: Parents) -> None:
    one, two = (shutil.copytree(parents["llama"][seed], tmp_path / str(seed)) for seed in (1, 2))
    shards = AutoModelForCausalLM.from_pretrained(two)
    shards.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    for file in (tmp_path / "shards").glob("model*"):
        shutil.copy(file, one)
    assert (one / "model.safetensors.index.json").is_file()
    recipe = tiny.write_recipe(tmp_path / "r.yml", parents["llama"][0], [one, two])
    said = [text for text in fm.plan(fm.Recipe.load(recipe)).warnings if "two sets of weights" in text]
    assert len(said) == 1
    assert str(one) in said[0]
    theirs = AutoModelForCausalLM.from_pretrained(one).model.layers[0].mlp.up_proj.weight
    ours = fm.load(recipe).model.model.layers[0].mlp.experts[0].up_proj.weight
    assert torch.equal(ours, theirs)


def test_an_adapter_inside_a_source_is_named(tmp_path: Path, parents: Parents) -> None:
    one = shutil.copytree(parents["llama"][1], tmp_path / "one")
    config = LoraConfig(r=2, target_modules=["up_proj"], init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(one), config).save_pretrained(one)
    base = parents["llama"][0]
    warnings = planned(tmp_path / "r.yml", base, [base, one]).warnings
    assert [text for text in warnings if "also holds an adapter" in text and str(one) in text]
    used = planned(tmp_path / "s.yml", base, [base, Path(f"{one}+{one}")]).warnings
    assert not [text for text in used if "also holds an adapter" in text]
