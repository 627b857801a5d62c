"""`fit`, `add-expert` and `extract` as a person meets them: a table, JSON, what is written, and how mistakes end."""

import json
from pathlib import Path

import pytest
import torch
from test_fit import data_recipe
from transformers import AutoModelForCausalLM

from frankenmoe.artifact.folder import open_artifact
from refusals import cli, refused

Parents = dict[str, list[Path]]


def output(*arguments: object) -> str:
    outcome = cli(*arguments)
    assert outcome.code == 0, outcome.stderr
    return outcome.stdout


@pytest.fixture(scope="module")
def fitted(parents: Parents, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual artifact of two experts, fitted by the command, beside their texts; not to be changed."""
    folder = tmp_path_factory.mktemp("fitted")
    out = folder / "small"
    said = output("fit", data_recipe(folder, parents["llama"]), out, "--block", 32, "--tokens", 512)
    assert "logistic gates, scale" in said
    assert f"routers in {out}" in said.replace("\n", "")
    return out


def test_add_expert_makes_a_larger_artifact(fitted: Path, parents: Parents, tmp_path: Path) -> None:
    words = ["--source", parents["llama"][0], "--name", "e2", "--data", fitted.parent / "e2.txt", "--block", 32]
    lines = output("add-expert", fitted, tmp_path / "large", *words).splitlines()
    assert [line.split()[0] for line in lines if line.startswith(("e0", "e1", "e2"))] == ["e2"]
    assert "ridge gates" in lines[0]
    assert open_artifact(tmp_path / "large").record["experts"] == ["e0", "e1", "e2"]
    assert open_artifact(fitted).record["experts"] == ["e0", "e1"]


def test_add_expert_answers_in_json(fitted: Path, parents: Parents, tmp_path: Path) -> None:
    words = ["--source", parents["llama"][0], "--name", "e2", "--data", fitted.parent / "e2.txt", "--method", "lda"]
    said = json.loads(output("add-expert", fitted, tmp_path / "large", *words, "--block", 32, "--json"))
    assert said["method"] == "lda"


def test_extract_gives_the_parents_numbers_back(fitted: Path, parents: Parents, tmp_path: Path) -> None:
    assert str(tmp_path / "dense") in output("extract", fitted, tmp_path / "dense", "--expert", "e1").replace("\n", "")
    dense, parent = (
        AutoModelForCausalLM.from_pretrained(folder).model.layers[1].mlp.down_proj.weight
        for folder in (tmp_path / "dense", parents["llama"][2])
    )
    assert torch.equal(dense, parent)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["add-expert", "small", "large", "--source", "PARENT", "--name", "e1", "--data", "e2.txt"], "already"),
        (["add-expert", "small", "large", "--source", "PARENT", "--name", "e2", "--data", "e3.txt"], "e3.txt"),
        (["extract", "small", "large", "--expert", "e9"], "no expert"),
        (["fit", "small", "--data", "e0"], "EXPERT=FILE"),
    ],
)
def test_mistakes_are_refused_and_nothing_is_written(
    words: list[str], says: str, fitted: Path, parents: Parents, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(fitted.parent)
    said = [str(parents["llama"][0]) if word == "PARENT" else word for word in words]
    refused(*said, inside=fitted.parent, facts=(says,))


@pytest.mark.parametrize("words", [["add-expert", "small", "large", "--name", "e2"], ["extract", "small", "large"]])
def test_what_must_be_said_is_asked_for(words: list[str], tmp_path: Path) -> None:
    outcome = cli(*words)
    assert outcome.code == 2
    assert "Missing option" in outcome.stderr
