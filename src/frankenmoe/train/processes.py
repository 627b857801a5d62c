"""Devices, processes and trackers of a run, through accelerate; sharding through torch's FSDP2.

Accelerate shards for accelerators only: with CPU processes it copies the weights (DDP), whatever its FSDP settings say.
torch's `fully_shard` is the same code on both, so two CPU processes can test it.
"""

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedDataParallelKwargs, ProjectConfiguration
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from frankenmoe.counted import counted
from frankenmoe.errors import PlanError
from frankenmoe.moe.dense import layer_modules
from frankenmoe.moe.processes import world
from frankenmoe.recipe.train import TrainSettings


def start_accelerator(
    settings: TrainSettings, device: torch.device, *, folder: Path, report_to: Sequence[str]
) -> Accelerator:
    """Joins the processes of the launcher, if there is one, on devices of the same type, and starts the trackers.

    Raises PlanError for a tracker that is not installed, and for a batch that does not divide among the processes.
    """
    known = ["all", *map(str, get_available_trackers())]
    for name in report_to:
        if name not in known:
            raise PlanError(
                f"no tracker {name} to report to, found {', '.join(known[1:]) or 'none'}",
                hint=f"pip install {name}, or leave --report-to out",
            )
    if device.type == "cuda" and world() == 1:
        torch.cuda.set_device(device)  # accelerate takes the current one
    accelerator = Accelerator(
        # without this accelerate would let every process of a CPU run train alone
        cpu=device.type == "cpu",
        mixed_precision="no",  # `loop.precision` decides
        log_with=list(report_to),
        project_config=ProjectConfiguration(logging_dir=str(folder / "runs")),
        kwargs_handlers=[
            # an expert that no token chose has no gradient
            DistributedDataParallelKwargs(find_unused_parameters=bool({"adapters", "experts"} & set(settings.what)))
        ],
    )
    parts = settings.accumulate * accelerator.num_processes
    if settings.batch % parts:
        raise PlanError(
            f"a batch of {counted(settings.batch, 'block')} does not divide into {parts} parts "
            f"({counted(accelerator.num_processes, 'process', 'processes')}, each computes {settings.accumulate} after "
            "another)",
            hint=f"use --batch {parts * -(-settings.batch // parts)}",
        )
    if report_to:
        plain = {name: each if isinstance(each, int | float) else str(each) for name, each in settings}
        accelerator.init_trackers(os.environ.get("WANDB_PROJECT", "frankenmoe"), config=plain)
    return accelerator


def spread(model: Any, accelerator: Accelerator, *, shard: bool) -> nn.Module:
    """Places the model on its device; several processes hold a copy each (DDP), or a shard each (FSDP2).

    Every decoder layer is sharded on its own: all of its experts are gathered together, only while it computes.
    """
    if not shard or accelerator.num_processes == 1:
        wrapped: nn.Module = accelerator.prepare_model(model)
        return wrapped
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for layer in layer_modules(model).values():
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model  # type: ignore[no-any-return]


def reducing(model: nn.Module, accelerator: Accelerator, *, now: bool) -> AbstractContextManager[None]:
    """A context for a backward pass that reduces gradients over processes `now`, or leaves it to a later one."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(now)
        return nullcontext()
    return nullcontext() if now else accelerator.no_sync(model)
