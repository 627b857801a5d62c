"""The tensors of an MoE under dense names, from a plan or from a built artifact. Does not import torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from frankenmoe.artifact.folder import Artifact, check_no_stray
from frankenmoe.checkpoint.reader import open_checkpoint
from frankenmoe.checkpoint.tensors import Constant, TensorRef, TensorWrite
from frankenmoe.errors import ArtifactError, PlanError
from frankenmoe.families import FAMILIES, FORMATS, SOFTMAX, Family, MoEFormat
from frankenmoe.families.mixtures import of_width, rule_in
from frankenmoe.families.spec import RouterRule
from frankenmoe.families.values import odd_value
from frankenmoe.families.words import DOWN
from frankenmoe.planning.compare import licence, one_for_all, shared_licence
from frankenmoe.planning.layout import SHARED, router_names
from frankenmoe.planning.plan import Plan
from frankenmoe.planning.siblings import is_shared
from frankenmoe.planning.sources import Source
from frankenmoe.planning.stored import stored, stored_backbone, stored_ffn
from frankenmoe.planning.translate import Translation
from frankenmoe.planning.tree import ExpertNode, expert_layers


@dataclass(frozen=True)
class Parts:
    """What loading, exporting, extracting and training need to know of an MoE.

    `config` is that of the dense base. `folder` holds the tokenizer and generation settings. `sources` are those whose
    configs give the experts' activations; empty for a built artifact. `gates` are zeros until routers are made. `rule`
    says how the gate's scores become weights. `shared_config` is that of a dense model with the shared expert, where
    its width is another than that of the routed ones. `outer` is the config of the model that the MoE is nested in, if
    it is. `about` goes into the metadata of exported files.
    """

    name: str
    fmt: MoEFormat | None
    family: Family | None
    config: Mapping[str, Any]
    folder: Path
    layers: int
    backbone: tuple[TensorWrite, ...]
    nodes: tuple[ExpertNode, ...]
    shared: tuple[ExpertNode, ...]
    gates: Mapping[str, TensorWrite]
    gated_shared: bool
    top_k: int
    rule: RouterRule = SOFTMAX
    shared_config: Mapping[str, Any] | None = None
    outer: Mapping[str, Any] | None = None
    sources: tuple[Source, ...] = ()
    own_head: bool = False
    trust_remote_code: bool = False
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def experts(self) -> tuple[str, ...]:
        """The names of the routed experts."""
        return tuple(node.name for node in self.nodes)

    @property
    def stock(self) -> tuple[MoEFormat, Family]:
        """The stock format and the dense family. PlanError if the MoE has none."""
        if self.fmt is None or self.family is None:
            raise PlanError(f"{self.name} fits no stock format", hint="use the virtual form")
        return self.fmt, self.family

    @cached_property
    def translation(self) -> Translation:
        """From the dense tensors to the format's. PlanError if the MoE has none."""
        return Translation(*self.stock, self.config, len(self.nodes))

    @property
    def renormalizes(self) -> bool:
        """Whether the weights of the selected experts are scaled to sum to one."""
        return self.rule.renormalizes(self.top_k)

    @property
    def normalizes(self) -> bool | None:
        """The same; None if every expert is selected, because then both ways give equal weights."""
        return None if self.top_k == len(self.nodes) else self.renormalizes

    @property
    def shared_kind(self) -> str:
        return "gated" if self.shared and self.gated_shared else "plain" if self.shared else "none"

    @property
    def expert_layers(self) -> tuple[int, ...]:
        """The numbers of the layers with experts: those that have an FFN."""
        return expert_layers(self.nodes)

    def router_names(self, path: tuple[int, ...]) -> dict[int, str]:
        """Layer -> the name of the router at a path of nested experts; SHARED is the gate of the shared expert."""
        return router_names(self.fmt, layers=self.expert_layers, path=path)

    def with_gates(self, refs: Mapping[str, TensorRef]) -> "Parts":
        """The same MoE with the gates stored in `refs`. ArtifactError if one is missing."""
        return replace(self, gates={name: stored(refs, name, name) for name in self.gates})


def parts_of_plan(plan: Plan) -> Parts:
    """The parts of a plan, with gates of zeros. The sources may lack weights, which sizes do not need."""
    return Parts(
        name=plan.recipe.name or Path(plan.recipe.origin).stem or "moe",
        fmt=plan.fmt,
        family=plan.base.family,
        config=plan.base.config,
        folder=plan.base.folder,
        layers=plan.layers,
        backbone=plan.backbone,
        nodes=plan.nodes,
        shared=plan.shared,
        gates={
            name: TensorWrite(name, plan.dtype, shape, (), (Constant(0.0),)) for name, shape in plan.routers.items()
        },
        gated_shared=plan.gated_shared,
        top_k=plan.recipe.experts_per_token,
        rule=plan.rule,
        shared_config=next(
            (node.source.config for node in plan.shared if node.source and is_shared(node.source)), None
        ),
        outer=plan.base.checkpoint.outer if plan.passed else None,
        sources=plan.sources,
        own_head=plan.base.own_head,
        trust_remote_code=plan.trust_remote_code,
        about={"licence": _licence(plan), "recipe_digest": plan.recipe.digest},
    )


def sharing_equal_experts(parts: Parts, plan: Plan) -> Parts:
    """The same parts, with experts that are equal in every byte read from the same tensors."""
    return replace(parts, nodes=one_for_all(parts.nodes, plan.identical_experts))


def parts_of_built(artifact: Artifact) -> Parts:
    """The parts of a built artifact. ArtifactError if its record or its tensors are damaged."""
    check_no_stray(artifact.folder)
    opened = open_checkpoint(artifact.folder)
    record, tensors = artifact.record, opened.tensors
    config = record["base_config"]
    fmt, family = FORMATS.get(record["format"]), FAMILIES.get(str(config.get("model_type")))
    odd = odd_value(family, config) if family else "is of an unknown family"
    if fmt is None or family is None or odd is not None:
        wrong = "an unknown format" if fmt is None else f"a base_config that {odd}"
        raise ArtifactError(
            f"the record of {artifact.folder} has {wrong}", hint="the record was edited; build the artifact again"
        )
    gated = fmt.shared_gate is not None and fmt.shared_gate.format(layer=0) in artifact.routers
    there = Translation(fmt, family, config, len(record["experts"]))
    shared_config = _shared_config(there, tensors) if record["shared_experts"] else None

    def expert(name: str, path: tuple[int, ...], templates: Mapping[str, tuple[str, ...]], index: int) -> ExpertNode:
        beside = path[: len(SHARED)] == SHARED
        halved = beside and fmt.shared_gate is not None and not gated
        into = replace(there, config=shared_config) if beside and shared_config else there
        rows = stored_ffn(tensors, into, templates, index=index, halved=halved)
        return ExpertNode(name, path, None, rows, {layer: {} for layer in rows})

    shared = tuple(expert(name, (*SHARED, 0), fmt.shared, 0) for name in record["shared_experts"])
    return Parts(
        name=record.get("name") or artifact.folder.resolve().name,
        fmt=fmt,
        family=family,
        config=config,
        folder=artifact.folder,
        layers=family.dims(config).layers,
        backbone=stored_backbone(tensors, there),
        nodes=tuple(expert(name, (index,), fmt.expert, index) for index, name in enumerate(record["experts"])),
        shared=shared,
        gates={name: stored(tensors, name, name) for name in artifact.routers},
        gated_shared=gated,
        top_k=record["experts_per_token"],
        rule=rule_in(fmt, opened.config),
        shared_config=shared_config,
        outer=opened.config if fmt.inside else None,
        about={"licence": licence(artifact.folder), "recipe_digest": record.get("recipe_digest")},
    )


def _shared_config(there: Translation, tensors: Mapping[str, TensorRef]) -> dict[str, Any] | None:
    """The config of a dense model with the shared expert, if its width is another than that of the routed ones."""
    down = next(name for name, suffixes in there.fmt.shared.items() if suffixes == DOWN)
    ref = tensors.get(down.format(layer=0))
    return of_width(there.fmt, there.config, ref.shape[-1]) if ref and ref.shape[-1] != there.dims.ffn else None


def _licence(plan: Plan) -> str | None:
    """The licence for exported files: the one in the recipe's card, else the one that all sources share."""
    folders = [source.folder for source in plan.sources]
    folders += [source.adapter.folder for source in plan.sources if source.adapter is not None]
    declared = plan.recipe.card.license if plan.recipe.card else None
    return declared or shared_licence([licence(folder) for folder in dict.fromkeys(folders)])
