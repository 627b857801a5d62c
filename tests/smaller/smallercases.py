"""Artifacts of three experts with a text each, for the tests of smaller MoEs."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

import tiny
from frankenmoe.artifact.folder import open_artifact
from frankenmoe.checkpoint.values import values

LETTERS = {"e0": "ABCDEFGH ", "e1": "123456789+=", "e2": "abcdefgh."}
SIZE = {"block": 32, "tokens": 512}


def write_texts(folder: Path, *, length: int = 1200) -> None:
    """A text file per expert, each of letters of its own."""
    for name, letters in LETTERS.items():
        state, out = 7, []
        for _ in range(length):
            state = (state * 1103515245 + 12345) % 2**31
            out.append(letters[state // 65536 % len(letters)])
        (folder / f"{name}.txt").write_text("".join(out))


def recipe_of(
    file: Path, parents: Sequence[Path], names: Sequence[str] = ("e0", "e1", "e2"), *, data: bool = True,
    rows: Mapping[str, Mapping[str, object]] | None = None, **keys: object,
) -> Path:  # fmt: skip
    """A recipe in which expert e1, for example, is the parent number 1; `rows` adds keys to experts."""
    experts = [
        {"source_model": str(parents[int(name[1])]), "name": name}
        | ({"data": f"{name}.txt"} if data else {})
        | dict((rows or {}).get(name, {}))
        for name in names
    ]
    return tiny.write_recipe(file, parents[0], [], **({"backbone": "base", "experts": experts} | keys))


def gates(folder: Path) -> dict[str, torch.Tensor]:
    """Every gate of an artifact by name."""
    return {name: torch.from_numpy(values(ref)) for name, ref in open_artifact(folder).routers.items()}
