"""Opens every source a recipe names and holds them side by side; knows nothing of experts, formats or the bill."""

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from frankenmoe.checkpoint.hub import resolve
from frankenmoe.checkpoint.reader import Adapter, Checkpoint, open_adapter, open_checkpoint
from frankenmoe.checkpoint.tensors import TensorRef
from frankenmoe.errors import SourceError
from frankenmoe.families import FAMILIES, Family
from frankenmoe.families.spec import Dims
from frankenmoe.recipe import Expert, Recipe, SourceName

# where a per-layer `mlp` hangs in any transformers decoder: model.layers.3.mlp.x, transformer.h.3.mlp.x ...
FFN_NAME = re.compile(r"^(?P<prefix>.*\.(?P<layer>\d+)\.mlp\.)(?P<suffix>.+)$")
BUFFER = re.compile(r"rotary_emb\.inv_freq$|\.attn\.(bias|masked_bias)$|\.attention\.(bias|masked_bias)$")

# config fields in which parents must agree, with the words a person uses for them
MUST_AGREE: Mapping[str, str] = {
    "model_type": "family",
    "hidden_size": "hidden size",
    "num_hidden_layers": "layer count",
    "intermediate_size": "FFN width",
    "num_attention_heads": "head count",
    "vocab_size": "vocabulary",
}

# sizes that every config must say, those that its family's table reads besides, and those that it may leave out
SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads")
FAMILY_SIZES = ("intermediate_size", "vocab_size")
OPTIONAL_SIZES = ("num_key_value_heads", "head_dim", "max_position_embeddings")
# what older families call the same; transformers' own configs answer to both
SPELLINGS: Mapping[str, tuple[str, ...]] = {
    "hidden_size": ("n_embd", "d_model"),
    "num_hidden_layers": ("n_layer", "num_layers"),
    "num_attention_heads": ("n_head", "num_heads"),
}
# the table is written out per layer, so a number that no model has must not reach it
MOST_LAYERS = 10_000
WRONG_FILE = "fetch config.json again: the one that save_pretrained wrote beside the weights"
WRONG_CONFIG = "config.json and weights are of two different models"


@dataclass(frozen=True, slots=True)
class Anatomy:
    """Names and shapes of a dense checkpoint: what stays (backbone) and, per layer, what is an expert (FFN)."""

    backbone: Mapping[str, tuple[int, ...]]
    ffn: tuple[Mapping[str, tuple[str, tuple[int, ...]]], ...]  # per layer: suffix -> (full name, shape)


@dataclass(frozen=True, slots=True)
class Source:
    """A dense checkpoint as a recipe names it, opened: its headers are read and checked, its weights are not."""

    name: SourceName
    checkpoint: Checkpoint
    adapter: Adapter | None = None

    @property
    def folder(self) -> Path:
        return self.checkpoint.folder

    @property
    def config(self) -> Mapping[str, Any]:
        return self.checkpoint.config

    @property
    def family(self) -> Family | None:
        """The table of this source's family, or None where only a virtual MoE can be made of it."""
        return FAMILIES.get(str(self.config.get("model_type")))

    def tensor(self, name: str, shape: tuple[int, ...]) -> TensorRef:
        """The tensor of that name; without weights, a reference that has a size but points nowhere."""
        if name in self.checkpoint.tensors:
            return self.checkpoint.tensors[name]
        dtype = {"float32": "F32", "float16": "F16"}.get(str(self.dtype), "BF16")
        return TensorRef(name=name, dtype=dtype, shape=shape, file=self.folder / "(no weights)", start=0, end=0)

    @property
    def dtype(self) -> str:
        """The type its config says, or that its first tensor has."""
        said = self.config.get("dtype") or self.config.get("torch_dtype")
        return str(said or next((ref.dtype for ref in self.checkpoint.tensors.values()), "bfloat16"))


def open_source(
    name: SourceName, *, folder: Path, weights: bool, adapter: str | None = None, trust_remote_code: bool = False
) -> Source:
    """Finds and opens one source. `weights=False` is content with a config; `adapter` overrides the name's own."""
    opened = open_checkpoint(resolve(name.path, revision=name.revision, folder=folder, weights=weights))
    checkpoint = replace(opened, config=in_one_spelling(opened.config))
    if (
        checkpoint.config.get("auto_map")
        and not trust_remote_code
        and str(checkpoint.config.get("model_type")) not in FAMILIES
    ):
        raise SourceError(
            f"{name} is a {checkpoint.config.get('model_type')!r} model with Python code of its own, which is not run",
            hint="read that code, and if you trust it say --trust-remote-code",
        )
    check_config(Source(name, checkpoint))
    path, revision = (adapter, None) if adapter else (name.adapter, name.adapter_revision)
    if path is None:
        return Source(name, checkpoint)
    if adapter and "@" in adapter and not os.path.exists(folder / adapter):
        path, revision = adapter.rsplit("@", 1)
    return Source(name, checkpoint, open_adapter(resolve(path, revision=revision, folder=folder, weights=True)))


def in_one_spelling(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config with its sizes under the names that most families use."""
    found = {key: config[other] for key, others in SPELLINGS.items() for other in others if other in config}
    return found | dict(config)


def check_config(source: Source) -> None:
    """Raises SourceError where config.json leaves out a size, or says one that no decoder can have."""
    file, family = source.folder / "config.json", source.family
    if not isinstance(source.config.get("model_type"), str):
        raise SourceError(f"{file} has no model_type, expected the name of a family", hint=WRONG_FILE)
    required = (*SIZES, *(FAMILY_SIZES if family else ()))
    for key in (*required, *(key for key in OPTIONAL_SIZES if source.config.get(key) is not None)):
        value = source.config.get(key)
        most = MOST_LAYERS if key == "num_hidden_layers" else 2**31 - 1
        if type(value) is not int or not 1 <= value <= most:  # `true` is an int to Python and not to us
            said = f"{key} {value!r:.40}" if key in source.config else f"no {key}"
            raise SourceError(
                f"{file} has {said}, expected a whole number from 1 to {most}",
                hint=WRONG_FILE,
            )
    rotary = source.config.get("rope_parameters") or source.config.get("rope_scaling") or {}
    if not isinstance(rotary, Mapping):
        raise SourceError(
            f"{file} has rotary settings {rotary!r:.40}, expected a mapping such as {{'rope_type': 'default'}}",
            hint="fetch config.json again, or delete the setting",
        )
    if family:
        _check_heads(file, family.dims(source.config))


def _check_heads(file: Path, dims: Dims) -> None:
    if dims.heads % dims.kv_heads or not dims.head_dim:
        raise SourceError(
            f"{file} has {dims.heads} attention heads, {dims.kv_heads} key-value heads and hidden size {dims.hidden}, "
            "expected heads that share the others evenly",
            hint=WRONG_CONFIG,
        )


def sources_of(recipe: Recipe) -> Iterator[tuple[SourceName, str | None]]:
    """Every (source, adapter) pair that a recipe names: the base, the experts at any depth, the shared experts."""
    yield recipe.base_model, None
    for expert in leaves((*recipe.experts, *recipe.shared_experts)):
        if expert.source_model is not None:
            yield expert.source_model, expert.adapter


def leaves(experts: Iterable[Expert]) -> Iterator[Expert]:
    """The experts that are FFNs themselves, depth first."""
    for expert in experts:
        if expert.experts:
            yield from leaves(expert.experts)
        else:
            yield expert


def anatomy(source: Source) -> Anatomy:
    """Tells an FFN from the rest: by the family's table where there is one, otherwise by the `mlp` in the names."""
    family = source.family
    if family is not None:
        backbone = family.shapes(family.backbone, source.config)
        return Anatomy(backbone, _layered(family.shapes(family.ffn, source.config), source))
    if not source.checkpoint.has_weights:
        raise SourceError(
            f"{source.name} is a {source.config.get('model_type')!r} model without weights, and only the names in its "
            f"weights tell experts from backbone; known without weights: {', '.join(FAMILIES)}",
            hint="download the weights too",
        )
    shapes = {name: ref.shape for name, ref in source.checkpoint.tensors.items() if not BUFFER.search(name)}
    ffn = {name: shape for name, shape in shapes.items() if FFN_NAME.match(name)}
    return Anatomy({name: shape for name, shape in shapes.items() if name not in ffn}, _layered(ffn, source))


def _layered(
    shapes: Mapping[str, tuple[int, ...]], source: Source
) -> tuple[Mapping[str, tuple[str, tuple[int, ...]]], ...]:
    layers: dict[int, dict[str, tuple[str, tuple[int, ...]]]] = {}
    for name, shape in shapes.items():
        match = FFN_NAME.match(name)
        assert match is not None, name
        layers.setdefault(int(match["layer"]), {})[match["suffix"]] = (name, shape)
    if not layers or sorted(layers) != list(range(len(layers))):
        raise SourceError(
            f"{source.name} ({source.config.get('model_type')}) has no `mlp` in every layer: expected tensors named "
            f"like `...layers.0.mlp...`, found them in layers {sorted(layers)}",
            hint="only decoders with a per-layer `mlp` can give experts",
        )
    return tuple(layers[index] for index in range(len(layers)))


def check_tensors(source: Source, parts: Anatomy) -> None:
    """Raises SourceError when a tensor the family's table asks for is missing or has another shape."""
    if not source.checkpoint.has_weights:
        return
    wanted = dict(parts.backbone) | {name: shape for layer in parts.ffn for name, shape in layer.values()}
    missing = [name for name in wanted if name not in source.checkpoint.tensors]
    if missing:
        raise SourceError(
            f"{source.name} lacks {len(missing)} of the {len(wanted)} tensors its config.json promises, the first "
            f"being {missing[0]}",
            hint="download it again, or check that config.json belongs to these weights",
        )
    for name, shape in wanted.items():
        found = source.checkpoint.tensors[name].shape
        if found != shape:
            raise SourceError(
                f"{source.name} holds {name} of shape {list(found)}, but its config.json says {list(shape)}",
                hint=WRONG_CONFIG,
            )


def check_siblings(base: Source, others: Iterable[Source]) -> None:
    """Raises SourceError when a parent cannot stand beside the base, naming both and every field that differs."""
    for other in others:
        differ = {
            words: (base.config.get(key), other.config.get(key))
            for key, words in MUST_AGREE.items()
            if base.config.get(key) != other.config.get(key)
        }
        if differ:
            sides = "; ".join(f"{words} {ours} against {theirs}" for words, (ours, theirs) in differ.items())
            raise SourceError(
                f"{other.name} does not fit beside the base {base.name}: {sides}",
                hint="experts must be fine-tunes of one architecture; choose parents of the base's family and size",
            )


def check_anatomies(base: tuple[Source, Anatomy], others: Iterable[tuple[Source, Anatomy]], *, averaged: bool) -> None:
    """Raises SourceError where the weights themselves, whatever the configs say, do not fit beside the base's.

    FFNs must have the same matrices, biases aside; with `averaged`, backbones the same tensors too.
    """
    for other in others:
        ours, theirs = (_matrices(parts) | (dict(parts.backbone) if averaged else {}) for _, parts in (base, other))
        odd = next((name for name in ours | theirs if ours.get(name) != theirs.get(name)), None)
        if odd is not None:
            sides = (f"{list(side[odd])}" if odd in side else "nothing" for side in (ours, theirs))
            raise SourceError(
                f"{other[0].name} does not fit beside the base {base[0].name}: {odd} is {' against '.join(sides)}",
                hint="choose parents of the base's family and size"
                + (", or take the base's own backbone with backbone: base" if averaged else ""),
            )


def _matrices(parts: Anatomy) -> dict[str, tuple[int, ...]]:
    return {name: shape for layer in parts.ffn for name, shape in layer.values() if len(shape) > 1}
