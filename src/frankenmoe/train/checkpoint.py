"""Checkpoints of a run: one folder that appears whole, without pickle, the same for any number of processes.

`checkpoint-N/` holds `trained.safetensors` (what learns and AdamW's moments, unsharded), `trainer_state.json`, which
transformers' Trainer reads, and `history.json`.
"""

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch.distributed.tensor import DTensor, distribute_tensor

from frankenmoe.artifact import write_json
from frankenmoe.checkpoint.writer import write_atomic
from frankenmoe.errors import ArtifactError
from frankenmoe.train.guard import Look
from frankenmoe.train.parts import Slots

WEIGHTS = "trained.safetensors"
HISTORY = "history.json"
STATE = "trainer_state.json"
BEST = "best.safetensors"
FOLDER = re.compile(r"checkpoint-(\d+)")
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class History:
    """What happened so far: steps done, the loss of each, the guard's looks, and the step of the best one."""

    step: int = 0
    losses: list[float] = field(default_factory=list)
    looks: list[Look] = field(default_factory=list)
    best: int = 0

    def to_dict(self) -> dict[str, Any]:
        looks = [{key: value for key, value in each.to_dict().items() if key != "mean"} for each in self.looks]
        return {"step": self.step, "losses": self.losses, "looks": looks, "best": self.best}

    @classmethod
    def read(cls, file: Path) -> "History":
        found = json.loads(file.read_bytes())
        return cls(found["step"], found["losses"], [Look(**each) for each in found["looks"]], found["best"])


@dataclass(frozen=True)
class Moments:
    """AdamW's running means for one tensor, unsharded, and how often it was updated: an expert may miss a step."""

    mean: torch.Tensor
    square: torch.Tensor
    step: torch.Tensor

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> "Moments":
        mean, square, step = (whole(torch.as_tensor(state[key])) for key in (*MOMENTS, "step"))
        return cls(mean, square, step)

    def like(self, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        """The optimizer's state for a parameter, sharded as it is."""
        kept = {key: sharded(value, parameter) for key, value in zip(MOMENTS, (self.mean, self.square), strict=True)}
        return {"step": self.step.clone(), **kept}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's values in one piece on the CPU, where it was sharded; all processes must ask together."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu().contiguous()


def sharded(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Values in one piece, spread as another tensor is."""
    value = value.to(like.device)
    return distribute_tensor(value, like.device_mesh, like.placements) if isinstance(like, DTensor) else value.clone()


def save_checkpoint(
    folder: str | Path,
    tensors: Mapping[str, torch.Tensor],
    moments: Mapping[str, Moments],
    *,
    trainer: Any,
    history: History,
) -> None:
    """Writes `checkpoint-N`, then removes the older ones.

    ArtifactError where the disk is full: the older checkpoint is as it was.
    """
    folder = Path(folder)
    final = folder / f"checkpoint-{history.step}"
    growing = folder / f"{final.name}.partial"
    try:
        shutil.rmtree(growing, ignore_errors=True)
        growing.mkdir()
        flat = {f"weight:{name}": tensor for name, tensor in tensors.items()}
        for name, moment in moments.items():
            flat |= {f"{MOMENTS[0]}:{name}": moment.mean, f"{MOMENTS[1]}:{name}": moment.square}
            flat |= {f"step:{name}": moment.step}
        write_atomic(growing / WEIGHTS, save(flat))
        write_json(growing / HISTORY, history.to_dict())
        trainer.save_to_json(str(growing / STATE))
        shutil.rmtree(final, ignore_errors=True)
        growing.rename(final)
    except (OSError, ArtifactError) as error:
        shutil.rmtree(growing, ignore_errors=True)
        kept = last_checkpoint(folder)
        why = error.message if isinstance(error, ArtifactError) else f"{error.strerror}"
        raise ArtifactError(
            f"the checkpoint of step {history.step} cannot be written: {why}; "
            + (f"that of step {kept[0]} is intact" if kept else "there is none before it"),
            hint=f"free space on the disk of {folder}; the same command goes on from the last checkpoint",
        ) from error
    for step, old in checkpoints(folder):
        if step < history.step:
            shutil.rmtree(old, ignore_errors=True)


def checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Every whole checkpoint with its step, oldest first."""
    found = ((FOLDER.fullmatch(path.name), path) for path in folder.iterdir())
    return sorted((int(match[1]), path) for match, path in found if match)


def last_checkpoint(folder: Path) -> tuple[int, Path] | None:
    """The newest whole checkpoint, if there is one."""
    return next(reversed(checkpoints(folder)), None) if folder.is_dir() else None


def load_weights(folder: str | Path) -> dict[str, torch.Tensor]:
    """What learnt, by name."""
    return _loaded(folder, "weight")


def load_moments(folder: str | Path) -> dict[str, Moments]:
    """AdamW's running means, by name."""
    mean, square, step = (_loaded(folder, key) for key in (*MOMENTS, "step"))
    return {name: Moments(mean[name], square[name], step[name]) for name in mean}


def _loaded(folder: str | Path, kind: str) -> dict[str, torch.Tensor]:
    found = load_file(Path(folder) / WEIGHTS)
    return {name.partition(":")[2]: tensor for name, tensor in found.items() if name.startswith(f"{kind}:")}


def save_best(folder: Path, slots: Mapping[str, torch.Tensor]) -> None:
    """Keeps the weights of the best look so far."""
    write_atomic(folder / BEST, save(dict(slots)))


def put_back(slots: Slots, tensors: Mapping[str, torch.Tensor]) -> None:
    """Fills what learns with kept values, before anything is sharded."""
    with torch.no_grad():
        for name, slot in slots.items():
            slot.parameter.copy_(tensors[name])


def remove_scaffold(folder: Path) -> None:
    """Removes checkpoints and the best weights, which a finished artifact has no use for."""
    for path in list(folder.iterdir()):
        if path.name.startswith("checkpoint-") or path.name == "teachers":
            shutil.rmtree(path)
    (folder / BEST).unlink(missing_ok=True)
