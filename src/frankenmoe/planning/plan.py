"""Recipe + headers -> Plan: every tensor to write, what stays unused and why, the bill and the warnings.

Reads config.json and safetensors headers only. Writes nothing. Does not import torch.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from frankenmoe.checkpoint.hub import local_path
from frankenmoe.checkpoint.peft import CONFIG
from frankenmoe.checkpoint.tensors import TensorRef, TensorWrite
from frankenmoe.errors import PlanError
from frankenmoe.families import MoEFormat, moe_config
from frankenmoe.families.spec import RouterRule
from frankenmoe.planning.asadapter import Extracted, extracted_adapters, savings
from frankenmoe.planning.backbone import Choice, backbone_writes, choose, lost_differences
from frankenmoe.planning.bill import Bill, kv_numbers, make_bill, statistics_bytes
from frankenmoe.planning.compare import (
    COMPARE_LIMIT,
    compared_whole,
    identical_groups,
    licence,
    licence_warnings,
    same_expert,
    source_warnings,
    spare_warnings,
)
from frankenmoe.planning.distance import Distance, distances
from frankenmoe.planning.files import check_small_files, deciding_files, small_files, states
from frankenmoe.planning.heads import with_own_head
from frankenmoe.planning.layout import (
    LAYOUT_VERSION,
    SHARED,
    built_writes,
    choose_format,
    expert_conflicts,
    extra_writes,
    format_notes,
    gates_shared,
    lost_in,
    misfits,
    router_shapes,
    rule_of,
    stored_dtype,
    without_weights,
)
from frankenmoe.planning.mixture import opened_sources
from frankenmoe.planning.siblings import check_ffns, check_siblings
from frankenmoe.planning.sources import Source, anatomy, check_tensors
from frankenmoe.planning.trained import check_used, nodes_with_trained, open_trained, with_trained
from frankenmoe.planning.translate import Translation
from frankenmoe.planning.tree import ExpertNode, expert_nodes, ffn_writes
from frankenmoe.planning.unused import unused_tensors
from frankenmoe.planning.vocabulary import with_rows_of
from frankenmoe.progress import SILENT, Progress
from frankenmoe.recipe import DOMAIN_MODES, FIT_MODES, Recipe


@dataclass(frozen=True)
class Plan:
    """What a recipe becomes. `problems` are reasons why it cannot be built; it may still be virtual.

    `nodes` and `shared` are the experts as tensor writes under dense names, `backbone` all other tensors, `groups` the
    built weights in byte order, `routers` the shape (experts, hidden) of every gate by name. `identical_sampled` is
    True if some identical experts (or the base) are so large that only blocks of them were compared. `measured` is the
    report on how the backbone was chosen, if it was by measurement. `carried`: the recipe's `trained` file is a
    temporary one, so an artifact gets a copy.
    """

    recipe: Recipe
    translation: Translation | None
    base: Source
    sources: tuple[Source, ...]
    dtype: str
    layers: int
    hidden: int
    nodes: tuple[ExpertNode, ...]
    shared: tuple[ExpertNode, ...]
    gated_shared: bool
    backbone: tuple[TensorWrite, ...]
    groups: tuple[tuple[TensorWrite, ...], ...]
    routers: Mapping[str, tuple[int, int]]
    identical_experts: tuple[tuple[int, ...], ...]
    equals_base: bool
    identical_sampled: bool
    unused: tuple[tuple[str, str, str], ...] = field(repr=False)
    choice: Choice
    distances: tuple[Distance, ...] = ()
    trained: tuple[TensorRef, ...] = field(default=(), repr=False)
    extracted: Mapping[tuple[int, ...], Extracted] = field(default_factory=dict, repr=False)
    measured: Mapping[str, Any] | None = field(default=None, repr=False)
    carried: bool = False
    warnings: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()

    @property
    def fmt(self) -> MoEFormat | None:
        """The stock format, if it fits one."""
        return self.translation.fmt if self.translation is not None else None

    @property
    def rule(self) -> RouterRule:
        """How the gates' scores become weights."""
        return rule_of(self.fmt, self.base)

    @property
    def trust_remote_code(self) -> bool:
        """Whether Python code found in a source may run."""
        return self.base.trust_remote_code

    @property
    def backbone_open(self) -> bool:
        """Whether text and a running model must decide how the backbone is made, before the MoE is."""
        return self.choice.open

    @property
    def experts(self) -> int:
        return len(self.nodes)

    @property
    def all_identical(self) -> bool:
        """Whether all experts have the same weights, so that routers make no difference."""
        return self.experts > 1 and any(len(group) == self.experts for group in self.identical_experts)

    @property
    def all_extracted(self) -> bool:
        """Whether every adapter that `as_adapter` asks for is there."""
        return all(each.there for each in self.extracted.values())

    @cached_property
    def writes(self) -> tuple[TensorWrite, ...]:
        """The tensors of a built body, in byte order."""
        return tuple(write for group in self.groups for write in group)

    @property
    def dtype_name(self) -> str:
        """torch's name of the stored dtype."""
        return {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}[self.dtype]

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json of the built MoE. PlanError if it fits no format."""
        if self.translation is None:
            raise PlanError(f"this MoE cannot be built: {'; '.join(self.problems)}", hint="use the virtual form")
        return moe_config(
            self.translation.fmt,
            self.translation.family,
            self.base.config,
            experts=self.experts,
            experts_per_token=self.recipe.experts_per_token,
            shared_ffn=self.translation.width(self.shared[0]) if self.shared else 0,
            dtype=self.dtype_name,
            rule=self.rule,
            by_domain=self.recipe.gate_mode in DOMAIN_MODES,
        )

    @cached_property
    def bill(self) -> Bill:
        """Parameters and bytes."""
        fitted = self.recipe.gate_mode in FIT_MODES and self.recipe.routers is None
        return make_bill(
            backbone=self.backbone,
            nodes=self.nodes,
            extra=extra_writes(self.translation, self.groups, self.backbone, self.nodes, self.shared),
            routers=self.routers,
            top_k=self.recipe.experts_per_token,
            itemsize=4 if self.dtype == "F32" else 2,
            kv_numbers=kv_numbers(self.base),
            small_files=sum(file.stat().st_size for file in small_files(self.base))
            + sum(each.bytes for each in self.extracted.values())
            + (statistics_bytes(self.routers) if fitted else 0),
            stock=not misfits(self.problems),
        )

    @cached_property
    def digest(self) -> str:
        """Identifies the plan: recipe, dtype, layout and source files, as they were at the first call."""
        return self.digest_now()

    def digest_now(self) -> str:
        """The digest of the current files: weight files by size and time, small files by content."""
        given = () if self.routers_file is None else (self.routers_file,)
        files = states(self.source_files, (*self.deciding_files, *given))
        facts = [LAYOUT_VERSION, self.recipe.digest, self.dtype, self.fmt.name if self.fmt else None, files]
        if not self.choice.from_base:
            facts.append(str(self.choice))
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    @property
    def source_files(self) -> tuple[Path, ...]:
        """Every weight file that the plan reads from."""
        adapters = [source.adapter for source in self.sources if source.adapter is not None]
        files = [file for source in self.sources for file in source.checkpoint.files]
        files += [ref.file for adapter in adapters for ref in adapter.tensors.values()]
        # one for each expert, also if two have equal ones, as an artifact has a copy for each
        extracted = (file for each in self.extracted.values() for file in each.files)
        return (*dict.fromkeys(files), *extracted, *dict.fromkeys(ref.file for ref in self.trained))

    @property
    def routers_file(self) -> Path | None:
        """The file named by the recipe's `routers`, if any."""
        return None if self.recipe.routers is None else local_path(self.recipe.routers, folder=self.recipe.folder)

    @property
    def small_files(self) -> tuple[Path, ...]:
        """Tokenizer, chat template and generation settings of the base, which are copied unchanged."""
        return small_files(self.base)

    @property
    def deciding_files(self) -> tuple[Path, ...]:
        """Every config and small file that the plan depends on."""
        configs = [each.adapter.folder / CONFIG for each in self.extracted.values() if each.there]
        return (*deciding_files(self.base, self.sources), *configs)

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain data, as `frankenmoe plan --json` prints it."""
        return {
            "name": self.recipe.name,
            "format": self.fmt.name if self.fmt else None,
            "buildable": not self.problems,
            "dtype": self.dtype_name,
            "layers": self.layers,
            "experts": self.experts,
            "experts_per_token": self.recipe.experts_per_token,
            **self.bill.to_dict(),
            "identical_experts": [list(group) for group in self.identical_experts],
            "equals_base": self.equals_base,
            "backbone": self.choice.to_dict() | {"distances": [each.to_dict() for each in self.distances]},
            "identical_sampled": self.identical_sampled,
            "as_adapter": savings(self.extracted, (*self.nodes, *self.shared)),
            "warnings": list(self.warnings),
            "problems": list(self.problems),
            "writes": len(self.routers) + (0 if self.bill.built is None else len(self.writes)),
            "unused": [{"source": source, "tensor": name, "reason": why} for source, name, why in self.unused],
            "sources": [
                {"name": str(source.name), "folder": str(source.folder), "licence": licence(source.folder)}
                for source in self.sources
            ],
            "disk": {"need": self.bill.on_disk, "free": shutil.disk_usage(Path.cwd()).free},
        }

    def __str__(self) -> str:
        """A summary of a few lines, for notebooks."""
        bill, form = self.bill, "virtual" if self.bill.built is None else "built"
        return (
            f"{self.recipe.name or 'MoE'}: {self.fmt.title if self.fmt else 'virtual only'}, {self.layers} layers, "
            f"{self.experts} experts, top-{self.recipe.experts_per_token}, {self.dtype_name}\n"
            f"{bill.total:,} parameters, {bill.active:,} active per token; {bill.on_disk / 2**30:.2f} GiB as "
            f"{form}, {bill.memory_virtual / 2**30:.2f} GiB in memory as virtual\n"
            + "\n".join(f"warning: {text}" for text in self.warnings)
        )


def plan(
    recipe: Recipe,
    *,
    dtype: str | None = None,
    weights: bool = False,
    trust_remote_code: bool = False,
    extract: bool = True,
    inside: Path | None = None,
    progress: Progress = SILENT,
) -> Plan:
    """Plans a recipe. `dtype` overrides the recipe's. `weights=True` downloads and requires weights, not only configs.

    With weights and `extract`, adapters of `as_adapter` experts are extracted into the user's cache, unless it or the
    artifact `inside` has them. Raises RecipeError, SourceError or PlanError if not even a virtual MoE is possible.
    """
    opened = opened_sources(recipe, weights=weights, trust_remote_code=trust_remote_code)
    opened = {key: with_own_head(one, limit=None if weights else COMPARE_LIMIT) for key, one in opened.items()}
    base = opened[(str(recipe.base_model), None)]
    opened = {key: with_rows_of(base, one) for key, one in opened.items()}
    check_small_files(base)
    others = [source for source in opened.values() if source is not base]
    check_siblings(base, others)
    parts = {key: (source, anatomy(source)) for key, source in opened.items()}
    for source, found in parts.values():
        check_tensors(source, found)
    base_pair = parts[(str(recipe.base_model), None)]
    base_parts = base_pair[1]
    check_ffns(base_pair, parts.values())
    if len(recipe.shared_experts) > 1:
        raise PlanError(
            f"the recipe has {len(recipe.shared_experts)} shared experts, expected at most one",
            hint="make the others routed experts",
        )
    stored = stored_dtype(dtype or recipe.dtype or base.dtype)
    trained = open_trained(recipe)
    extracted = extracted_adapters(recipe, parts, may=weights and extract, inside=inside, progress=progress)
    adapters = {path: each.adapter for path, each in extracted.items()}
    made_of = partial(expert_nodes, recipe, sources=parts, dtype=stored, extracted=adapters)
    nodes = nodes_with_trained(made_of(experts=recipe.experts), trained)
    shared = nodes_with_trained(made_of(experts=recipe.shared_experts, path=SHARED), trained)
    fmt, problems = choose_format(recipe, base)
    to = Translation(fmt, base.family, base.config, len(nodes)) if fmt is not None and base.family is not None else None
    if to is not None:
        problems = (*problems, *expert_conflicts(to, nodes, shared), *lost_in(stored, base))
    problems = (*problems, *without_weights(opened.values()))
    gated = gates_shared(recipe, fmt)
    apart = distances(base_pair, nodes)
    choice = choose(recipe, base_pair, nodes, apart)
    writes = backbone_writes(recipe, base, base_parts, nodes=nodes, by_group=choice.by_group, dtype=stored)
    backbone = with_trained(writes, trained)
    check_used(recipe, trained, backbone=backbone, nodes=(*nodes, *shared))
    groups = built_writes(to, backbone, nodes, shared, gated_shared=gated, dtype=stored) if to is not None else ()
    layers, hidden = len(base_parts.ffn), int(base.config["hidden_size"])
    routers = router_shapes(fmt, layers=layers, hidden=hidden, nodes=nodes, gated_shared=gated)
    identical = identical_groups(nodes)
    base_node = ExpertNode("base", (), base, *ffn_writes(base, base_parts, dtype=stored))
    whole = rule_of(fmt, base).renormalizes(recipe.experts_per_token)
    plain = whole and not shared and choice.from_base and backbone == writes
    equals_base = plain and all(same_expert(leaf, base_node) for node in nodes for leaf in node.leaves())
    made = Plan(
        recipe=recipe,
        translation=to,
        base=base,
        sources=tuple(opened.values()),
        dtype=stored,
        layers=layers,
        hidden=hidden,
        nodes=nodes,
        shared=shared,
        gated_shared=gated,
        backbone=backbone,
        groups=groups,
        routers=routers,
        identical_experts=tuple(map(tuple, identical)),
        equals_base=equals_base,
        identical_sampled=not all(
            compared_whole(nodes[group[0]], nodes[index]) for group in identical for index in group[1:]
        )
        or (equals_base and not all(compared_whole(leaf, base_node) for node in nodes for leaf in node.leaves())),
        unused=unused_tensors(
            parts.values(),
            base=base,
            by_group=choice.by_group,
            trained=bool(trained),
            nodes=(*nodes, *shared),
            backbone=backbone,
        ),
        trained=tuple(trained.values()),
        extracted=extracted,
        choice=choice,
        distances=apart,
        problems=problems,
    )
    return _with_warnings(made, others)


def _with_warnings(made: Plan, others: list[Source]) -> Plan:
    warnings = (*_identity_warnings(made), *_own_warnings(made), *source_warnings(made.base, others))
    return replace(made, warnings=warnings)


def _identity_warnings(made: Plan) -> list[str]:
    same = "identical in every block compared" if made.identical_sampled else "bit-identical"
    if made.all_identical:
        computes = "its base" if made.equals_base else "one dense model"
        return [
            f"all {made.experts} experts are {same}: this MoE computes {'' if made.identical_sampled else 'exactly '}"
            f"{computes}, whatever its routers are, even trained ones; break the symmetry with "
            "noise_relative (such as 0.01) or adapters, then train"
        ]
    return spare_warnings(made.nodes, made.identical_experts, same=same)


def _own_warnings(made: Plan) -> list[str]:
    recipe, found = made.recipe, list(made.recipe.notes)
    fmt = None if misfits(made.problems) else made.fmt
    if not made.trained:  # training, or regmean, has replaced tensors of the backbone
        found.extend(lost_differences(made.choice, made.distances))
    if fmt is not None and not fmt.loads_in_transformers:
        found.append(f"{fmt.title} loads in llama.cpp and frankenmoe; transformers and vLLM need remote code for it")
    if fmt is not None and fmt.inert_shared_ffn and not made.shared:
        found.append(f"{fmt.title} must have a shared expert: one of {fmt.inert_shared_ffn} zero neurons is written")
    if made.base.own_head:
        found.append(
            f"{made.base.name} sets tie_word_embeddings, but its stored lm_head.weight differs from its embeddings; "
            "the stored head is used, as in transformers, and the MoE is untied"
        )
    if fmt is not None and made.base.family is not None:
        found.extend(format_notes(fmt, made.base, made.base.family, experts=made.experts, recipe=recipe))
    if made.shared and all(expert.residual_scale is None for expert in (*recipe.experts, *recipe.shared_experts)):
        found.append(
            "shared and routed experts add up to about two FFNs; residual_scale: 0.5 on all experts corrects this"
        )
    if recipe.experts_per_token == 1 and made.experts > 1 and made.rule.renormalizes(1):
        found.append(
            "with one expert per token its weight is always 1, so a language-model loss cannot train the routers"
        )
    found += [each.warning for each in made.extracted.values() if not each.certain]
    found += licence_warnings(made.sources)
    return found
