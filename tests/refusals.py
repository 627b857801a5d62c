"""The front door in one process: runs the CLI as a shell would, and holds every refusal to the same promises."""

import contextlib
import io
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import torch
from safetensors.torch import load_file, save_file

from frankenmoe.cli.app import main

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Outcome:
    """What a shell sees of a command."""

    code: int
    stdout: str
    stderr: str


def cli(*args: object) -> Outcome:
    """`frankenmoe ARGS` without the three seconds that another process would spend on importing torch."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    argv = ["frankenmoe", *map(str, args)]
    with patch.object(sys, "argv", argv), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 0
    return Outcome(code, out.getvalue(), err.getvalue())


def refused(*args: object, inside: Path, facts: tuple[object, ...], hint: str = "") -> str:
    """Exit code 2, one sentence with all `facts`, a hint, and not a file more or less in the folder `inside`."""
    before = tree(inside)
    outcome = cli(*args)
    check_refusal(outcome, facts=facts, hint=hint)
    assert tree(inside) == before
    return outcome.stderr


def check_refusal(outcome: Outcome, *, facts: tuple[object, ...], hint: str = "") -> None:
    """What every refusal looks like on stderr, below the plan's warnings."""
    said = [line for line in outcome.stderr.splitlines() if not line.startswith("warning: ")]
    assert outcome.code == 2, outcome.stderr
    assert not outcome.stdout
    assert len(said) == 2, outcome.stderr
    assert said[0].startswith("error: ")
    assert said[1].startswith("  hint: ")
    assert not [fact for fact in facts if str(fact) not in said[0]], said[0]
    assert hint in said[1], said[1]


def tree(folder: Path) -> dict[str, int]:
    """Every path below a folder and its size in bytes."""
    return {str(path): path.lstat().st_size for path in folder.rglob("*")}


def copy_of(parent: Path, folder: Path) -> Path:
    """A parent to spoil, without harm to the one that other tests use."""
    return shutil.copytree(parent, folder, symlinks=True)


def spoil(folder: Path, change: Callable[[Tensors], object]) -> Path:
    """Saves a folder's tensors again after `change` has edited them in place."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    return folder
