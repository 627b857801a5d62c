"""Recipe -> artifact: plan, routers, body, proof, in that order; the library's and the CLI's way to build.

Does not import torch until a stage needs it: bytes are already being copied while it loads.
"""

import os
import platform
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from frankenmoe.artifact import ROUTERS, Artifact, Routers, finish, growing, refuse_occupied, write_routers
from frankenmoe.checkpoint.fingerprint import fingerprint, sha256
from frankenmoe.checkpoint.writer import write_atomic
from frankenmoe.compose import compose, copy_small_files
from frankenmoe.errors import PlanError, SourceError
from frankenmoe.gates.chance import random_routers
from frankenmoe.planning import Plan, plan
from frankenmoe.progress import SILENT, Progress
from frankenmoe.recipe import RANDOM_MODES, Recipe

SHARD_SIZE = 4 * 10**9
SWITCH_INTERVAL = 2e-4  # seconds; see torch_ahead


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
    digest = f"{made.digest}/{'virtual' if virtual else shard_size}"
    with growing(out, digest=digest) as partial, torch_ahead() as beside:
        if virtual or made.recipe.gate_mode not in RANDOM_MODES:
            beside(import_module, "frankenmoe.prove").result()
        if virtual:
            _check_sources(made, progress, trust_remote_code=trust_remote_code)
        if not (partial / ROUTERS).exists():
            write_routers(partial, make_routers(made, progress, trust_remote_code=trust_remote_code))
        if virtual:
            copy_small_files(made, partial)
        else:
            checked = beside(_check_class, made, trust_remote_code=trust_remote_code)
            _compose(made, partial, progress, shard_size=shard_size, checked=checked)
            _prove(made, partial)
        text = yaml.safe_dump(made.recipe.to_dict(), sort_keys=False, allow_unicode=True)
        write_atomic(partial / "recipe.yml", text.encode())
        record = _record(made, out, virtual=virtual, progress=progress)
        if made.digest_now() != made.digest:
            raise SourceError(
                f"a source of {recipe if isinstance(recipe, str | Path) else recipe.origin} changed while it was read",
                hint="build again when nothing writes to the sources any more",
            )
        return finish(partial, out, record=record)


@contextmanager
def torch_ahead() -> Iterator[Callable[..., Future[Any]]]:
    """Loads torch and what stands on it in a thread, since that takes as long as copying gigabytes.

    Yields what has this thread do something more, once it has them: transformers cannot be imported from two threads at
    once. Python's threads take turns; a short turn keeps the copying from waiting for the imports.
    """
    before = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_INTERVAL)
    thread = ThreadPoolExecutor(1)
    thread.submit(import_module, "frankenmoe.prove")
    try:
        yield thread.submit
    finally:
        thread.shutdown(cancel_futures=True)
        sys.setswitchinterval(before)


def _compose(made: Plan, folder: Path, progress: Progress, *, shard_size: int, checked: Future[None]) -> None:
    """Writes the body, and no further than to where the check beside it fails."""

    def on_bytes(amount: int) -> None:
        if checked.done():
            checked.result()
        progress.advance(amount)

    progress.start("writing", sum(write.nbytes for write in made.writes), "B")
    compose(made, folder, shard_size=shard_size, on_bytes=on_bytes)
    checked.result()


def _check_class(made: Plan, *, trust_remote_code: bool) -> None:
    """transformers can load the sources, and will find in the built form what its class wants."""
    from frankenmoe.moe.load import check_loadable
    from frankenmoe.prove import prove_class

    check_loadable(made, trust_remote_code=trust_remote_code)
    prove_class(made)


def _check_sources(made: Plan, progress: Progress, *, trust_remote_code: bool) -> None:
    """What a virtual MoE will read, checked before it is promised."""
    from frankenmoe.moe.load import check_loadable
    from frankenmoe.prove import prove_sources

    check_loadable(made, trust_remote_code=trust_remote_code)
    progress.start("checking", made.bill.memory_virtual, "B")
    prove_sources(made, on_bytes=progress.advance)


def _prove(made: Plan, folder: Path) -> None:
    """What was written is what was planned."""
    from frankenmoe.prove import prove_body, prove_routers

    prove_routers(made, folder)
    prove_body(made, folder, sampled=True, on_bytes=lambda amount: None)


def make_routers(made: Plan, progress: Progress, *, trust_remote_code: bool) -> Routers:
    """Every gate by the recipe's gate mode; random ones without waiting for torch."""
    if made.recipe.gate_mode in RANDOM_MODES:
        return random_routers(made)
    from frankenmoe.gates import run

    reached = 0

    def on_progress(done: int, total: int) -> None:
        nonlocal reached
        if done == 0:
            progress.start("routers", total, "prompt sets")
        progress.advance(done - reached)
        reached = done

    return run.make_routers(made, on_progress=on_progress, trust_remote_code=trust_remote_code)


def is_recipe(path: str | Path) -> bool:
    """Whether a path names a recipe, there or not, and not an artifact's folder."""
    return Path(path).is_file() or (Path(path).suffix in (".yml", ".yaml") and not Path(path).is_dir())


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


def _record(made: Plan, out: Path, *, virtual: bool, progress: Progress) -> dict[str, Any]:
    """frankenmoe.json: enough to say where every number came from and to load without the recipe file."""
    files = made.source_files
    if virtual:
        progress.start("hashing sources", sum(file.stat().st_size for file in files), "B")
    return {
        "form": "virtual" if virtual else "built",
        "name": made.recipe.name,
        "recipe": made.recipe.to_dict(),
        "recipe_folder": str(made.recipe.folder),
        "recipe_folder_from_here": os.path.relpath(made.recipe.folder, out),
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
        "frankenmoe": version("frankenmoe"),
        "torch": version("torch"),
        "transformers": version("transformers"),
        "python": platform.python_version(),
    }
