"""A GGUF file that another tool made, read with the gguf package. No torch."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from frankenmoe.after.matrix import Matrix, Stored, to_grid, two_axes
from frankenmoe.after.other import EXPERTS, ROUTERS, SHARED, TOP_K, Other, Place, backbone_place, differing, own_head
from frankenmoe.checkpoint.cast import Floats
from frankenmoe.checkpoint.gguffile import facts_of, open_gguf, whole
from frankenmoe.checkpoint.quantize import quantize
from frankenmoe.checkpoint.tensors import Constant, Scale, TensorWrite
from frankenmoe.errors import PlanError, SourceError
from frankenmoe.families.llamacpp import BLOCKS, FILE_TYPES
from frankenmoe.families.places import EXPERTS as EXPERT_NAMES
from frankenmoe.families.places import ROUTER, SHARED_EXPERT, SHARED_ROUTER, generic_name
from frankenmoe.planning.gguf import GgufLayout, GgufTensor, layout
from frankenmoe.planning.parts import Parts
from frankenmoe.planning.translate import halves_of_pairs

PLAIN = ("f32", "f16", "bf16")
OUTPUT = "output.weight"
SMALLEST_BLOCK = 32  # rows that are no multiple of it cannot be quantized
# metadata that change what a model computes, and the words for them
SETTINGS = {
    "expert_used_count": TOP_K,
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
}


def open_file(file: Path, parts: Parts) -> Other:
    """The file's tensors beside those of an MoE. SourceError for one of another kind of model."""
    reader = open_gguf(file)
    with whole(file):
        facts = facts_of(reader)
        stored = {tensor.name: _matrix(tensor) for tensor in reader.tensors}
    if facts.get("split.count", 1) != 1:
        raise SourceError(
            f"{file} is one of {facts['split.count']} parts", hint="llama-gguf-split --merge makes one file"
        )
    try:
        arch = str(facts["general.architecture"])
        experts, layers = int(facts.get(f"{arch}.expert_count", 0)), int(facts[f"{arch}.block_count"])
        wide = int(facts[f"{arch}.embedding_length"]) != parts.translation.dims.hidden
    except (KeyError, TypeError, ValueError) as error:
        raise SourceError(
            f"{file} lacks a size of a model, or has an impossible one: {error}",
            hint="give the file of a whole model, not an adapter or a projector",
        ) from None
    kind = _file_type(facts.get("general.file_type"))
    if not experts:
        raise SourceError(
            f"{file} is a dense model, expected a mixture made of {parts.name}", hint="give the file that it became"
        )
    try:
        made = layout(parts, arch=arch, pad256=wide)
    except PlanError as error:
        raise SourceError(
            f"{file} has llama.cpp's architecture {arch} and a hidden size of "
            f"{facts[f'{arch}.embedding_length']}, so it was not made of {parts.name}: {error.message}",
            hint="give the file that was made of this artifact",
        ) from None
    ours: dict[Place, TensorWrite] = {}
    theirs: dict[Place, Matrix] = {}
    for tensor in made.tensors:
        # the file's own constants, and divisors of rotary frequencies, are nobody's weights
        if tensor.parts and not any(isinstance(step, Constant) for part in tensor.parts for step in part.steps):
            rows = list(_rows(tensor, parts.layers))
            ours |= dict(rows)
            theirs |= dict(_parts(tensor, rows, stored, experts))
    if OUTPUT in stored:
        for place, write in own_head(ours).items():
            ours[place], theirs[place] = write, _unpadded(stored[OUTPUT], two_axes(write.shape))
    quantized = kind not in PLAIN if kind else any(matrix.stored.quantized for matrix in stored.values())
    kind = kind or "of a type without a name"
    narrow = {name for name, matrix in stored.items() if matrix.shape[1] % SMALLEST_BLOCK}
    return Other(
        where=str(file),
        what=f"GGUF file ({kind})",
        experts=experts,
        layers=layers,
        ours=ours,
        theirs=theirs,
        method=kind if quantized else None,
        kept=narrow.__contains__,
        settings=differing(_settings(made, facts)),
        notes=("hidden and FFN sizes are padded with zeros",) if wide else (),
        plain=_back(made),
    )


def _file_type(number: Any) -> str:
    """The name of a file type; empty if the file does not say it, or if the gguf package does not know it."""
    import gguf

    known = next((kind.name for kind in FILE_TYPES.values() if kind.number == number), None)
    types = {int(kind): kind.name for kind in gguf.LlamaFileType}
    return known or types.get(number, "").removeprefix("MOSTLY_").lower()


def _rows(tensor: GgufTensor, layers: int) -> Iterator[tuple[Place, TensorWrite]]:
    """The places of a tensor's parts and what the file should hold of each."""
    layer = _layer(tensor.name)
    for suffix, name in EXPERT_NAMES.items():
        if tensor.name == name.format(layer=layer):
            for index, part in enumerate(tensor.parts):
                yield Place(EXPERTS, layer, index, suffix), part
            return
    for write in tensor.parts:
        for suffix, name in SHARED_EXPERT.items():
            if tensor.name == name.format(layer=layer):
                yield Place(SHARED, layer, 0, suffix), write
                return
        for label, name in (("gate", ROUTER), ("shared gate", SHARED_ROUTER)):
            if tensor.name == name.format(layer=layer):
                yield Place(ROUTERS, layer, 0, label), write
                return
        yield backbone_place(write.name, generic_name(write.name)[0]), _as_in_file(tensor, write)


def _layer(name: str) -> int:
    return int(name.split(".")[1]) if name.startswith("blk.") else -1


def _as_in_file(tensor: GgufTensor, write: TensorWrite) -> TensorWrite:
    """Rows in llama.cpp's rotary order, and norms scaled for a padded size."""
    if tensor.heads:
        order = halves_of_pairs(write.shape[0] // tensor.heads, write.shape[0] // tensor.heads).inverse
        write = TensorWrite(write.name, write.dtype, write.shape, (write,), (order,))
    if tensor.factor != 1:
        write = replace(write, dtype="F32", steps=(*write.steps, Scale(tensor.factor)))
    return write


def _back(made: GgufLayout) -> Callable[[Place, Floats], Floats] | None:
    """From the file's numbers to a checkpoint's; None for an architecture that stores some in another form."""
    if any(place.steps or place.order for place in made.arch.places.values()):
        return None
    tensors = {write.name: (tensor, write.shape[0]) for tensor in made.tensors for write in tensor.parts}

    def plain(place: Place, rows_RC: Floats) -> Floats:
        if place.name not in tensors:
            return rows_RC
        tensor, rows = tensors[place.name]
        if tensor.heads:  # side by side in the file, half a head apart in a checkpoint
            halves = rows_RC.reshape(tensor.heads, rows // tensor.heads // 2, 2, -1)
            rows_RC = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows_RC.shape)
        return rows_RC / np.float32(tensor.factor)

    return plain


def _parts(
    tensor: GgufTensor, rows: list[tuple[Place, TensorWrite]], stored: Mapping[str, Matrix], experts: int
) -> Iterator[tuple[Place, Matrix]]:
    """The file's numbers at these places, without padding, and those of experts beyond ours."""
    matrix = stored.get(tensor.name)
    if matrix is None:
        return
    place, first = rows[0]
    shape = two_axes(first.shape)
    if place.part != EXPERTS:
        yield place, _unpadded(matrix, shape)
        return
    each = matrix.shape[0] // experts
    for index in range(experts):
        kept = (min(shape[0], each), min(shape[1], matrix.shape[1]))
        yield place._replace(expert=index), matrix.part(index * each, kept)


def _unpadded(matrix: Matrix, shape: tuple[int, int]) -> Matrix:
    """The numbers without padding; all of them if the columns are not padded."""
    return matrix.part(0, (min(shape[0], matrix.shape[0]), shape[1])) if matrix.shape[1] > shape[1] else matrix


def _matrix(tensor: Any) -> Matrix:
    """A tensor of the file, which lists its axes from the last one on."""
    import gguf

    shape = two_axes(tuple(reversed([int(size) for size in tensor.shape])))
    kind = tensor.tensor_type
    raw_RB = np.asarray(tensor.data).view(np.uint8).reshape(shape[0], -1)

    def rows(start: int, stop: int) -> Floats:
        try:
            found = gguf.quants.dequantize(raw_RB[start:stop], kind)
        except NotImplementedError:
            raise SourceError(
                f"{tensor.name} has the type {kind.name}, which the gguf package cannot read",
                hint="update it: pip install -U gguf",
            ) from None
        return np.asarray(found, np.float32).reshape(stop - start, shape[1])

    return Matrix(str(tensor.name), shape, _stored(kind), rows)


@cache
def _stored(kind: Any) -> Stored:
    """How a type rounds: as llama.cpp's quantizer does where it is known, else as a grid of as many bits."""
    import gguf

    block, size = gguf.GGML_QUANT_SIZES[kind]
    name = str(kind.name)

    def rounded(rows_RC: Floats) -> Floats:
        wide_RC = np.pad(rows_RC, ((0, 0), (0, -rows_RC.shape[1] % block)))
        try:
            raw = quantize(wide_RC, name) if name in BLOCKS else None
        except PlanError:  # llama.cpp's quantizer is not installed
            raw = None
        if raw is None:
            return to_grid(size * 8 // block, SMALLEST_BLOCK, symmetric=False)(rows_RC)
        found = gguf.quants.dequantize(raw.reshape(len(rows_RC), -1), kind)
        return np.asarray(found, np.float32)[:, : rows_RC.shape[1]]

    return Stored(name, rounded, quantized=block > 1)


def _settings(made: GgufLayout, facts: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Setting -> ours and the file's, where the file has it."""
    found = {}
    for key, words in SETTINGS.items():
        name = f"{made.arch.name}.{key}"
        if name in facts and name in made.metadata:
            found[words] = (made.metadata[name], facts[name])
    return found
