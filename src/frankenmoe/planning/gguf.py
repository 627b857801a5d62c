"""Parts -> the layout of a GGUF file: architecture, tensors, types and sizes.

Reads no weights. Does not import torch or gguf.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from frankenmoe.checkpoint.tensors import TensorWrite
from frankenmoe.errors import PlanError
from frankenmoe.families import is_neutral, rope
from frankenmoe.families.llamacpp import (
    ARCHS,
    EXPERTS,
    MAX_EXPERTS,
    NAMES,
    PLAIN,
    ROUTER,
    SHARED_EXPERT,
    SHARED_ROUTER,
    WIDE_BLOCK,
    Arch,
    FileType,
    MixFacts,
    generic_name,
    gguf_name,
    row_bytes,
    tensor_type,
)
from frankenmoe.families.words import GRANITE_FIELDS
from frankenmoe.planning.parts import Parts

ALIGNMENT = 32  # bytes, of each tensor in a GGUF file
SCALINGS = ("default", "linear", "yarn", "llama3")
# these override the attention factor computed from `factor`
OWN_YARN = ("attention_factor", "mscale", "mscale_all_dim")


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

    `hidden`, `ffn` and `shared_ffn` are the sizes in the file, larger than the model's if padded. `notes` are sentences
    for users.
    """

    arch: Arch
    tensors: tuple[GgufTensor, ...]
    facts: MixFacts
    hidden: int
    ffn: int
    shared_ffn: int
    eps: float
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


def layout(model: Parts, *, pad256: bool = False) -> GgufLayout:
    """The GGUF layout of an MoE. Raises PlanError with the reasons if llama.cpp does not support it.

    `pad256` pads hidden and FFN sizes to multiples of 256 with zeros. This is exact: a norm over d' numbers, of which
    d' - d are zero, is off by sqrt(d / d'), which its weights and its epsilon correct.
    """
    reasons, notes = _cannot(model)
    arch, odd = choose_arch(model)
    if reasons or arch is None:
        raise PlanError(
            f"llama.cpp does not support this MoE: {'; '.join((*reasons, *odd))}",
            hint="chat, audit and eval run it; `frankenmoe build` writes it for transformers and vLLM",
        )
    family = model.stock[1]
    dims = family.dims(model.config)
    shared = model.translation.width(model.shared[0]) if model.shared else 0
    wide = {"hidden": dims.hidden, "ffn": dims.ffn, "shared": shared}
    wide = {name: _up(size) for name, size in wide.items()} if pad256 else wide
    if pad256 and not arch.free_heads:
        raise PlanError(
            f"--pad256 changes the hidden size, which in llama.cpp's {arch.name} must equal heads x head size",
            hint="omit --pad256",
        )
    tensors = tuple(_tensors(model, arch, wide))
    if pad256:
        narrow, padded = f"{dims.hidden}/{dims.ffn}", f"{wide['hidden']}/{wide['ffn']}"
        notes = (*notes, f"padded with zeros from {narrow} to {padded}: LoRAs and merges for {narrow} do not fit it")
    return GgufLayout(
        arch=arch,
        tensors=tensors,
        facts=MixFacts(
            layers=dims.layers,
            experts=len(model.nodes),
            tied=all(tensor.name != "output.weight" for tensor in tensors),
            is_70b=arch.name == "llama" and dims.layers == 80 and dims.heads != dims.kv_heads,
        ),
        hidden=wide["hidden"],
        ffn=wide["ffn"],
        shared_ffn=wide["shared"],
        eps=family.value(model.config, "rms_norm_eps") * dims.hidden / wide["hidden"],
        notes=notes,
    )


def choose_arch(model: Parts) -> tuple[Arch | None, tuple[str, ...]]:
    """The first architecture that computes exactly this MoE, or None with the reasons."""
    writes = model.translation.plain(model.backbone)
    names = {write.name.rpartition("self_attn.")[2] for write in writes if "self_attn." in write.name}
    qk_norm, bias = "q_norm.weight" in names, any(name.endswith(".bias") for name in names)
    scaled = bool(multipliers(model))
    dims = model.stock[1].dims(model.config)
    for arch in ARCHS:
        if (
            model.normalizes in (arch.normalizes, None)
            and model.shared_kind in arch.shared
            and qk_norm == arch.qk_norm
            and (arch.qkv_bias or not bias)
            and (arch.o_bias or "o_proj.bias" not in names)
            and (arch.multipliers or not scaled)
            and (arch.free_heads or dims.heads * dims.head_dim == dims.hidden)
        ):
            return arch, ()
    weights = "with weights that sum to one" if model.normalizes else "with plain softmax weights"
    norms = ", a norm on q and k" if qk_norm else ""
    return None, (
        f"none of its architectures has top-{model.top_k} experts {weights}, "
        f"{'no' if model.shared_kind == 'none' else f'a {model.shared_kind}'} shared expert{norms}"
        f"{' and attention biases' if bias else ''}{' and multipliers' if scaled else ''} together",
    )


def multipliers(model: Parts) -> dict[str, float]:
    """Granite's multipliers that are not neutral, by name."""
    family = model.stock[1]
    names = (name for name in GRANITE_FIELDS if not is_neutral(family, model.config, name))
    return {name: float(family.read(model.config, name)) for name in names}


def _cannot(model: Parts) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(reasons why no architecture fits, notes about harmless differences)."""
    fmt, family = model.stock

    def value(key: str) -> Any:
        return family.read(model.config, key)

    reasons, notes = [], []
    if fmt.no_gguf:
        reasons.append(fmt.no_gguf)
    if value("hidden_act") != "silu":
        reasons.append(f"its experts support only silu, found {value('hidden_act')}")
    if len(model.nodes) > MAX_EXPERTS:
        reasons.append(f"it allows {MAX_EXPERTS} experts, found {len(model.nodes)}")
    odd = [write.name for write in model.translation.plain(model.backbone) if gguf_name(write.name) is None]
    if odd and not fmt.no_gguf:
        reasons.append(f"it has no place for {odd[0]}")
    rotary = rope(family, model.config)
    if rotary["rope_type"] not in SCALINGS:
        reasons.append(f"it has no rope scaling {rotary['rope_type']!r}")
    if rotary["rope_type"] == "yarn":
        reasons += [f"its yarn has no {key} {rotary[key]!r}" for key in OWN_YARN if rotary.get(key) is not None]
        if rotary.get("truncate") is False:
            reasons.append("its yarn always rounds its range (truncate: false is not supported)")
    if "partial_rotary_factor" in rotary:
        reasons.append(f"it rotates whole heads, found partial_rotary_factor {rotary['partial_rotary_factor']}")
    window = value("sliding_window")
    if window is not None and window < (model.config.get("max_position_embeddings") or window):
        notes.append(
            f"llama.cpp has no sliding window here: beyond {window} tokens it attends to more tokens than the source"
        )
    return tuple(reasons), tuple(notes)


def _tensors(model: Parts, arch: Arch, wide: Mapping[str, int]) -> Iterator[GgufTensor]:
    """Embedding, head and norm, then layer by layer, with the experts stacked."""
    family = model.stock[1]
    dims = family.dims(model.config)
    factor = math.sqrt(dims.hidden / wide["hidden"])
    specs = model.translation.symbols
    heads = {"q_proj": dims.heads, "k_proj": dims.kv_heads}
    writes = {write.name: write for write in model.translation.plain(model.backbone)}
    if arch.own_head and "lm_head.weight" not in writes:
        writes["lm_head.weight"] = replace(writes["model.embed_tokens.weight"], name="lm_head.weight")
    rows: dict[int, list[GgufTensor]] = {layer: [] for layer in range(-1, dims.layers)}
    for name, write in writes.items():
        layer, generic = generic_name(name)
        shape = tuple(wide.get(symbol, dims.size(symbol)) for symbol in specs[generic])
        inside = name.rpartition("self_attn.")[2].split(".")[0]
        rows[layer].append(
            GgufTensor(
                name=NAMES[generic].format(layer=layer),
                shape=shape,
                parts=(write,),
                heads=heads.get(inside, 0) if arch.interleaved else 0,
                factor=factor if specs[generic] == ("hidden",) and name.endswith("norm.weight") else 1.0,
            )
        )
    rotary = rope(family, model.config)
    yield from rows[-1]
    if rotary["rope_type"] == "llama3":
        freqs = llama3_factors(rotary, dims.head_dim)
        yield GgufTensor("rope_freqs.weight", (len(freqs),), (), values=freqs)
    for layer in range(dims.layers):
        yield from rows[layer]
        yield from _experts(model, layer, wide)


def _experts(model: Parts, layer: int, wide: Mapping[str, int]) -> Iterator[GgufTensor]:
    hidden, ffn, count = wide["hidden"], wide["ffn"], len(model.nodes)
    fmt = model.stock[0]
    gate = model.gates[fmt.gate.format(layer=layer)]
    yield GgufTensor(ROUTER.format(layer=layer), (count, hidden), (gate,))
    rows = [model.translation.ffn(node, layer) for node in model.nodes]
    for suffix, name in EXPERTS.items():
        shape = (hidden, ffn) if suffix.startswith("down") else (ffn, hidden)
        parts = tuple(row[suffix] for row in rows)
        yield GgufTensor(name.format(layer=layer), (count, *shape), parts)
    for node in model.shared:
        row = model.translation.ffn(node, layer)
        for suffix, name in SHARED_EXPERT.items():
            down = suffix.startswith("down")
            shape = (hidden, wide["shared"]) if down else (wide["shared"], hidden)
            yield GgufTensor(name.format(layer=layer), shape, (row[suffix],))
    if model.shared_kind == "gated":
        assert fmt.shared_gate is not None
        write = model.gates[fmt.shared_gate.format(layer=layer)]
        yield GgufTensor(SHARED_ROUTER.format(layer=layer), (hidden,), (replace(write, shape=(write.numel,)),))


def llama3_factors(rotary: Mapping[str, Any], head_dim: int) -> tuple[float, ...]:
    """The divisor of each rotary frequency: 1 for short wavelengths, `factor` for long ones, interpolated in between.

    The formula is that of Llama 3.1 (transformers' rope type `llama3`).
    """
    factor, low = float(rotary["factor"]), float(rotary.get("low_freq_factor", 1.0))
    high = float(rotary.get("high_freq_factor", 4.0))
    context = float(rotary["original_max_position_embeddings"])
    found = []
    for index in range(0, head_dim, 2):
        wavelength = 2 * math.pi * float(rotary["rope_theta"]) ** (index / head_dim)
        if wavelength < context / high:
            found.append(1.0)
        elif wavelength > context / low:
            found.append(factor)
        else:
            smooth = (context / wavelength - low) / (high - low)
            found.append(1 / ((1 - smooth) / factor + smooth))
    return tuple(found)


def nbytes(shape: tuple[int, ...], kind: str) -> int:
    """Bytes of a tensor of a type."""
    return math.prod(shape[:-1]) * row_bytes(kind, shape[-1])


def aligned(size: int) -> int:
    """A size rounded up to the alignment."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def _up(size: int) -> int:
    return -(-size // WIDE_BLOCK) * WIDE_BLOCK


def suggestion(found: GgufLayout, kind: FileType) -> str | None:
    """Advice for a K-quant file with few K-quants, naming a better type; else None."""
    if kind.name not in PLAIN or found.survives(kind):
        return None
    mostly = list(found.weights_by_type(found.types(kind)))[:2]
    return (
        f"{kind.name} is mostly {' and '.join(mostly)} on this shape: K-quants need rows of a multiple of "
        f"{WIDE_BLOCK}, found {found.hidden} and {found.ffn}; use {PLAIN[kind.name]}, or --pad256"
    )
