"""Parts -> the layout of a GGUF file: architecture, tensors, types and sizes.

Reads no weights. Does not import torch or gguf.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from frankenmoe.checkpoint.tensors import Constant, Permute, Scale, TensorWrite
from frankenmoe.errors import PlanError
from frankenmoe.families.archs import Arch, metadata
from frankenmoe.families.llamacpp import PLAIN, WIDE_BLOCK, FileType, MixFacts, row_bytes, tensor_type
from frankenmoe.families.places import EXPERTS, ROUTER, SHARED_ROUTER, Place, generic_name
from frankenmoe.families.spec import Dims
from frankenmoe.planning.archs import choose_arch, facts_of, notes_on, sizes
from frankenmoe.planning.parts import Parts

ALIGNMENT = 32  # bytes, of each tensor in a GGUF file
DOUBLE = Scale(2.0)


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """A tensor of the file: `parts` stacked along the first axis of `shape` (numpy order), padded with zeros.

    If `heads` > 0, rows are reordered so that rotary pairs are adjacent. `factor` multiplies the values. `values` are
    the content of a tensor without parts.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[TensorWrite, ...]
    heads: int = 0
    factor: float = 1.0
    values: tuple[float, ...] = ()


@dataclass(frozen=True)
class GgufLayout:
    """A GGUF file without its types. `tensors` are in order, `facts` decide types in mixed files.

    `hidden` and `ffn` are the sizes in the file, larger than the model's if padded. `metadata` are the architecture's.
    `notes` are sentences for users.
    """

    arch: Arch
    tensors: tuple[GgufTensor, ...]
    facts: MixFacts
    hidden: int
    ffn: int
    metadata: Mapping[str, Any]
    notes: tuple[str, ...]

    @cached_property
    def weights(self) -> int:
        """The number of parameters, without padding."""
        return sum(math.prod(write.shape) for tensor in self.tensors for write in tensor.parts)

    def types(self, kind: FileType, *, imatrix: bool = False) -> dict[str, str]:
        """Tensor name -> its type in a file of this kind."""
        facts = replace(self.facts, imatrix=imatrix)
        return {tensor.name: tensor_type(tensor.name, tensor.shape, kind, facts) for tensor in self.tensors}

    def tensor_bytes(self, kind: FileType, *, imatrix: bool = False) -> int:
        """Bytes of all tensors, with alignment."""
        types = self.types(kind, imatrix=imatrix)
        return sum(aligned(nbytes(tensor.shape, types[tensor.name])) for tensor in self.tensors)

    def weights_by_type(self, types: Mapping[str, str]) -> dict[str, int]:
        """Type -> number of weights stored in it, largest first."""
        held: dict[str, int] = {}
        for tensor in self.tensors:
            name = types[tensor.name]
            held[name] = held.get(name, 0) + sum(part.numel for part in tensor.parts)
        return dict(sorted(held.items(), key=lambda item: -item[1]))

    def survives(self, kind: FileType) -> bool:
        """Whether most weights of such a file have the type in its name."""
        held = self.weights_by_type(self.types(kind))
        return 2 * held.get(kind.base, 0) > self.weights


def layout(model: Parts, *, pad256: bool = False, arch: str | None = None) -> GgufLayout:
    """The GGUF layout of an MoE. Raises PlanError with the reasons if llama.cpp does not support it.

    `arch` names the architecture, by default the first that computes exactly this MoE. `pad256` pads hidden and FFN
    sizes to multiples of 256 with zeros. This is exact: a norm over d' numbers, of which d' - d are zero, is off by
    sqrt(d / d'), which its weights and its epsilon correct.
    """
    chosen = choose_arch(model, arch)
    family = model.stock[1]
    dims = family.dims(model.config)
    wide = _padded(sizes(model)) if pad256 else sizes(model)
    if pad256 and not (chosen.pads and chosen.free_heads):
        why = "its layers need the exact hidden size" if chosen.free_heads else "it must equal heads x head size"
        raise PlanError(
            f"--pad256 changes the hidden size, which llama.cpp's {chosen.name} does not allow: {why}",
            hint="omit --pad256",
        )
    tensors = tuple(_tensors(model, chosen, wide))
    notes = notes_on(chosen, model)
    if pad256:
        narrow, padded = f"{dims.hidden}/{dims.ffn}", f"{wide['hidden']}/{wide['ffn']}"
        notes = (*notes, f"padded with zeros from {narrow} to {padded}: LoRAs and merges for {narrow} do not fit it")
    names = {tensor.name for tensor in tensors}
    values = ((layer, f"blk.{layer}.attn_{what}.weight") for layer in range(dims.layers) for what in ("v", "qkv"))
    return GgufLayout(
        arch=chosen,
        tensors=tensors,
        facts=MixFacts(
            layers=dims.layers,
            experts=len(model.nodes),
            tied="output.weight" not in names,
            wide=family.wide_range,
            is_70b=chosen.name == "llama" and dims.layers == 80 and dims.heads != dims.kv_heads,
            valued=tuple(layer for layer, name in values if name in names),
        ),
        hidden=wide["hidden"],
        ffn=wide["ffn"],
        metadata=metadata(chosen, facts_of(model, wide)),
        notes=notes,
    )


def _tensors(model: Parts, arch: Arch, wide: Mapping[str, int]) -> Iterator[GgufTensor]:
    """Embedding, head and norm, then layer by layer, with the experts stacked."""
    fmt = model.stock[0]
    dims = model.translation.dims
    factor = math.sqrt(dims.hidden / wide["hidden"])
    heads = {"q_proj": dims.heads, "k_proj": dims.kv_heads} if arch.interleaved and not fmt.interleaved else {}
    writes = {write.name: write for write in model.translation.plain(model.backbone)}
    if arch.added:
        more = (write for write in model.translation.backbone(model.backbone) if write.name not in writes)
        writes |= {write.name: write for write in more if generic_name(write.name)[1] in arch.added}
    if arch.own_head and "lm_head.weight" not in writes:
        writes["lm_head.weight"] = replace(writes["model.embed_tokens.weight"], name="lm_head.weight")
    rows: dict[int, list[GgufTensor]] = {layer: [] for layer in range(-1, dims.layers)}
    for name, write in writes.items():
        layer, generic = generic_name(name)
        place = arch.places[generic]
        symbols = place.shape or model.translation.symbols[generic]
        own = dims.shape(place.shape) if place.shape else write.shape
        shape = tuple(wide.get(symbol, size) for symbol, size in zip(symbols, own, strict=True))
        inside = name.rpartition("self_attn.")[2].split(".")[0]
        rows[layer].append(
            GgufTensor(
                name=place.name.format(layer=layer),
                shape=shape,
                parts=(placed(write, place, dims, own),),
                heads=heads.get(inside, 0),
                factor=factor if symbols == ("hidden",) and name.endswith("norm.weight") else 1.0,
            )
        )
    yield from rows[-1]
    for name, numbers in arch.factors(facts_of(model)).items():
        yield GgufTensor(f"{name}.weight", (len(numbers),), (), values=numbers)
    for layer in range(dims.layers):
        yield from rows[layer]
        if layer in model.expert_layers:
            for name, symbols, value in arch.constants:
                yield _constant(f"blk.{layer}.{name}", dims.shape(symbols), value)
            yield from _experts(model, arch, layer, wide)


def placed(write: TensorWrite, place: Place, dims: Dims, shape: tuple[int, ...]) -> TensorWrite:
    """A plain tensor as llama.cpp wants it, without padding: [shape]. Computed numbers are in float32."""
    order = place.order(dims) if place.order else ()
    if order != tuple(range(len(order))):
        # columns are reordered as rows of one number
        seen = (write.numel, 1) if place.columns else write.shape
        moved = TensorWrite(write.name, write.dtype, seen, (write,), (Permute(order),))
        write = TensorWrite(write.name, write.dtype, write.shape, (moved,))
    dtype = "F32" if place.steps else write.dtype
    return replace(write, shape=shape, steps=(*write.steps, *place.steps), dtype=dtype)


def _constant(name: str, shape: tuple[int, ...], value: float = 0.0) -> GgufTensor:
    return GgufTensor(name, shape, (TensorWrite(name, "F32", shape, (), (Constant(value),)),))


def _experts(model: Parts, arch: Arch, layer: int, wide: Mapping[str, int]) -> Iterator[GgufTensor]:
    hidden, ffn, count = wide["hidden"], wide["ffn"], len(model.nodes)
    fmt = model.stock[0]
    gate = model.gates[fmt.gate.format(layer=layer)]
    yield GgufTensor(ROUTER.format(layer=layer), (count, hidden), (gate,))
    rows = [model.translation.ffn(node, layer) for node in model.nodes]
    for suffix, name in ((suffix, name) for suffix, name in EXPERTS.items() if suffix in rows[0]):
        shape = (hidden, ffn) if suffix.startswith("down") else (ffn, hidden)
        parts = tuple(row[suffix] for row in rows)
        yield GgufTensor(name.format(layer=layer), (count, *shape), parts)
    # without a gate of its own the shared expert gets one of zeros, whose sigmoid is one half
    doubled = model.shared_kind == "plain" and "plain" in arch.shared and "gated" in arch.shared
    for node in model.shared:
        row = model.translation.ffn(node, layer)
        for suffix, name in ((suffix, name) for suffix, name in arch.beside.items() if suffix in row):
            down = suffix.startswith("down")
            shape = (hidden, wide["shared_ffn"]) if down else (wide["shared_ffn"], hidden)
            write = row[suffix]
            if down and doubled:
                write = replace(write, steps=(*write.steps, DOUBLE))
            yield GgufTensor(name.format(layer=layer), shape, (write,))
    if not model.shared and arch.inert:
        inert = wide.get(arch.inert) or int(arch.inert)
        for suffix, name in ((suffix, name) for suffix, name in arch.beside.items() if suffix in rows[0]):
            shape = (hidden, inert) if suffix.startswith("down") else (inert, hidden)
            yield _constant(name.format(layer=layer), shape)
    if model.shared_kind == "gated":
        assert fmt.shared_gate is not None
        write = model.gates[fmt.shared_gate.format(layer=layer)]
        yield GgufTensor(SHARED_ROUTER.format(layer=layer), (hidden,), (replace(write, shape=(write.numel,)),))
    elif "gated" in arch.shared:
        yield _constant(SHARED_ROUTER.format(layer=layer), (hidden,))


def nbytes(shape: tuple[int, ...], kind: str) -> int:
    """Bytes of a tensor of a type."""
    return math.prod(shape[:-1]) * row_bytes(kind, shape[-1])


def aligned(size: int) -> int:
    """A size rounded up to the alignment."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def _up(size: int, multiple: int = WIDE_BLOCK) -> int:
    return -(-size // multiple) * multiple


def _padded(narrow: Mapping[str, int]) -> dict[str, int]:
    """Sizes that K-quants fit. The shared expert stays as wide as a number of experts: some architectures count it."""
    ffn = _up(narrow["ffn"])
    shared = _up(narrow["shared_ffn"], narrow["ffn"]) // narrow["ffn"] * ffn
    return {"hidden": _up(narrow["hidden"]), "ffn": ffn, "shared_ffn": shared}


def suggestion(found: GgufLayout, kind: FileType) -> str | None:
    """Advice for a K-quant file with few K-quants, naming a better type; else None."""
    if kind.name not in PLAIN or found.survives(kind):
        return None
    mostly = list(found.weights_by_type(found.types(kind)))[:2]
    return (
        f"{kind.name} is mostly {' and '.join(mostly)} on this shape: K-quants need rows of a multiple of "
        f"{WIDE_BLOCK}, found {found.hidden} and {found.ffn}; use {PLAIN[kind.name]}, or --pad256"
    )
