"""Checkpoints of a run: one folder that appears whole, without pickle, the same for any number of processes.

`checkpoint-N/` holds `history.json` and `trained.safetensors`: the trained parameters as `weight:NAME`, and AdamW's
state as `exp_avg:NAME`, `exp_avg_sq:NAME` and `step:NAME`, all unsharded.
"""

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch.distributed.tensor import DTensor, distribute_tensor

from frankenmoe.artifact.folder import whole_or_absent, write_json
from frankenmoe.checkpoint.writer import write_atomic
from frankenmoe.errors import ArtifactError
from frankenmoe.train.guard import Look
from frankenmoe.train.parts import Slots

WEIGHTS = "trained.safetensors"
HISTORY = "history.json"
BEST = "best.safetensors"
FOLDER = re.compile(r"checkpoint-(\d+)")


@dataclass
class History:
    """What happened so far: steps done, the loss of each, the guard's looks, and the step of the best look."""

    step: int = 0
    losses: list[float] = field(default_factory=list)
    looks: list[Look] = field(default_factory=list)
    best: int = 0

    @classmethod
    def read(cls, folder: Path) -> "History":
        """The history in a checkpoint."""
        found = json.loads((folder / HISTORY).read_bytes())
        return cls(**found | {"looks": [Look(**each) for each in found["looks"]]})


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor on the CPU, unsharded. If it is sharded, all processes must call this together."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu().contiguous()


def whole_weights(slots: Slots) -> dict[str, torch.Tensor]:
    """The trained parameters by name, unsharded."""
    return {name: whole(slot.parameter) for name, slot in slots.items()}


def state_of(slots: Slots, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The trained parameters and the optimizer's state. An expert that never got a token has no state."""
    found = {f"weight:{name}": tensor for name, tensor in whole_weights(slots).items()}
    for name, slot in slots.items():
        state: Mapping[str, Any] = optimizer.state.get(slot.parameter, {})
        found |= {f"{key}:{name}": whole(value) for key, value in state.items()}
    return found


@torch.no_grad()
def restore(folder: Path, slots: Slots, optimizer: torch.optim.Optimizer) -> None:
    """Restores a checkpoint's tensors, sharded as the parameters are."""
    for key, value in load_file(folder / WEIGHTS).items():
        kind, _, name = key.partition(":")
        parameter = slots[name].parameter
        if kind == "weight":
            parameter.copy_(_like(value, parameter))
        else:  # AdamW counts steps on the CPU
            optimizer.state[parameter][kind] = value if kind == "step" else _like(value, parameter)


def _like(value: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    value = value.to(parameter.device)
    if not isinstance(parameter, DTensor):
        return value
    return distribute_tensor(value, parameter.device_mesh, parameter.placements)


def save_checkpoint(folder: Path, tensors: Mapping[str, torch.Tensor], history: History) -> None:
    """Writes `checkpoint-N`, then removes the older ones.

    Raises ArtifactError if the disk is full; the older checkpoint is then as it was.
    """
    final = folder / f"checkpoint-{history.step}"
    try:
        with whole_or_absent(final) as partial:
            write_atomic(partial / WEIGHTS, save(dict(tensors)))
            write_json(partial / HISTORY, asdict(history))
    except (OSError, ArtifactError) as error:
        kept = last_checkpoint(folder)
        why = error.message if isinstance(error, ArtifactError) else f"{error.strerror}"
        raise ArtifactError(
            f"the checkpoint of step {history.step} cannot be written: {why}; "
            + (f"that of step {kept[0]} is intact" if kept else "there is none before it"),
            hint=f"free space on the disk of {folder}; the same command resumes from the last checkpoint",
        ) from error
    for step, old in checkpoints(folder):
        if step < history.step:
            shutil.rmtree(old, ignore_errors=True)


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Every whole checkpoint with its step, oldest first."""
    found = ((FOLDER.fullmatch(path.name), path) for path in folder.iterdir())
    return sorted((int(match[1]), path) for match, path in found if match)


def last_checkpoint(folder: Path) -> tuple[int, Path] | None:
    """The newest whole checkpoint with its step, if there is one."""
    return next(reversed(checkpoints(folder)), None) if folder.is_dir() else None


def save_best(folder: Path, weights: Mapping[str, torch.Tensor]) -> None:
    """Keeps the weights of the best look so far."""
    write_atomic(folder / BEST, save(dict(weights)))


def load_best(folder: Path) -> dict[str, torch.Tensor]:
    """What `save_best` kept, in memory: Windows cannot remove a file that is mapped."""
    return {key: tensor.clone() for key, tensor in load_file(folder / BEST).items()}


def remove_scaffold(folder: Path) -> None:
    """Removes checkpoints, the best weights and the parents' predictions; a finished artifact needs none of them."""
    for path in list(folder.iterdir()):
        if path.name.startswith("checkpoint-") or path.name == "teachers":
            shutil.rmtree(path)
    (folder / BEST).unlink(missing_ok=True)
