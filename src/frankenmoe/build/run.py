"""Recipe or virtual artifact -> artifact: plan, routers, weights, verification.

Imports torch only to fit routers, and if transformers must be asked about this recipe for the first time.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from frankenmoe.artifact.folder import (
    ROUTERS,
    STATISTICS,
    Artifact,
    finish,
    growing,
    refuse_occupied,
    small_hashes,
    write_routers,
)
from frankenmoe.build.asking import asked
from frankenmoe.build.backbone import moved_record, with_own_backbone
from frankenmoe.build.body import compose
from frankenmoe.build.proof import prove_body, prove_routers, prove_sources
from frankenmoe.build.record import record_of, stages_beside
from frankenmoe.build.target import target_of
from frankenmoe.build.virtual import copy_virtual_files
from frankenmoe.checkpoint.fingerprint import sha256
from frankenmoe.checkpoint.writer import write_atomic
from frankenmoe.counted import counted
from frankenmoe.errors import ArtifactError, PlanError, SourceError
from frankenmoe.gates.made import MadeRouters
from frankenmoe.planning import Plan
from frankenmoe.planning.buildable import check_buildable
from frankenmoe.progress import SILENT, Progress
from frankenmoe.recipe import RANDOM_MODES, Recipe
from frankenmoe.recipe.sections import SHARD_SIZE, BuildSettings
from frankenmoe.recipe.settings import settings_with
from frankenmoe.subject import Subject, open_subject

NOTHING: Mapping[str, Any] = MappingProxyType({})


def build(
    what: Subject | Recipe | Artifact | str | Path,
    out: str | Path,
    *,
    settings: BuildSettings | None = None,
    dtype: str | None = None,
    shard_size: int = SHARD_SIZE,
    device: str = "auto",
    progress: Progress = SILENT,
    stage: str = "build",
    said: Mapping[str, Any] = NOTHING,
    earlier: Sequence[Mapping[str, Any]] = (),
    **changes: Any,
) -> Artifact:
    """Writes an artifact to `out`: a built one (a standard checkpoint) or a virtual one (megabytes).

    A virtual artifact is built with its own routers. `changes` are settings by name, such as virtual=True. `dtype` is
    the type to store weights in, by default the recipe's. Routers are fitted on `device`. `stage` is the name of the
    entry in the record, `said` what else it says, and `earlier` are the entries before it. If killed, the same call
    continues where it stopped. Raises subclasses of FrankenMoEError.
    """
    # resolves a link to an empty folder on another disk
    out = Path(os.path.realpath(out))
    refuse_occupied(out)
    subject = open_subject(what, dtype=dtype)
    if subject.artifact and subject.built:
        folder = subject.artifact.folder
        raise ArtifactError(f"{folder} is already built", hint=f"its recipe is {folder / 'recipe.yml'}")
    if subject.experts_per_token not in (None, subject.own_experts_per_token):
        raise PlanError(
            f"an artifact has the recipe's {counted(subject.own_experts_per_token, 'expert')} per token, found "
            f"{subject.experts_per_token} to build with",
            hint="write experts_per_token in the recipe",
        )
    settings = settings_with(settings or BuildSettings(), changes)
    virtual, given = settings.virtual, subject.artifact
    check_buildable(subject.planned, virtual=virtual, allow_identical=settings.allow_identical)
    made = subject.resolved(progress, device=device).plan
    digest = (
        f"{made.digest}/{'virtual' if virtual else shard_size}{f'/{sha256(given.folder / ROUTERS)}' if given else ''}"
    )
    here = virtual or (
        made.recipe.gate_mode not in RANDOM_MODES and given is None
    )  # at once, or torch is needed anyway
    asking = asked(target_of(made, virtual=virtual), here=here, cache=subject.cache, name=subject.name)
    with growing(out, digest=digest) as partial, asking as ahead:
        if here:
            ahead.result()
        if virtual:
            prove_sources(made, progress)
        if not (partial / ROUTERS).exists():
            _write_routers(partial, subject.routers(progress, device=device))
        if virtual:
            copy_virtual_files(made, partial)
        else:
            progress.start("writing", sum(write.nbytes for write in made.writes), "B")
            compose(made, partial, shard_size=shard_size, on_bytes=_unless_failed(ahead, progress.advance))
            for name, raw in ahead.result().items():
                write_atomic(partial / name, raw)
            _prove(made, partial)
        table = with_own_backbone(made, partial, out=out)
        text = yaml.safe_dump(table or made.recipe.to_dict(), sort_keys=False, allow_unicode=True)
        write_atomic(partial / "recipe.yml", text.encode())
        try:
            record = record_of(made, out, folder=partial, virtual=virtual, progress=progress, stage=stage)
            record |= moved_record(record, made, table, out=out) if table else {}
            record["files"] = small_hashes(partial)
            same = made.digest_now() == made.digest
        except FileNotFoundError:
            same = False
        if not same:
            raise SourceError(
                f"a source of {made.recipe.origin} changed while it was read",
                hint="build again when no other program writes to the sources",
            )
        before = given.record["stages"] if given else stages_beside(made.recipe)
        *backbone, own = record["stages"]
        record["stages"] = [*before, *earlier, *backbone, {**own, **said}]
        return finish(partial, out, record=record)


def _unless_failed(ahead: Future[Any], on_bytes: Callable[[int], None]) -> Callable[[int], None]:
    """`on_bytes`, but raises an error of the thread, so that writing stops early."""

    def listen(amount: int) -> None:
        if ahead.done():
            ahead.result()
        on_bytes(amount)

    return listen


def _prove(made: Plan, folder: Path) -> None:
    """Checks that the written files match the plan."""
    try:
        prove_routers(made, folder)
        prove_body(made, folder, sampled=True, on_bytes=lambda amount: None)
    except ArtifactError as error:  # a resumed build would use the same damaged files again
        error.hint = f"the folder was changed or damaged during the build; remove {folder} if it exists, build again"
        raise


def _write_routers(folder: Path, made: MadeRouters) -> None:
    """Writes statistics, then routers: if the routers' file exists, the statistics are complete."""
    if made.statistics is not None:
        write_atomic(folder / STATISTICS, made.statistics)
    write_routers(folder, made.routers)
