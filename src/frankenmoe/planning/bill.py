"""What an MoE costs: parameters, bytes on disk, memory, KV cache."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from frankenmoe.checkpoint.tensors import DTYPES, TensorRef, TensorWrite
from frankenmoe.families.llamacpp import FILE_TYPES, MixFacts, row_bytes, tensor_type
from frankenmoe.families.places import ROUTER, gguf_name
from frankenmoe.planning.configs import odd_heads
from frankenmoe.planning.sources import Source
from frankenmoe.planning.tree import ExpertNode

KV_BYTES = 2  # a 16-bit cache


@dataclass(frozen=True, slots=True)
class Bill:
    """Counts in parameters, sizes in bytes. Sizes of forms that the MoE cannot have are None."""

    total: int
    active: int
    shared: int
    per_expert: int
    built: int | None
    virtual: int
    memory_built: int | None
    memory_virtual: int
    memory_q4_0: int | None
    memory_q5_0: int | None
    kv_per_token: int

    @property
    def on_disk(self) -> int:
        """Bytes of the built form, or of the virtual one if there is no other."""
        return self.virtual if self.built is None else self.built

    def to_dict(self) -> dict[str, Any]:
        """The three tables of the plan's JSON: parameters, bytes and memory."""
        flat = asdict(self)
        return {
            "parameters": {key: flat[key] for key in ("total", "active", "shared", "per_expert")},
            "bytes": {"built": self.built, "virtual": self.virtual},
            "memory": {
                "built": self.memory_built,
                "virtual": self.memory_virtual,
                "q4_0": self.memory_q4_0,
                "q5_0": self.memory_q5_0,
                "kv_per_token": self.kv_per_token,
            },
        }


def make_bill(
    *,
    backbone: Iterable[TensorWrite],
    nodes: tuple[ExpertNode, ...],
    extra: Iterable[TensorWrite],
    passed: Sequence[TensorWrite],
    routers: Mapping[str, tuple[int, int]],
    top_k: int,
    itemsize: int,
    kv_numbers: int,
    small_files: int,
    stock: bool,
) -> Bill:
    """Adds everything up.

    `extra` are the shared expert and the zeros that a format requires, `passed` what a token of text does not use: the
    part that reads pictures, which only the built form has. `kv_numbers` are the cached numbers per token over all
    layers, `small_files` the bytes of tokenizer, configs and router statistics. `stock`: it fits a stock format.
    """
    static = [*backbone, *extra]
    router_parameters = sum(math.prod(shape) for shape in routers.values())
    shared = sum(write.numel for write in static) + router_parameters
    experts = [expert_parameters(node) for node in nodes]
    total = shared + sum(experts) + sum(write.numel for write in passed)
    leaves = [leaf for node in nodes for leaf in node.leaves()]
    sizes = sorted((active_parameters(node) for node in nodes), reverse=True)
    folded = [write for leaf in leaves for write in leaf.folded_writes()]
    shapes = [(write.name, write.shape) for write in (*static, *folded)] + list(routers.items())
    body = sum(write.nbytes for write in (*static, *folded, *passed))
    router_bytes = router_parameters * itemsize
    return Bill(
        total=total,
        active=shared + sum(sizes[:top_k]),
        shared=shared,
        per_expert=max(experts),
        built=body + router_bytes + small_files if stock else None,
        virtual=router_bytes + small_files,
        memory_built=body + router_bytes if stock else None,
        memory_virtual=distinct_bytes(static, leaves) + router_bytes,
        memory_q4_0=gguf_bytes(shapes, "Q4_0", experts=len(nodes)) if stock else None,
        memory_q5_0=gguf_bytes(shapes, "Q5_0", experts=len(nodes)) if stock else None,
        kv_per_token=kv_numbers * KV_BYTES,
    )


def expert_parameters(node: ExpertNode) -> int:
    """Parameters of all FFNs below a node, without its routers."""
    return sum(write.numel for leaf in node.leaves() for row in leaf.ffn.values() for write in row.values())


def active_parameters(node: ExpertNode) -> int:
    """Parameters that one token uses in a node: all of a leaf, the largest top-k children of a mixture."""
    if not node.children:
        return expert_parameters(node)
    return sum(sorted(map(active_parameters, node.children), reverse=True)[: node.top_k])


def distinct_bytes(static: Iterable[TensorWrite], leaves: Iterable[ExpertNode]) -> int:
    """Bytes of a virtual MoE in memory: each source tensor once, and each computed tensor."""
    writes = [*static, *(write for leaf in leaves for row in leaf.ffn.values() for write in row.values())]
    loras = [lora for leaf in leaves for row in leaf.loras.values() for lora in row.values()]
    copied = (write.copied or write for write in writes)
    # a reference without weights has no bytes, but the write that copies it knows how many there will be
    sizes = {_place(each): write.nbytes for each, write in zip(copied, writes, strict=True)}
    factors = (ref for lora in loras for ref in (lora.a, lora.b))
    return sum((sizes | {_place(ref): ref.numel * DTYPES[ref.dtype].itemsize for ref in factors}).values())


def _place(what: TensorRef | TensorWrite) -> object:
    return (what.file, what.start, what.name) if isinstance(what, TensorRef) else what


def gguf_bytes(shapes: Iterable[tuple[str, tuple[int, ...]]], kind: str, *, experts: int) -> int:
    """Bytes of a GGUF file of a plain type such as Q4_0; `shapes` are dense names and shapes of all tensors.

    Tensors that llama.cpp does not support count too; `forecast` says which files can be written.
    """
    named = [(name, shape or (1,)) for name, shape in shapes]  # activations may have learned scalars
    facts = MixFacts(layers=1, experts=experts, tied=all(name != "lm_head.weight" for name, _ in named))
    types = [tensor_type(_file_name(name), shape, FILE_TYPES[kind.lower()], facts) for name, shape in named]
    return sum(
        math.prod(shape[:-1]) * row_bytes(found, shape[-1]) for (_, shape), found in zip(named, types, strict=True)
    )


def _file_name(name: str) -> str:
    return ROUTER if name.endswith("gate.weight") else gguf_name(name) or name


def statistics_bytes(routers: Mapping[str, tuple[int, int]]) -> int:
    """Bytes of the statistics of fitted routers: per router a triangle of second moments and the means, in float64."""
    return sum(8 * (hidden * (hidden + 1) // 2 + experts * hidden) for experts, hidden in routers.values())


def kv_numbers(base: Source) -> int:
    """Cached numbers per token: keys and values of every layer."""
    config = base.config
    if base.family is not None:
        return 2 * base.family.dims(config).cached
    head_dim = int(config.get("head_dim") or int(config["hidden_size"]) // int(config["num_attention_heads"]))
    return 2 * int(config["num_hidden_layers"]) * odd_heads(config) * head_dim


def billions(count: int) -> str:
    """A parameter count such as 3.43B or 160.00M."""
    return f"{count / 1e9:.2f}B" if count >= 10**9 else f"{count / 1e6:.2f}M"
