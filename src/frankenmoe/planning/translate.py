"""Tensors of a dense model -> those of an MoE format, and back. Does not import torch.

Follows the tables: a family's pieces and changes give plain tensors, a format's names and stacks give its own.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from frankenmoe.checkpoint.tensors import (
    DTYPES,
    Constant,
    Join,
    Part,
    Permute,
    Scale,
    Shift,
    Step,
    TensorRef,
    TensorWrite,
    Turn,
)
from frankenmoe.families import Family, MoEFormat, rotary_size
from frankenmoe.families.places import generic_name
from frankenmoe.families.rows import LAYER
from frankenmoe.families.spec import Change, Config, Dims, Piece
from frankenmoe.planning.tree import ExpertNode

Plain = Callable[[str], TensorWrite]
QK = ("self_attn.q_proj.", "self_attn.k_proj.")


@dataclass(frozen=True)
class Translation:
    """A family's tensors in the language of a format; `config` is that of the dense base, `experts` their number."""

    fmt: MoEFormat
    family: Family
    config: Config
    experts: int

    @cached_property
    def dims(self) -> Dims:
        """The base's sizes, and the number of experts."""
        found = self.family.dims(self.config)
        return replace(found, more={**found.more, "experts": self.experts})

    @cached_property
    def symbols(self) -> dict[str, tuple[str, ...]]:
        """Plain name of a backbone tensor, with `{layer}` -> the symbols of its shape."""
        found = {}
        for spec in self.family.backbone:
            for piece in self.pieces(spec.name):
                found[piece.name] = (piece.rows, *spec.shape[1:]) if piece.rows else spec.shape
        return found

    @cached_property
    def layers(self) -> tuple[int, ...]:
        """The numbers of the layers with an FFN."""
        return tuple(self.family.layered(self.config))

    def plain(self, writes: Sequence[TensorWrite], dims: Dims | None = None) -> Iterator[TensorWrite]:
        """The plain tensors that dense writes hold, in their order; `dims` are those of the base if not given."""
        for write in writes:
            layer, generic = generic_name(write.name)
            start = 0
            for piece in self.pieces(generic):
                rows = (dims or self.dims).size(piece.rows) if piece.rows else write.shape[0]
                found = rows_of(write, piece.name.format(layer=layer), start, rows)
                yield changed(found, self._changes(piece.name))
                start += rows

    def backbone(self, writes: Sequence[TensorWrite]) -> list[TensorWrite]:
        """The backbone in the format: its plain tensors, then those that the format adds."""
        found = list(self.plain(writes))
        added = self._added({write.name: write for write in found}, writes[0].dtype)
        return [replace(write, name=self.fmt.named(write.name)) for write in (*found, *added)]

    def ffn(self, node: ExpertNode, layer: int) -> dict[str, TensorWrite]:
        """Plain suffix (`gate_proj.weight`) -> write, of one expert in one layer, with its adapter folded in."""
        here = LAYER.format(layer=layer)
        dense = [replace(node.folded(layer, key), name=f"{here}{self.family.mlp}.{key}") for key in node.ffn[layer]]
        dims = replace(self.dims, ffn=self.width(node))
        return {write.name.removeprefix(f"{here}mlp."): write for write in self.plain(dense, dims)}

    def width(self, node: ExpertNode) -> int:
        """The width of an expert's FFN, which may be another one in a shared expert."""
        down = next(spec.name for spec in self.family.ffn if spec.shape == ("hidden", "ffn"))
        return next(iter(node.ffn.values()))[down.partition(f".{self.family.mlp}.")[2]].shape[1]

    def dense(self, name: str, shape: tuple[int, ...], plain: Plain) -> TensorWrite:
        """A dense tensor, put together again from the plain ones that `plain` finds by name."""
        layer, generic = generic_name(name)
        parts = [
            changed(plain(piece.name.format(layer=layer)), undone(self._changes(piece.name)))
            for piece in self.pieces(generic)
        ]
        return replace(parts[0], name=name, shape=shape) if len(parts) == 1 else joined(name, parts)

    def pieces(self, generic: str) -> tuple[Piece, ...]:
        """The plain tensors that a dense one holds."""
        return self.family.pieces.get(generic) or (Piece(generic, ""),)

    def _changes(self, plain: str) -> tuple[Change, ...]:
        """The steps from dense numbers to plain ones."""
        filled = self.family.filled(self.config)
        found = tuple(each(filled) if callable(each) else each for each in self.family.changes.get(plain, ()))
        if self.family.interleaved and not self.fmt.interleaved and any(part in plain for part in QK):
            found = (*found, halves_of_pairs(self.dims.head_dim, rotary_size(self.family, self.config)))
        return found

    def _added(self, present: Mapping[str, TensorWrite], dtype: str) -> Iterator[TensorWrite]:
        filled = self.family.filled(self.config)
        for name, spec in self.family.expand(self.fmt.added, self.config):
            value = spec.fill(filled) if callable(spec.fill) else spec.fill
            if name in present:
                continue
            if spec.like is not None:
                plain = present[spec.like.format(layer=generic_name(name)[0])]
                yield replace(changed(plain, () if value == 1 else (Scale(value),)), name=name)
            else:
                yield TensorWrite(name, spec.dtype or dtype, self.dims.shape(spec.shape), (), (Constant(value),))


def halves_of_pairs(head: int, rotary: int) -> Permute:
    """The order of a head's rows that puts rotary pairs half of `rotary` apart, where they were adjacent."""
    return Permute((*range(0, rotary, 2), *range(1, rotary, 2), *range(rotary, head)))


def changed(write: TensorWrite, changes: Sequence[Change]) -> TensorWrite:
    """A write after some changes."""
    for change in changes:
        nested = isinstance(change, Permute)
        steps: tuple[Step, ...] = (change,) if nested else (*write.steps, change)
        write = replace(write, inputs=(_input(write),) if nested else write.inputs, steps=steps)
    return write


def undone(changes: Sequence[Change]) -> tuple[Change, ...]:
    """The changes that lead back."""
    return tuple(map(_inverse, reversed(changes)))


def _inverse(change: Change) -> Change:
    match change:
        case Scale(factor):
            return Scale(1 / factor)
        case Shift(amount):
            return Shift(-amount)
        case Permute():
            return change.inverse


def joined(name: str, parts: Sequence[TensorWrite], *, experts: int | None = None) -> TensorWrite:
    """Tensors stacked along their first axis; with `experts`, another axis of that size is put before it."""
    rows, columns = sum(part.shape[0] for part in parts), parts[0].shape[1:]
    shape = (rows, *columns) if experts is None else (experts, rows // experts, *columns)
    return TensorWrite(name, parts[0].dtype, shape, tuple(map(_input, parts)), (Join(),))


def turned(matrices: Sequence[TensorWrite]) -> TensorWrite:
    """Matrices stacked along their rows, with rows and columns exchanged."""
    rows, columns = sum(matrix.shape[0] for matrix in matrices), matrices[0].shape[1]
    return replace(matrices[0], shape=(columns, rows), inputs=tuple(map(_input, matrices)), steps=(Turn(),))


def rows_of(write: TensorWrite, name: str, start: int, rows: int) -> TensorWrite:
    """Some rows of a tensor; the rows of a plain copy are again a plain copy."""
    if rows == write.shape[0]:
        return replace(write, name=name)
    shape, width = (rows, *write.shape[1:]), math.prod(write.shape[1:])
    ref = _input(write)
    if isinstance(ref, TensorRef):
        return TensorWrite(name, write.dtype, shape, (narrowed(ref, shape, start * width),))
    return TensorWrite(name, write.dtype, shape, (write,), (Part(start * width),))


def narrowed(ref: TensorRef, shape: tuple[int, ...], start: int) -> TensorRef:
    """The elements of a stored tensor from `start` on, as a tensor of its own; empty where a plan has no weights."""
    if ref.start == ref.end:
        return replace(ref, shape=shape)
    size = DTYPES[ref.dtype].itemsize
    first = ref.start + start * size
    return replace(ref, shape=shape, start=first, end=first + math.prod(shape) * size)


def _input(write: TensorWrite) -> TensorWrite | TensorRef:
    """A write as another one's input: what it reads, if it computes nothing."""
    if len(write.inputs) == 1 and not write.steps and write.inputs[0].shape == write.shape:
        return write.inputs[0]
    return write
