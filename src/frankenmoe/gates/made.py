"""Plan -> routers, by the recipe's gate mode: made once, then read from the user's cache.

Imports torch only where a mode needs it: random gates and cached ones do not.
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
from frankenmoe.planning import Plan
from frankenmoe.planning.trained import read_routers
from frankenmoe.progress import Progress
from frankenmoe.recipe.fields import FIT_MODES, RANDOM_MODES


@dataclass(frozen=True)
class MadeRouters:
    """Every gate, and the bytes of the statistics file where the gates were fitted."""

    routers: Routers
    statistics: bytes | None = None


RouterMaker = Callable[[Plan, Progress], MadeRouters]


def make_routers(plan: Plan, progress: Progress, *, cache: bool = True) -> MadeRouters:
    """Every gate of a plan by its gate mode, or from the file that the recipe names.

    With `cache`, gates that were fitted before for the same plan and text are read from the user's cache.
    """
    if plan.routers_file is not None:
        return MadeRouters(stored_routers(plan, plan.routers_file))
    if plan.recipe.gate_mode in RANDOM_MODES:
        return MadeRouters(random_routers(plan))
    key = cached.key_of(plan) if cache else None
    folder = cached.find(key) if key else None
    if folder is not None:
        with suppress(FrankenMoEError):  # a damaged entry is made again
            return _read_folder(folder, plan.routers, dtype=plan.dtype)
    made = _fit(plan, progress)
    if key:
        cached.keep(key, made.routers, made.statistics, name=plan.recipe.name or Path(plan.recipe.origin).stem)
    return made


def artifact_routers(artifact: Artifact, plan: Plan | None) -> MadeRouters:
    """The routers of an artifact, with the statistics that they were fitted from; checked against `plan` if given."""
    if plan is not None:
        return _read_folder(artifact.folder, plan.routers, dtype=plan.dtype)
    shapes = {name: (ref.shape[0], ref.shape[-1]) for name, ref in artifact.routers.items()}
    return _read_folder(artifact.folder, shapes, dtype=None)


def stored_routers(plan: Plan, file: Path) -> Routers:
    """The gates in a file, for every router of the plan, in the plan's type.

    Raises SourceError where one is missing or has another shape, NumericsError where one is not finite.
    """
    return _read(file, plan.routers, dtype=plan.dtype)


def _read_folder(folder: Path, shapes: Mapping[str, tuple[int, int]], *, dtype: str | None) -> MadeRouters:
    statistics = folder / STATISTICS
    return MadeRouters(
        _read(folder / ROUTERS, shapes, dtype=dtype), statistics.read_bytes() if statistics.is_file() else None
    )


def _read(file: Path, shapes: Mapping[str, tuple[int, int]], *, dtype: str | None) -> Routers:
    refs = read_routers(file, shapes)
    for ref in refs.values():
        check_finite(ref)
    kinds = {name: dtype or ref.dtype for name, ref in refs.items()}
    # copies, since the file may be replaced while they are used
    return {
        name: (kinds[name], shape, materialize(TensorWrite(name, kinds[name], shape, (refs[name],))).copy())
        for name, shape in shapes.items()
    }


def _fit(plan: Plan, progress: Progress) -> MadeRouters:
    mode = plan.recipe.gate_mode
    if mode in FIT_MODES:
        from frankenmoe.gates.fitted import fit_plan

        fitted = fit_plan(plan, method=mode, progress=progress)
        return MadeRouters(fitted.routers, fitted.statistics)
    from frankenmoe.gates.prompted import prompted_routers

    return MadeRouters(prompted_routers(plan, progress))
