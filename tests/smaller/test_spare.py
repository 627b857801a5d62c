"""What `plan` and `audit` say of experts that an MoE can do without: dead ones, copies, and those of zeros."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from smallercases import recipe_of, write_texts

import frankenmoe as fm
from frankenmoe.audit.run import look
from refusals import Tensors, copy_of, spoil

Parents = dict[str, list[Path]]


def empty(tensors: Tensors) -> None:
    """Sets all that a parent's FFNs write to zero."""
    for name, tensor in tensors.items():
        if "down_proj" in name:
            tensor.zero_()


@pytest.fixture(scope="module")
def place(parents: Parents, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `zero` (expert e1 writes zeros), `twins` (e2 is a copy of e0) and `idle` (e1 is never chosen)."""
    folder = tmp_path_factory.mktemp("spare")
    write_texts(folder)
    base, one, two = parents["llama"]
    zero = spoil(copy_of(one, folder / "silent"), empty)
    fm.build(recipe_of(folder / "zero.yml", [base, zero, two]), folder / "zero", virtual=True)
    rows = {"e2": {"source_model": str(base)}}
    fm.build(recipe_of(folder / "twins.yml", [base, one, two], rows=rows), folder / "twins", virtual=True)
    row = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    names = [f"model.layers.{layer}.block_sparse_moe.gate.weight" for layer in range(2)]
    save_file(
        {name: torch.stack([row[at], row[at] / 2, -row[at]]) for at, name in enumerate(names)}, folder / "g.safetensors"
    )
    keys = {"routers": "g.safetensors", "experts_per_token": 1}
    fm.build(recipe_of(folder / "idle.yml", [base, one, two], **keys), folder / "idle", virtual=True)
    return folder


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("zero", ["the output of expert e1 is always zero"]),
        ("twins", ["experts 0, 2 are bit-identical and count as one for routing"]),
        ("idle", []),
    ],
)
def test_the_plan_names_the_command(name: str, says: list[str], place: Path) -> None:
    found = [
        warning for warning in fm.plan(fm.Recipe.load(place / f"{name}.yml")).warnings if "remove-expert" in warning
    ]
    assert found == [f"{words}; `frankenmoe remove-expert` takes one out of a finished MoE" for words in says]


@pytest.mark.parametrize(
    ("name", "key", "of_artifact", "of_recipe"),
    [
        (
            "zero",
            "moe",
            "The output of e1 is always zero: `frankenmoe remove-expert {} OUT e1` takes it out.",
            "can do without it",
        ),
        (
            "twins",
            "moe",
            "same weights: e0 = e2; `frankenmoe prune {} OUT --experts 2` leaves one of each.",
            "one of each",
        ),
        (
            "idle",
            "load",
            "e1 got none in any layer: `frankenmoe remove-expert {} OUT e1` takes it out.",
            "can do without it",
        ),
    ],
)
def test_the_audit_names_the_command(name: str, key: str, of_artifact: str, of_recipe: str, place: Path) -> None:
    sentences = {}
    for what in (place / name, place / f"{name}.yml"):
        answers = look(what, tokens=300).report["answers"]
        sentences[what] = {answer["key"]: answer["sentence"] for answer in answers}
    assert of_artifact.format(place / name) in sentences[place / name][key]
    assert of_recipe in sentences[place / f"{name}.yml"][key]
    other = {"moe": "load", "load": "moe"}[key]
    assert "remove-expert" not in sentences[place / name][other]
