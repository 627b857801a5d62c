"""An MoE of four experts, virtual and built, and ways to change what another tool would have made of it."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import frankenmoe as fm
import gguftools
import tiny

WIDE = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 4, "head_dim": 64}
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Place:
    """`virtual` and `built` are the artifact, `tensors` all of the built one's, `config` its config.json."""

    recipe: Path
    virtual: Path
    built: Path
    tensors: Tensors
    config: dict[str, object]

    def folder(
        self, folder: Path, change: Callable[[Tensors], object] = lambda tensors: None, **config: object
    ) -> Path:
        """A stock folder of the same model after a change of its tensors and its config."""
        tensors = {name: tensor.clone() for name, tensor in self.tensors.items()}
        change(tensors)
        folder.mkdir(parents=True)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(self.config | config))
        return folder


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    root = tmp_path_factory.mktemp("after")
    base, *others = gguftools.parents(root, "llama", count=4, **WIDE)
    (root / "text.txt").write_text(gguftools.WORDS * 2)
    recipe = tiny.write_recipe(root / "r.yml", base, [base, *others])
    virtual = fm.build(recipe, root / "virtual", virtual=True).folder
    built = fm.build(recipe, root / "built").folder
    tensors: Tensors = {}
    for file in built.glob("*.safetensors"):
        tensors |= load_file(file)
    return Place(recipe, virtual, built, tensors, json.loads((built / "config.json").read_text()))
