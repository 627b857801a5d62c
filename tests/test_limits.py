"""Files and numbers that are absurdly large, or that never end: refused at once, in a sentence."""

import json
import os
from pathlib import Path

import pytest

import tiny
from frankenmoe.errors import RecipeError
from frankenmoe.recipe import Recipe
from refusals import copy_of, refused

Parents = dict[str, list[Path]]


@pytest.fixture
def base(tmp_path: Path, parents: Parents) -> Path:
    return copy_of(parents["llama"][0], tmp_path / "base")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "generation_config.json", "chat_template.jinja"])
def test_small_files_of_gigabytes(name: str, base: Path, tmp_path: Path) -> None:
    (base / name).touch()
    os.truncate(base / name, 2**33)
    recipe = tiny.write_recipe(tmp_path / "r.yml", base, [base, base])
    facts = (str(base / name), "8,589,934,592 bytes", "expected at most")
    refused("plan", recipe, inside=tmp_path, facts=facts, hint="fetch the file again")


@pytest.mark.parametrize("labels", [10**9, -1, "many", True])
def test_labels_without_number(labels: object, base: Path, tmp_path: Path) -> None:
    tiny.edit_config(base, num_labels=labels)
    recipe = tiny.write_recipe(tmp_path / "r.yml", base, [base, base])
    facts = (str(base / "config.json"), f"num_labels {labels!r}")
    refused("plan", recipe, inside=tmp_path, facts=facts, hint="remove the setting")


def test_a_pipe_as_recipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "r.yml")
    refused("plan", tmp_path / "r.yml", inside=tmp_path, facts=("r.yml", "found a pipe"), hint="name a file")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("".join(f"k{number}: 1\n" for number in range(10**6)), "at most 1,000,000 bytes"),
        ("base_model: a\nseed: " + "9" * 5000 + "\nexperts: [{source_model: b}]\n", "found"),
        ("base_model: a\nseed: " + "9" * 4000 + "\nexperts: [{source_model: b}]\n", "seed must be"),
    ],
    ids=["keys", "digits", "fewer digits"],
)
def test_recipes_without_end(text: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.parse(text, folder=Path("/nowhere"), origin="r.yml")
    assert message in caught.value.message
    assert len(caught.value.message) < 400


def test_an_index_that_is_not_one_stays_a_sentence(base: Path, tmp_path: Path) -> None:
    (base / "model.safetensors").unlink()
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": 3}))
    recipe = tiny.write_recipe(tmp_path / "r.yml", base, [base, base])
    refused("plan", recipe, inside=tmp_path, facts=("has no weight_map",), hint="fetch the index again")
