"""Opens every source of a recipe and checks that they fit together."""

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from frankenmoe.artifact.record import MODEL_TYPE
from frankenmoe.checkpoint.hub import is_folder, local_path, resolve
from frankenmoe.checkpoint.reader import Adapter, Checkpoint, open_adapter, open_checkpoint
from frankenmoe.checkpoint.tensors import FLOATS, TensorRef, TensorWrite
from frankenmoe.errors import SourceError
from frankenmoe.families import FAMILIES, FFN_PARTS, Family, prefixes_of, text_config, text_name, wrapper_of
from frankenmoe.families.mixtures import UNLIKE_DENSE, MixtureConfig, format_of
from frankenmoe.planning.configs import WRONG_CONFIG, check_config, dequantizing
from frankenmoe.recipe import Expert, Recipe, SourceName
from frankenmoe.recipe.backbone import WITHOUT_BASE, ExpertMerge

# a tensor of a per-layer `mlp` in any transformers decoder: model.layers.3.mlp.x, transformer.h.3.mlp.x ...
FFN_NAME = re.compile(rf"^(?P<prefix>.*\.(?P<layer>\d+)\.({FFN_PARTS})\.)(?P<suffix>.+)$")
# a tensor of an expert: mlp.experts.3.w, block_sparse_moe.experts.3.w, mlp.experts.gate_up_proj ...
OWN_EXPERTS = re.compile(r"\.\d+\.(\w+\.)*experts\.")
BUFFER = re.compile(r"rotary_emb\.inv_freq$|\.attn\.(bias|masked_bias)$|\.attention\.(bias|masked_bias)$")

# older spellings of these sizes; transformers' configs accept both
SPELLINGS: Mapping[str, tuple[str, ...]] = {
    "hidden_size": ("n_embd", "d_model"),
    "num_hidden_layers": ("n_layer", "num_layers"),
    "num_attention_heads": ("n_head", "num_heads"),
}
# fields with a word or a letter for every layer
LISTS = ("layers_block_type", "hybrid_override_pattern")


@dataclass(frozen=True, slots=True)
class Anatomy:
    """Names and shapes of a dense checkpoint: its backbone, and the FFN of every layer that has one.

    `unadapted` are modules that PEFT puts no adapter on.
    """

    backbone: Mapping[str, tuple[int, ...]]
    ffn: Mapping[int, Mapping[str, tuple[str, tuple[int, ...]]]]  # layer -> suffix -> (full name, shape)
    unadapted: tuple[str, ...] = ()

    @property
    def ffn_shapes(self) -> dict[str, tuple[int, ...]]:
        """Full name -> shape of every FFN tensor."""
        return dict(tensor for row in self.ffn.values() for tensor in row.values())

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Full name -> shape of every tensor."""
        return {**self.backbone, **self.ffn_shapes}


@dataclass(frozen=True, slots=True)
class Merged:
    """How several sources become one parent. `base` is None for methods that take nothing from one."""

    settings: ExpertMerge
    base: "Source | None"
    models: tuple["Source", ...]
    seed: int

    @property
    def inputs(self) -> tuple["Source", ...]:
        """The base, if there is one, and then the models."""
        return self.models if self.base is None else (self.base, *self.models)


@dataclass(frozen=True, slots=True)
class Part:
    """What of a mixture a source is: its backbone and the expert `name`, a number or `shared` (planning/mixture.py).

    `tensors` have the names of a dense model. `gates` are per layer those that the expert is a row of.
    """

    mixture: MixtureConfig
    name: str
    tensors: Mapping[str, TensorRef | TensorWrite]
    gates: tuple[TensorRef, ...]


@dataclass(frozen=True, slots=True)
class Source:
    """An opened dense checkpoint. Its headers have been read and checked, its weights have not.

    `trust_remote_code` allows Python code in its folder to run. With `merged`, it stands for a merge of several
    checkpoints; then config and folder are those of the first model, and no single file has its tensors. With `part`,
    it is a part of a mixture as a dense model, and so is its config.
    """

    name: SourceName
    checkpoint: Checkpoint
    adapter: Adapter | None = None
    trust_remote_code: bool = False
    # the config ties head and embeddings, but the weights differ: see planning/heads.py
    own_head: bool = False
    merged: Merged | None = None
    # how many rows its own embeddings have, if the base's stand in: see planning/vocabulary.py
    own_rows: int | None = None
    part: Part | None = None

    @property
    def models(self) -> tuple["Source", ...]:
        """Itself, or the models that are merged, without their base."""
        return (self,) if self.merged is None else self.merged.models

    @property
    def singles(self) -> tuple["Source", ...]:
        """The checkpoints that it is made from: itself, or those that are merged."""
        return (self,) if self.merged is None else self.merged.inputs

    @property
    def key(self) -> tuple[object, ...]:
        """What identifies a parent: the folders of model and adapter with its part, or what is merged and how."""
        if self.merged is not None:
            return str(self.merged.settings.to_dict()), *(single.key for single in self.singles)
        return self.folder, self.adapter.folder if self.adapter else None, self.part.name if self.part else None

    @property
    def folder(self) -> Path:
        return self.checkpoint.folder

    @property
    def config(self) -> Mapping[str, Any]:
        return self.checkpoint.config

    @property
    def wrapper(self) -> str | None:
        """The model type of the model that it is nested in; None if it is a language model alone."""
        return str(self.checkpoint.outer["model_type"]) if self.checkpoint.outer else None

    @property
    def family(self) -> Family | None:
        """The table of this source's family; None if only a virtual MoE is possible."""
        return FAMILIES.get(str(self.config.get("model_type")))

    @property
    def tensors(self) -> Mapping[str, TensorRef | TensorWrite]:
        """Its tensors by the names of a dense model."""
        return self.part.tensors if self.part else self.checkpoint.tensors

    def tensor(self, name: str, shape: tuple[int, ...]) -> TensorRef | TensorWrite:
        """The tensor of that name; without weights, a reference with a shape and no bytes."""
        if name in self.tensors:
            return self.tensors[name]
        dtype = {"float32": "F32", "float16": "F16"}.get(str(self.dtype), "BF16")
        no_weights = f"(no weights{f' of expert {self.part.name}' if self.part else ''})"
        return TensorRef(name=name, dtype=dtype, shape=shape, file=self.folder / no_weights, start=0, end=0)

    @property
    def dtype(self) -> str:
        """The type in its config, or that of its first tensor."""
        said = self.config.get("dtype") or self.config.get("torch_dtype")
        return str(said or next((ref.dtype for ref in self.checkpoint.tensors.values()), "bfloat16"))


def open_source(
    name: SourceName, *, folder: Path, weights: bool, adapter: str | None = None, trust_remote_code: bool = False
) -> Source:
    """Finds and opens one source. `weights=False` requires the config only; `adapter` overrides the name's own."""
    found = resolve(name.path, revision=name.revision, folder=folder, weights=weights)
    # planning a hub model needs no weights: an interrupted download is completed when the model is built
    opened = open_checkpoint(found, whole=weights or is_folder(name.path, folder=folder))
    checkpoint = language_model(opened)
    model_type = str(checkpoint.config.get("model_type"))
    if model_type == MODEL_TYPE:
        raise SourceError(
            f"{name} is a virtual artifact of frankenmoe, expected a dense model",
            hint="name the models of its recipe.yml instead",
        )
    fmt = format_of(checkpoint.config)
    if fmt is not None and fmt.name in UNLIKE_DENSE:
        raise SourceError(f"{name} {UNLIKE_DENSE[fmt.name]}", hint="name the dense models that it was made of")
    own_code = checkpoint.config.get("auto_map") and model_type not in FAMILIES and fmt is None
    if own_code and not trust_remote_code and not known_to_transformers(model_type):
        raise SourceError(
            f"{name} is a {model_type!r} model with Python code of its own, which is not run",
            hint="read that code; if you trust it, add --trust-remote-code",
        )
    source = Source(name, checkpoint, trust_remote_code=trust_remote_code)
    check_config(source.name, source.folder, source.config)
    path, revision = (adapter, None) if adapter else (name.adapter, name.adapter_revision)
    if path is None:
        return source
    if adapter and "@" in adapter and not os.path.exists(local_path(adapter, folder=folder)):
        path, revision = adapter.rsplit("@", 1)
    opened_adapter = open_adapter(resolve(path, revision=revision, folder=folder, weights=True))
    return replace(source, adapter=language_adapter(opened_adapter, prefixes_of(opened.config)))


def language_model(opened: Checkpoint) -> Checkpoint:
    """A checkpoint with the config and the names of its language model, which may be nested in another model."""
    prefixes = prefixes_of(opened.config)
    tensors = {text_name(name, prefixes): ref for name, ref in opened.tensors.items()} if prefixes else opened.tensors
    outer = opened.config if wrapper_of(opened.config) else opened.outer
    return replace(opened, config=in_one_spelling(text_config(opened.config)), tensors=tensors, outer=outer)


def language_adapter(adapter: Adapter, prefixes: Mapping[str, str]) -> Adapter:
    """An adapter of a model whose names begin with other words, with those of its language model's class."""
    return replace(adapter, tensors={text_name(name, prefixes): ref for name, ref in adapter.tensors.items()})


@cache
def known_to_transformers(model_type: str) -> bool:
    """Whether the installed transformers has a config class for a model type, so that no remote code is needed.

    Reads the text of transformers' table, because importing it takes seconds and loads torch. If the table has moved,
    such models are rejected.
    """
    spec = find_spec("transformers")
    auto = Path(spec.origin).parent / "models" / "auto" if spec and spec.origin else Path()
    rows = re.compile(rf'^\s*\("{re.escape(model_type)}", "\w+Config"\)', re.MULTILINE)
    files = (auto / "auto_mappings.py", auto / "configuration_auto.py")
    return any(rows.search(file.read_text(encoding="utf-8")) for file in files if file.is_file())


def in_one_spelling(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config with its sizes under their common names; where it lists its layers, it may not count them."""
    found = {key: config[other] for key, others in SPELLINGS.items() for other in others if other in config}
    listed = next((config[key] for key in LISTS if isinstance(config.get(key), list | str)), None)
    return ({} if listed is None else {"num_hidden_layers": len(listed)}) | found | dict(config)


def sources_of(recipe: Recipe) -> Iterator[tuple[SourceName, str | None]]:
    """Every (source, adapter) pair of a recipe: base, experts at any depth, shared experts."""
    yield recipe.base_model, None
    for expert in leaves((*recipe.experts, *recipe.shared_experts)):
        if expert.source_model is not None:
            yield expert.source_model, expert.adapter if expert.as_adapter is None else None
        if expert.as_adapter is not None and expert.adapter is not None:
            yield recipe.base_model, expert.adapter
        if expert.merge is not None:
            base = merge_base(recipe, expert.merge)
            yield from ((name, None) for name in (*expert.merge.models, *((base,) if base else ())))


def first_of_folders(sources: Sequence[Source]) -> Iterable[Source]:
    """One source of each folder."""
    return {source.folder: source for source in reversed(sources)}.values()


def merge_base(recipe: Recipe, merge: ExpertMerge) -> SourceName | None:
    """The base of a merged expert; None for methods that take nothing from one."""
    return None if merge.method in WITHOUT_BASE else merge.base or recipe.base_model


def leaves(experts: Iterable[Expert]) -> Iterator[Expert]:
    """The experts that are not mixtures themselves, depth first."""
    for expert in experts:
        if expert.experts:
            yield from leaves(expert.experts)
        else:
            yield expert


def anatomy(source: Source) -> Anatomy:
    """Splits a source into backbone and FFNs: by its family's table, or else by `mlp` in the names."""
    family = source.family
    if family is not None:
        backbone = family.shapes(family.backbone, source.config)
        return Anatomy(backbone, family.layered(source.config), family.unadapted)
    if not source.checkpoint.has_weights:
        raise SourceError(
            f"{source.name} is a {source.config.get('model_type')!r} model without weights, and only the names in its "
            f"weights tell experts from backbone; known without weights: {', '.join(FAMILIES)}",
            hint="download the weights too",
        )
    shapes = {name: ref.shape for name, ref in source.checkpoint.tensors.items() if not BUFFER.search(name)}
    ffn = {name: shape for name, shape in shapes.items() if FFN_NAME.match(name)}
    if any(OWN_EXPERTS.search(name) for name in shapes):
        raise SourceError(
            f"{source.name} ({source.config.get('model_type')}) is a mixture of experts itself, expected a dense model",
            hint="name the dense model it was made from; experts of your own can nest with `experts:` inside an expert",
        )
    return Anatomy({name: shape for name, shape in shapes.items() if name not in ffn}, _layered(ffn, source))


def _layered(
    shapes: Mapping[str, tuple[int, ...]], source: Source
) -> Mapping[int, Mapping[str, tuple[str, tuple[int, ...]]]]:
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
    return dict(sorted(layers.items()))


def check_tensors(source: Source, parts: Anatomy) -> None:
    """Raises SourceError if a tensor of the family's table is missing, has another shape, or is quantized."""
    if not source.checkpoint.has_weights:
        return
    # a family without a table may have integer buffers in its backbone, but not in its FFNs
    check_held(source.name, source.tensors, parts.shapes, floats=parts.shapes if source.family else parts.ffn_shapes)


def check_held(
    name: SourceName,
    tensors: Mapping[str, TensorRef | TensorWrite],
    wanted: Mapping[str, tuple[int, ...]],
    *,
    floats: Iterable[str],
) -> None:
    """Raises SourceError if a wanted tensor is missing or has another shape, or if one of `floats` is quantized."""
    missing = [tensor for tensor in wanted if tensor not in tensors]
    if missing:
        raise SourceError(
            f"{name} lacks {len(missing)} of the {len(wanted)} tensors that its config.json requires, the first is "
            f"{missing[0]}",
            hint="download it again, or check that config.json belongs to these weights",
        )
    for tensor, shape in wanted.items():
        found = tensors[tensor].shape
        if found != shape:
            raise SourceError(
                f"{name} holds {tensor} of shape {list(found)}, but its config.json says {list(shape)}",
                hint=WRONG_CONFIG,
            )
    coded = next((ref for tensor in floats if (ref := tensors[tensor]).dtype not in FLOATS), None)
    if coded is not None:
        raise SourceError(
            f"{name} is quantized: it holds {coded.name} as {coded.dtype}, expected weights in float32, float16 "
            "or bfloat16",
            hint=f"name the model it was quantized from, or dequantize it first: {dequantizing('')}",
        )
