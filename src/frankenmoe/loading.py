"""Artifact or recipe -> a running MoE; the library's and the CLI's way to load. Writes nothing."""

from pathlib import Path
from typing import Any

import torch

from frankenmoe.artifact import Artifact, open_artifact
from frankenmoe.building import check_buildable, is_recipe, load_recipe, make_routers
from frankenmoe.checkpoint.tensors import DTYPES
from frankenmoe.moe.dense import as_tensor
from frankenmoe.moe.linear import to_int8
from frankenmoe.moe.load import MoE, copy, load_built, load_plan
from frankenmoe.planning import plan
from frankenmoe.planning.recall import plan_of
from frankenmoe.progress import SILENT, Progress
from frankenmoe.recipe import Recipe


def load(
    what: Recipe | Artifact | str | Path,
    *,
    dtype: str | None = None,
    int8: bool = False,
    trust_remote_code: bool = False,
    progress: Progress = SILENT,
    **options: Any,
) -> MoE:
    """An MoE to run: from an artifact of either form, or from a recipe, whose routers are then made in memory.

    `dtype` (float32, bfloat16, float16) converts; without it weights stay mapped as they are stored. `int8` rounds
    every linear layer to 8 bits in memory, for inference: half the memory of 16 bits, logits a little off.
    `options` are those of MoEBlock: capacity_factor, drop_policy.
    """
    moe = _load(what, dtype=dtype, trust_remote_code=trust_remote_code, progress=progress, **options)
    if int8:
        to_int8(moe.model, progress)
    return moe


def _load(
    what: Recipe | Artifact | str | Path,
    *,
    dtype: str | None,
    trust_remote_code: bool,
    progress: Progress,
    **options: Any,
) -> MoE:
    as_dtype = getattr(torch, dtype) if dtype else None
    if isinstance(what, (str, Path)) and not is_recipe(what):
        what = open_artifact(Path(what))
    if isinstance(what, Artifact):
        if what.form == "built":
            return load_built(what, dtype=as_dtype, **options)
        made = plan_of(what, trust_remote_code=trust_remote_code)
        gates = {name: as_tensor(copy(what.routers, name, name)) for name in what.routers}
        return load_plan(made, gates, dtype=as_dtype, trust_remote_code=trust_remote_code, **options)
    made = plan(load_recipe(what), weights=True, trust_remote_code=trust_remote_code)
    check_buildable(made, virtual=True, allow_identical=True)
    gates = {
        name: torch.from_numpy(raw).view(getattr(torch, DTYPES[kind].name)).view(shape)
        for name, (kind, shape, raw) in make_routers(
            made, progress, trust_remote_code=trust_remote_code
        ).routers.items()
    }
    return load_plan(made, gates, dtype=as_dtype, trust_remote_code=trust_remote_code, **options)
