"""A transformers folder that another tool made: merged, fine-tuned, quantized, or saved again. No torch."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from frankenmoe.after.matrix import Matrix
from frankenmoe.after.other import EXPERTS, ROUTERS, SHARED, TOP_K, Other, Place, backbone_place, differing, own_head
from frankenmoe.after.packing import Find, packing
from frankenmoe.artifact.folder import RECORD
from frankenmoe.checkpoint.jsonfile import read_object
from frankenmoe.checkpoint.reader import open_checkpoint
from frankenmoe.checkpoint.tensors import Scale, TensorWrite
from frankenmoe.errors import ArtifactError, SourceError
from frankenmoe.families import FAMILIES, MoEFormat, rope
from frankenmoe.families.mixtures import UNLIKE_DENSE, format_of, read_mixture
from frankenmoe.families.places import generic_name
from frankenmoe.families.words import DOWN, alone
from frankenmoe.planning.mixture import Templates, Tensors, as_saved, expert_names
from frankenmoe.planning.parts import Parts
from frankenmoe.planning.sources import language_model

ROTARY, PLAIN = ("rope_type", "rope_theta"), ("rms_norm_eps", "layer_norm_eps", "hidden_act")
NORMS_ADD = {"qwen3_5_moe": 1.0}  # formats whose norms multiply by 1 + weight
MERGE = "merge it into its model first (PEFT's merge_and_unload), then compare the merged folder"


def open_folder(folder: Path, parts: Parts, built: Mapping[str, Any]) -> Other:
    """The folder's tensors beside those of an MoE, whose built form has the config `built`.

    SourceError for a folder that holds no mixture that can be read.
    """
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise SourceError(f"{folder} is an adapter, expected a whole model", hint=MERGE)
    # tools copy small files, so a record alone means nothing
    if (folder / RECORD).is_file() and read_object(folder / RECORD, hint="remove it, or write it again").get(
        "form"
    ) == "virtual":
        raise ArtifactError(
            f"{folder} is a virtual artifact, which no other tool has written",
            hint=f"write it first: frankenmoe verify {folder} --after OTHER",
        )
    if parts.stock[0].inside:
        raise SourceError(
            f"{parts.stock[0].title} reads pictures too, and only folders of models of text can be compared",
            hint="compare the GGUF file of its text",
        )
    opened = language_model(open_checkpoint(folder))
    config = opened.config
    fmt = format_of(config)
    if fmt is None:
        kind = "a dense model" if config.get("model_type") in FAMILIES else "a model"
        raise SourceError(
            f"{folder} is {kind} of type {config.get('model_type')!r}, expected a mixture made of {parts.name}",
            hint="give the folder that the other tool wrote",
        )
    if not opened.has_weights:
        raise SourceError(f"{folder} has no weights", hint="give the folder that the other tool wrote")
    try:
        sizes, wanted = _sizes(fmt, config), _sizes(parts.stock[0], built)
    except (KeyError, TypeError, ValueError) as error:
        raise SourceError(
            f"{folder / 'config.json'} lacks a size of a {fmt.title} model, or has an impossible one: {error}",
            hint="fetch or write config.json again",
        ) from None
    tensors = as_saved(fmt, opened.tensors)
    packed = packing(tensors, config, where=str(folder))
    ours = our_tensors(parts)
    ours |= {place: write for place, write in own_head(ours).items() if packed.find(place.name)}
    return Other(
        where=str(folder),
        what=f"{fmt.title} folder" + (f", {packed.method}" if packed.method else ""),
        experts=sizes.experts,
        layers=parts.layers + sizes.layers - wanted.layers,  # some formats add a layer that changes nothing
        ours=ours,
        theirs=dict(_found(fmt, _expert_names(fmt, tensors, packed.find), packed.find, sizes.experts, ours)),
        method=packed.method,
        folds=packed.folds and fmt.name not in UNLIKE_DENSE,
        norms_add=NORMS_ADD.get(fmt.name, 0.0),
        kept=packed.kept,
        settings=differing({key: (value, sizes.settings.get(key)) for key, value in wanted.settings.items()}),
        notes=sizes.notes,
    )


def our_tensors(parts: Parts) -> dict[Place, TensorWrite]:
    """The tensors of an MoE as a checkpoint of its format has them, by place."""
    there, fmt = parts.translation, parts.stock[0]
    found = {}
    for write in there.backbone(parts.backbone):
        found[backbone_place(write.name, generic_name(write.name)[0])] = write
    # a format that always gates its shared expert halves it, so it holds the double
    doubled = fmt.shared_gate is not None and parts.shared_kind == "plain"
    for layer in parts.expert_layers:
        for index, node in enumerate(parts.nodes):
            for suffix, write in there.ffn(node, layer).items():
                found[Place(EXPERTS, layer, index, suffix)] = write
        for node in parts.shared:
            for suffix, write in there.ffn(node, layer).items():
                twice = replace(write, steps=(*write.steps, Scale(2.0))) if doubled and (suffix,) == DOWN else write
                found[Place(SHARED, layer, 0, suffix)] = twice
        found[Place(ROUTERS, layer, 0, "gate")] = parts.gates[fmt.gate.format(layer=layer)]
        if parts.shared_kind == "gated" and fmt.shared_gate:
            found[Place(ROUTERS, layer, 0, "shared gate")] = parts.gates[fmt.shared_gate.format(layer=layer)]
    return found


def _expert_names(fmt: MoEFormat, tensors: Tensors, find: Find) -> Templates:
    """Name of a tensor of routed experts -> the matrices it holds; llm-compressor names all formats' experts alike."""
    found = expert_names(fmt, tensors)
    first = next(iter(found)).format(layer=0, expert=0)
    linear = alone(first.partition("experts.")[0].replace("layers.0.", "layers.{layer}.") + "experts.{expert}.")
    return linear if find(first) is None and find(next(iter(linear)).format(layer=0, expert=0)) else found


def _found(
    fmt: MoEFormat, templates: Templates, find: Find, experts: int, ours: Mapping[Place, TensorWrite]
) -> Iterator[tuple[Place, Matrix]]:
    """The folder's tensors at our places, and those of experts beyond ours."""
    layers = sorted({place.layer for place in ours if place.part == EXPERTS})
    for layer in layers:
        for index in range(experts):
            for suffix, matrix in _ffn(templates, find, layer, index, experts):
                yield Place(EXPERTS, layer, index, suffix), matrix
        for suffix, matrix in _ffn(fmt.shared, find, layer, 0, 1):
            yield Place(SHARED, layer, 0, suffix), matrix
        for name, template in (("gate", fmt.gate), ("shared gate", fmt.shared_gate)):
            gate = find(template.format(layer=layer)) if template else None
            if gate is not None:
                yield Place(ROUTERS, layer, 0, name), gate
    for place in ours:
        if place.part not in (EXPERTS, SHARED, ROUTERS):
            found = find(place.name)
            if found is not None:
                yield place, found


def _ffn(templates: Templates, find: Find, layer: int, index: int, experts: int) -> Iterator[tuple[str, Matrix]]:
    """Plain suffix and matrix of one expert: a tensor, or rows of one that several matrices or experts share."""
    for template, suffixes in templates.items():
        matrix = find(template.format(layer=layer, expert=index))
        if matrix is None:
            continue
        count = 1 if "{expert}" in template else experts
        rows, columns = matrix.shape[0] // (count * len(suffixes)), matrix.shape[1]
        first = (index if count > 1 else 0) * rows * len(suffixes)
        for place, suffix in enumerate(suffixes):
            yield suffix, matrix.part(first + place * rows, (rows, columns))


@dataclass(frozen=True)
class _Sizes:
    """What a config.json says: sizes, and settings with which the same weights are another model."""

    experts: int
    layers: int
    settings: Mapping[str, Any]
    notes: tuple[str, ...] = ()


def _sizes(fmt: MoEFormat, config: Mapping[str, Any]) -> _Sizes:
    """Raises KeyError for a missing size, TypeError or ValueError for one that is no number."""
    if fmt.name in UNLIKE_DENSE:
        count, top_k = (
            next(config[key] for key, quantity in fmt.counted.items() if quantity == wanted)
            for wanted in ("experts", "experts_per_token")
        )
        return _Sizes(int(count), int(config["num_hidden_layers"]), {TOP_K: top_k})
    read = read_mixture(fmt, config)
    rotary = rope(read.family, read.dense)
    settings = {TOP_K: read.top_k, **{key: rotary.get(key) for key in ROTARY}}
    settings |= {key: read.family.read(read.dense, key) for key in PLAIN}
    notes = tuple(f"it {problem}" for problem in read.problems)
    return _Sizes(read.experts, read.family.dims(read.dense).layers, settings, notes)
