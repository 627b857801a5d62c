"""Recipe -> artifact: plan, routers, body, proof, in that order; the library's and the CLI's way to build.

Does not import torch until a stage needs it: bytes are already being copied while it loads.
"""

import os
import platform
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from frankenmoe.artifact import (
    ROUTERS,
    STATISTICS,
    Artifact,
    Routers,
    finish,
    growing,
    open_artifact,
    refuse_occupied,
    small_hashes,
    write_routers,
)
from frankenmoe.checkpoint.fingerprint import fingerprint, sha256
from frankenmoe.checkpoint.tensors import TensorWrite, safetensors_dtype
from frankenmoe.checkpoint.values import check_finite, materialize
from frankenmoe.checkpoint.writer import write_atomic
from frankenmoe.compose import compose, copy_small_files
from frankenmoe.errors import ArtifactError, PlanError, SourceError
from frankenmoe.gates.chance import random_routers
from frankenmoe.planning import Plan, plan
from frankenmoe.planning.recall import facts, plan_of
from frankenmoe.planning.trained import read_routers
from frankenmoe.progress import SILENT, Progress
from frankenmoe.recipe import FIT_MODES, RANDOM_MODES, Recipe

SHARD_SIZE = 4 * 10**9
SWITCH_INTERVAL = 2e-4  # seconds; see torch_ahead


def build(
    recipe: Recipe | Artifact | str | Path,
    out: str | Path,
    *,
    virtual: bool = False,
    dtype: str | None = None,
    shard_size: int = SHARD_SIZE,
    allow_identical: bool = False,
    trust_remote_code: bool = False,
    progress: Progress = SILENT,
    router_maker: "RouterMaker | None" = None,
    stage: str = "build",
) -> Artifact:
    """Makes an artifact of a recipe: the built form, a standard checkpoint, or the virtual one, megabytes.

    A virtual artifact, as it is or by its folder, is built with the routers it has. `router_maker` makes the routers in
    place of the recipe's gate mode, and `stage` is what the record calls that. Killed at any moment, the same call goes
    on where it stopped. Raises FrankenMoEError's children.
    """
    # a link to an empty folder on another disk is filled there
    out = Path(os.path.realpath(out))
    refuse_occupied(out)
    if isinstance(recipe, (str, Path)) and not is_recipe(recipe):
        recipe = open_artifact(Path(recipe))
    given = recipe if isinstance(recipe, Artifact) else None
    made = _plan(recipe, dtype=dtype, trust_remote_code=trust_remote_code)
    check_buildable(made, virtual=virtual, allow_identical=allow_identical)
    digest = (
        f"{made.digest}/{'virtual' if virtual else shard_size}{f'/{sha256(given.folder / ROUTERS)}' if given else ''}"
    )
    with (
        growing(out, digest=digest) as partial,
        torch_ahead(made, virtual=virtual, trust_remote_code=trust_remote_code) as ahead,
    ):
        if virtual or made.recipe.gate_mode not in RANDOM_MODES:
            ahead.result()
        if virtual:
            _check_sources(made, progress)
        if not (partial / ROUTERS).exists():
            _write_routers(
                partial,
                _given_routers(made, given)
                if given
                else router_maker(made, progress)
                if router_maker
                else make_routers(made, progress, trust_remote_code=trust_remote_code),
            )
        if virtual:
            copy_small_files(made, partial)
        else:
            progress.start("writing", sum(write.nbytes for write in made.writes), "B")
            compose(made, partial, shard_size=shard_size, on_bytes=_unless_failed(ahead, progress.advance))
            ahead.result()
            _prove(made, partial)
        text = yaml.safe_dump(made.recipe.to_dict(), sort_keys=False, allow_unicode=True)
        write_atomic(partial / "recipe.yml", text.encode())
        try:
            record = record_of(made, out, folder=partial, virtual=virtual, progress=progress, stage=stage)
            record["files"] = small_hashes(partial)
            same = made.digest_now() == made.digest
        except FileNotFoundError:
            same = False
        if given:
            record["stages"] = [*given.record["stages"], *record["stages"]]
        if not same:
            raise SourceError(
                f"a source of {made.recipe.origin} changed while it was read",
                hint="build again when nothing writes to the sources any more",
            )
        return finish(partial, out, record=record)


def _plan(what: Recipe | Artifact | str | Path, *, dtype: str | None, trust_remote_code: bool) -> Plan:
    if not isinstance(what, Artifact):
        return plan(load_recipe(what), dtype=dtype, weights=True, trust_remote_code=trust_remote_code)
    if what.form == "built":
        raise ArtifactError(
            f"{what.folder} is built already", hint=f"use it as it is; its recipe is {what.folder / 'recipe.yml'}"
        )
    if dtype is not None and safetensors_dtype(dtype) != safetensors_dtype(what.record["dtype"]):
        raise ArtifactError(
            f"{what.folder} is made for {what.record['dtype']}, found --dtype {dtype}",
            hint="an artifact is built in its own type; build from a recipe to choose another",
        )
    return plan_of(what, trust_remote_code=trust_remote_code)


@contextmanager
def torch_ahead(made: Plan, *, virtual: bool, trust_remote_code: bool = False) -> Iterator[Future[None]]:
    """Loads torch and what stands on it in a thread, since that takes as long as copying gigabytes, then checks there
    that transformers can make models of the sources, and of what will be built.

    Yields what waits for it and raises what it found: transformers cannot be imported from two threads at once.
    Python's threads take turns; a short turn keeps the copying from waiting for the imports.
    """
    before = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_INTERVAL)
    with ThreadPoolExecutor(max_workers=1) as pool:
        try:
            yield pool.submit(_check_ahead, made, virtual=virtual, trust_remote_code=trust_remote_code)
        finally:
            pool.shutdown()
            sys.setswitchinterval(before)


def _check_ahead(made: Plan, *, virtual: bool, trust_remote_code: bool) -> None:
    """transformers can load the sources, and will find in a built form what its class wants."""
    prove = import_module("frankenmoe.prove")
    from frankenmoe.moe.load import check_loadable

    check_loadable(made, trust_remote_code=trust_remote_code)
    if not virtual:
        prove.prove_class(made)


def _unless_failed(ahead: Future[None], on_bytes: Callable[[int], None]) -> Callable[[int], None]:
    """`on_bytes`, but raising what the thread has found meanwhile: no use in writing on."""

    def listen(amount: int) -> None:
        if ahead.done():
            ahead.result()
        on_bytes(amount)

    return listen


def _check_sources(made: Plan, progress: Progress) -> None:
    """What a virtual MoE will read, checked before it is promised."""
    from frankenmoe.prove import prove_sources

    progress.start("checking", made.bill.memory_virtual, "B")
    prove_sources(made, on_bytes=progress.advance)


def _prove(made: Plan, folder: Path) -> None:
    """What was written is what was planned."""
    from frankenmoe.prove import prove_body, prove_routers

    try:
        prove_routers(made, folder)
        prove_body(made, folder, sampled=True, on_bytes=lambda amount: None)
    except ArtifactError as error:  # of a build that went on: running it again would go on from the same files
        error.hint = f"the folder was changed or damaged while it was made; remove {folder} if it is there, build again"
        raise


@dataclass(frozen=True)
class MadeRouters:
    """Every gate, and, where they were fitted, the bytes of their statistics file."""

    routers: Routers
    statistics: bytes | None = None


RouterMaker = Callable[[Plan, Progress], MadeRouters]


def _write_routers(folder: Path, made: MadeRouters) -> None:
    """The routers last: where they are, the statistics are too."""
    if made.statistics is not None:
        write_atomic(folder / STATISTICS, made.statistics)
    write_routers(folder, made.routers)


def _given_routers(made: Plan, given: Artifact) -> MadeRouters:
    """The routers that an artifact has, and the statistics they were fitted from, where it has these."""
    statistics = given.folder / STATISTICS
    return MadeRouters(
        stored_routers(made, given.folder / ROUTERS), statistics.read_bytes() if statistics.is_file() else None
    )


def make_routers(made: Plan, progress: Progress, *, trust_remote_code: bool) -> MadeRouters:
    """Every gate by the recipe's gate mode; random ones without waiting for torch."""
    if made.routers_file is not None:
        return MadeRouters(stored_routers(made, made.routers_file))
    mode = made.recipe.gate_mode
    if mode in RANDOM_MODES:
        return MadeRouters(random_routers(made))
    if mode in FIT_MODES:
        from frankenmoe.gates.stage import fit_plan

        fitted = fit_plan(made, method=mode, trust_remote_code=trust_remote_code, progress=progress)
        return MadeRouters(fitted.routers, fitted.statistics)
    from frankenmoe.gates import run

    reached = 0

    def on_progress(done: int, total: int) -> None:
        nonlocal reached
        if done == 0:
            progress.start("routers", total, "prompt sets")
        progress.advance(done - reached)
        reached = done

    return MadeRouters(run.make_routers(made, on_progress=on_progress, trust_remote_code=trust_remote_code))


def stored_routers(made: Plan, file: Path) -> Routers:
    """The gates in a file, for every router of the plan; SourceError where one is missing, odd or not a number."""
    refs = read_routers(file, made.routers)
    writes = {name: TensorWrite(name, made.dtype, refs[name].shape, (refs[name],)) for name in made.routers}
    for ref in refs.values():
        check_finite(ref)
    return {name: (made.dtype, made.routers[name], materialize(write)) for name, write in writes.items()}


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
            f"all {made.experts} experts hold the same weights"
            f"{' in every block compared' if made.identical_sampled else ''}, so no router can make a difference",
            hint="set noise_relative (0.01, say) or give them adapters; --allow-identical makes it all the same, to be "
            "trained later",
        )


def _target(made: Plan) -> str:
    return made.fmt.title if made.fmt else "a checkpoint"


def record_of(
    made: Plan,
    out: Path,
    *,
    folder: Path,
    virtual: bool,
    progress: Progress,
    stage: str = "build",
    known: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """frankenmoe.json: enough to say where every number came from and to load without the recipe file.

    `folder` is where the artifact grows, `known` are SHA-256 by fingerprint, of files that were hashed before.
    """
    files, known = made.source_files, known or {}
    if virtual:
        wanted = (file for file in files if fingerprint(file) not in known)
        progress.start("hashing sources", sum(file.stat().st_size for file in wanted), "B")
    return {
        "form": "virtual" if virtual else "built",
        "name": made.recipe.name,
        "recipe": made.recipe.to_dict(),
        "recipe_folder": str(made.recipe.folder),
        "recipe_folder_from_here": os.path.relpath(made.recipe.folder, out),
        "recipe_digest": made.recipe.digest,
        "seed": made.recipe.seed,
        **facts(made),
        "sources": [
            {
                "file": str(file),
                "bytes": file.stat().st_size,
                "fingerprint": fingerprint(file),
                "sha256": (known.get(fingerprint(file)) or sha256(file, on_bytes=progress.advance))
                if virtual
                else None,
            }
            for file in files
        ],
        "configs": [{"file": str(file), "sha256": sha256(file)} for file in made.deciding_files],
        "stages": [{"stage": stage, "gate_mode": made.recipe.gate_mode, **_fit_report(folder), "versions": versions()}],
    }


def _fit_report(folder: Path) -> dict[str, Any]:
    """What the fit said when it wrote its statistics: a run that was killed since has not kept it otherwise."""
    if not (folder / STATISTICS).exists():
        return {}
    from frankenmoe.gates.statistics import load_statistics

    return {"fit": load_statistics(folder / STATISTICS).facts}


def versions() -> dict[str, str]:
    """What made this, for the record."""
    return {
        "frankenmoe": version("frankenmoe"),
        "torch": version("torch"),
        "transformers": version("transformers"),
        "python": platform.python_version(),
    }
