"""Plan -> routers, by the recipe's gate mode, from a file, or from the user's cache.

Imports torch only if gates are computed; random, kept and cached ones need none.
"""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from frankenmoe.artifact.folder import ROUTERS, STATISTICS, Artifact, Routers
from frankenmoe.checkpoint.tensors import TensorWrite
from frankenmoe.checkpoint.values import check_finite, materialize
from frankenmoe.errors import FrankenMoEError
from frankenmoe.gates import cached
from frankenmoe.gates.chance import random_routers
from frankenmoe.gates.kept import kept_routers
from frankenmoe.moe.processes import from_main, is_main, world
from frankenmoe.planning import Plan
from frankenmoe.planning.trained import read_routers
from frankenmoe.progress import Progress
from frankenmoe.recipe.gatemodes import FIT_MODES, KEPT, RANDOM_MODES


@dataclass(frozen=True)
class MadeRouters:
    """Every gate, and for fitted gates the bytes of the statistics file."""

    routers: Routers
    statistics: bytes | None = None


RouterMaker = Callable[[Plan, Progress], MadeRouters]


def make_routers(plan: Plan, progress: Progress, *, cache: bool = True, device: str = "auto") -> MadeRouters:
    """Every gate of a plan: from the recipe's `routers` file, else by its gate mode. Fits run on `device`.

    With `cache`, gates computed earlier for the same plan and text are read from the user's cache. All processes of a
    launcher call this and share a fit. Raises SourceError
    if the file lacks a gate or has one of another shape, NumericsError if a gate is not finite.
    """
    if plan.routers_file is not None:
        return MadeRouters(_read(plan.routers_file, plan.routers, dtype=plan.dtype))
    if plan.recipe.gate_mode in RANDOM_MODES:
        return MadeRouters(random_routers(plan))
    if plan.recipe.gate_mode == KEPT:
        return MadeRouters(kept_routers(plan))
    key = cached.key_of(plan) if cache else None
    folder = from_main(cached.find(key) if key else None)  # all processes of a launcher must decide alike
    if folder is not None:
        with suppress(FrankenMoEError, OSError):  # a damaged or just removed entry is computed again
            return _read_folder(folder, plan.routers, dtype=plan.dtype)
    made = _compute(plan, progress, device)
    # routers are not kept if plan or text changed while they were computed
    if is_main() and key and key == cached.key_of(plan) and plan.digest == plan.digest_now():
        cached.keep(key, made.routers, made.statistics, name=plan.recipe.name or Path(plan.recipe.origin).stem)
    return made


def artifact_routers(artifact: Artifact, plan: Plan | None) -> MadeRouters:
    """The routers of an artifact, with their statistics if they were fitted. Checked against `plan` if given."""
    if plan is not None:
        return _read_folder(artifact.folder, plan.routers, dtype=plan.dtype)
    shapes = {name: (ref.shape[0], ref.shape[-1]) for name, ref in artifact.routers.items()}
    return _read_folder(artifact.folder, shapes, dtype=None)


def _read_folder(folder: Path, shapes: Mapping[str, tuple[int, int]], *, dtype: str | None) -> MadeRouters:
    statistics = folder / STATISTICS
    return MadeRouters(
        _read(folder / ROUTERS, shapes, dtype=dtype), statistics.read_bytes() if statistics.is_file() else None
    )


def _read(file: Path, shapes: Mapping[str, tuple[int, int]], *, dtype: str | None) -> Routers:
    """The gates in a file by name, converted to `dtype` (None: as stored)."""
    refs = read_routers(file, shapes)
    for ref in refs.values():
        check_finite(ref)
    kinds = {name: dtype or ref.dtype for name, ref in refs.items()}
    # copied, because the file may be replaced while the gates are in use
    return {
        name: (kinds[name], shape, materialize(TensorWrite(name, kinds[name], shape, (refs[name],))).copy())
        for name, shape in shapes.items()
    }


def _compute(plan: Plan, progress: Progress, device: str) -> MadeRouters:
    mode = plan.recipe.gate_mode
    if mode in FIT_MODES:
        from frankenmoe.gates.fitted import fit_plan

        settings = plan.recipe.fit_settings
        method = settings.method or mode
        fitted = fit_plan(
            plan, method=method, settings=settings, together=world() > 1, device=device, progress=progress
        )
        return MadeRouters(fitted.routers, fitted.statistics)
    from frankenmoe.gates.prompted import prompted_routers

    return MadeRouters(prompted_routers(plan, progress, device=device))
