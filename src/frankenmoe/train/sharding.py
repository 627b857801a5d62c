"""Spreads a model's weights over the processes of a launcher (FSDP2), on GPUs and CPUs alike; knows nothing of losses.

Accelerate knows FSDP2 for accelerators only: with CPU processes it is MULTI_CPU whatever the settings say, and wraps
the model in DDP, which copies all weights. torch's own `fully_shard` has no such limit, and transformers' Trainer takes
a model that is sharded already as it is, so this way is the same on both and tested on two CPU processes.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from frankenmoe.moe.dense import mlp_modules


def shard(model: Any, device: torch.device) -> None:
    """Shards every decoder layer on its own, then the rest; a layer is whole in memory only while it computes.

    One layer's experts are gathered together, frozen or not; what learns is reduced to its owners as gradients.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for holder, _ in mlp_modules(model).values():
        fully_shard(holder, mesh=mesh)
    fully_shard(model, mesh=mesh)
