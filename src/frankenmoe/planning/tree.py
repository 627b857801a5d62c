"""The experts of a recipe as tensor writes, nested as in the recipe. Does not import torch.

This module fixes the order of steps on an expert's matrix, for the virtual and the built form: noise, then the adapter,
then the residual scale.
"""

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from frankenmoe.checkpoint.lorasettings import check_settings, lora_scale
from frankenmoe.checkpoint.peft import PREFIX
from frankenmoe.checkpoint.reader import Adapter
from frankenmoe.checkpoint.tensors import FLOATS, LowRank, Merge, Noise, Scale, Step, TensorRef, TensorWrite
from frankenmoe.counted import counted
from frankenmoe.errors import PlanError, SourceError
from frankenmoe.families import FFN_PARTS
from frankenmoe.planning.sources import Anatomy, Merged, Source, anatomy, merge_base
from frankenmoe.recipe import Expert, Recipe, SourceName

# names of the matrix that writes to the residual stream, in the families of transformers
DOWN = ("down_proj", "c_proj", "dense_4h_to_h", "fc2", "fc_out", "wo")
# a tensor of an adapter on an FFN, of any kind of adapter
FFN_ADAPTER = re.compile(rf"\.\d+\.({FFN_PARTS})\.")
EVERY_NAME = re.compile("")

Rows = Mapping[int, Mapping[str, TensorWrite]]
LoraRows = Mapping[int, Mapping[str, LowRank]]
ParentTensors = Callable[[str, tuple[int, ...]], TensorRef | TensorWrite]


@dataclass(frozen=True, slots=True)
class ExpertNode:
    """An expert: a leaf with FFN writes (dense names), or a nested mixture with children and a top-k.

    `ffn[layer][suffix]` is the write without the adapter, `loras[layer][suffix]` the adapter's step, for every layer
    that has an FFN. `path` is (2, 0) for the first expert nested in the third.
    """

    name: str
    path: tuple[int, ...]
    source: Source | None
    ffn: Rows = field(default_factory=dict)
    loras: LoraRows = field(default_factory=dict)
    children: tuple["ExpertNode", ...] = ()
    top_k: int = 0

    def leaves(self) -> Iterator["ExpertNode"]:
        """The leaves below this node, depth first; a leaf yields itself."""
        if not self.children:
            yield self
        for child in self.children:
            yield from child.leaves()

    def folded(self, layer: int, suffix: str) -> TensorWrite:
        """The write with the adapter folded in, as in a built checkpoint."""
        write, lora = self.ffn[layer][suffix], self.loras[layer].get(suffix)
        return write if lora is None else with_lora(write, lora)

    def folded_writes(self) -> list[TensorWrite]:
        """All FFN writes below this node, with adapters folded in."""
        return [
            leaf.folded(layer, suffix) for leaf in self.leaves() for layer, row in leaf.ffn.items() for suffix in row
        ]


def expert_layers(nodes: Sequence[ExpertNode]) -> tuple[int, ...]:
    """The numbers of the layers that have experts, which are the same for all experts of an MoE."""
    return tuple(next(nodes[0].leaves()).ffn)


def with_lora(write: TensorWrite, lora: LowRank) -> TensorWrite:
    """Inserts the adapter's step between noise and residual scale."""
    before = tuple(step for step in write.steps if not isinstance(step, Scale))
    after = tuple(step for step in write.steps if isinstance(step, Scale))
    return replace(write, steps=(*before, lora, *after))


def expert_nodes(
    recipe: Recipe,
    experts: tuple[Expert, ...],
    *,
    sources: Mapping[tuple[str, str | None], tuple[Source, Anatomy]],
    dtype: str,
    extracted: Mapping[tuple[int, ...], Adapter],
    path: tuple[int, ...] = (),
) -> tuple[ExpertNode, ...]:
    """The experts of one level as nodes; `dtype` is the safetensors type of the stored weights.

    `extracted` has the adapters that take the place of a source's FFNs, by the path of the expert.
    """
    return tuple(
        _node(recipe, expert, sources=sources, dtype=dtype, extracted=extracted, path=(*path, index))
        for index, expert in enumerate(experts)
    )


def _node(
    recipe: Recipe,
    expert: Expert,
    *,
    sources: Mapping[tuple[str, str | None], tuple[Source, Anatomy]],
    dtype: str,
    extracted: Mapping[tuple[int, ...], Adapter],
    path: tuple[int, ...],
) -> ExpertNode:
    if expert.experts:
        children = expert_nodes(recipe, expert.experts, sources=sources, dtype=dtype, extracted=extracted, path=path)
        top_k = expert.experts_per_token or recipe.experts_per_token
        return ExpertNode(expert.name, path, None, children=children, top_k=top_k)
    source, parts = _parent(recipe, expert, sources)
    down, some = down_names(source), next(iter(parts.ffn.values()))
    if expert.residual_scale is not None and not any(suffix.startswith(down) for suffix in some):
        raise PlanError(
            f"residual_scale of expert {expert.name} cannot be applied: its FFN has {', '.join(some)}, and "
            f"none of them is a known down projection ({', '.join(down)})",
            hint="leave residual_scale out for this family",
        )
    if expert.as_adapter is None:
        ffn, lora_rows = ffn_writes(source, parts, dtype=dtype)
    else:  # `source` is still the parent, whose backbone may be merged
        base, base_parts = sources[(str(recipe.base_model), None)]
        ours = extracted[path] if path in extracted else sources[(str(recipe.base_model), expert.adapter)][0].adapter
        shared, lora_rows = ffn_writes(replace(base, adapter=ours), base_parts, dtype=dtype)
        # biases have no low rank, and weigh nothing: they are the parent's own
        own, _ = ffn_writes(source, parts, dtype=dtype)
        ffn = {
            layer: {key: write if len(write.shape) > 1 else own[layer][key] for key, write in row.items()}
            for layer, row in shared.items()
        }
    changed = {
        layer: {
            suffix: replace(
                write,
                steps=(*write.steps, *_steps(recipe, expert, write.name, down=suffix.startswith(down), path=path)),
            )
            for suffix, write in row.items()
        }
        for layer, row in ffn.items()
    }
    return ExpertNode(expert.name, path, source, changed, lora_rows)


def _parent(
    recipe: Recipe, expert: Expert, sources: Mapping[tuple[str, str | None], tuple[Source, Anatomy]]
) -> tuple[Source, Anatomy]:
    """The source of an expert, or the merge of several as one source."""
    if expert.merge is None:
        found = sources[(str(expert.source_model), expert.adapter if expert.as_adapter is None else None)]
        return _one_expert(found[0]), found[1]
    base = merge_base(recipe, expert.merge)
    models = tuple(_one_expert(sources[(str(name), None)][0]) for name in expert.merge.models)
    merged = Merged(expert.merge, sources[(str(base), None)][0] if base else None, models, recipe.seed)
    parts = sources[(str(expert.merge.models[0]), None)][1]
    return replace(models[0], name=SourceName(str(expert.merge)), adapter=None, merged=merged), parts


def _one_expert(source: Source) -> Source:
    """The source; SourceError for a mixture of which no expert was named."""
    if source.part is not None and source.name.part is None:
        raise SourceError(
            f"{source.name} is a mixture of {counted(source.part.mixture.experts, 'expert')}, expected one model",
            hint=f"write {source.name}#0 for its first expert; `frankenmoe adopt` takes it as it is",
        )
    return source


def ffn_writes(source: Source, parts: Anatomy, *, dtype: str) -> tuple[Rows, LoraRows]:
    """A parent's FFNs as they are: layer -> suffix -> write under its dense name, and the same of adapter steps."""
    for single in source.singles:
        refuse_strange_keys(single, FFN_ADAPTER)
    # the adapter of a single source stays apart, so that the virtual form keeps it low-rank
    loras = {} if source.merged is not None else adapter_steps(source, parts)
    tensors = parent_tensors(replace(source, adapter=None))
    ffn, steps = dict[int, Mapping[str, TensorWrite]](), dict[int, Mapping[str, LowRank]]()
    for layer, row in parts.ffn.items():
        ffn[layer] = {suffix: _written(tensors(name, shape), name, dtype) for suffix, (name, shape) in row.items()}
        steps[layer] = {suffix: loras[name] for suffix, (name, _) in row.items() if name in loras}
    return ffn, steps


def down_names(source: Source | None) -> tuple[str, ...]:
    """The starts of the names of matrices that write to the residual stream, in an FFN of this source."""
    return DOWN if source is None or source.family is None else source.family.down


def _steps(recipe: Recipe, expert: Expert, name: str, *, down: bool, path: tuple[int, ...]) -> tuple[Step, ...]:
    steps: list[Step] = []
    noise = expert.noise_scale if expert.noise_scale is not None else expert.noise_relative
    if noise:
        relative = expert.noise_scale is None
        steps.append(Noise(std=noise, relative=relative, seed=tensor_seed(recipe.seed, path, name)))
    if expert.residual_scale is not None and down:
        steps.append(Scale(expert.residual_scale))
    return tuple(steps)


def tensor_seed(seed: int, path: tuple[int, ...], name: str) -> int:
    """The noise seed of one tensor of one expert; unlike `hash`, the same on every machine."""
    text = f"{seed}/{'.'.join(map(str, path))}/{name}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def adapter_steps(source: Source, parts: Anatomy) -> Mapping[str, LowRank]:
    """Full name of a weight -> its LoRA step W + alpha/r * B A, read from PEFT's format.

    Supports rank and alpha patterns and rank-stabilised scaling (alpha / sqrt(r), arXiv 2312.03732). Raises SourceError
    for adapters with settings that are not understood (checkpoint/lorasettings.py) or for another model.
    """
    adapter = source.adapter
    if adapter is None:
        return {}
    check_settings(adapter)
    shapes, steps = parts.shapes, dict[str, LowRank]()
    for key, a in adapter.tensors.items():
        if not key.endswith(".lora_A.weight"):
            continue
        module = key.removeprefix(PREFIX).removesuffix(".lora_A.weight")
        b = adapter.tensors.get(key.replace(".lora_A.", ".lora_B."))
        shape = shapes.get(f"{module}.weight")
        if b is None or shape is None or not _fits(a.shape, b.shape, shape):
            found = f"{module}.weight of shape {list(shape)}" if shape else f"no {module}.weight"
            raise SourceError(
                f"the adapter {adapter.folder} holds {key} of shape {list(a.shape)}, but {source.name} has {found}",
                hint="this adapter was trained on another model; name the model it was trained on as source_model",
            )
        steps[f"{module}.weight"] = LowRank(a=a, b=b, scale=lora_scale(adapter, module, rank=a.shape[0]))
    if not steps:
        raise SourceError(
            f"the adapter {adapter.folder} holds no LoRA matrices, expected names ending in .lora_A.weight",
            hint="save it with PEFT's save_pretrained",
        )
    return steps


def strange_keys(source: Source, wanted: re.Pattern[str]) -> list[str]:
    """The adapter's tensors whose name matches `wanted` and that are not half of a LoRA pair."""
    adapter = source.adapter
    if adapter is None:
        return []
    return [
        key
        for key in adapter.tensors
        if wanted.search(key)
        and not key.endswith(".lora_A.weight")
        and not (key.endswith(".lora_B.weight") and key.replace(".lora_B.", ".lora_A.") in adapter.tensors)
    ]


def refuse_strange_keys(source: Source, wanted: re.Pattern[str]) -> None:
    """Raises SourceError for strange keys.

    On the base all names count, because its adapter changes the backbone; on an expert only those of the FFN.
    """
    strange = strange_keys(source, wanted)
    if strange and source.adapter is not None:
        more = f" and {len(strange) - 1} more" if len(strange) > 1 else ""
        raise SourceError(
            f"the adapter {source.adapter.folder} holds {strange[0]}{more}, expected pairs of .lora_A.weight and "
            ".lora_B.weight only",
            hint="merge it into its model with PEFT's merge_and_unload and name that model as the source",
        )


def _fits(a: tuple[int, ...], b: tuple[int, ...], weight: tuple[int, ...]) -> bool:
    """Whether [rank, in] and [out, rank] give a weight [out, in], with rank at least 1."""
    return len(weight) == len(a) == 2 and a[0] > 0 and (a[1], b) == (weight[1], (weight[0], a[0]))


def stored_as(ref: TensorRef | TensorWrite, dtype: str) -> str:
    """The recipe's dtype for floats; integer buffers keep their own."""
    return dtype if ref.dtype in FLOATS else ref.dtype


def dense_writes(source: Source, parts: Anatomy, *, dtype: str) -> tuple[TensorWrite, ...]:
    """A parent as a dense model: every tensor under its own name, merged and with the adapter folded in."""
    tensors = parent_tensors(source)
    found = {name: tensors(name, shape) for name, shape in parts.shapes.items()}
    return tuple(_written(each, name, stored_as(each, dtype)) for name, each in found.items())


def parent_tensors(source: Source) -> ParentTensors:
    """Name and shape -> that tensor of a parent as an input of a merge: with its adapter, and merged itself."""
    if source.merged is not None:
        return _merged_tensors(source.merged)
    loras = adapter_steps(source, anatomy(source))

    def tensor(name: str, shape: tuple[int, ...]) -> TensorRef | TensorWrite:
        ref = source.tensor(name, shape)
        return TensorWrite(name, "F32", shape, (ref,), (loras[name],)) if name in loras else ref

    return tensor


def _merged_tensors(merged: Merged) -> ParentTensors:
    inputs, settings = [parent_tensors(each) for each in merged.inputs], merged.settings

    def tensor(name: str, shape: tuple[int, ...]) -> TensorRef | TensorWrite:
        parts = tuple(each(name, shape) for each in inputs)
        if any(part.dtype not in FLOATS for part in parts):
            return parts[0]  # an integer buffer
        # the seed depends on nothing but the tensor, so that the same merge gives the same expert everywhere
        seed = tensor_seed(merged.seed, (), f"merge/{name}")
        merge = Merge(settings.method, settings.every_weight, settings.scale, settings.density, settings.t, seed)
        write = merged_write(name, "F32", shape, parts, merge)
        return write.inputs[0] if not write.steps else write

    return tensor


def merged_write(
    name: str, dtype: str, shape: tuple[int, ...], inputs: tuple[TensorRef | TensorWrite, ...], merge: Merge
) -> TensorWrite:
    """A merge of tensors; a plain copy where all of them, and the base, are one tensor."""
    if all(each == inputs[0] for each in inputs):
        return _written(inputs[0], name, dtype)
    return TensorWrite(name, dtype, shape, inputs, (merge,))


def _written(what: TensorRef | TensorWrite, name: str, dtype: str) -> TensorWrite:
    return (
        replace(what, name=name, dtype=dtype)
        if isinstance(what, TensorWrite)
        else TensorWrite(name, dtype, what.shape, (what,))
    )
