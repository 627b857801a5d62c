"""Files and numbers that are absurdly large, or that never end: refused at once, in a sentence."""

import json
import os
import re
from pathlib import Path

import pytest
import torch

import tiny
from frankenmoe.checkpoint.lorasettings import lora_scale
from frankenmoe.checkpoint.reader import Adapter
from frankenmoe.errors import LONGEST, QUOTED, RecipeError, SourceError
from frankenmoe.recipe import Recipe
from refusals import check_refusal, cli, copy_of, refused, spoil, tree

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


@pytest.mark.timeout(300)  # a pipe that is waited for
@pytest.mark.parametrize(
    "command",
    [
        "plan PIPE", "build PIPE out", "chat PIPE --prompt x", "chat PIPE.gguf --prompt x", "verify PIPE", "card PIPE",
        "eval PIPE", "audit VIRTUAL --data e0=PIPE", "eval VIRTUAL --text e0=PIPE", "export VIRTUAL out --text PIPE",
        "export VIRTUAL out --imatrix PIPE --allow-random", "train VIRTUAL out --data e0=PIPE",
        "eval VIRTUAL --data-dir PIPE",
        "chat FOLDER.gguf --prompt x", "plan FOLDER", "audit VIRTUAL --data e0=FOLDER", "eval VIRTUAL --text e0=FOLDER",
        "plan /dev/zero", "plan /dev/null", "chat /dev/zero --prompt x", "eval VIRTUAL --text e0=/dev/zero",
    ],
)  # fmt: skip
def test_what_is_no_file_is_not_waited_for(command: str, base: Path, tmp_path: Path) -> None:
    recipe = tiny.write_recipe(tmp_path / "r.yml", base, [base, base])
    assert cli("build", recipe, tmp_path / "virtual", "--virtual", "--allow-identical").code == 0
    for name in ("pipe", "pipe.gguf"):
        os.mkfifo(tmp_path / name)
    for name in ("folder", "folder.gguf"):
        (tmp_path / name).mkdir()
    for name in ("PIPE", "FOLDER", "VIRTUAL", "out"):
        command = command.replace(name, str(tmp_path / name.lower()))
    before = tree(tmp_path)
    outcome = cli(*command.split())
    assert outcome.code == 2, outcome.stdout
    assert "Error" not in outcome.stderr, outcome.stderr
    assert tree(tmp_path) == before


def test_a_tensor_name_that_patterns_would_take_hours_to_read(base: Path, tmp_path: Path) -> None:
    tiny.edit_config(base, model_type="gpt_neox")
    spoil(base, lambda tensors: tensors.update({".1" * 50_000: torch.ones(1)}))
    recipe = tiny.write_recipe(tmp_path / "r.yml", base, [base, base])
    refused("plan", recipe, inside=tmp_path, facts=("has a name of 100,000 characters", "at most 1,000"))


@pytest.mark.parametrize(
    ("patterns", "facts"),
    [
        ({"a.*b.*c.*" + str(number): 2 for number in range(31)}, ("31 entries in alpha_pattern", "a few")),
        ({"a*" * 4: 2}, ("alpha_pattern 'a*a*a*a*'",)),
        ({"x" * 501: 2}, ("alpha_pattern 'xxx",)),
        ({"(a|a)*": 2}, ("alpha_pattern '(a|a)*'",)),
        ({"(a|a)" * 40 + "b": 2}, ("alpha_pattern '(a|a)(a|a)",)),
        ({"a?" * 40 + "a" * 40: 2}, ("alpha_pattern 'a?a?",)),
    ],
    ids=["many", "repeats", "long", "group", "choices", "options"],
)
def test_patterns_of_adapters_that_could_run_for_long(patterns: dict[str, int], facts: tuple[str, ...]) -> None:
    adapter = Adapter(Path("lora"), {"alpha_pattern": patterns}, {})
    with pytest.raises(SourceError) as caught:
        lora_scale(adapter, "model.layers.0.mlp.up_proj", rank=2)
    for fact in facts:
        assert fact in caught.value.message


def test_patterns_of_adapters_that_peft_writes_are_read() -> None:
    patterns = {f"model\\.layers\\.{layer}\\.mlp\\.up_proj": layer for layer in range(200)} | {r".*\.down_proj": 7}
    adapter = Adapter(Path("lora"), {"alpha_pattern": patterns}, {})
    assert lora_scale(adapter, "model.layers.150.mlp.up_proj", rank=2) == 75
    assert lora_scale(adapter, "model.layers.150.mlp.down_proj", rank=2) == 3.5


LETTERS = "x y " * 1250


@pytest.mark.parametrize(
    "recipe",
    [
        f"base_model: {LETTERS}\nexperts: [{{source_model: b}}]\n",
        f"base_model: a\nname: {LETTERS}\nexperts: [{{source_model: b}}]\n",
        f"base_model: a\nexperts: [{{source_model: b, name: {LETTERS}}}]\n",
        f"base_model: a\ngate_mode: {LETTERS}\nexperts: [{{source_model: b}}]\n",
        f"base_model: a\nseed: {LETTERS}\nexperts: [{{source_model: b}}]\n",
        f"base_model: a\n{LETTERS}: 1\nexperts: [{{source_model: b}}]\n",
        f"base_model: a\n? {LETTERS}\n: 1\n? {LETTERS}\n: 1\nexperts: [{{source_model: b}}]\n",
        f"base_model: a\nseed: !<{LETTERS.replace(' ', '')}> 1\nexperts: [{{source_model: b}}]\n",
        f"base_model: a\nexperts: [{{source_model: [{LETTERS}]}}]\n",
        f"base_model: a\nexperts: {{'{LETTERS}': 1}}\n",
        f"base_model: a\nexperts: [{{source_model: b+{LETTERS}+c}}]\n",
        f"base_model: a\nseed: *{LETTERS.replace(' ', '')}\nexperts: [{{source_model: b}}]\n",
    ],
    ids=["base", "name", "expert", "mode", "seed", "key", "twice", "tag", "list", "keys", "adapter", "alias"],
)
def test_a_message_quotes_at_most_two_hundred_characters_of_a_recipe(recipe: str, tmp_path: Path) -> None:
    (tmp_path / "r.yml").write_text(recipe)
    outcome = cli("plan", tmp_path / "r.yml")
    check_refusal(outcome, facts=())
    quoted = re.findall(r"(?:x ?y ?)+", outcome.stderr)
    assert max(map(len, quoted), default=0) <= QUOTED
    assert len(outcome.stderr) < LONGEST


def test_the_middle_of_a_long_message_is_left_out() -> None:
    error = SourceError(f"{'a' * 300} has '{'b c ' * 100}', and so have transformers' others", hint="d" * 10_000)
    assert len(error.message) <= 2 * QUOTED + 60
    assert error.message.endswith("', and so have transformers' others")
    assert "..." in error.message
    assert len(error.hint or "") == QUOTED
    assert len(SourceError("word " * 10_000).message) == LONGEST
    apostrophes = "transformers' " + "plain words " * 30 + "the parents' own"
    assert SourceError(apostrophes).message == apostrophes
