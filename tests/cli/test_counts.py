"""Counts of one have their noun in the singular, in every command that counts."""

import re
from pathlib import Path

import pytest

import frankenmoe as fm
import tiny
from frankenmoe.counted import counted
from refusals import cli

NOUNS = "experts|layers|gates|files|tensors|entries|models|questions|tokens|steps|texts|bytes|others|heads"
WRONG = re.compile(rf"(?<![\d.,/])1 (?:[a-z]+ )?(?:{NOUNS})\b")


@pytest.mark.parametrize(
    ("count", "words", "said"),
    [
        (0, ("expert",), "0 experts"),
        (1, ("expert",), "1 expert"),
        (2, ("more byte",), "2 more bytes"),
        (12_000, ("token",), "12,000 tokens"),
        (1, ("entry", "entries"), "1 entry"),
        (3, ("entry", "entries"), "3 entries"),
    ],
)
def test_the_noun_follows_the_count(count: int, words: tuple[str, ...], said: str) -> None:
    assert counted(count, *words) == said


def test_an_moe_of_one_layer_and_one_expert(tmp_path: Path) -> None:
    parent = tiny.make_parent(tmp_path / "p", "llama", num_hidden_layers=1)
    recipe = tiny.write_recipe(tmp_path / "r.yml", parent, [parent], experts_per_token=1, gate_mode="random")
    said = [str(fm.plan(fm.Recipe.load(recipe)))]
    out = tmp_path / "out"
    for command in (
        ("plan", recipe),
        ("build", recipe, out, "--allow-identical"),
        ("verify", out),
        ("card", out),
        ("cache",),
        ("chat", recipe, "--prompt", "a", "--max-new-tokens", 1, "--trace"),
    ):
        outcome = cli(*command)
        assert outcome.code == 0, outcome.stderr
        said += [outcome.stdout, outcome.stderr]
    said.append((out / "README.md").read_text())
    text = "\n".join(said)
    assert [found[0] for found in WRONG.finditer(text)] == []
    for part in ("1 layer x 1 expert, 1 per token", "1 gate", "1 layer, 1 expert, top-1", "A mixture of 1 expert"):
        assert part in text
