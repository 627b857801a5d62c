"""How far each parent is from the base, by group of tensors: |parent - base| / |base|. Does not import torch.

Of large tensors only blocks are read. Results are kept in the user's cache, by the state of the files.
Shape suffixes: N elements of the sampled blocks, O rows (out), I columns (in), R rank.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from frankenmoe.cache import cache_folder, trim
from frankenmoe.checkpoint.cast import Floats, decode, encode
from frankenmoe.checkpoint.reader import map_bytes
from frankenmoe.checkpoint.tensors import DTYPES, FLOATS, LowRank, TensorRef, TensorWrite
from frankenmoe.checkpoint.values import materialize, values
from frankenmoe.checkpoint.writer import write_atomic
from frankenmoe.errors import FrankenMoEError
from frankenmoe.planning.files import deciding_files, states
from frankenmoe.planning.groups import FFN, group_of
from frankenmoe.planning.names import named_leaves
from frankenmoe.planning.sources import Anatomy, Source, anatomy
from frankenmoe.planning.tree import ExpertNode, adapter_steps
from frankenmoe.recipe.backbone import EMBEDDINGS, GROUPS, HEAD

KIND = "distances"
VERSION = 1  # increase it when a change of the code gives other numbers for the same files
LIMIT = 2**20  # bytes of all entries in the cache
WORTH_KEEPING = 2**26  # bytes of weights; smaller sources are read again
SAME = 1e-5  # relative distances below are those of two roundings of one model
WHOLE = 2**16  # elements; smaller tensors are read whole
# blocks and their elements; few tokens of an embedding may have moved, so more of its rows are read
SAMPLES, SAMPLE = 16, 2048
ROW_SAMPLES, ROW_SAMPLE = 64, 1024
ALL_GROUPS = (*GROUPS, FFN)

Named = tuple[str, Source, Anatomy]
"""(expert, one of its sources, the source's tensors)."""


@dataclass(frozen=True)
class Distance:
    """The relative distance of a source to the base in each group; None where shapes differ or numbers are not finite.

    A group that the base does not have is left out. `sampled`: only blocks of the large tensors were compared.
    """

    expert: str
    source: str
    groups: Mapping[str, float | None] = field(default_factory=dict)
    sampled: bool = False

    @property
    def outside(self) -> float | None:
        """The largest distance outside the FFNs; None if it is unknown in some group."""
        found = [each for group, each in self.groups.items() if group != FFN]
        known = [each for each in found if each is not None]
        return max(known, default=0.0) if len(known) == len(found) else None

    @property
    def differs(self) -> bool:
        """Whether the source differs from the base outside its FFNs."""
        return self.outside is None or self.outside > SAME

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as `frankenmoe plan --json` prints it."""
        return {"expert": self.expert, "source": self.source, **self.groups, "sampled": self.sampled}


@dataclass
class _Sums:
    """Squared norms of difference and base, by group."""

    difference: dict[str, float] = field(default_factory=dict)
    base: dict[str, float] = field(default_factory=dict)
    unknown: set[str] = field(default_factory=set)
    sampled: bool = False

    def relative(self) -> dict[str, float | None]:
        return {group: self._relative(group) for group in ALL_GROUPS if group in self.base or group in self.unknown}

    def _relative(self, group: str) -> float | None:
        if group in self.unknown:
            return None
        squared = self.difference[group] / self.base[group] if self.base[group] else self.difference[group]
        return math.sqrt(squared) if math.isfinite(squared) else None


def _named_sources(base: Source, nodes: tuple[ExpertNode, ...]) -> list[Named]:
    """(expert, source, anatomy) of every routed expert; one row for each model of a merge.

    The experts of the base, if it is a mixture, are left out: they have its backbone.
    """
    return [
        (name, single, anatomy(single))
        for name, leaf in named_leaves(nodes)
        for single in (leaf.source.models if leaf.source else ())
        if not (base.part and single.part and base.folder == single.folder)
    ]


def distances(base: tuple[Source, Anatomy], nodes: tuple[ExpertNode, ...]) -> tuple[Distance, ...]:
    """The distance of the parent of every routed expert, adapters included; of a merged one, that of each model.

    Sources without weights are left out, and all if the base has none.
    """
    if not base[0].checkpoint.has_weights:
        return ()
    able = [each for each in _named_sources(base[0], nodes) if each[1].checkpoint.has_weights]
    keys = [_key(base[0], source) for _, source, _ in able]
    known = {key: found for key in dict.fromkeys(keys) if (found := _recalled(key)) is not None}
    fresh = {key: each for key, each in zip(keys, able, strict=True) if key not in known}
    for key, sums in zip(fresh, _measure(base, list(fresh.values())), strict=True):
        known[key] = (sums.relative(), sums.sampled)
        _memory()[key] = known[key]
        if sum(file.stat().st_size for file in fresh[key][1].checkpoint.files) >= WORTH_KEEPING:
            _keep(key, *known[key])
    return tuple(
        Distance(expert, str(source.name), *known[key]) for key, (expert, source, _) in zip(keys, able, strict=True)
    )


def _measure(base: tuple[Source, Anatomy], parents: Sequence[Named]) -> list[_Sums]:
    found = [_Sums() for _ in parents]
    loras = [adapter_steps(source, parts) for _, source, parts in parents]
    own = adapter_steps(*base)
    for name, shape in base[1].shapes.items():
        ref, group = base[0].tensor(name, shape), group_of(name)
        if ref.dtype not in FLOATS:
            continue
        spans = _spans(ref.numel, group)
        whole = sum(stop - start for start, stop in spans) == ref.numel
        base_N, base_lora_N = _sampled(ref, spans), _low_rank(own.get(name), spans)
        with np.errstate(over="ignore", invalid="ignore"):
            norm = _squares(base_N if base_lora_N is None else base_N + base_lora_N)
        for sums, terms, (_, source, parts) in zip(found, loras, parents, strict=True):
            if parts.shapes.get(name) != shape:
                sums.unknown.add(group)
                continue
            difference_N = _difference(ref, base_N, source.tensor(name, shape), spans)
            lora_N = _low_rank(terms.get(name), spans)
            if lora_N is not None or base_lora_N is not None:
                difference_N = difference_N + (0 if lora_N is None else lora_N)
                difference_N = difference_N - (0 if base_lora_N is None else base_lora_N)
            part = ref.numel / base_N.size  # of a sample, to the size of its tensor
            sums.base[group] = sums.base.get(group, 0.0) + norm * part
            sums.difference[group] = sums.difference.get(group, 0.0) + _squares(difference_N) * part
            sums.sampled |= not whole
    return found


def _squares(numbers_N: Floats) -> float:
    return float(np.square(numbers_N, dtype=np.float64).sum())


def _spans(size: int, group: str) -> list[tuple[int, int]]:
    """The elements of a tensor to read: all of a small one, else evenly spread blocks."""
    count, length = (ROW_SAMPLES, ROW_SAMPLE) if group in (EMBEDDINGS, HEAD) else (SAMPLES, SAMPLE)
    if size <= max(WHOLE, count * length):
        return [(0, size)]
    return [(start, start + length) for start in (index * (size - length) // (count - 1) for index in range(count))]


def _sampled(ref: TensorRef | TensorWrite, spans: Sequence[tuple[int, int]]) -> Floats:
    width, raw = DTYPES[ref.dtype].itemsize, map_bytes(ref) if isinstance(ref, TensorRef) else materialize(ref)
    parts = [raw[start * width : stop * width] for start, stop in spans]
    return decode(parts[0] if len(parts) == 1 else np.concatenate(parts), dtype=ref.dtype)


def _difference(
    base: TensorRef | TensorWrite, base_N: Floats, ref: TensorRef | TensorWrite, spans: Sequence[tuple[int, int]]
) -> Floats:
    """Parent minus base. If their types differ, both are rounded to the coarser: a conversion is no difference."""
    if ref == base:
        return np.zeros_like(base_N)
    if ref.dtype not in FLOATS:
        return np.full_like(base_N, np.nan)
    parent_N = _sampled(ref, spans)
    if ref.dtype != base.dtype:
        kinds = {ref.dtype, base.dtype}
        coarser = "BF16" if "BF16" in kinds else "F16" if "F16" in kinds else "F32"
        base_N, parent_N = (decode(encode(each, dtype=coarser), dtype=coarser) for each in (base_N, parent_N))
    with np.errstate(over="ignore", invalid="ignore"):
        return parent_N - base_N


def _low_rank(step: LowRank | None, spans: Sequence[tuple[int, int]]) -> Floats | None:
    """The sampled elements of an adapter's term scale * B A; only the rows that are touched are computed."""
    if step is None:
        return None
    a_RI, b_OR = values(step.a), values(step.b)
    columns = a_RI.shape[1]

    def parts() -> Iterator[Floats]:
        for start, stop in spans:
            first, skipped = divmod(start, columns)
            rows_OI = b_OR[first : math.ceil(stop / columns)] @ a_RI
            yield rows_OI.ravel()[skipped : skipped + stop - start]

    return np.concatenate(list(parts())) * np.float32(step.scale)


def _key(base: Source, source: Source) -> str:
    """The state of the files that a distance depends on."""
    both = (base, source)
    adapters = [each.adapter for each in both if each.adapter is not None]
    factors = [ref.file for adapter in adapters for ref in adapter.tensors.values()]
    files = [list(each.checkpoint.files) for each in both]
    # the order of the two matters, the order of files does not
    facts: list[object] = [VERSION, *(states(group, ()) for group in (*files, list(dict.fromkeys(factors))))]
    facts += [each.part.name for each in both if each.part]
    small = states((), deciding_files(base, both))
    return hashlib.sha256(json.dumps([facts, small]).encode()).hexdigest()


Found = tuple[Mapping[str, float | None], bool]


@cache
def _memory() -> dict[str, Found]:
    """What this process has measured: one run makes many plans."""
    return {}


def _recalled(key: str) -> Found | None:
    if key in _memory():
        return _memory()[key]
    try:
        data = json.loads((cache_folder(KIND) / key).read_bytes())
        groups = {str(group): None if each is None else float(each) for group, each in data["groups"].items()}
        found = (groups, bool(data["sampled"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # absent or damaged
        return None
    _memory()[key] = found
    return found


def _keep(key: str, groups: Mapping[str, float | None], sampled: bool) -> None:
    file: Path = cache_folder(KIND) / key
    with suppress(OSError, FrankenMoEError):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, json.dumps({"groups": dict(groups), "sampled": sampled}).encode())
        trim(KIND, limit=LIMIT)
