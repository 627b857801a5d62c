"""The stages in order: plan, routers, body, proof; load in either form. The library's front door, and the CLI's."""

import os
import platform
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml

from frankenmoe import __version__
from frankenmoe.artifact import (
    ROUTERS,
    Artifact,
    Routers,
    finish,
    growing,
    open_artifact,
    refuse_occupied,
    write_routers,
)
from frankenmoe.checkpoint.fingerprint import fingerprint, sha256
from frankenmoe.checkpoint.tensors import DTYPES
from frankenmoe.checkpoint.writer import write_atomic
from frankenmoe.compose import compose, copy_small_files
from frankenmoe.errors import PlanError
from frankenmoe.gates.run import make_routers
from frankenmoe.moe.dense import as_tensor
from frankenmoe.moe.load import MoE, check_loadable, copy, load_built, load_plan
from frankenmoe.planning import Plan, plan
from frankenmoe.planning.recall import plan_of
from frankenmoe.progress import SILENT, Progress
from frankenmoe.prove import prove_body, prove_routers, prove_sources
from frankenmoe.recipe import Recipe

SHARD_SIZE = 4 * 10**9


def build(
    recipe: Recipe | str | Path,
    out: str | Path,
    *,
    virtual: bool = False,
    dtype: str | None = None,
    shard_size: int = SHARD_SIZE,
    allow_identical: bool = False,
    trust_remote_code: bool = False,
    progress: Progress = SILENT,
) -> Artifact:
    """Makes an artifact of a recipe: the built form, a standard checkpoint, or the virtual one, megabytes.

    Killed at any moment, the same call goes on where it stopped. Raises FrankenMoEError's children.
    """
    # a link to an empty folder on another disk is filled there
    out = Path(os.path.realpath(out))
    refuse_occupied(out)
    made = plan(load_recipe(recipe), dtype=dtype, weights=True, trust_remote_code=trust_remote_code)
    check_buildable(made, virtual=virtual, allow_identical=allow_identical)
    check_loadable(made, trust_remote_code=trust_remote_code)
    digest = f"{made.digest}/{'virtual' if virtual else shard_size}"
    with growing(out, digest=digest) as partial:
        if virtual:
            progress.start("checking", made.bill.memory_virtual, "B")
            prove_sources(made, on_bytes=progress.advance)
        if not (partial / ROUTERS).exists():
            write_routers(partial, _routers(made, progress, trust_remote_code=trust_remote_code))
        if virtual:
            copy_small_files(made, partial)
        else:
            total = sum(write.nbytes for write in made.writes)
            progress.start("writing", total, "B")
            compose(made, partial, shard_size=shard_size, on_bytes=progress.advance)
            prove_routers(made, partial)
            prove_body(made, partial, sampled=True, on_bytes=lambda amount: None)
        text = yaml.safe_dump(made.recipe.to_dict(), sort_keys=False, allow_unicode=True)
        write_atomic(partial / "recipe.yml", text.encode())
        record = _record(made, virtual=virtual, progress=progress)
        return finish(partial, out, record=record)


def load_recipe(recipe: Recipe | str | Path) -> Recipe:
    """A recipe, read if it is still a path."""
    return recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)


def check_buildable(made: Plan, *, virtual: bool, allow_identical: bool) -> None:
    """PlanError when this plan cannot become the form asked for, or only a model that no router can change."""
    lacking = [str(source.name) for source in made.sources if not source.checkpoint.has_weights]
    if lacking:
        raise PlanError(
            f"{', '.join(lacking)} has a config but no weights, which is enough for the bill and not for a model",
            hint="put the safetensors files beside config.json, or name the source by its hub id",
        )
    if made.problems and not virtual:
        raise PlanError(
            f"this recipe cannot be built as {_target(made)}: {'; '.join(made.problems)}",
            hint="keep it virtual with --virtual: frankenmoe runs it as it is",
        )
    if made.all_identical and not allow_identical:
        raise PlanError(
            f"all {made.experts} experts hold the same weights, so no router can make a difference",
            hint="set noise_relative (0.01, say) or give them adapters; --allow-identical makes it all the same, to be "
            "trained later",
        )


def _target(made: Plan) -> str:
    return made.fmt.title if made.fmt else "a checkpoint"


def _routers(made: Plan, progress: Progress, *, trust_remote_code: bool) -> Routers:
    reached = 0

    def on_progress(done: int, total: int) -> None:
        nonlocal reached
        if done == 0:
            progress.start("routers", total, "prompt sets")
        progress.advance(done - reached)
        reached = done

    return make_routers(made, on_progress=on_progress, trust_remote_code=trust_remote_code)


def _record(made: Plan, *, virtual: bool, progress: Progress) -> dict[str, Any]:
    """frankenmoe.json: enough to say where every number came from and to load without the recipe file."""
    files = made.source_files
    if virtual:
        progress.start("hashing sources", sum(file.stat().st_size for file in files), "B")
    return {
        "form": "virtual" if virtual else "built",
        "name": made.recipe.name,
        "recipe": made.recipe.to_dict(),
        "recipe_folder": str(made.recipe.folder),
        "recipe_digest": made.recipe.digest,
        "seed": made.recipe.seed,
        "dtype": made.dtype_name,
        "format": made.fmt.name if made.fmt else None,
        "base_config": dict(made.base.config),
        "experts": [node.name for node in made.nodes],
        "shared_experts": [node.name for node in made.shared],
        "experts_per_token": made.recipe.experts_per_token,
        "sources": [
            {
                "file": str(file),
                "bytes": file.stat().st_size,
                "fingerprint": fingerprint(file),
                "sha256": sha256(file, on_bytes=progress.advance) if virtual else None,
            }
            for file in files
        ],
        "stages": [{"stage": "build", "gate_mode": made.recipe.gate_mode, "versions": versions()}],
    }


def versions() -> dict[str, str]:
    """What made this, for the record."""
    return {
        "frankenmoe": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def load(
    what: Recipe | Artifact | str | Path,
    *,
    dtype: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress = SILENT,
    **options: Any,
) -> MoE:
    """An MoE to run: from an artifact of either form, or from a recipe, whose routers are then made in memory.

    `dtype` (float32, bfloat16, float16) converts; without it weights stay mapped as they are stored. `options` are
    those of MoEBlock: capacity_factor, drop_policy.
    """
    as_dtype = getattr(torch, dtype) if dtype else None
    if isinstance(what, (str, Path)) and not Path(what).is_file():
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
        for name, (kind, shape, raw) in _routers(made, progress, trust_remote_code=trust_remote_code).items()
    }
    return load_plan(made, gates, dtype=as_dtype, trust_remote_code=trust_remote_code, **options)
