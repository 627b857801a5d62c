"""Experts `as_adapter`: the base's FFNs plus a LoRA of what a parent's FFNs have learnt. Does not import torch.

The LoRA is extracted once into the user's cache, or read from an artifact. A plan without weights has its size only.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from frankenmoe.cache import NAME, cache_folder, trim
from frankenmoe.checkpoint.links import ADAPTERS
from frankenmoe.checkpoint.peft import CONFIG, PREFIX, WEIGHTS
from frankenmoe.checkpoint.reader import Adapter, open_adapter
from frankenmoe.checkpoint.tensors import DTYPES, TensorRef
from frankenmoe.checkpoint.writer import write_atomic
from frankenmoe.errors import ArtifactError, PlanError
from frankenmoe.families import prefixes_of
from frankenmoe.planning.difference import check_linear, linear_layers, write_adapter
from frankenmoe.planning.files import states
from frankenmoe.planning.groups import FFN
from frankenmoe.planning.layout import SHARED
from frankenmoe.planning.names import named_experts
from frankenmoe.planning.sources import Anatomy, Source, language_adapter
from frankenmoe.planning.tree import ExpertNode
from frankenmoe.progress import SILENT, Progress
from frankenmoe.recipe import Expert, Recipe
from frankenmoe.recipe.asadapter import AdapterSettings

KIND = "adapters"
VERSION = 2  # increase it when a change of the code gives other factors for the same models
LIMIT = 2**34  # bytes of all entries

Sources = Mapping[tuple[str, str | None], tuple[Source, Anatomy]]
NodePath = tuple[int, ...]


@dataclass(frozen=True)
class Extracted:
    """The LoRA of an expert. `folder` is its name in an artifact.

    Not `there`: only its size is planned. Not `certain`: even that is a guess, as the rank follows from the energy.
    """

    name: str
    folder: str
    adapter: Adapter
    there: bool
    certain: bool

    @property
    def bytes(self) -> int:
        return sum(ref.numel * DTYPES[ref.dtype].itemsize for ref in self.adapter.tensors.values())

    @property
    def ranks(self) -> tuple[int, int]:
        """The smallest and the largest rank of a layer."""
        found = [ref.shape[0] for name, ref in self.adapter.tensors.items() if ".lora_A." in name]
        return min(found), max(found)

    @property
    def warning(self) -> str:
        """What is to be said if its size is not certain."""
        return (
            f"the ranks of expert {self.name} follow from its energy and are known once it is extracted; sizes are for "
            "ranks at which it saves nothing"
        )

    @property
    def files(self) -> tuple[Path, ...]:
        """Its weights; none if it is not there."""
        return tuple(dict.fromkeys(ref.file for ref in self.adapter.tensors.values())) if self.there else ()


def extracted_adapters(
    recipe: Recipe,
    sources: Sources,
    *,
    may: bool,
    inside: Path | None = None,
    progress: Progress = SILENT,
) -> dict[NodePath, Extracted]:
    """Path of an expert in the plan -> its LoRA, for every expert whose difference is to be extracted.

    `inside` is an artifact with extracted LoRAs. Unless it `may`, nothing is extracted: what is not there yet has a
    size only. Raises SourceError or PlanError if a parent has no difference or cannot be decomposed.
    """
    found = {}
    base, parts = sources[(str(recipe.base_model), None)]
    for name, path, expert in _asked(recipe):
        check_linear(base)
        settings, names = expert.as_adapter, linear_layers(parts, (FFN,))
        assert settings is not None
        if not names:
            raise PlanError(
                f"the FFN of expert {name} has no linear layers, so as_adapter has nothing to make an adapter of",
                hint="leave as_adapter out for this family",
            )
        model, folder = sources[(str(expert.source_model), None)][0], folder_of(name)
        place: Path | None = inside / ADAPTERS / folder if inside else None
        if place is None or not (place / CONFIG).is_file():
            whole = model.checkpoint.has_weights and base.checkpoint.has_weights
            place = _cached(model, base, names, settings, name=name, may=may, progress=progress) if whole else None
        adapter = (
            language_adapter(open_adapter(place), prefixes_of(base.checkpoint.outer or base.config))
            if place
            else _sizes(model, names, settings)
        )
        certain = place is not None or settings.every_rank is not None
        found[path] = Extracted(name, folder, adapter, place is not None, certain)
    return found


def _asked(recipe: Recipe) -> Iterator[tuple[str, NodePath, Expert]]:
    """The experts whose difference is to be extracted; those with an `adapter` beside `as_adapter` have it already."""
    shared = named_experts(recipe.shared_experts, path=SHARED, prefix="shared/")
    for name, path, expert in (*named_experts(recipe.experts), *shared):
        if expert.as_adapter is not None and expert.adapter is None:
            yield name, path, expert


def on_base(recipe: Recipe, path: NodePath) -> bool:
    """Whether the expert at a path is an adapter on the base's FFNs, and not on those of its source."""
    shared = named_experts(recipe.shared_experts, path=SHARED)
    found = {place: expert for _, place, expert in (*named_experts(recipe.experts), *shared)}
    return found[path].as_adapter is not None


def folder_of(name: str) -> str:
    """The folder of an expert's LoRA in an artifact, for the name of an expert with its groups."""
    stem = re.sub(r"[^\w.-]+", "-", name, flags=re.ASCII)
    if stem == name.lower():
        return f"extracted-{stem}"
    # also for capitals, which some file systems take for small letters
    return f"extracted-{stem}-{hashlib.blake2b(name.encode(errors='replace'), digest_size=4).hexdigest()}"


def copy_adapters(adapters: Iterable[Extracted], folder: Path) -> None:
    """Copies all LoRAs into an unfinished artifact, so that it does not depend on the cache."""
    for each in adapters:
        target = folder / ADAPTERS / each.folder
        target.mkdir(parents=True, exist_ok=True)
        for name in (WEIGHTS, CONFIG):  # the config last: with it, the folder is whole
            write_atomic(target / name, (each.adapter.folder / name).read_bytes())


def copied_to(file: Path, adapters: Iterable[Extracted], out: Path) -> Path:
    """Where `copy_adapters` puts a file of an adapter; any other file unchanged."""
    targets = (out / ADAPTERS / each.folder for each in adapters if file.parent == each.adapter.folder)
    return next((target / file.name for target in targets), file)


def savings(adapters: Mapping[NodePath, Extracted], nodes: Iterable[ExpertNode]) -> list[dict[str, Any]]:
    """A row per expert: its ranks, its bytes in memory, and those of the FFNs that it does without."""
    leaves = {leaf.path: leaf for node in nodes for leaf in node.leaves()}

    return [
        {
            "expert": each.name,
            "rank": list(each.ranks),
            "bytes": each.bytes,
            "instead_of": sum(write.nbytes for row in leaves[path].ffn.values() for write in row.values()),
            "extracted": each.there,
            "certain": each.certain,
        }
        for path, each in adapters.items()
    ]


def _cached(
    model: Source,
    base: Source,
    names: Mapping[str, tuple[int, int]],
    settings: AdapterSettings,
    *,
    name: str,
    may: bool,
    progress: Progress,
) -> Path | None:
    """The folder of the LoRA in the cache. If it is not there, it is extracted if that is allowed, else None."""
    files = [states(list(source.checkpoint.files), ()) for source in (model, base)]
    facts = [VERSION, settings.every_rank, settings.energy, files]
    folder = cache_folder(KIND) / hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    if _whole(folder):
        with suppress(OSError):
            os.utime(folder)
        return folder
    if not may:
        return None
    partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True, exist_ok=True)
        # without the base's name, which may be a path on this machine
        write_adapter(model, base, names, partial, settings=settings, named=False, progress=progress)
        write_atomic(partial / NAME, f"{name} of {model.name}".encode(errors="replace"))
        if not _whole(folder):  # else another process was quicker, and may be reading its own
            shutil.rmtree(folder, ignore_errors=True)  # a damaged entry
            partial.replace(folder)
    except OSError as error:
        raise ArtifactError(
            f"the adapter of expert {name} cannot be kept in {folder.parent}: {error.strerror}",
            hint="set XDG_CACHE_HOME to a folder on a disk with space, or use frankenmoe extract-lora",
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    trim(KIND, limit=LIMIT)
    return folder


def _whole(folder: Path) -> bool:
    return (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file()


def _sizes(model: Source, names: Mapping[str, tuple[int, int]], settings: AdapterSettings) -> Adapter:
    """An adapter without numbers. If the energy decides, each rank is that at which it is as large as the matrix."""
    tensors: dict[str, TensorRef] = {}
    file = model.folder / f"(rank {settings.every_rank or settings.energy}, not extracted)"
    for name, (rows, columns) in names.items():
        rank = min(settings.every_rank or max(1, rows * columns // (rows + columns)), rows, columns)
        kind, module = model.tensor(name, (rows, columns)).dtype, name.removesuffix(".weight")
        for letter, shape in (("A", (rank, columns)), ("B", (rows, rank))):
            key = f"{PREFIX}{module}.lora_{letter}.weight"
            tensors[key] = TensorRef(key, kind, shape, file, 0, 0)
    return Adapter(model.folder, {}, tensors)
