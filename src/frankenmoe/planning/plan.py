"""What a recipe becomes: a Plan, with what follows from it. `make.py` makes it. Does not import torch."""

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from frankenmoe.checkpoint.hub import local_path
from frankenmoe.checkpoint.peft import CONFIG
from frankenmoe.checkpoint.tensors import TensorRef, TensorWrite
from frankenmoe.counted import counted
from frankenmoe.errors import PlanError
from frankenmoe.families import MoEFormat, moe_config
from frankenmoe.families.spec import RouterRule
from frankenmoe.planning.asadapter import Extracted, savings
from frankenmoe.planning.backbone import Choice
from frankenmoe.planning.bill import Bill, kv_numbers, make_bill, statistics_bytes
from frankenmoe.planning.compare import (
    licence,
)
from frankenmoe.planning.distance import Distance
from frankenmoe.planning.files import deciding_files, small_files, states
from frankenmoe.planning.layout import (
    LAYOUT_VERSION,
    extra_writes,
    misfits,
    router_names,
    rule_of,
)
from frankenmoe.planning.sources import Source
from frankenmoe.planning.translate import Translation
from frankenmoe.planning.tree import ExpertNode, expert_layers
from frankenmoe.recipe import DOMAIN_MODES, FIT_MODES, Recipe


@dataclass(frozen=True)
class Plan:
    """What a recipe becomes. `problems` are reasons why it cannot be built; it may still be virtual.

    `nodes` and `shared` are the experts as tensor writes under dense names, `backbone` all other tensors of the
    language model, `passed` those of what is around it, which only a built MoE has. `groups` are the built weights in
    byte order, `routers` the shape (experts, hidden) of every gate by name. `identical_sampled` is True if some
    identical experts (or the base) are so large that only blocks of them were compared. `measured` is the report on how
    the backbone was chosen, if it was by measurement. `carried`: the recipe's `trained` file is a temporary one, so an
    artifact gets a copy.
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
    passed: tuple[TensorWrite, ...]
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
    def expert_layers(self) -> tuple[int, ...]:
        """The numbers of the layers with experts: those that have an FFN."""
        return expert_layers(self.nodes)

    def router_names(self, path: tuple[int, ...]) -> dict[int, str]:
        """Layer -> the name of the router at a path of nested experts; SHARED is the gate of the shared expert."""
        return router_names(self.fmt, layers=self.expert_layers, path=path)

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
            outer=self.base.checkpoint.outer,
        )

    @cached_property
    def bill(self) -> Bill:
        """Parameters and bytes."""
        fitted = self.recipe.gate_mode in FIT_MODES and self.recipe.routers is None
        return make_bill(
            backbone=self.backbone,
            nodes=self.nodes,
            extra=extra_writes(
                self.translation, self.groups, self.backbone, self.nodes, self.shared, passed=self.passed
            ),
            passed=self.passed,
            routers=self.routers,
            top_k=self.recipe.experts_per_token,
            itemsize=4 if self.dtype == "F32" else 2,
            kv_numbers=kv_numbers(self.base),
            small_files=sum(file.stat().st_size for file in self.small_files)
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
        """Tokenizer, chat template, generation settings and processor of the base, which are copied unchanged."""
        return small_files(self.base, processor=bool(self.passed))

    @property
    def deciding_files(self) -> tuple[Path, ...]:
        """Every config and small file that the plan depends on."""
        configs = [each.adapter.folder / CONFIG for each in self.extracted.values() if each.there]
        return (*deciding_files(self.base, self.sources, processor=bool(self.passed)), *configs)

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
            f"{self.recipe.name or 'MoE'}: {self.fmt.title if self.fmt else 'virtual only'}, "
            f"{counted(self.layers, 'layer')}, {counted(self.experts, 'expert')}, "
            f"top-{self.recipe.experts_per_token}, {self.dtype_name}\n"
            f"{bill.total:,} parameters, {bill.active:,} active per token; {bill.on_disk / 2**30:.2f} GiB as "
            f"{form}, {bill.memory_virtual / 2**30:.2f} GiB in memory as virtual\n"
            + "\n".join(f"warning: {text}" for text in self.warnings)
        )
