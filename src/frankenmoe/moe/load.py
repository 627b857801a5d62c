"""Loads a running MoE: a dense transformers model with an MoEBlock in place of every `mlp`.

The virtual and the built form load the same way. Writes nothing.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from frankenmoe.artifact.folder import Routers
from frankenmoe.checkpoint import tensors as checkpoint
from frankenmoe.checkpoint.tensors import Scale, TensorWrite
from frankenmoe.errors import ArtifactError, NumericsError, SourceError
from frankenmoe.moe.adapter import Lora, with_adapter, wrap_linear
from frankenmoe.moe.block import MoEBlock
from frankenmoe.moe.dense import (
    as_tensor,
    fill,
    linear_names,
    load_dense,
    load_tokenizer,
    made_config,
    mlp_modules,
    one_line,
    read_config,
    skeleton,
    source_config,
    torch_dtype,
)
from frankenmoe.moe.device import CPU, Weights, place
from frankenmoe.moe.router import Router
from frankenmoe.moe.trace import RoutingTrace, concat, record
from frankenmoe.planning import ExpertNode
from frankenmoe.planning.bill import distinct_bytes
from frankenmoe.planning.layout import SHARED
from frankenmoe.planning.parts import Parts
from frankenmoe.planning.sources import first_of_folders

Gates = Mapping[str, torch.Tensor]
ROUTERS_AGAIN = "the routers file was changed after it was written: fit the routers or build the artifact again"
# endings of config fields that no `mlp` depends on
OUTSIDE_MLP = ("_token_id", "dtype", "_version", "architectures", "use_cache", "_name_or_path", "rope_parameters")


@dataclass(frozen=True)
class MoE:
    """A running MoE.

    `model` is a transformers PreTrainedModel (forward, generate). `experts` are the experts' names. `folder` contains
    the tokenizer.
    """

    model: PreTrainedModel
    experts: tuple[str, ...]
    folder: Path

    def forward_with_trace(self, input_ids: torch.Tensor, **inputs: Any) -> tuple[Any, RoutingTrace]:
        """The model's output for `input_ids` [B, T], and every router's ids, weights and logits."""
        with record(self.model) as layers:
            out = self.model(input_ids=input_ids, **inputs)
        return out, concat(layers)

    def tokenizer(self) -> Any:
        """The base's tokenizer. SourceError if it has none."""
        return load_tokenizer(self.folder)


def gate_tensors(routers: Routers) -> Gates:
    """An artifact's stored gates as tensors."""
    return {
        name: torch.from_numpy(raw.copy()).view(torch_dtype(kind)).view(shape)
        for name, (kind, shape, raw) in routers.items()
    }


def check_loadable(
    sources: Iterable[tuple[Path, Mapping[str, Any] | None]], *, base: Path, trust_remote_code: bool
) -> None:
    """SourceError if transformers cannot make a generating model from these folders. Reads configs only.

    `sources` are folders, each with None or a config that replaces its config.json.
    """
    for folder, config in sources:
        skeleton(read_config(folder, trust_remote_code=trust_remote_code) if config is None else made_config(config))
    _generation_config(base)


def weights_of(parts: Parts) -> Weights:
    """What the weights take in memory: each source tensor once."""
    leaves = [leaf for node in (*parts.nodes, *parts.shared) for leaf in node.leaves()]
    stored = distinct_bytes([*parts.backbone, *parts.gates.values()], leaves)
    return Weights(stored, torch_dtype(parts.backbone[0].dtype))


def load_parts(
    parts: Parts, gates: Gates, *, dtype: torch.dtype | None = None, device: torch.device = CPU, **options: Any
) -> MoE:
    """A running MoE from parts and gates (name -> [experts, hidden]), on `device`.

    On the CPU, weights stay memory-mapped unless `dtype` converts them. `options` are MoEBlock's: capacity_factor,
    drop_policy. Raises SourceError, ArtifactError or NumericsError for sources, tensors or gates that cannot be used.
    """
    # of several sources in one folder the first one counts; it is not a shared expert
    configs = {source.folder: source_config(source) for source in first_of_folders(parts.sources)}
    config = configs.get(parts.folder) or made_config(parts.config)
    if parts.own_head:
        config.tie_word_embeddings = False
    made = _assemble(parts, config, configs, gates, dtype=dtype, **options)
    place(made.model, device)
    return made


def _assemble(
    parts: Parts,
    config: Any,
    configs: Mapping[Path, Any],
    gates: Gates,
    *,
    dtype: torch.dtype | None,
    **options: Any,
) -> MoE:
    """Loads the backbone as a dense model, then replaces every `mlp` by an MoEBlock."""
    tensor = _tensor_cache(dtype)
    first = next(parts.nodes[0].leaves())
    backbone, loras = low_rank(config, parts.backbone)
    writes = (*backbone, *(write for row in first.ffn.values() for write in row.values()))
    tensors = {write.name: tensor(write) for write in writes}
    model = load_dense(config, tensors, dtype=dtype or tensors[parts.backbone[0].name].dtype)
    for name, lora in loras.items():
        wrap_linear(model, name, *_lora(lora, tensors[f"{name}.weight"].dtype))
    places = mlp_modules(model)
    own = {layer: mlp for layer, (_, mlp) in places.items()}
    shared = made_config(parts.shared_config) if parts.shared_config else None
    pattern = _patterns(config, configs, own, shared=shared)
    make = _block_maker(parts, gates, pattern, tensor, dtype, options)
    for layer, (holder, dense_mlp) in places.items():
        name = next(key for key, module in holder.named_children() if module is dense_mlp)
        setattr(holder, name, make(layer))
    model.generation_config = _generation_config(parts.folder) or model.generation_config
    model.requires_grad_(False)
    head = model.get_output_embeddings()
    if head is not None:
        head.register_forward_pre_hook(_plain_strides)
    return MoE(model=model.eval(), experts=parts.experts, folder=parts.folder)


def _plain_strides(head: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Copies the head's input into contiguous memory.

    Otherwise torch computes a batched product for the last token of a long prompt. That copies the weights of the whole
    vocabulary and takes half of the prefill's time.
    """
    return (inputs[0].clone(memory_format=torch.contiguous_format), *inputs[1:])


def low_rank(
    config: Any, backbone: tuple[TensorWrite, ...]
) -> tuple[tuple[TensorWrite, ...], Mapping[str, checkpoint.LowRank]]:
    """(the backbone's writes without adapter terms, these terms by the name of their linear layer).

    Tensors that are not the weight of one linear layer, such as tied embeddings, keep their term: it is merged.
    """
    terms = {
        write.name.removesuffix(".weight"): step
        for write in backbone
        for step in write.steps
        if isinstance(step, checkpoint.LowRank)
    }
    linears = linear_names(config) if terms else set()
    loras = {name: lora for name, lora in terms.items() if name in linears}
    plain = (
        replace(write, steps=tuple(step for step in write.steps if step is not loras.get(name)))
        for write in backbone
        for name in [write.name.removesuffix(".weight")]
    )
    return tuple(plain), loras


def _lora(lora: checkpoint.LowRank, base: torch.dtype, *, factor: float = 1.0) -> Lora:
    """The adapter's tensors, without rounding, in the smallest dtype that holds both its own and the base's."""
    stored = (as_tensor(TensorWrite(ref.name, ref.dtype, ref.shape, (ref,))) for ref in (lora.a, lora.b))
    a_RI, b_OR = (tensor.to(torch.promote_types(tensor.dtype, base)) for tensor in stored)
    return a_RI, b_OR, lora.scale * factor


def _generation_config(folder: Path) -> GenerationConfig | None:
    file = folder / "generation_config.json"
    try:
        return GenerationConfig.from_pretrained(folder) if file.is_file() else None
    except Exception as error:  # of many classes: transformers uses the values before it checks them
        raise SourceError(
            f"transformers cannot read {file}: {one_line(error)}",
            hint="fetch the file again, or remove it to generate with the defaults",
        ) from error


def _tensor_cache(dtype: torch.dtype | None) -> Callable[[TensorWrite], torch.Tensor]:
    """Write -> tensor. Equal writes give one tensor, so a shared source is loaded and converted once."""

    @cache
    def tensor(write: TensorWrite) -> torch.Tensor:
        found = as_tensor(write)
        return found.to(dtype) if dtype is not None and found.is_floating_point() else found

    return tensor


def _block_maker(
    parts: Parts,
    gates: Gates,
    pattern: Callable[[ExpertNode], Mapping[int, nn.Module]],
    tensor: Callable[[TensorWrite], torch.Tensor],
    dtype: torch.dtype | None,
    options: Mapping[str, Any],
) -> Callable[[int], MoEBlock]:
    """Layer -> its MoEBlock. `pattern` gives an expert's `mlp` modules. Experts of equal content share a module."""
    dense: dict[object, nn.Module] = {}

    def gate(path: tuple[int, ...], layer: int) -> torch.Tensor | None:
        name = parts.router_names(path)[layer]
        found = gates.get(name)
        if found is None:
            if path == SHARED:
                return None
            raise ArtifactError(f"{parts.folder} has no router {name}", hint=ROUTERS_AGAIN)
        hidden = parts.config["hidden_size"]
        if not found.is_floating_point() or found.dim() != 2 or found.shape[1] != hidden:
            raise ArtifactError(
                f"router {name} is {found.dtype} {list(found.shape)}, expected numbers of shape [experts, {hidden}]",
                hint=ROUTERS_AGAIN,
            )
        if not found.isfinite().all():
            raise NumericsError(f"router {name} contains numbers that are not finite", hint=ROUTERS_AGAIN)
        return found.to(dtype) if dtype is not None else found

    def leaf(node: ExpertNode, layer: int) -> nn.Module:
        row, modules = node.ffn[layer], pattern(node)
        key = (id(modules), layer, tuple(row.values()))  # equal weights with another activation are another FFN
        if key not in dense:
            tensors = {suffix: tensor(write) for suffix, write in row.items()}
            dense[key] = fill(modules[layer], tensors)
        loras = {
            suffix.removesuffix(".weight"): _lora(lora, tensor(row[suffix]).dtype, factor=residual_scale(row[suffix]))
            for suffix, lora in node.loras[layer].items()
        }
        return with_adapter(dense[key], loras) if loras else dense[key]

    def block(path: tuple[int, ...], nodes: tuple[ExpertNode, ...], layer: int, top_k: int, **keys: Any) -> MoEBlock:
        gate_ED = gate(path, layer)
        assert gate_ED is not None
        whole = parts.renormalizes or path != ()
        router = Router(gate_ED, top_k=top_k, renormalize=whole, rule=parts.rule)
        experts = [
            block(node.path, node.children, layer, node.top_k) if node.children else leaf(node, layer) for node in nodes
        ]
        return MoEBlock(router, experts, **keys)

    def outer(layer: int) -> MoEBlock:
        shared = {
            "shared": leaf(parts.shared[0], layer) if parts.shared else None,
            "shared_gate": gate(SHARED, layer) if parts.shared else None,
        }
        return block((), parts.nodes, layer, parts.top_k, **shared, **options)

    return outer


def _patterns(
    config: Any, configs: Mapping[Path, Any], own: Mapping[int, nn.Module], *, shared: Any
) -> Callable[[ExpertNode], Mapping[int, nn.Module]]:
    """Expert -> the `mlp` modules of its source's config, to be copied with other weights.

    These are the dense model's modules, `own`, if the configs agree. Another activation, for example, needs others.
    `shared` is the config of the shared expert where it has one of its own.
    """

    @cache
    def modules(folder: Path | None) -> Mapping[int, nn.Module]:
        its = shared if folder is None else configs.get(folder, config)
        return own if its is config or _of_mlp(its) == _of_mlp(config) else skeleton(its)

    def pattern(node: ExpertNode) -> Mapping[int, nn.Module]:
        if shared is not None and node.path[:1] == SHARED:
            return modules(None)
        return own if node.source is None else modules(node.source.folder)

    return pattern


def _of_mlp(config: Any) -> dict[str, Any]:
    """The fields of a config that may affect an `mlp`: all except those that never do."""
    return {key: value for key, value in config.to_dict().items() if not key.endswith(OUTSIDE_MLP)}


def residual_scale(write: TensorWrite) -> float:
    """The factor by which a write scales its weights. Adapters on these weights need the same factor."""
    return math.prod(step.factor for step in write.steps if isinstance(step, Scale))
