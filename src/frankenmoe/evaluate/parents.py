"""Loads the dense models that an MoE is compared with: its parents and the average of their weights."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from frankenmoe.checkpoint.tensors import FLOATS
from frankenmoe.errors import SourceError
from frankenmoe.moe.dense import (
    as_tensor,
    load_dense,
    load_source,
    one_line,
    quiet_transformers,
    read_config,
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
    if source.adapter is None and source.merged is None:
        return stock_model(source.folder, dtype=dtype, trust_remote_code=source.trust_remote_code)
    return load_source(source, stored=_stored(source), dtype=dtype)


def average_model(sources: list[Source], *, dtype: torch.dtype | None) -> Any:
    """The mean of the parents' weights, computed in float32 and stored in the first parent's dtype.

    Raises SourceError if their tensors differ in name or shape.
    """
    total: dict[str, torch.Tensor] = {}
    for source in sources:
        writes = {write.name: write for write in dense_writes(source, anatomy(source), dtype="F32")}
        odd = sorted(set(writes) ^ set(total)) if total else []
        odd += [name for name in writes if name in total and tuple(total[name].shape) != tuple(writes[name].shape)]
        if odd:
            raise SourceError(
                f"the parents' weights cannot be averaged: {source.name} differs in {odd[0]}",
                hint="parents of one vocabulary and shape can be averaged",
            )
        for name, write in writes.items():
            tensor = as_tensor(write)
            if name not in total:
                total[name] = tensor.clone()  # the sum must not change the mapped file
            elif tensor.is_floating_point():
                total[name] += tensor
    mean = {name: tensor / len(sources) if tensor.is_floating_point() else tensor for name, tensor in total.items()}
    config = read_config(sources[0].folder, trust_remote_code=sources[0].trust_remote_code)
    return load_dense(config, mean, dtype=dtype or torch_dtype(_stored(sources[0])))


def _stored(source: Source) -> str:
    """The dtype of most of a source's floating-point bytes."""
    floats = [ref for ref in source.checkpoint.tensors.values() if ref.dtype in FLOATS]
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
    return keep_stored(model.eval())


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
