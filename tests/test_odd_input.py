"""Input nobody asked for: odd paths, odd prompts, tokenizers and adapters of another model; refused, or simply fine."""

import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from frankenmoe.cli.app import main
from refusals import Tensors, cli, copy_of, refused, spoil

Parents = dict[str, list[Path]]


@pytest.fixture
def recipe(tmp_path: Path, parents: Parents) -> Path:
    """A good recipe with prompts over copies of three tiny llamas, which may be spoilt."""
    folders = [copy_of(parent, tmp_path / "parents" / parent.name) for parent in parents["llama"]]
    return tiny.write_recipe(tmp_path / "recipe.yml", folders[0], folders[1:], prompts=True, gate_mode="hidden")


@pytest.fixture
def base(recipe: Path) -> Path:
    return recipe.parent / "parents" / "0"


def builds(recipe: Path, out: Path, *options: str) -> None:
    outcome = cli("build", recipe, out, *options)
    assert outcome.code == 0, outcome.stderr
    assert cli("verify", out).code == 0


# paths


@pytest.mark.parametrize("name", ["MoE mit Ümläuten 🧟", "-x", "a.partial", "%s{0}", "new/folders/on the way"])
def test_an_output_folder_of_any_name(recipe: Path, tmp_path: Path, name: str) -> None:
    builds(recipe, tmp_path / name, "--virtual")


def test_a_folder_whose_name_is_no_text(recipe: Path, tmp_path: Path) -> None:
    odd = tmp_path / os.fsdecode(b"caf\xe9")
    (tmp_path / "parents").rename(odd)
    recipe = recipe.rename(odd / "recipe.yml")
    recipe.write_text(
        recipe.read_text().replace(f"{tmp_path}/parents/", "./").replace("gate_mode: hidden", "gate_mode: random")
    )
    assert cli("plan", recipe).code == 0
    for form in ((), ("--virtual",)):
        builds(recipe, tmp_path / "".join(("out", *form)), *form)


def test_relative_paths_with_dots_count_from_the_recipe(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "recipes").mkdir()
    moved = tmp_path / "recipes" / "r.yml"
    moved.write_text(recipe.read_text().replace(str(tmp_path), ".."))
    builds(moved, tmp_path / "out")


def test_an_output_folder_inside_a_source(recipe: Path, base: Path) -> None:
    builds(recipe, base / "moe")


def test_an_output_folder_that_is_a_source(recipe: Path, base: Path, tmp_path: Path) -> None:
    refused("build", recipe, base, inside=tmp_path, facts=(str(base), "is not empty"), hint="another folder")


def test_an_output_link_to_an_empty_folder_is_filled_there(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to("disk")
    builds(recipe, tmp_path / "out")
    assert (tmp_path / "disk" / "frankenmoe.json").is_file()


def test_an_output_link_in_a_circle(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to("out")
    refused("build", recipe, tmp_path / "out", inside=tmp_path, facts=(str(tmp_path / "out"),), hint="choose another")


@pytest.mark.parametrize("name", ["x" * 300, "x" * 250, "new/" + "x" * 250, "recipe.yml/out"])
def test_an_output_folder_that_cannot_be(recipe: Path, tmp_path: Path, name: str) -> None:
    facts = (str(tmp_path), name[-20:], "cannot be made")  # long names are cut in the middle
    refused("build", recipe, tmp_path / name, inside=tmp_path, facts=facts, hint="choose another output folder")


def test_somebody_elses_folder_in_the_place_of_an_unfinished_build(recipe: Path, tmp_path: Path) -> None:
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / "thesis.tex").write_text("mine")
    facts = (str(partial), "contains thesis.tex", "no build.json")
    refused("build", recipe, tmp_path / "out", inside=tmp_path, facts=facts, hint="move that one away")


def test_folders_made_on_the_way_go_again(recipe: Path, base: Path, tmp_path: Path) -> None:
    spoil(base, lambda tensors: tensors["model.norm.weight"].fill_(float("nan")))
    refused("build", recipe, tmp_path / "new" / "deep" / "out", inside=tmp_path, facts=("model.norm.weight", "NaN"))


def test_a_recipe_that_is_a_folder(tmp_path: Path) -> None:
    refused("plan", tmp_path, inside=tmp_path, facts=(str(tmp_path), "found a folder"), hint=".yml file inside")
    refused("build", tmp_path, tmp_path / "out", inside=tmp_path, facts=(str(tmp_path), "not an artifact"))
    refused("chat", tmp_path, "--prompt", "x", inside=tmp_path, facts=(str(tmp_path), "not an artifact"))


def test_no_recipe(tmp_path: Path) -> None:
    refused("plan", tmp_path / "gone.yml", inside=tmp_path, facts=("gone.yml", "no such recipe"), hint="spelling")
    refused("chat", tmp_path / "gone.yml", inside=tmp_path, facts=("gone.yml",))


@pytest.mark.parametrize("kind", ["loop", "file", "dangling"])
def test_a_source_that_is_no_folder(recipe: Path, base: Path, tmp_path: Path, kind: str) -> None:
    odd = tmp_path / "parents" / "odd"
    if kind == "file":
        odd.write_text("")
    else:
        odd.symlink_to("odd" if kind == "loop" else "gone")
    tiny.write_recipe(recipe, Path("parents/odd"), [base, base])  # as a hub id is written, too
    facts = ("'parents/odd'", str(odd), "expected a folder")
    refused("build", recipe, tmp_path / "out", inside=tmp_path, facts=facts, hint="name the folder")


# prompts and tokenizers


def with_prompts(recipe: Path, base: Path, *prompts: str, gate_mode: str = "hidden", **changes: Any) -> Path:
    experts = [
        {"source_model": str(base.with_name(str(index + 1))), "positive_prompts": [prompt]}
        for index, prompt in enumerate(prompts)
    ]
    recipe.write_text(json.dumps({"base_model": str(base), "gate_mode": gate_mode, "experts": experts} | changes))
    return recipe


@pytest.mark.parametrize("gate_mode", ["hidden", "hidden_avg", "cheap_embed"])
def test_prompts_in_any_script(recipe: Path, base: Path, tmp_path: Path, gate_mode: str) -> None:
    builds(with_prompts(recipe, base, "🧟‍♀️ ¿qué?", "漢字\u202e\0x", gate_mode=gate_mode), tmp_path / "out")


def test_a_prompt_longer_than_the_base_reads(recipe: Path, base: Path, tmp_path: Path) -> None:
    with_prompts(recipe, base, "x" * 10_000, "y")
    facts = (repr("x" * 40), "has 10001 tokens", "expected 1 to 64")
    refused("build", recipe, tmp_path / "out", inside=tmp_path, facts=facts, hint="another prompt")
    builds(with_prompts(recipe, base, "x" * 10_000, "y", gate_mode="cheap_embed"), tmp_path / "out")


def test_a_tokenizer_of_a_larger_model(recipe: Path, base: Path, tmp_path: Path) -> None:
    file = base / "tokenizer.json"
    data = json.loads(file.read_text())
    data["model"]["vocab"]["x"] = 1000
    file.write_text(json.dumps(data))
    facts = (str(base), "makes token 1000 from the prompt 'x'", "the model has only 128 tokens")
    for gate_mode in ("hidden", "cheap_embed"):
        with_prompts(recipe, base, "x", "y", gate_mode=gate_mode)
        refused("build", recipe, tmp_path / "out", inside=tmp_path, facts=facts, hint="own tokenizer")


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"model": 3, "added_tokens": ["x"]}', "[" * 100_000])
def test_a_tokenizer_that_is_none(recipe: Path, base: Path, tmp_path: Path, content: str) -> None:
    (base / "tokenizer.json").write_text(content)
    facts = (str(base), "no tokenizer that transformers can load")
    refused("build", recipe, tmp_path / "out", inside=tmp_path, facts=facts, hint="tokenizer's files")


@pytest.mark.parametrize("whose", ["0", "1"])
@pytest.mark.parametrize(
    "changes",
    [{"model": None}, {"model": 3}, {"added_tokens": 3}, {"added_tokens": "x"}]
    + [{"model": {key: value}} for key in ("vocab", "merges") for value in (3, "x", [3], [[]], [{}], {"a": "\udcff"})],
    ids=str,
)
def test_the_bill_needs_no_tokenizer(recipe: Path, base: Path, whose: str, changes: dict[str, Any]) -> None:
    file = base.with_name(whose) / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    for option in ((), ("--json",)):
        outcome = cli("plan", recipe, *option)
        assert outcome.code == 0, outcome.stderr


def test_no_tokenizer(recipe: Path, base: Path, tmp_path: Path) -> None:
    for file in base.glob("*token*"):
        file.unlink()
    facts = (str(base), "no tokenizer that transformers can load")
    refused("build", recipe, tmp_path / "out", inside=tmp_path, facts=facts, hint="tokenizer's files")


def test_a_chat_template_that_is_no_text(recipe: Path, base: Path, tmp_path: Path) -> None:
    (base / "chat_template.jinja").write_bytes(b"\xff\xfe\xff")
    assert cli("plan", recipe).code == 0
    refused("build", recipe, tmp_path / "out", inside=tmp_path, facts=(str(base), "no tokenizer"), hint="fetch them")


def test_no_generation_config(recipe: Path, base: Path, tmp_path: Path) -> None:
    (base / "generation_config.json").unlink()
    builds(recipe, tmp_path / "out")
    assert cli("chat", tmp_path / "out", "--prompt", "hi", "--max-new-tokens", 2).code == 0


@pytest.mark.parametrize("content", ["{", "[]"])
@pytest.mark.parametrize("form", [(), ("--virtual",)])
def test_a_generation_config_that_is_none(
    recipe: Path, base: Path, tmp_path: Path, content: str, form: tuple[str, ...]
) -> None:
    (base / "generation_config.json").write_text(content)
    facts = (str(base / "generation_config.json"),)
    refused("build", recipe, tmp_path / "out", *form, inside=tmp_path, facts=facts, hint="remove it")


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja", "generation_config.json"])
@pytest.mark.parametrize("kind", ["dangling", "loop", "folder", "pipe"])
def test_a_small_file_that_is_none_is_not_left_out_silently(
    recipe: Path, base: Path, tmp_path: Path, name: str, kind: str
) -> None:
    file = base / name
    file.unlink(missing_ok=True)
    match kind:
        case "dangling":
            file.symlink_to("../blobs/gone")
        case "loop":
            file.symlink_to(name)
        case "folder":
            file.mkdir()
        case "pipe":
            os.mkfifo(file)
    facts = (str(file), "is not a file", *(["link that leads to none"] if file.is_symlink() else []))
    refused("plan", recipe, inside=tmp_path, facts=facts, hint="fetch it again")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "model.safetensors.index.json"])
def test_a_pipe_is_not_waited_for(recipe: Path, base: Path, tmp_path: Path, name: str) -> None:
    for file in {name, "model.safetensors"} if name != "config.json" else {name}:
        (base / file).unlink(missing_ok=True)
    os.mkfifo(base / name)
    refused("plan", recipe, inside=tmp_path, facts=(str(base / name), "is not a file"))


def test_escape_codes_in_names_do_not_reach_the_terminal(recipe: Path, base: Path, tmp_path: Path) -> None:
    red = "\x1b[31mred\n\u202e"
    spoil(base, lambda tensors: tensors.__setitem__(red, torch.ones(1)))
    said = cli("plan", recipe)
    assert said.code == 0
    assert "\\x1b[31mred\\n\\u202e" in said.stdout
    assert not {"\x1b", "\u202e"} & set(said.stdout + said.stderr)
    tiny.write_recipe(recipe, Path(red), [base, base])
    refused("plan", recipe, inside=tmp_path, facts=("\\x1b[31mred",))


def test_a_terminal_that_has_no_such_letters(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe.write_text(recipe.read_text() + "name: naïve 日\n")
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding="ascii"))
    monkeypatch.setattr(sys, "argv", ["frankenmoe", "plan", str(recipe)])
    main()
    sys.stdout.flush()
    assert b"na\\xefve \\u65e5" in shown.getvalue()


# backbones and adapters


@pytest.mark.parametrize("changes", [{"num_key_value_heads": 4}, {"head_dim": 16}, {"tie_word_embeddings": True}])
def test_backbones_that_cannot_be_averaged(recipe: Path, base: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    other = tiny.make_parent(tmp_path / "other", seed=7, **changes)
    tiny.write_recipe(recipe, base, [base, other], backbone="average")
    facts = (str(base), str(other), "does not fit beside the base", "against")
    refused("build", recipe, tmp_path / "out", inside=tmp_path, facts=facts, hint="backbone: base")
    builds(tiny.write_recipe(recipe, base, [base, other]), tmp_path / "out")  # only its FFN is taken here


@pytest.mark.parametrize("form", [(), ("--virtual",)])
def test_a_parent_of_an_unlisted_family_whose_weights_differ(
    tmp_path: Path, parents: Parents, form: tuple[str, ...]
) -> None:
    other = tiny.make_parent(tmp_path / "other", tiny.UNLISTED, intermediate_size=64)
    tiny.edit_config(other, intermediate_size=48)
    base = parents[tiny.UNLISTED][0]
    recipe = tiny.write_recipe(tmp_path / "recipe.yml", base, [base, other])
    facts = (str(other), str(base), ".mlp.", "[32, 48] against [32, 64]")
    refused("build", recipe, tmp_path / "out", *form, inside=tmp_path, facts=facts, hint="choose parents")


def test_a_family_with_older_words_for_its_sizes(tmp_path: Path) -> None:
    folders = [tiny.make_parent(tmp_path / str(seed), "gpt2", seed=seed) for seed in range(3)]
    assert "hidden_size" not in json.loads((folders[0] / "config.json").read_text())
    recipe = tiny.write_recipe(tmp_path / "recipe.yml", folders[0], folders[1:], prompts=True, gate_mode="hidden")
    builds(recipe, tmp_path / "out", "--virtual")
    assert cli("chat", tmp_path / "out", "--prompt", "hi", "--max-new-tokens", 2).code == 0


def test_a_family_whose_mlp_wants_more_than_hidden_states(tmp_path: Path) -> None:
    folders = [tiny.make_parent(tmp_path / str(seed), "bloom", seed=seed) for seed in range(3)]
    recipe = tiny.write_recipe(tmp_path / "recipe.yml", folders[0], folders[1:])
    facts = ("BloomForCausalLM takes hidden_states and residual",)
    refused(
        "build",
        recipe,
        tmp_path / "out",
        "--virtual",
        inside=tmp_path,
        facts=facts,
        hint="must map hidden states to hidden states",
    )
    refused("chat", recipe, "--prompt", "hi", inside=tmp_path, facts=facts)


def test_a_family_whose_activation_has_learnt_scalars(tmp_path: Path) -> None:
    folders = [tiny.make_parent(tmp_path / str(seed), "apertus", seed=seed) for seed in range(2)]
    recipe = tiny.write_recipe(tmp_path / "recipe.yml", folders[0], folders)
    assert cli("plan", recipe).code == 0
    builds(recipe, tmp_path / "out", "--virtual")


@pytest.mark.parametrize(
    ("family", "sizes", "facts", "hint"),
    [
        (
            "gpt_oss",
            {"num_local_experts": 2, "layer_types": None},
            ("(gpt_oss) is a mixture of experts itself", "expected a dense model"),
            "name the dense model",
        ),
        (
            "qwen3_moe",
            {"num_experts": 2, "moe_intermediate_size": 48},
            ("is a mixture of 2 experts", "expected one model"),
            "#0",
        ),
        ("mixtral", {"num_local_experts": 2}, ("is a mixture of 2 experts", "expected one model"), "#0"),
    ],
)
def test_parents_that_are_mixtures_of_experts_themselves(
    family: str, sizes: dict[str, Any], facts: tuple[str, ...], hint: str, tmp_path: Path
) -> None:
    parent = tiny.make_parent(tmp_path / "moe", family, **sizes)
    recipe = tiny.write_recipe(tmp_path / "recipe.yml", parent, [parent, parent])
    refused("plan", recipe, inside=tmp_path, facts=(str(parent), *facts), hint=hint)
    refused("build", recipe, tmp_path / "out", "--virtual", inside=tmp_path, facts=(str(parent), *facts))


def adapter(folder: Path, *, rank: int = 2, hidden: int = 32, ffn: int = 48, **settings: Any) -> Path:
    """A PEFT LoRA on the first layer's up projection."""
    folder.mkdir()
    module = "base_model.model.model.layers.0.mlp.up_proj"
    tensors = {f"{module}.lora_A.weight": torch.ones(rank, hidden), f"{module}.lora_B.weight": torch.ones(ffn, rank)}
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 4, "target_modules": ["up_proj"]} | settings
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("settings", "facts"),
    [
        ({"hidden": 64}, ("lora_A.weight of shape [2, 64]", "up_proj.weight of shape [48, 32]")),
        ({"ffn": 64}, ("up_proj.weight of shape [48, 32]",)),
        ({"use_dora": True}, ("use_dora", "expected a plain LoRA")),
        ({"peft_type": "IA3"}, ("IA3", "expected a plain LoRA")),
        ({"layer_replication": [[0, 2], [0, 2]]}, ("layer_replication [[0, 2], [0, 2]]", "expected a plain LoRA")),
        ({"alora_invocation_tokens": [7]}, ("alora_invocation_tokens [7]",)),
        ({"target_parameters": ["mlp.up_proj.weight"]}, ("target_parameters",)),
        ({"a_setting_of_next_year": {"beta": 0.5}}, ("a_setting_of_next_year {'beta': 0.5}",)),
        ({"kasa_config": {"beta": 1e-4}, "use_bdlora": True}, ("kasa_config", "use_bdlora True")),
        ({"init_lora_weights": "pissa"}, ("init_lora_weights 'pissa'",)),
        ({"lora_alpha": 10**400}, ("lora_alpha of more than 30 digits",)),
        ({"lora_alpha": True}, ("lora_alpha True",)),
        ({"alpha_pattern": {"(.*)*x": 3}}, ("alpha_pattern '(.*)*x'", "plain regular expressions")),
        ({"alpha_pattern": {"(" * 5000 + ")" * 5000: 3}}, ("alpha_pattern '(((",)),
        ({"alpha_pattern": {"up_proj[": 3}}, ("alpha_pattern 'up_proj['",)),
        ({"lora_alpha": "much"}, ("lora_alpha 'much'", "expected a finite number")),
        ({"lora_alpha": float("nan")}, ("lora_alpha nan",)),
        ({"alpha_pattern": {"up_proj": None}}, ("lora_alpha None",)),
        ({"alpha_pattern": [3]}, ("alpha_pattern",)),
        ({"rank": 0}, ("lora_A.weight of shape [0, 32]",)),
    ],
)
def test_an_adapter_that_does_not_fit(
    recipe: Path, base: Path, tmp_path: Path, settings: dict[str, Any], facts: tuple[str, ...]
) -> None:
    folder = adapter(tmp_path / "lora", **settings)
    tiny.write_recipe(recipe, base, [base, Path(f"{base}+{folder}")])
    refused("build", recipe, tmp_path / "out", inside=tmp_path, facts=(str(folder), *facts))


@pytest.mark.parametrize("name", ["lora_A", "lora_B"])
@pytest.mark.parametrize("form", [(), ("--virtual",)])
def test_an_adapter_with_a_nan(recipe: Path, base: Path, tmp_path: Path, name: str, form: tuple[str, ...]) -> None:
    file = adapter(tmp_path / "lora") / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(key for key in tensors if name in key)
    tensors[key][1, 1] = float("nan")
    save_file(tensors, file)
    tiny.write_recipe(recipe, base, [base, Path(f"{base}+{file.parent}")])
    facts = (key, str(file), "holds NaN at [1, 1]")
    refused("build", recipe, tmp_path / "out", *form, inside=tmp_path, facts=facts, hint="fetch it again")


@pytest.mark.parametrize("change", [lambda ours: ours.clear(), lambda ours: ours.update(x=torch.ones(1))])
def test_an_adapter_without_matrices(
    recipe: Path, base: Path, tmp_path: Path, change: Callable[[Tensors], object]
) -> None:
    folder = adapter(tmp_path / "lora")
    tensors: Tensors = {}
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")
    tiny.write_recipe(recipe, base, [base, Path(f"{base}+{folder}")])
    facts = (str(folder), "holds no LoRA matrices")
    refused("build", recipe, tmp_path / "out", inside=tmp_path, facts=facts, hint="PEFT")


def test_thirty_three_experts(recipe: Path, base: Path, tmp_path: Path) -> None:
    tiny.write_recipe(recipe, base, [base.with_name(str(1 + index % 2)) for index in range(33)], experts_per_token=33)
    builds(recipe, tmp_path / "out")
