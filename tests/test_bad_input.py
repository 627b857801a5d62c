"""Every row of the issue's "Bad input", through the front door: one sentence, a hint, exit code 2, nothing left."""

import json
import os
import subprocess
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import yaml

import tiny
from mounts import mounted
from refusals import Outcome, check_refusal, cli, copy_of, refused, spoil, tree

Parents = dict[str, list[Path]]


@pytest.fixture
def recipe(tmp_path: Path, parents: Parents) -> Path:
    """A good recipe over three tiny llamas, in a folder of its own."""
    base, *others = parents["llama"]
    return tiny.write_recipe(tmp_path / "recipe.yml", base, others)


def edit(recipe: Path, **keys: Any) -> Path:
    """Changes top-level keys of a recipe; None takes a key out."""
    data = yaml.safe_load(recipe.read_text()) | keys
    recipe.write_text(yaml.safe_dump({key: value for key, value in data.items() if value is not None}, sort_keys=False))
    return recipe


def test_the_good_one_is_good(recipe: Path, tmp_path: Path) -> None:
    outcome = cli("build", recipe, tmp_path / "out")
    assert outcome.code == 0, outcome.stderr
    assert cli("verify", tmp_path / "out").code == 0


# recipes


@pytest.mark.parametrize(
    ("keys", "facts", "hint"),
    [
        ({"gate_moed": "random"}, ("recipe.yml:8: gate_moed is not a known key",), "did you mean 'gate_mode'?"),
        ({"gate_mode": "hiden"}, ("recipe.yml:2: gate_mode must be one of hidden,", "'hiden'"), "'hidden'?"),
        ({"experts_per_token": 3}, ("recipe.yml:8: experts_per_token must be at most 2", "found 3"), "more experts"),
        ({"gate_mode": "hidden"}, ("recipe.yml:4: experts[0].positive_prompts must be given", "'e0'"), "random"),
    ],
)
def test_a_recipe_that_says_what_cannot_be(
    recipe: Path, tmp_path: Path, keys: dict[str, Any], facts: tuple[str, ...], hint: str
) -> None:
    edit(recipe, **keys)
    refused("plan", recipe, inside=tmp_path, facts=facts, hint=hint)
    refused("build", recipe, tmp_path / "out", inside=tmp_path, facts=facts, hint=hint)


def test_identical_prompts_for_all(tmp_path: Path, parents: Parents) -> None:
    experts = [{"source_model": str(parent), "positive_prompts": ["the same"]} for parent in parents["llama"]]
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(yaml.safe_dump({"base_model": str(parents["llama"][0]), "experts": experts}))
    facts = (f"{recipe}:2: experts must have data or prompts that differ", "the same for all")
    refused(
        "build", recipe, tmp_path / "out", inside=tmp_path, facts=facts, hint="data or prompts that only it should get"
    )


def test_unreadable_yaml_has_line_and_column(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yml"
    recipe.write_text("base_model: a/b\nexperts:\n\t- source_model: a/x\n")
    facts = (f"{recipe}:3:1: the YAML cannot be read", "'\\t'")
    refused("plan", recipe, inside=tmp_path, facts=facts, hint="indentation")


def test_a_missing_source(recipe: Path, tmp_path: Path) -> None:
    edit(recipe, base_model="./gone")
    facts = ("'./gone'", str(tmp_path / "gone"), "neither a folder")
    refused("build", recipe, tmp_path / "out", inside=tmp_path, facts=facts, hint="relative path")


# parents that do not fit


@pytest.mark.parametrize(
    ("family", "changes", "facts"),
    [
        ("llama", {"hidden_size": 64}, ("hidden size 32 against 64",)),
        ("llama", {"num_hidden_layers": 3}, ("layer count 2 against 3",)),
        ("llama", {"intermediate_size": 64}, ("FFN width 48 against 64",)),
        ("llama", {"num_attention_heads": 8}, ("head count 4 against 8",)),
        ("mistral", {}, ("family llama against mistral",)),
        ("llama", {"hidden_size": 64, "vocab_size": 112}, ("hidden size 32 against 64", "vocabulary 128 against 112")),
    ],
)
def test_a_parent_of_another_shape(
    tmp_path: Path, parents: Parents, family: str, changes: dict[str, Any], facts: tuple[str, ...]
) -> None:
    base = parents["llama"][0]
    other = tiny.make_parent(tmp_path / "other", family, **changes)
    recipe = tiny.write_recipe(tmp_path / "recipe.yml", base, [base, other])
    refused("build", recipe, tmp_path / "out", inside=tmp_path, facts=(str(base), str(other), *facts), hint="family")


def test_a_parent_with_other_tokens_is_told_why(tmp_path: Path, parents: Parents) -> None:
    base = parents["llama"][0]
    other = tiny.make_parent(tmp_path / "other", vocab_size=112)
    file = other / "tokenizer.json"
    data = json.loads(file.read_text())
    data["model"]["vocab"] = {token: (index + 7) % 97 for token, index in data["model"]["vocab"].items()}
    data["added_tokens"] = []
    file.write_text(json.dumps(data))
    recipe = tiny.write_recipe(tmp_path / "recipe.yml", base, [base, other])
    facts = (str(base), str(other), "vocabulary 128 against 112", "most of their tokens have other ids")
    refused("plan", recipe, inside=tmp_path, facts=facts, hint="fine-tuned from the base")


# values


@pytest.mark.parametrize(("value", "spelt"), [(float("nan"), "NaN"), (float("inf"), "Inf"), (float("-inf"), "-Inf")])
@pytest.mark.parametrize("form", [(), ("--virtual",)])
def test_a_number_that_is_none_in_an_expert(
    recipe: Path, tmp_path: Path, parents: Parents, value: float, spelt: str, form: tuple[str, ...]
) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    bad = spoil(copy_of(parents["llama"][2], tmp_path / "bad"), lambda tensors: tensors[name][3].fill_(value))
    tiny.write_recipe(recipe, parents["llama"][0], [parents["llama"][1], bad])
    facts = (name, str(bad / "model.safetensors"), f"holds {spelt} at [3, 0]", "expected finite numbers")
    refused("build", recipe, tmp_path / "out", *form, inside=tmp_path, facts=facts, hint="fetch it again")


@pytest.mark.parametrize("gate_mode", ["random", "hidden"])
@pytest.mark.parametrize("form", [(), ("--virtual",)])
def test_a_nan_in_the_backbone(
    recipe: Path, tmp_path: Path, parents: Parents, gate_mode: str, form: tuple[str, ...]
) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    bad = spoil(
        copy_of(parents["llama"][0], tmp_path / "bad"),
        lambda tensors: tensors[name][0, 2:3].fill_(float("nan")),
    )
    tiny.write_recipe(recipe, bad, parents["llama"][1:], prompts=True, gate_mode=gate_mode)
    facts = (name, str(bad / "model.safetensors"), "holds NaN at [0, 2]")
    refused("build", recipe, tmp_path / "out", *form, inside=tmp_path, facts=facts, hint="fetch it again")


def test_a_nan_that_nothing_is_made_from_does_no_harm(recipe: Path, tmp_path: Path, parents: Parents) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"  # of an expert's parent: only its FFN is used
    odd = spoil(copy_of(parents["llama"][1], tmp_path / "odd"), lambda tensors: tensors[name].fill_(float("nan")))
    tiny.write_recipe(recipe, parents["llama"][0], [odd, parents["llama"][2]])
    outcome = cli("build", recipe, tmp_path / "out")
    assert outcome.code == 0, outcome.stderr


@pytest.mark.parametrize("form", [(), ("--virtual",)])
def test_a_value_that_overflows_float16(recipe: Path, tmp_path: Path, parents: Parents, form: tuple[str, ...]) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    big = spoil(copy_of(parents["llama"][1], tmp_path / "big"), lambda tensors: tensors[name][1, 2:3].fill_(1e5))
    tiny.write_recipe(recipe, parents["llama"][0], [big, parents["llama"][2]])
    facts = (str(big / "model.safetensors"), "becomes 100000 at [1, 2]", "F16 holds at most 65504")
    args = ("build", recipe, tmp_path / "out", "--dtype", "float16", *form)
    refused(*args, inside=tmp_path, facts=facts, hint="bfloat16 or float32")


# identical experts


@pytest.mark.parametrize("copied", [False, True], ids=["one folder", "copies under other names"])
@pytest.mark.parametrize("form", [(), ("--virtual",)])
def test_identical_experts_need_a_word(
    recipe: Path, tmp_path: Path, parents: Parents, copied: bool, form: tuple[str, ...]
) -> None:
    parent = parents["llama"][1]
    twins = [copy_of(parent, tmp_path / name) for name in ("a", "b")] if copied else [parent, parent]
    tiny.write_recipe(recipe, parents["llama"][0], twins)
    args = ("build", recipe, tmp_path / "out", *form)
    refused(*args, inside=tmp_path, facts=("all 2 experts hold the same weights",), hint="--allow-identical")
    outcome = cli(*args, "--allow-identical")
    assert outcome.code == 0, outcome.stderr


# the output folder


def test_an_output_folder_with_something_in_it(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    facts = (str(out), "exists and is not empty", "expected a new or empty folder")
    refused("build", recipe, out, inside=tmp_path, facts=facts, hint="choose another folder")


def test_an_output_folder_that_is_a_file(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.write_text("")
    refused("build", recipe, out, inside=tmp_path, facts=(str(out), "expected a new or empty folder"), hint="choose")


def test_an_empty_output_folder_is_fine(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    assert cli("build", recipe, out).code == 0


def test_a_disk_that_is_too_small(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("frankenmoe.artifact.folder.free_bytes", lambda folder: 3 * 2**19)
    need = yaml.safe_load(cli("plan", recipe, "--json").stdout)["bytes"]["built"]
    monkeypatch.setattr("frankenmoe.artifact.folder.free_bytes", lambda folder: need // 2)
    facts = (str(tmp_path), "GiB free", "still to be written")
    refused("build", recipe, tmp_path / "out", inside=tmp_path, facts=facts, hint="another disk")


def small_disk(folder: Path, *, size: str) -> AbstractContextManager[Path]:
    """A disk of its own for the time of a test."""
    return mounted(folder, "-t", "tmpfs", "-o", f"size={size}", "none")


@pytest.mark.parametrize(
    ("size", "form"),
    [("4k", ()), ("16k", ()), ("64k", ()), ("4k", ("--virtual",)), ("8k", ("--virtual",)), ("16k", ("--virtual",))],
)
def test_a_real_disk_that_is_too_small(recipe: Path, tmp_path: Path, size: str, form: tuple[str, ...]) -> None:
    with small_disk(tmp_path / "disk", size=size) as disk:
        refused("build", recipe, disk / "out", *form, inside=disk, facts=(str(disk),), hint="disk")


def test_an_output_folder_that_is_a_disk_itself(recipe: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", size="8m") as disk:
        facts = (str(disk), "is the mount point of a disk")
        refused("build", recipe, disk, inside=tmp_path, facts=facts, hint=str(disk / "moe"))
        assert cli("build", recipe, disk / "moe").code == 0


# another process, as a person runs it


def shell(*args: object) -> Outcome:
    ended = subprocess.run(
        [sys.executable, "-m", "frankenmoe.cli", *map(str, args)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    return Outcome(ended.returncode, ended.stdout, ended.stderr)


def test_a_shell_sees_the_same(recipe: Path, tmp_path: Path) -> None:
    edit(recipe, experts_per_toke=1)
    before = tree(tmp_path)
    facts = ("experts_per_toke is not a known key",)
    check_refusal(shell("build", recipe, tmp_path / "out"), facts=facts, hint="did you mean 'experts_per_token'?")
    assert tree(tmp_path) == before
