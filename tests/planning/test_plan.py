"""The bill to the last parameter, the choice of format, what a format cannot say, and the warnings."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import frankenmoe as fm
import tiny
from frankenmoe.cli.app import app
from frankenmoe.planning.bill import gguf_bytes
from frankenmoe.planning.forecast import forecast

RECIPES = Path(__file__).parents[2] / "recipes"
Parents = dict[str, list[Path]]


def planned(file: Path, **keys: Any) -> fm.Plan:
    return fm.plan(fm.Recipe.load(file), **keys)


@pytest.mark.parametrize(
    ("recipe", "total", "active"),
    [
        ("mixtral-8x7b-shape.yml", 46_702_792_704, 12_879_925_248),
        ("raiden-16x3.43b.yml", 35_775_964_800, 5_584_348_800),
    ],
)
def test_parameters_of_the_known_shapes(recipe: str, total: int, active: int) -> None:
    data = planned(RECIPES / recipe).to_dict()
    assert data["parameters"]["total"] == total
    assert data["parameters"]["active"] == active
    counts = data["parameters"]
    assert counts["shared"] + counts["per_expert"] * data["experts"] == total
    assert data["identical_experts"] == [list(range(data["experts"]))]
    assert any("computes exactly its base" in text for text in data["warnings"])
    assert json.loads(json.dumps(data)) == data


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.yml")), ids=lambda file: file.name)
def test_every_ready_recipe_can_be_planned(recipe: Path) -> None:
    assert planned(recipe).bill.total > 0


def test_raidens_gguf_sizes_are_what_llama_cpp_measures() -> None:
    bill = planned(RECIPES / "raiden-16x3.43b.yml").bill
    # llama.cpp's own dry run of this shape: 18.79 and 22.95 GiB (shared/research/gguf.md)
    assert round(bill.memory_q4_0 / 2**30, 2) == 18.79
    assert round(bill.memory_q5_0 / 2**30, 2) == 22.95


def test_gguf_rows_that_no_block_fits_stay_16_bit() -> None:
    assert gguf_bytes([("a.weight", (10, 33))], "Q4_0", experts=2) == 660
    assert gguf_bytes([("a.weight", (10, 64))], "Q4_0", experts=2) == 10 * 64 * 4.5 / 8


def test_virtual_memory_counts_a_source_once(parents: Parents, tmp_path: Path) -> None:
    base = parents["llama"][0]
    one = planned(tiny.write_recipe(tmp_path / "1.yml", base, [base], experts_per_token=1)).bill
    many = planned(tiny.write_recipe(tmp_path / "16.yml", base, [base] * 16)).bill
    gates = 15 * 32 * 2 * 4
    assert many.memory_virtual == one.memory_virtual + gates
    assert many.memory_built > 5 * one.memory_built


@pytest.mark.parametrize(
    ("family", "shared", "architecture", "expected"),
    [
        ("llama", None, None, "mixtral"),
        ("mistral", None, None, "mixtral"),
        ("qwen2", None, None, "qwen2_moe"),
        ("qwen3", None, None, "qwen3_moe"),
        ("olmo2", None, None, "flex_olmo"),
        ("llama", [], None, "granitemoeshared"),
        ("llama", ["say"], None, "qwen2_moe"),
        ("llama", None, "qwen", "qwen2_moe"),
        ("llama", [], "DeepSeek MoE", "deepseek"),
        ("qwen2", ["say"], None, "qwen2_moe"),
    ],
)
def test_format_follows_family_and_shared_expert(
    family: str, shared: list[str] | None, architecture: str | None, expected: str, parents: Parents, tmp_path: Path
) -> None:
    base, one, two = parents[family]
    keys: dict[str, Any] = {"architecture": architecture} if architecture else {}
    if shared is not None:
        keys["shared_experts"] = [{"source_model": str(base)} | ({"positive_prompts": shared} if shared else {})]
    file = tiny.write_recipe(tmp_path / "r.yml", base, [one, two], prompts=True, gate_mode="hidden", **keys)
    made = planned(file)
    assert made.fmt is not None
    assert made.fmt.name == expected
    assert not made.problems


@pytest.mark.parametrize(
    ("family", "change", "word"),
    [
        ("llama", {"mlp_bias": True}, "mlp_bias"),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}, "sliding_window"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}, "sliding_window"),
    ],
)
def test_what_a_format_cannot_say_is_named_and_stays_virtual(
    family: str, change: dict[str, Any], word: str, tmp_path: Path
) -> None:
    own = [tiny.make_parent(tmp_path / str(seed), family, seed=seed, **change) for seed in range(2)]
    file = tiny.write_recipe(tmp_path / "r.yml", own[0], own)
    assert any(word in problem for problem in planned(file).problems)
    with pytest.raises(fm.FrankenMoEError, match=word) as caught:
        fm.build(file, tmp_path / "out")
    assert "--virtual" in str(caught.value.hint)
    fm.build(file, tmp_path / "virtual", virtual=True)
    assert fm.load(tmp_path / "virtual").forward_with_trace(tiny.ids())[0].logits.isfinite().all()


def test_a_format_that_the_recipe_names_is_not_replaced(tmp_path: Path) -> None:
    own = [tiny.make_parent(tmp_path / str(seed), seed=seed, attention_bias=True) for seed in range(2)]
    assert planned(tiny.write_recipe(tmp_path / "r.yml", own[0], own)).fmt.name == "granitemoe"
    made = planned(tiny.write_recipe(tmp_path / "r.yml", own[0], own, architecture="Mixtral"))
    assert made.fmt.name == "mixtral"
    assert "attention_bias True" in made.problems[0]
    assert "architecture: Granite MoE supports it" in made.problems


@pytest.mark.parametrize(
    ("family", "field", "value"),
    [
        ("llama", "attn_logit_softcapping", 50.0),
        ("llama", "partial_rotary_factor", 0.5),
        ("mistral", "residual_multiplier", 0.5),
        ("qwen2", "layer_types", ["full_attention", "sliding_attention"]),
        ("qwen3", "alibi", True),
    ],
)
def test_a_setting_that_may_change_the_function_is_refused_by_name(
    family: str, field: str, value: Any, tmp_path: Path
) -> None:
    own = [tiny.make_parent(tmp_path / str(seed), family, seed=seed) for seed in range(2)]
    file = tiny.write_recipe(tmp_path / "r.yml", own[0], own)
    assert not planned(file).problems
    tiny.edit_config(own[0], **{field: value})
    assert any(field in problem for problem in planned(file).problems)


def test_settings_that_change_nothing_are_not_refused(tmp_path: Path) -> None:
    own = [tiny.make_parent(tmp_path / str(seed), seed=seed) for seed in range(2)]
    tiny.edit_config(
        own[0], pretraining_tp=1, unsloth_fixed=True, rope_interleaved=False, is_llama_config=True, alibi=False,
        temperature=0.7, _name_or_path="x", resid_pdrop=0.1, softcap=None,
    )  # fmt: skip
    assert not planned(tiny.write_recipe(tmp_path / "r.yml", own[0], own)).problems


def test_rope_scaling_reaches_the_built_config(tmp_path: Path) -> None:
    scaling = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}
    own = [tiny.make_parent(tmp_path / str(seed), seed=seed, rope_parameters=scaling) for seed in range(2)]
    config = planned(tiny.write_recipe(tmp_path / "r.yml", own[0], own)).config
    assert config["rope_scaling"]["factor"] == 2.0
    assert config["rope_parameters"]["rope_type"] == "linear"
    assert config["rope_theta"] == 5000.0


def test_a_family_without_a_format_is_named_and_runs_virtually(parents: Parents, tmp_path: Path) -> None:
    base, one, _ = parents[tiny.UNLISTED]
    made = planned(tiny.write_recipe(tmp_path / "r.yml", base, [base, one]))
    assert made.fmt is None
    assert "'gpt_neox'" in made.problems[0]
    assert "its FFN has no gate" in made.problems[0]


def test_equal_experts_are_found_by_content_whatever_their_name(tmp_path: Path) -> None:
    one = tiny.make_parent(tmp_path / "one", seed=1)
    shutil.copytree(one, tmp_path / "same")
    other = tiny.make_parent(tmp_path / "other", seed=2)
    file = tiny.write_recipe(tmp_path / "r.yml", one, [one, other, tmp_path / "same", other])
    made = planned(file)
    assert made.identical_experts == ((0, 2), (1, 3))
    assert not made.all_identical


def test_differences_among_parents_become_warnings(tmp_path: Path) -> None:
    base, other = (tiny.make_parent(tmp_path / name, seed=seed) for seed, name in enumerate(("base", "other")))
    data = json.loads((other / "tokenizer.json").read_text())
    data["model"]["vocab"]["new"] = 127
    (other / "tokenizer.json").write_text(json.dumps(data))
    settings = json.loads((other / "tokenizer_config.json").read_text())
    (other / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": "~", "chat_template": "{{ x }}"}))
    tiny.edit_config(other, rms_norm_eps=0.5)
    (base / "README.md").write_text("---\nlicense: mit\n---\n")
    (other / "README.md").write_text("---\nlicense: 'llama2'\n---\n")
    warnings = "\n".join(planned(tiny.write_recipe(tmp_path / "r.yml", base, [base, other])).warnings)
    for word in ("vocabulary", "eos token", "chat template", "rms_norm_eps 0.5", "llama2, mit"):
        assert word in warnings


def test_plan_writes_nothing(parents: Parents, tmp_path: Path) -> None:
    base, one, two = parents["llama"]
    file = tiny.write_recipe(tmp_path / "r.yml", base, [one, two])
    planned(file)
    assert list(tmp_path.iterdir()) == [file]


def test_a_recipe_that_cannot_be_built_has_no_sizes_as_a_checkpoint(parents: Parents, tmp_path: Path) -> None:
    base, one, two = map(str, parents["llama"])
    inner = {"name": "inner", "experts": [{"source_model": one}, {"source_model": two}]}
    recipe = tmp_path / "r.yml"
    tiny.write_recipe(recipe, Path(base), [], experts=[inner, {"source_model": two}])
    made = planned(recipe)
    facts = made.to_dict()
    assert (facts["buildable"], facts["bytes"]["built"], facts["memory"]["built"]) == (False, None, None)
    assert facts["memory"]["q4_0"] is None
    assert facts["disk"]["need"] == facts["bytes"]["virtual"] > 0
    assert facts["writes"] == len(made.routers)
    assert "built" not in str(made)
    shown = CliRunner().invoke(app, ["plan", str(recipe)])
    assert shown.stdout.count("not possible as built") == 2
    assert "cannot be built: no stock MoE format has nested experts" in shown.stderr
    said = json.loads(CliRunner().invoke(app, ["plan", str(recipe), "--json"]).stdout)
    assert (said["gguf"]["files"], said["memory"]["q5_0"]) == ([], None)


def test_a_config_without_weights_still_has_sizes(parents: Parents, tmp_path: Path) -> None:
    base = shutil.copytree(parents["llama"][0], tmp_path / "base")
    recipe = tiny.write_recipe(tmp_path / "r.yml", base, [base, base])
    whole = planned(recipe).bill
    (base / "model.safetensors").unlink()
    made = planned(recipe)
    assert not made.to_dict()["buildable"]
    assert made.bill.built == whole.built


LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}


@pytest.mark.parametrize("long", [False, True])
def test_what_a_gguf_file_computes_otherwise_is_said(long: bool, tmp_path: Path) -> None:
    more = {"original_max_position_embeddings": 16, "rope_parameters": LONGROPE} if long else {"sliding_window": 8}
    base, other = (tiny.make_parent(tmp_path / str(seed), "phi3", seed=seed, **more) for seed in range(2))
    recipe = tiny.write_recipe(tmp_path / "r.yml", base, [base, other])
    notes = forecast(planned(recipe)).notes
    assert any("rotary factors for long texts" in note for note in notes) == long
    shown = CliRunner().invoke(app, ["plan", str(recipe)]).stdout
    assert ("set to more than 16 tokens" in " ".join(shown.split())) == long
    assert json.loads(CliRunner().invoke(app, ["plan", str(recipe), "--json"]).stdout)["gguf"]["notes"] == list(notes)
