"""An open plan + text -> a plan with an explicit backbone. The result is kept in the user's cache.

The key of an entry is a digest of plan and text. Imports torch only to measure.
"""

import atexit
import json
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from frankenmoe.artifact import store
from frankenmoe.artifact.folder import write_json
from frankenmoe.errors import FrankenMoEError
from frankenmoe.gates.cached import digest_of, text_states
from frankenmoe.moe.processes import once
from frankenmoe.planning import Plan, plan
from frankenmoe.planning.files import states
from frankenmoe.planning.trained import TRAINED
from frankenmoe.progress import SILENT, Progress
from frankenmoe.recipe.backbone import ATTENTION, AUTO, backbone_of

KIND = "backbones"
VERSION = 3  # increase it when a change of the code gives another backbone for the same plan and text
RESULT = "backbone.json"
DECIDING = ("base_model", "experts", "shared_experts", "backbone", "seed", "trained")  # keys of a recipe


def resolve(
    made: Plan, *, cache: bool = True, together: bool = False, device: str = "auto", progress: Progress = SILENT
) -> Plan:
    """The plan of the same recipe with an explicit backbone: `auto` measured, `regmean` computed from text.

    Where nothing must be measured, the recipe only says what `auto` means. With `cache`, what was found earlier for the
    same plan and text is read from the user's cache. With `together`, all processes of a launcher call this, and the
    first one finds it for all of them. Models run on `device`. Raises RecipeError or SourceError for text that cannot
    be read.
    """
    if not made.backbone_open:
        written = made.recipe.backbone_for(ATTENTION).method
        explicit = made.recipe.with_backbone(backbone_of(made.choice.by_group)) if written == AUTO else made.recipe
        return replace(made, recipe=explicit)
    found: list[Plan] = []

    def find() -> Path:
        folder, plan = _find(made, cache=cache, device=device, progress=progress)
        found.append(plan)
        return folder

    folder = once(find) if together else find()
    return found[0] if found else _read(made, folder)


def _find(made: Plan, *, cache: bool, device: str, progress: Progress) -> tuple[Path, Plan]:
    """The folder with the result, and the resolved plan. A folder outside of the cache lives as long as the process."""
    key = key_of(made) if cache else None
    folder = store.find(KIND, key, needs=RESULT) if key else None
    if folder is not None:
        with suppress(FrankenMoEError, OSError, ValueError, KeyError, TypeError):  # damaged or just removed
            return folder, _read(made, folder)
    scratch = Path(tempfile.mkdtemp(prefix="frankenmoe-backbone-"))
    try:
        from frankenmoe.backbone.choose import choose

        found, report = choose(made, scratch, device=device, progress=progress)
        write_json(scratch / RESULT, {"backbone": found.recipe.to_dict()["backbone"], "report": report})
        # nothing is kept if plan or text changed while they were read
        if key and key == key_of(made) and made.digest == made.digest_now():
            name = made.recipe.name or Path(made.recipe.origin).stem
            folder = store.keep(KIND, key, lambda into: _copy(scratch, into), name=name)
        resolved = _read(made, folder or scratch)
    except BaseException:  # Ctrl-C too
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    if folder is None:
        atexit.register(shutil.rmtree, scratch, ignore_errors=True)
    else:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder or scratch, resolved


def key_of(made: Plan) -> str | None:
    """The digest of everything that the choice depends on: not of how routers are made. None as in `gates.cached`."""
    texts = text_states(made)
    if texts is None:
        return None
    recipe = {key: made.recipe.to_dict().get(key) for key in DECIDING}
    files = states(made.source_files, made.deciding_files)
    length = made.recipe.fit.block if made.recipe.fit else None
    return digest_of(VERSION, recipe, made.dtype, length, files, texts)


def _copy(scratch: Path, folder: Path) -> None:
    for file in scratch.iterdir():
        shutil.copyfile(file, folder / file.name)


def _read(made: Plan, folder: Path) -> Plan:
    data: Mapping[str, Any] = json.loads((folder / RESULT).read_bytes())
    trained = folder / TRAINED
    recipe = made.recipe.with_backbone(data["backbone"], trained=trained if trained.exists() else None)
    found = plan(recipe, dtype=made.dtype_name, weights=True, trust_remote_code=made.trust_remote_code)
    return replace(found, measured=data["report"])
