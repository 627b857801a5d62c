"""A finished mixture as a source: the dense model of its backbone and one of its experts. Does not import torch.

Knows the names that `save_pretrained` writes and those that transformers 5 has in memory, where the experts of a layer
are one tensor.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from frankenmoe.checkpoint.reader import Checkpoint
from frankenmoe.checkpoint.tensors import TensorRef, TensorWrite
from frankenmoe.checkpoint.values import values
from frankenmoe.counted import counted
from frankenmoe.errors import SourceError
from frankenmoe.families.mixtures import MixtureConfig, format_of, of_width, read_mixture
from frankenmoe.families.places import generic_name
from frankenmoe.families.spec import MoEFormat
from frankenmoe.families.values import odd_value
from frankenmoe.families.words import DOWN, GATE_UP
from frankenmoe.planning.configs import check_config
from frankenmoe.planning.sources import Part, Source, check_held, open_source, sources_of
from frankenmoe.planning.stored import stored_backbone, stored_ffn
from frankenmoe.planning.translate import Translation
from frankenmoe.recipe import Recipe, SourceName
from frankenmoe.recipe.sourcename import SHARED_PART

Tensors = Mapping[str, TensorRef]
Templates = Mapping[str, tuple[str, ...]]

# parts of names in memory -> those that save_pretrained writes
ROUTER = (".block_sparse_moe.router.weight", ".block_sparse_moe.router.layer.weight")
IN_MEMORY: Mapping[str, tuple[str, str]] = {
    "mixtral": (".mlp.", ".block_sparse_moe."),
    "granitemoe": ROUTER,
    "granitemoeshared": ROUTER,
    "granitemoehybrid": ROUTER,
    "ernie4_5_moe": (".gate.moe_statics.", ".moe_statics."),
    "nemotron_h": ("model.", "backbone."),
}


@dataclass(frozen=True)
class Mixture:
    """An opened mixture. `tensors` have the names that `save_pretrained` writes, but for experts that are packed."""

    name: SourceName
    config: MixtureConfig
    checkpoint: Checkpoint
    tensors: Tensors

    @property
    def fmt(self) -> MoEFormat:
        return self.config.fmt

    @cached_property
    def expert(self) -> Templates:
        """Name of a tensor of routed experts -> the matrices it holds."""
        return expert_names(self.fmt, self.tensors)

    @cached_property
    def shared_ffn(self) -> int:
        """The width of its shared expert; 0 if it has none, or zeros, as our builds do where it must have one."""
        width = self.config.shared_ffn
        if not width or width != self.fmt.inert_shared_ffn or not self.tensors:
            return width
        down = next(name for name, suffixes in self.fmt.shared.items() if suffixes == DOWN)
        found = (self.tensors.get(down.format(layer=layer)) for layer in self.translation().layers)
        return width if any(ref is None or values(ref).any() for ref in found) else 0

    def translation(self, *, shared: bool = False) -> Translation:
        """Between its names and those of the dense model with one routed expert, or with the shared one."""
        return Translation(self.fmt, self.config.family, self.dense(shared=shared), self.config.experts)

    def dense(self, *, shared: bool) -> Mapping[str, Any]:
        """The config of that dense model."""
        found = self.config
        return of_width(found.fmt, found.dense, self.shared_ffn) if shared else found.dense

    def ffn(self, part: str) -> Iterator[TensorWrite]:
        """An expert's FFNs under dense names."""
        shared = part == SHARED_PART
        templates, index = (self.fmt.shared, 0) if shared else (self.expert, int(part))
        rows = stored_ffn(self.tensors, self.translation(shared=shared), templates, index=index, halved=False)
        return (write for row in rows.values() for write in row.values())

    @cached_property
    def backbone(self) -> dict[str, TensorRef | TensorWrite]:
        """Every backbone tensor under its dense name."""
        return {write.name: _plain(write) for write in stored_backbone(self.tensors, self.translation())}

    def gates(self, template: str | None) -> tuple[TensorRef, ...]:
        """Per layer, its gate of that name; none without weights, or where it has no such gate."""
        if template is None or not self.tensors:
            return ()
        return tuple(self.tensors[template.format(layer=layer)] for layer in self.translation().layers)


def opened_sources(recipe: Recipe, *, weights: bool, trust_remote_code: bool) -> dict[tuple[str, str | None], Source]:
    """Every source of a recipe, by its name and adapter. Raises SourceError for one that cannot be used."""
    mixtures: dict[tuple[str, str | None], Mixture] = {}
    found = {}
    for name, adapter in dict.fromkeys(sources_of(recipe)):
        key, source = (name.path, name.revision), None
        if key not in mixtures or adapter or name.adapter:
            source = open_source(
                name, folder=recipe.folder, weights=weights, adapter=adapter, trust_remote_code=trust_remote_code
            )
            fmt = format_of(source.checkpoint.config)
            if fmt is None:
                found[str(name), adapter] = _checked_dense(source)
                continue
            mixtures.setdefault(key, open_mixture(source, fmt))
        dense = as_dense(mixtures[key], name)
        found[str(name), adapter] = replace(dense, adapter=source.adapter if source else None)
    return found


def _checked_dense(source: Source) -> Source:
    if source.name.part is not None:
        raise SourceError(
            f"{source.name.path} is a dense model, so it has no expert {source.name.part}",
            hint=f"write {source.name.path} alone",
        )
    return source


def open_mixture(source: Source, fmt: MoEFormat) -> Mixture:
    """A mixture of a known format, opened and checked.

    Raises SourceError for a format or a setting that the tables cannot express, and for missing and misshapen tensors.
    """
    try:
        config = read_mixture(fmt, source.checkpoint.config)
        if odd := odd_value(config.family, config.dense):
            raise ValueError(odd)
    except (KeyError, TypeError, ValueError) as error:
        raise SourceError(
            f"{source.folder / 'config.json'} lacks a size of a {fmt.title} model, or has an impossible one: {error}",
            hint="fetch config.json again: the one that save_pretrained wrote beside the weights",
        ) from None
    if config.problems:
        raise SourceError(
            f"{source.name} is a {fmt.title} model that cannot be run exactly: it {'; it '.join(config.problems)}",
            hint="eval runs it as transformers does",
        )
    found = Mixture(source.name, config, source.checkpoint, as_saved(fmt, source.checkpoint.tensors))
    if found.tensors:
        wanted = dict(_wanted(found))
        check_held(found.name, found.tensors, wanted, floats=wanted)
        _check_added(found)
    return found


def as_dense(mixture: Mixture, name: SourceName) -> Source:
    """The dense model of a mixture's backbone and the expert that `name` says, by default the first."""
    part = name.part or "0"
    shared = part == SHARED_PART
    count = mixture.config.experts
    if shared and not mixture.shared_ffn:
        raise SourceError(
            f"{mixture.name} has no shared expert, found #{part}", hint=f"it has the experts 0 to {count - 1}"
        )
    if not shared and int(part) >= count:
        raise SourceError(
            f"{mixture.name} has {counted(count, 'expert')}, found #{part}", hint=f"name one of 0 to {count - 1}"
        )
    view = mixture.backbone | {write.name: _plain(write) for write in mixture.ffn(part)} if mixture.tensors else {}
    gates = mixture.gates(mixture.fmt.shared_gate if shared else mixture.fmt.gate)
    opened = replace(mixture.checkpoint, config=dict(mixture.dense(shared=shared)))
    source = Source(name, opened, part=Part(mixture.config, part, view, gates))
    check_config(source.name, source.folder, source.config)
    return source


def _plain(write: TensorWrite) -> TensorRef | TensorWrite:
    """What a write reads, if it computes nothing."""
    only = write.inputs[0] if len(write.inputs) == 1 and not write.steps else None
    return only if isinstance(only, TensorRef) else write


def expert_names(fmt: MoEFormat, tensors: Tensors) -> Templates:
    """Name of a tensor of routed experts -> the matrices it holds, for a model with these tensors."""
    first = next(iter(fmt.expert))
    block = first.partition("experts.")[0] if "experts." in first else f"{first.rsplit('.', 2)[0]}."
    gated = any(GATE_UP[0] in suffixes for suffixes in fmt.expert.values())
    into = {"gate_up_proj": GATE_UP} if gated else {"up_proj": GATE_UP[1:]}
    packed = {f"{block}experts.{name}": suffixes for name, suffixes in (into | {"down_proj": DOWN}).items()}
    return packed if packed.keys() <= {generic_name(name)[1] for name in tensors} else fmt.expert


def as_saved(fmt: MoEFormat, tensors: Tensors) -> Tensors:
    """The tensors under the names that save_pretrained writes, as far as each is one tensor there."""
    if fmt.name not in IN_MEMORY:
        return tensors
    ours, theirs = IN_MEMORY[fmt.name]
    return {name.replace(ours, theirs): ref for name, ref in tensors.items()}


def _wanted(mixture: Mixture) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name, shape) of every tensor that its config requires."""
    there, fmt, family = mixture.translation(), mixture.fmt, mixture.config.family
    for name, _ in family.expand(family.backbone, there.config):
        layer, generic = generic_name(name)
        for piece in there.pieces(generic):
            yield piece.name.format(layer=layer), there.dims.shape(there.symbols[piece.name])
    hidden, count = there.dims.hidden, mixture.config.experts
    for layer in there.layers:
        yield fmt.gate.format(layer=layer), (count, hidden)
        yield from _matrices(mixture.expert, there.dims.ffn, hidden, layer, count)
        if mixture.shared_ffn:
            yield from _matrices(fmt.shared, mixture.shared_ffn, hidden, layer)
            if fmt.shared_gate:
                yield fmt.shared_gate.format(layer=layer), (1, hidden)


def _matrices(
    templates: Templates, ffn: int, hidden: int, layer: int, experts: int | None = None
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name, shape) of the FFN matrices of a layer: those of all `experts`, else those of the shared one."""
    for template, suffixes in templates.items():
        shape = (hidden, ffn) if suffixes == DOWN else (len(suffixes) * ffn, hidden)
        stacked = experts is not None and "{expert}" not in template
        for expert in range(1 if stacked else experts or 1):
            yield template.format(layer=layer, expert=expert), (experts, *shape) if stacked and experts else shape


def _check_added(mixture: Mixture) -> None:
    """Raises SourceError where a tensor that only the format has is not what our builds write: it would be lost."""
    there, family = mixture.translation(), mixture.config.family
    own = family.shapes(family.backbone, there.config)
    for name, spec in family.expand(mixture.fmt.added, there.config):
        ref = mixture.tensors.get(name)
        if name in own or ref is None:
            continue
        found = values(ref)
        wanted = spec.fill(family.filled(there.config)) if callable(spec.fill) else spec.fill
        if not np.allclose(found, wanted, rtol=0.01, atol=0):
            raise SourceError(
                f"{mixture.name} holds {name} from {found.min():g} to {found.max():g}, and frankenmoe knows "
                f"{mixture.fmt.title} only with {wanted:g} there",
                hint="eval runs it as transformers does",
            )
