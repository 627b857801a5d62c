"""Two kinds of text that tiny models can tell apart, and recipes over tiny parents, for the tests of training."""

import random
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import tiny
from frankenmoe.recipe.train import TrainSettings

WORDS = {"e0": ("abc ", "bca ", "cab "), "e1": ("xyz ", "zyx ", "yxz ")}


def write_texts(folder: Path, *, words: int = 900) -> dict[str, list[str]]:
    """Domain -> its file, one per expert."""
    found = {}
    for name, choices in WORDS.items():
        draw = random.Random(name)
        file = folder / f"{name}.txt"
        file.write_text("".join(draw.choice(choices) for _ in range(words)))
        found[name] = [str(file)]
    return found


def settings(**changes: Any) -> TrainSettings:
    """A short run on short blocks."""
    plain = {"steps": 6, "batch": 4, "block": 16, "guard_blocks": 4, "guard_every": 3, "rate": 0.01, "rank": 4}
    return TrainSettings.model_validate(plain | changes)


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found = model(input_ids=ids).logits
    assert isinstance(found, torch.Tensor)
    return found


def stock(folder: Path) -> Any:
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def recipe(folder: Path, parents: list[Path], **keys: Any) -> Path:
    """Two experts called e0 and e1 with gates from prompts."""
    return tiny.write_recipe(
        folder / "r.yml", parents[0], parents[1:], prompts=True, **({"gate_mode": "hidden_avg"} | keys)
    )
