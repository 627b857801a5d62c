"""The folder of a finished mixture -> the recipe that means it. Does not import torch."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from frankenmoe.checkpoint.hub import is_folder, is_hub_id, local_path
from frankenmoe.checkpoint.jsonfile import read_object
from frankenmoe.checkpoint.tensors import DTYPES
from frankenmoe.errors import ArtifactError, SourceError
from frankenmoe.families import FAMILIES, FORMATS
from frankenmoe.families.mixtures import VIEWS, format_of
from frankenmoe.planning.mixture import Mixture, open_mixture
from frankenmoe.planning.sources import open_source
from frankenmoe.recipe import Recipe, SourceName
from frankenmoe.recipe.gatemodes import KEPT
from frankenmoe.recipe.sourcename import SHARED_PART

Row = Mapping[str, Any]
MERGEKIT = "mergekit_moe_config.yml"  # which mergekit-moe writes beside its weights
TAKEN = ("name", "positive_prompts", "negative_prompts", "data")  # what an expert takes over from a recipe


@dataclass(frozen=True)
class Named:
    """What a recipe knows of a mixture: the rows of its experts, in the order of the mixture, and a name for it."""

    experts: Sequence[Row] = ()
    shared: Row = field(default_factory=dict)
    name: str | None = None


NOTHING = Named()


def is_mixture(folder: Path) -> bool:
    """Whether a folder holds a mixture of a known format, by its config.json."""
    with suppress(SourceError):
        return format_of(read_object(folder / "config.json", hint="")) is not None
    return False


def mixture_in(what: str) -> Mixture:
    """The mixture in a folder or on the hub, opened and checked.

    Raises ArtifactError for a model that is none, SourceError for one that cannot be read or taken apart exactly.
    """
    source = open_source(_name_of(what), folder=_start_of(what), weights=True)
    fmt = format_of(source.checkpoint.config)
    kind = source.checkpoint.config.get("model_type")
    if fmt is None:
        known = ", ".join(FORMATS[name].title for name in VIEWS)
        dense = kind in FAMILIES
        raise ArtifactError(
            f"{what} is a {kind!r} model, expected a mixture of experts in a format that frankenmoe knows",
            hint="a dense model becomes an expert: name it in a recipe" if dense else f"known formats: {known}",
        )
    if not source.checkpoint.has_weights:
        raise SourceError(f"{what} has no weights in {source.folder}", hint="download the weights too")
    return open_mixture(source, fmt)


def recipe_of_mixture(what: str, mixture: Mixture, *, named: Named = NOTHING, inside: bool = False) -> Recipe:
    """The recipe whose experts are those of a mixture, with the gates that it has.

    Paths start beside the folder, or with `inside` in it.
    """
    folder = mixture.checkpoint.folder
    name = SourceName(".") if inside else _name_of(what)
    start = folder if inside else _start_of(what)
    rows = named.experts or [{"name": f"expert-{index}"} for index in range(mixture.config.experts)]
    table = {
        "name": named.name or folder.name,
        "base_model": name.to_data(),
        "gate_mode": KEPT,
        "experts_per_token": mixture.config.top_k,
        "dtype": _stored(mixture),
        "experts": [
            {"source_model": _part(name, str(index)), **{key: row[key] for key in TAKEN if key in row}}
            for index, row in enumerate(rows)
        ],
    }
    if mixture.shared_ffn:
        called = named.shared.get("name", SHARED_PART)
        table["shared_experts"] = [{"source_model": _part(name, SHARED_PART), "name": called}]
    text = yaml.safe_dump({key: value for key, value in table.items() if value is not None}, sort_keys=False)
    return Recipe.parse(text, folder=start, origin=what)


def _part(name: SourceName, part: str) -> Any:
    return replace(name, part=part).to_data()


def on_hub(what: str) -> bool:
    """Whether a name means a model on the hub, with or without @revision."""
    return not is_folder(what, folder=Path.cwd()) and is_hub_id(what.partition("@")[0])


def _name_of(what: str) -> SourceName:
    """The name of a folder as seen from the one it is in; of a model on the hub, as it is."""
    if not on_hub(what):
        return SourceName(f"./{local_path(what, folder=Path.cwd()).name}")
    path, _, revision = what.partition("@")
    return SourceName(path, revision or None)


def _start_of(what: str) -> Path:
    """The folder that `_name_of` starts at."""
    here = Path.cwd()
    return here if on_hub(what) else local_path(what, folder=here).parent


def _stored(mixture: Mixture) -> str | None:
    """torch's name of the type that most of its numbers are stored in."""
    sizes: dict[str, int] = {}
    for ref in mixture.tensors.values():
        sizes[ref.dtype] = sizes.get(ref.dtype, 0) + ref.nbytes
    most = max(sizes, key=lambda kind: sizes[kind])
    return DTYPES[most].name if most in ("F32", "F16", "BF16") else None
