"""Rows of benchmarks/real.py that compare with mergekit: the same merges, tensor by tensor."""

import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from common import Row, log
from real_bed import Bed, dense, folder_for
from real_parts import attempted, make_row

import frankenmoe as fm
from frankenmoe.moe.dense import as_tensor, quiet_transformers

# mergekit's name and parameters -> ours
METHODS: Mapping[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "average": ({"merge_method": "linear"}, {"method": "average"}),
    "task arithmetic 0.7": (
        {"merge_method": "task_arithmetic", "parameters": {"lambda": 0.7}},
        {"method": "task_arithmetic", "lambda": 0.7},
    ),
    "ties 0.5": (
        {"merge_method": "ties", "parameters": {"density": 0.5, "normalize": True}},
        {"method": "ties", "density": 0.5},
    ),
    "slerp 0.3": ({"merge_method": "slerp", "parameters": {"t": 0.3}}, {"method": "slerp", "t": 0.3}),
}


def mergekit(bed: Bed) -> Iterator[Row]:
    """The largest difference of our merged tensors from mergekit's, in units of bf16 of the tensor's own values.

    mergekit merges in float32 and rounds once, as we do, with a stable sort: of equal differences, of which 16-bit
    parents have many, TIES then keeps the first ones, as ours does. Beside it, only reported, is what mergekit makes
    when it merges in bf16 with torch's own sort.
    """
    for name, (theirs, ours) in METHODS.items():
        what = f"{name}: units of bf16 from mergekit"
        with attempted(what) as rows:
            folders = list(bed.parents.folders.values())[: 2 if ours["method"] == "slerp" else None]
            writes = fm.plan(_merge_recipe(bed, ours, folders)).backbone
            merged = {write.name: as_tensor(write) for write in writes}
            rows.append(_compared(what, merged, theirs, folders, bed, dtype="float32", limit=1.0))
            rows.append(_compared(f"{what} in bf16", merged, theirs, folders, bed, dtype="bfloat16", limit=None))
        yield from rows


def _compared(
    what: str,
    merged: Mapping[str, torch.Tensor],
    theirs: Mapping[str, Any],
    folders: list[Path],
    bed: Bed,
    *,
    dtype: str,
    limit: float | None,
) -> Row:
    with folder_for(bed, "mergekit") as out:
        with _stable_sort() if dtype == "float32" else nullcontext():
            peer = _mergekit(theirs, folders, bed, out, dtype=dtype)
        units = {name: _units(tensor, peer[name]) for name, tensor in merged.items()}
    worst = max(units, key=lambda tensor: units[tensor][0])
    differ = 100 * statistics.fmean(share for _, share in units.values())
    note = f"worst: {worst}; {differ:.3f} % of the values differ at all"
    log(f"    {what}: {units[worst][0]:.0f}, {note}")
    return make_row(what, units[worst][0], "", limit=limit, note=note)


@contextmanager
def _stable_sort() -> Iterator[None]:
    """Makes torch.argsort stable: which of several equal numbers comes first otherwise depends on the processor."""
    plain = torch.argsort
    torch.argsort = partial(plain, stable=True)
    try:
        yield
    finally:
        torch.argsort = plain


PEERS: Mapping[str, Callable[[Bed], Iterator[Row]]] = {"mergekit": mergekit}


def _merge_recipe(bed: Bed, ours: Mapping[str, Any], folders: list[Path]) -> fm.Recipe:
    experts = [{"source_model": str(folder), "name": folder.name} for folder in folders]
    return bed.recipe(backbone=dict(ours), experts=experts, dtype="bfloat16")


def _mergekit(
    theirs: Mapping[str, Any], folders: list[Path], bed: Bed, out: Path, *, dtype: str
) -> dict[str, torch.Tensor]:
    """The backbone as mergekit-yaml writes it when it merges in `dtype`."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    weights = {"parameters": {"weight": 1.0}} if theirs["merge_method"] != "slerp" else {}
    types = {"dtype": dtype, "out_dtype": "bfloat16"}
    config = {**theirs, **types, "models": [{"model": str(folder), **weights} for folder in folders]}
    if theirs["merge_method"] == "slerp":
        config["base_model"] = str(folders[0])
    elif theirs["merge_method"] != "linear":
        config["base_model"] = str(bed.parents.base)
    file = MergeConfiguration.model_validate(yaml.safe_load(yaml.safe_dump(config)))
    with quiet_transformers():
        run_merge(file, str(out), MergeOptions(copy_tokenizer=False, write_model_card=False))
        return dict(dense(out, "bfloat16").state_dict())


def _units(ours: torch.Tensor, theirs: torch.Tensor) -> tuple[float, float]:
    """(largest difference in steps between neighbouring bf16 numbers, share of values that differ).

    Numbers below a hundredth of the tensor's mean size count in steps of that size: they are differences of rounding.
    """
    a, b = ours.to(torch.bfloat16).float(), theirs.to(torch.bfloat16).float()
    size = torch.maximum(a.abs(), b.abs()).clamp(min=float(b.abs().mean()) / 100)
    step = torch.exp2(torch.floor(torch.log2(size)) - 7)
    apart = (a - b).abs() / step
    return float(apart.max()), float((apart > 0).float().mean())
