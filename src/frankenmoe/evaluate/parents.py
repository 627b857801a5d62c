"""Loads the dense models that an MoE is compared with: its parents and dense merges of them."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from frankenmoe.checkpoint.tensors import FLOATS, MERGES, Merge, TensorWrite
from frankenmoe.errors import SourceError
from frankenmoe.moe.counting import counting
from frankenmoe.moe.dense import (
    as_tensor,
    load_dense,
    load_source,
    one_line,
    quiet_transformers,
    source_config,
    torch_dtype,
)
from frankenmoe.moe.linear import keep_stored
from frankenmoe.moe.router import Router
from frankenmoe.planning import Plan
from frankenmoe.planning.sources import Source, anatomy
from frankenmoe.planning.tree import dense_writes


def parents(made: Plan) -> Iterator[tuple[str, Source]]:
    """(name, source) of every distinct parent except the base. The name is that of its first expert."""
    seen = {made.base.key}
    for node in made.nodes:
        for leaf in node.leaves():
            if leaf.source is not None and leaf.source.key not in seen:
                seen.add(leaf.source.key)
                yield leaf.name, leaf.source


def dense_model(source: Source, *, dtype: torch.dtype | None) -> Any:
    """A parent as a dense model, with its adapter merged into the weights; or the merge that is the parent."""
    if source.adapter is None and source.merged is None and source.part is None:
        return stock_model(source.folder, dtype=dtype, trust_remote_code=source.trust_remote_code)
    return load_source(source, stored=_stored(source), dtype=dtype)


def merged_model(base: Source, sources: Sequence[Source], merge: Merge, *, dtype: torch.dtype | None) -> Any:
    """The dense merge of all weights of the parents, in the base's dtype: the same code as for merged backbones.

    Raises SourceError if their tensors differ from the base's in name or shape.
    """
    stored = _stored(base)
    ours = _writes(base, stored)
    theirs = [_writes(source, stored) for source in sources]
    for source, writes in zip(sources, theirs, strict=True):
        odd = sorted(set(writes) ^ set(ours)) + [
            name for name in writes if name in ours and writes[name].shape != ours[name].shape
        ]
        if odd:
            raise SourceError(
                f"the parents' weights cannot be merged: {source.name} differs from the base in {odd[0]}",
                hint="parents of one vocabulary and shape can be merged",
            )
    tensors = {
        name: as_tensor(_merged(write, [writes[name] for writes in theirs], merge)) for name, write in ours.items()
    }
    config = source_config(base)
    return load_dense(config, tensors, dtype=dtype or torch_dtype(stored))


def _writes(source: Source, stored: str) -> dict[str, TensorWrite]:
    return {write.name: write for write in dense_writes(source, anatomy(source), dtype=stored)}


def _merged(base: TensorWrite, parents: Sequence[TensorWrite], merge: Merge) -> TensorWrite:
    """One tensor of the merge. Integer buffers stay the base's."""
    if base.dtype not in FLOATS:
        return base
    inputs = (base, *parents) if MERGES[merge.method] else tuple(parents)
    return TensorWrite(base.name, base.dtype, base.shape, inputs, (merge,))


def _stored(source: Source) -> str:
    """The dtype of most of a source's floating-point bytes."""
    floats = [ref for ref in source.tensors.values() if ref.dtype in FLOATS]
    return max(floats, key=lambda ref: ref.nbytes).dtype


def stock_model(folder: Path, *, dtype: torch.dtype | None, trust_remote_code: bool = False) -> Any:
    """Any causal model in a folder, as transformers loads it."""
    try:
        with quiet_transformers():
            model = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype or "auto", trust_remote_code=trust_remote_code
            )
    except Exception as error:  # transformers raises many classes of errors for a bad folder
        raise SourceError(
            f"transformers cannot load a causal language model from {folder}: {one_line(error)}",
            hint="check that config.json and the weights belong together; own code needs --trust-remote-code",
        ) from error
    return counting(keep_stored(model.eval()))


def randomize_gates(model: Any, *, seed: int) -> Any:
    """Replaces the gates of an MoE by standard normal ones, as gate_mode `random` draws them."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, Router):
            old = module.weight
            drawn = torch.randn(old.shape, generator=generator).to(old.device, old.dtype)
            # a new parameter: the old one may be mapped from a file
            module.weight = nn.Parameter(drawn, requires_grad=False)
    return model
