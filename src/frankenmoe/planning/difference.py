"""What one model has learnt beyond another, as a LoRA: which tensors differ, by how much, and their factors.

Does not import torch.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from frankenmoe.checkpoint.lowrank import Difference, energies, low_rank
from frankenmoe.checkpoint.peft import AdapterWriter
from frankenmoe.checkpoint.tensors import FLOATS, TensorRef
from frankenmoe.errors import SourceError
from frankenmoe.families import text_name
from frankenmoe.planning.groups import FFN
from frankenmoe.planning.groups import group_of as group_of_name
from frankenmoe.planning.siblings import check_backbones, check_ffns, check_siblings
from frankenmoe.planning.sources import Anatomy, Source, anatomy, check_tensors
from frankenmoe.progress import SILENT, Progress
from frankenmoe.recipe.asadapter import AdapterSettings
from frankenmoe.recipe.backbone import ATTENTION, GROUPS

BIASES, UNADAPTED = "biases", "refused by PEFT"
LINEAR = (FFN, ATTENTION)
IN_LAYER = re.compile(r"\.\d+\..*\.weight$")
# families whose layers store their weights transposed, which LoRAs for linear layers do not fit
TRANSPOSED = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")


@dataclass(frozen=True, slots=True)
class Layer:
    """A linear layer's part in an adapter. `energy` is the squared norm of its difference, `kept` the adapter's part.

    `rank` and `bytes` are 0 where the models do not differ. `reference` is the squared norm of the base's weight.
    """

    module: str
    group: str
    shape: tuple[int, int]
    rank: int
    bytes: int
    energy: float
    kept: float
    reference: float

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "shape": list(self.shape)}


def checked_pair(model: Source, base: Source) -> tuple[Anatomy, Anatomy]:
    """The anatomies of two sources whose tensors have the same names and shapes.

    Raises SourceError if they do not fit, are quantized, lack weights, or store their layers transposed.
    """
    for source in (base, model):
        if source.part is not None:
            raise SourceError(f"{source.name} is a part of a mixture, expected a dense model", hint="use it as it is")
        if source.adapter is not None:
            raise SourceError(
                f"{source.name} has an adapter, expected a whole checkpoint",
                hint="it is an adapter already: use it as `source_model: base+adapter`, or merge it with PEFT's "
                "merge_and_unload first",
            )
        if not source.checkpoint.has_weights:
            raise SourceError(f"{source.name} has no weights in {source.folder}", hint="download the weights too")
    check_linear(base)
    check_siblings(base, [model])
    ours, theirs = anatomy(model), anatomy(base)
    check_tensors(base, theirs)
    check_tensors(model, ours)
    check_ffns((base, theirs), [(model, ours)])
    check_backbones((base, theirs), [(model, ours)], groups=GROUPS)
    return ours, theirs


def check_linear(base: Source) -> None:
    """Raises SourceError for a family whose layers PEFT's LoRAs for linear layers do not fit."""
    if base.config.get("model_type") in TRANSPOSED:
        raise SourceError(
            f"{base.name} is a {base.config.get('model_type')} model, whose layers are stored transposed, expected "
            "linear layers",
            hint="adapters of such models are not supported; use the model itself as an expert",
        )


def group_of(name: str, shape: tuple[int, ...], parts: Anatomy) -> str:
    """The group of a tensor: ffn and attention are linear layers of the decoder, the others have no low rank."""
    group = group_of_name(name)
    if len(shape) == 2 and name.split(".")[-2] in parts.unadapted:
        return UNADAPTED
    return BIASES if group in LINEAR and not (len(shape) == 2 and IN_LAYER.search(name)) else group


def linear_layers(parts: Anatomy, groups: Iterable[str] = LINEAR) -> dict[str, tuple[int, int]]:
    """Name -> shape [O, I] of the weights in these groups, in the model's order."""
    wanted = set(groups)
    return {
        name: (shape[0], shape[1]) for name, shape in parts.shapes.items() if group_of(name, shape, parts) in wanted
    }


def left_out(model: Source, base: Source, parts: Anatomy) -> dict[str, float]:
    """Group -> relative difference (Frobenius norm over that of the base) of all that is no linear layer."""
    sums: dict[str, list[float]] = {}
    for name, shape in parts.shapes.items():
        group = group_of(name, shape, parts)
        ours, theirs = model.checkpoint.tensors[name], base.checkpoint.tensors[name]
        if group not in LINEAR and {ours.dtype, theirs.dtype} <= FLOATS:
            total = sums.setdefault(group, [0.0, 0.0])
            for place, amount in enumerate(energies(ours, theirs)):
                total[place] += amount
    return {group: (found / whole) ** 0.5 if whole else 0.0 for group, (found, whole) in sums.items()}


def write_adapter(
    model: Source,
    base: Source,
    names: Mapping[str, tuple[int, int]],
    folder: Path,
    *,
    settings: AdapterSettings,
    seed: int = 0,
    named: bool = True,
    progress: Progress = SILENT,
) -> tuple[Layer, ...]:
    """Writes the difference of these weights as a PEFT LoRA into `folder`, one layer at a time.

    Stored in the model's own type. `named`: the adapter names its base. Raises SourceError if no weight differs,
    NumericsError for NaN and infinity.
    """
    found = []
    # around a language model, modules are called as in the files
    words = base.family.prefixes if base.family else {}
    progress.start("decomposing", sum(rows * columns for rows, columns in names.values()), "")
    with AdapterWriter(folder) as writer:
        for name, shape in names.items():
            ours, theirs = model.checkpoint.tensors[name], base.checkpoint.tensors[name]
            module, group = text_name(theirs.name, words).removesuffix(".weight"), group_of_name(name)
            found.append(_layer(writer, ours, theirs, shape, module=module, group=group, settings=settings, seed=seed))
            progress.advance(shape[0] * shape[1])
        if not any(layer.rank for layer in found):
            raise SourceError(
                f"{model.name} has the same linear layers as {base.name}, so there is nothing to extract",
                hint="check that the two names are of a fine-tune and of the model it was tuned from",
            )
        writer.finish(base=base.name.path if named else None)
    return tuple(found)


def _layer(
    writer: AdapterWriter,
    ours: TensorRef,
    theirs: TensorRef,
    shape: tuple[int, int],
    *,
    module: str,
    group: str,
    settings: AdapterSettings,
    seed: int,
) -> Layer:
    energy, reference = energies(ours, theirs)
    factors = low_rank(
        Difference(ours, theirs), total=energy, rank=settings.every_rank, energy=settings.energy, seed=seed
    )
    if factors is None:
        return Layer(module, group, shape, 0, 0, 0.0, 0.0, reference)
    size = writer.add(module, factors.a_RI, factors.b_OR, dtype=ours.dtype if ours.dtype != "F64" else "F32")
    return Layer(module, group, shape, factors.rank, size, energy, factors.kept, reference)


def by_group(layers: Iterable[Layer]) -> dict[str, dict[str, Any]]:
    """Group -> layers, ranks (least, median, most), bytes, relative difference, and the share of the energy kept."""
    found: dict[str, list[Layer]] = {}
    for layer in layers:
        found.setdefault(layer.group, []).append(layer)
    return {group: _summary(rows) for group, rows in found.items()}


def _summary(rows: list[Layer]) -> dict[str, Any]:
    ranks = sorted(row.rank for row in rows)
    energy, reference = (sum(getattr(row, key) for row in rows) for key in ("energy", "reference"))
    return {
        "layers": len(rows),
        "rank": [ranks[0], ranks[len(ranks) // 2], ranks[-1]],
        "bytes": sum(row.bytes for row in rows),
        "relative_difference": (energy / reference) ** 0.5 if reference else 0.0,
        "energy_kept": sum(row.kept for row in rows) / energy if energy else 1.0,
    }
