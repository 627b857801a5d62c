"""Opens every source of a recipe and checks that they fit together."""

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from frankenmoe.checkpoint.hub import is_folder, local_path, resolve
from frankenmoe.checkpoint.reader import Adapter, Checkpoint, open_adapter, open_checkpoint
from frankenmoe.checkpoint.tensors import FLOATS, TensorRef
from frankenmoe.errors import SourceError
from frankenmoe.families import FAMILIES, MLPS, Family
from frankenmoe.families.spec import Dims
from frankenmoe.recipe import Expert, Recipe, SourceName
from frankenmoe.recipe.backbone import WITHOUT_BASE, ExpertMerge

# a tensor of a per-layer `mlp` in any transformers decoder: model.layers.3.mlp.x, transformer.h.3.mlp.x ...
FFN_NAME = re.compile(rf"^(?P<prefix>.*\.(?P<layer>\d+)\.({'|'.join(MLPS)})\.)(?P<suffix>.+)$")
# a tensor of an expert: mlp.experts.3.w, block_sparse_moe.experts.3.w, mlp.experts.gate_up_proj ...
OWN_EXPERTS = re.compile(r"\.\d+\.(\w+\.)*experts\.")
BUFFER = re.compile(r"rotary_emb\.inv_freq$|\.attn\.(bias|masked_bias)$|\.attention\.(bias|masked_bias)$")

# sizes that every config must have, those that families with a table need too, and optional ones
SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads")
FAMILY_SIZES = ("intermediate_size", "vocab_size")
OPTIONAL_SIZES = (
    "num_key_value_heads", "num_kv_heads", "multi_query_group_num", "head_dim", "max_position_embeddings",
)  # fmt: skip
# older spellings of these sizes; transformers' configs accept both
SPELLINGS: Mapping[str, tuple[str, ...]] = {
    "hidden_size": ("n_embd", "d_model"),
    "num_hidden_layers": ("n_layer", "num_layers"),
    "num_attention_heads": ("n_head", "num_heads"),
}
# families whose config classes have multi_query on by default
MULTI_QUERY = ("falcon", "gpt_bigcode")
GROUPED = ("num_key_value_heads", "num_kv_heads", "multi_query_group_num")
# numbers that must be positive and finite, or every model computes NaN
POSITIVE = ("rope_theta", "rms_norm_eps")
MOST = 1e30
# config fields of quantized weights
QUANTIZED = ("quantization_config", "compression_config")
# how transformers dequantizes while loading; other methods do it afterwards, if at all
DEQUANTIZE: Mapping[str, str] = {
    "fp8": "FineGrainedFP8Config(dequantize=True)",
    "mxfp4": "Mxfp4Config(dequantize=True)",
    "compressed-tensors": "CompressedTensorsConfig(dequantize=True)",
}
# tables are expanded per layer, so absurd numbers must be rejected first
MOST_LAYERS = 10_000
MOST_LABELS = 100_000
WRONG_FILE = "fetch config.json again: the one that save_pretrained wrote beside the weights"
WRONG_CONFIG = "config.json and weights are of two different models"


@dataclass(frozen=True, slots=True)
class Anatomy:
    """Names and shapes of a dense checkpoint: its backbone, and per layer its FFN."""

    backbone: Mapping[str, tuple[int, ...]]
    ffn: tuple[Mapping[str, tuple[str, tuple[int, ...]]], ...]  # per layer: suffix -> (full name, shape)

    @property
    def ffn_shapes(self) -> dict[str, tuple[int, ...]]:
        """Full name -> shape of every FFN tensor."""
        return dict(tensor for layer in self.ffn for tensor in layer.values())

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
class Source:
    """An opened dense checkpoint. Its headers have been read and checked, its weights have not.

    `trust_remote_code` allows Python code in its folder to run. With `merged`, it stands for a merge of several
    checkpoints; then config and folder are those of the first model, and no single file has its tensors.
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
        """What identifies a parent: the folders of model and adapter, or what is merged and how."""
        if self.merged is not None:
            return str(self.merged.settings.to_dict()), *(single.key for single in self.singles)
        return self.folder, self.adapter.folder if self.adapter else None

    @property
    def folder(self) -> Path:
        return self.checkpoint.folder

    @property
    def config(self) -> Mapping[str, Any]:
        return self.checkpoint.config

    @property
    def family(self) -> Family | None:
        """The table of this source's family; None if only a virtual MoE is possible."""
        return FAMILIES.get(str(self.config.get("model_type")))

    def tensor(self, name: str, shape: tuple[int, ...]) -> TensorRef:
        """The tensor of that name; without weights, a reference with a shape and no bytes."""
        if name in self.checkpoint.tensors:
            return self.checkpoint.tensors[name]
        dtype = {"float32": "F32", "float16": "F16"}.get(str(self.dtype), "BF16")
        return TensorRef(name=name, dtype=dtype, shape=shape, file=self.folder / "(no weights)", start=0, end=0)

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
    checkpoint = replace(opened, config=in_one_spelling(opened.config))
    model_type = str(checkpoint.config.get("model_type"))
    own_code = checkpoint.config.get("auto_map") and model_type not in FAMILIES
    if own_code and not trust_remote_code and not known_to_transformers(model_type):
        raise SourceError(
            f"{name} is a {model_type!r} model with Python code of its own, which is not run",
            hint="read that code; if you trust it, add --trust-remote-code",
        )
    source = Source(name, checkpoint, trust_remote_code=trust_remote_code)
    check_config(source)
    path, revision = (adapter, None) if adapter else (name.adapter, name.adapter_revision)
    if path is None:
        return source
    if adapter and "@" in adapter and not os.path.exists(local_path(adapter, folder=folder)):
        path, revision = adapter.rsplit("@", 1)
    return replace(source, adapter=open_adapter(resolve(path, revision=revision, folder=folder, weights=True)))


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
    """A config with its sizes under their common names."""
    found = {key: config[other] for key, others in SPELLINGS.items() for other in others if other in config}
    return found | dict(config)


def check_config(source: Source) -> None:
    """Raises SourceError if config.json lacks a size or has an impossible one."""
    file, family = source.folder / "config.json", source.family
    if not isinstance(source.config.get("model_type"), str):
        raise SourceError(f"{file} has no model_type, expected the name of a family", hint=WRONG_FILE)
    # what a family derives from other fields is checked with its sizes, below
    required = (*SIZES, *(key for key in FAMILY_SIZES if family and key not in family.reads))
    for key in (*required, *(key for key in OPTIONAL_SIZES if source.config.get(key) is not None)):
        value = source.config.get(key)
        most = MOST_LAYERS if key == "num_hidden_layers" else 2**31 - 1
        if type(value) is not int or not 1 <= value <= most:  # `true` is an int to Python and not to us
            said = f"{key} {value!r:.40}" if key in source.config else f"no {key}"
            raise SourceError(
                f"{file} has {said}, expected a whole number from 1 to {most}",
                hint=WRONG_FILE,
            )
    rotary = source.config.get("rope_scaling") or source.config.get("rope_parameters") or {}
    if not isinstance(rotary, Mapping):
        raise SourceError(
            f"{file} has rotary settings {rotary!r:.40}, expected a mapping such as {{'rope_type': 'default'}}",
            hint="fetch config.json again, or delete the setting",
        )
    for key, value in (("rope_theta", rotary.get("rope_theta")), *((key, source.config.get(key)) for key in POSITIVE)):
        if isinstance(value, int | float) and not isinstance(value, bool):
            wrong = not 0 < value < MOST
        else:
            wrong = family is not None and key == "rms_norm_eps" and key in source.config
        if wrong:
            raise SourceError(f"{file} has {key} {value!r:.40}, expected a positive number", hint=WRONG_FILE)
    labels = source.config.get("num_labels", 0)
    if type(labels) is not int or not 0 <= labels <= MOST_LABELS:  # transformers makes a table of them
        raise SourceError(
            f"{file} has num_labels {labels!r:.40}, expected a whole number up to {MOST_LABELS}",
            hint="remove the setting: a language model has no labels",
        )
    window = source.config.get("sliding_window")
    if family and window is not None and type(window) is not int:
        raise SourceError(f"{file} has sliding_window {window!r:.40}, expected a whole number or null", hint=WRONG_FILE)
    _refuse_quantized(source)
    if family:
        try:
            dims = family.dims(source.config)
        except (KeyError, TypeError, ValueError) as error:
            raise SourceError(f"{file} lacks a size, or has an impossible one: {error}", hint=WRONG_FILE) from error
        if dims.ffn < 1:
            raise SourceError(f"{file} has FFNs of {dims.ffn} rows, expected at least one", hint=WRONG_FILE)
        _check_heads(file, dims)


def _refuse_quantized(source: Source) -> None:
    """Raises SourceError for quantized weights."""
    said = next((source.config[key] for key in QUANTIZED if source.config.get(key)), None)
    if said is not None:
        method = (said.get("quant_method") or said.get("quant_algo")) if isinstance(said, Mapping) else said
        raise SourceError(
            f"{source.name} is quantized: config.json has a quantization_config, method {method!s:.40}; expected "
            "weights in float32, float16 or bfloat16",
            hint=f"name the model it was quantized from, or dequantize it first: {_dequantizing(str(method))}",
        )


def _dequantizing(method: str) -> str:
    option = DEQUANTIZE.get(method)
    load = f"load it with from_pretrained(..., quantization_config={option})" if option else "load it with transformers"
    call = "" if option else " call model.dequantize() where its method has that,"
    return f"{load},{call} save_pretrained(folder) in bfloat16, and name that folder"


def _check_heads(file: Path, dims: Dims) -> None:
    if dims.heads % dims.kv_heads or not dims.head_dim:
        raise SourceError(
            f"{file} has {dims.heads} attention heads, {dims.kv_heads} key-value heads and hidden size {dims.hidden}, "
            "expected heads that share the others evenly",
            hint=WRONG_CONFIG,
        )


def odd_heads(config: Mapping[str, Any]) -> int:
    """Cached key-value heads of a family without a table: one in multi-query models, all in Falcon's second generation.

    There transformers repeats the grouped heads before it caches them.
    """
    heads = int(config["num_attention_heads"])
    if config.get("new_decoder_architecture"):
        return heads
    if config.get("multi_query", config.get("model_type") in MULTI_QUERY):
        return 1
    return next((int(config[key]) for key in GROUPED if config.get(key)), heads)


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
        return Anatomy(backbone, _layered(family.shapes(family.ffn, source.config), source))
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
    """Raises SourceError if a tensor of the family's table is missing, has another shape, or is quantized."""
    if not source.checkpoint.has_weights:
        return
    wanted = parts.shapes
    missing = [name for name in wanted if name not in source.checkpoint.tensors]
    if missing:
        raise SourceError(
            f"{source.name} lacks {len(missing)} of the {len(wanted)} tensors that its config.json requires, the "
            f"first is {missing[0]}",
            hint="download it again, or check that config.json belongs to these weights",
        )
    for name, shape in wanted.items():
        found = source.checkpoint.tensors[name].shape
        if found != shape:
            raise SourceError(
                f"{source.name} holds {name} of shape {list(found)}, but its config.json says {list(shape)}",
                hint=WRONG_CONFIG,
            )
    # a family without a table may have integer buffers in its backbone, but not in its FFNs
    numbers = wanted if source.family else parts.ffn_shapes
    coded = next((ref for name in numbers if (ref := source.checkpoint.tensors[name]).dtype not in FLOATS), None)
    if coded is not None:
        raise SourceError(
            f"{source.name} is quantized: it holds {coded.name} as {coded.dtype}, expected weights in float32, float16 "
            "or bfloat16",
            hint=f"name the model it was quantized from, or dequantize it first: {_dequantizing('')}",
        )
