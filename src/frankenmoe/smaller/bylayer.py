"""A smaller MoE whose layers keep different experts: a standard checkpoint, adopted as an artifact.

A recipe cannot say this, because an expert of a recipe is one parent in all layers. A standard checkpoint can: it only
needs the same number of experts in each layer. Its experts are slots, filled layer by layer.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from frankenmoe.artifact.folder import ROUTERS, Artifact, Routers, become, growing, write_json, write_routers
from frankenmoe.build.adopt import adopt
from frankenmoe.build.body import compose
from frankenmoe.build.proof import prove_body
from frankenmoe.checkpoint.header import read_header
from frankenmoe.checkpoint.tensors import TensorWrite
from frankenmoe.errors import PlanError
from frankenmoe.planning import ExpertNode, Plan
from frankenmoe.planning.layout import built_writes, router_shapes
from frankenmoe.planning.translate import Translation
from frankenmoe.progress import Progress
from frankenmoe.recipe.sections import SHARD_SIZE
from frankenmoe.smaller.rest import smaller_recipe

REPORT = "prune.json"


def standard(old: Plan) -> Translation:
    """How a plan becomes a standard checkpoint. PlanError if it cannot."""
    if old.translation is None or old.problems or not old.translation.fmt.loads_in_transformers:
        why = "; ".join(old.problems) or "it loads in llama.cpp alone"
        raise PlanError(
            f"only a standard checkpoint can have other experts in each layer, and this MoE cannot be one: {why}",
            hint="leave --per-layer out",
        )
    if old.passed:
        raise PlanError(
            f"--per-layer writes models of text, and {old.translation.fmt.title} reads pictures too",
            hint="leave --per-layer out",
        )
    return old.translation


def plan_by_layer(old: Plan, kept_L: Sequence[Sequence[int]]) -> Plan:
    """The plan of a standard checkpoint that has the experts kept_L[layer] of `old` in each layer.

    Raises PlanError if the MoE has no standard format.
    """
    there = standard(old)
    count = len(kept_L[0])
    nodes = tuple(_slot(old, index, [kept[index] for kept in kept_L]) for index in range(count))
    fmt = there.fmt
    translation = Translation(fmt, there.family, old.base.config, count)
    gated = old.gated_shared
    return replace(
        old,
        recipe=smaller_recipe(old, kept_L[0]),
        translation=translation,
        nodes=nodes,
        groups=built_writes(translation, old.backbone, nodes, old.shared, gated_shared=gated, dtype=old.dtype),
        routers=router_shapes(fmt, layers=old.expert_layers, hidden=old.hidden, nodes=nodes, gated_shared=gated),
        extracted={},
    )


def _slot(old: Plan, index: int, experts: Sequence[int]) -> ExpertNode:
    """A place among the experts of every layer; it has the name of its expert if that is the same in all layers."""
    name = old.nodes[experts[0]].name if len(set(experts)) == 1 else f"expert-{index}"
    chosen = dict(zip(old.expert_layers, experts, strict=True))
    ffn = {layer: old.nodes[expert].ffn[layer] for layer, expert in chosen.items()}
    loras = {layer: old.nodes[expert].loras[layer] for layer, expert in chosen.items()}
    return ExpertNode(name, (index,), old.nodes[experts[0]].source, ffn, loras)


def write_by_layer(
    made: Plan, routers: Routers, out: Path, *, report: Mapping[str, Any], progress: Progress
) -> Artifact:
    """Writes the checkpoint of a plan of `plan_by_layer` to `out` with its gates and the report, and adopts it."""
    with TemporaryDirectory(prefix="frankenmoe-gates-") as scratch:
        write_routers(Path(scratch), routers)
        refs = read_header(Path(scratch) / ROUTERS)
        gates = tuple(TensorWrite(name, ref.dtype, ref.shape, (ref,)) for name, ref in refs.items())
        # among the weights, as in other programs' checkpoints
        whole = replace(made, groups=(*made.groups, gates), routers={})
        digest = hashlib.sha256(repr((made.groups, [raw.tobytes() for *_, raw in routers.values()])).encode())
        with growing(out, digest=f"{digest.hexdigest()}/prune") as partial:
            progress.start("writing", sum(write.nbytes for write in whole.writes), "B")
            compose(whole, partial, shard_size=SHARD_SIZE, on_bytes=progress.advance)
            prove_body(whole, partial, sampled=True, on_bytes=lambda amount: None)
            write_json(partial / REPORT, report)
            become(partial, out)
    return adopt(out, progress=progress).artifact
