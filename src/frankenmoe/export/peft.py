"""Adapter experts -> LoRAs in PEFT's format, with the gates beside them. Does not import torch.

Only an MoE whose experts are the base's FFNs plus adapters can be said so; any other is refused. PEFT's Arrow routes
among such LoRAs, by directions that it takes from the LoRAs themselves: it has no place for gates. `export/arrow.py`
measures what that changes.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from frankenmoe import system
from frankenmoe.artifact.folder import ROUTERS, refuse_occupied, whole_or_absent, write_routers
from frankenmoe.checkpoint.cast import Floats
from frankenmoe.checkpoint.hub import is_folder
from frankenmoe.checkpoint.peft import AdapterWriter
from frankenmoe.checkpoint.tensors import LowRank, TensorWrite
from frankenmoe.checkpoint.values import values
from frankenmoe.errors import PlanError
from frankenmoe.families.wrapped import WRAPPERS
from frankenmoe.planning import ExpertNode, Plan
from frankenmoe.progress import SILENT, Progress
from frankenmoe.subject import Subject

DTYPE = "F32"  # in which the scale of an adapter can be multiplied into it
BACKBONE, REPORT = "backbone", "peft.json"
HINT = "`as_adapter` in a recipe makes adapters of whole fine-tunes; `frankenmoe extract-lora` writes one such adapter"


@dataclass(frozen=True)
class PeftFolder:
    """What was written: expert -> the folder of its LoRA, and that of the backbone if it has one.

    `plain` are experts that are the base's FFN as it is, without a LoRA. All LoRAs have one rank and the same layers,
    as Arrow needs them.
    """

    folder: Path
    base: str
    experts: Mapping[str, Path]
    plain: tuple[str, ...]
    backbone: Path | None
    rank: int
    top_k: int

    @property
    def arrow_top_k(self) -> int:
        """LoRAs per token in Arrow: those of the MoE, or all if there are fewer."""
        return min(self.top_k, len(self.experts))

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as in peft.json and as `--json` prints it."""
        return {
            "base": self.base,
            "experts": {name: folder.name for name, folder in self.experts.items()},
            "plain": list(self.plain),
            "backbone": self.backbone.name if self.backbone else None,
            "rank": self.rank,
            "experts_per_token": self.top_k,
        }


def export_peft(subject: Subject, out: Path, *, progress: Progress = SILENT) -> PeftFolder:
    """Writes the LoRA of every expert into a folder of `out`, and the gates into `out`.

    Every LoRA has the largest rank and all layers of any: the rest is zeros, which changes nothing. Raises PlanError if
    the MoE is more than adapters on one base, ArtifactError if `out` exists.
    """
    refuse_occupied(out)
    plan = subject.resolved(progress).plan
    check_adapters(plan)
    routers = subject.routers(progress).routers
    terms = {node.name: _terms(node) for node in plan.nodes}
    layers = {name: lora for found in terms.values() for name, lora in found.items()}
    rank = max(lora.a.shape[0] for found in terms.values() for lora in found.values())
    adapted = [name for name, found in terms.items() if found]
    own = {
        write.name.removesuffix(".weight"): step
        for write in plan.backbone
        for step in write.steps
        if isinstance(step, LowRank)
    }
    taken = [BACKBONE, REPORT, ROUTERS]
    folders = dict(zip(adapted, system.file_names([*taken, *adapted], default="expert")[len(taken) :], strict=True))
    base = _base_name(plan)
    out.parent.mkdir(parents=True, exist_ok=True)
    with whole_or_absent(out) as partial:
        for name in adapted:
            _write(partial / folders[name], _padded(terms[name], layers, rank), base=base)
        if own:
            _write(partial / BACKBONE, ((name, *_factors(lora)) for name, lora in own.items()), base=base)
        write_routers(partial, routers)
    return PeftFolder(
        folder=out,
        base=base,
        experts={name: out / folders[name] for name in adapted},
        plain=tuple(name for name in terms if name not in adapted),
        backbone=out / BACKBONE if own else None,
        rank=rank,
        top_k=subject.experts_per_token or subject.own_experts_per_token,
    )


def check_adapters(plan: Plan) -> None:
    """Raises PlanError unless every expert is the base's FFN, with an adapter or without, on the base's backbone.

    Also for a base in which transformers gives layers other names than a language model alone has.
    """
    wrapper = plan.base.wrapper
    if wrapper and not WRAPPERS[wrapper].alone:
        raise PlanError(
            f"{plan.base.name} is a language model inside a {wrapper} model, where PEFT finds no layers by their names",
            hint="`frankenmoe extract` writes an expert as a language model alone; such a model can be base_model",
        )
    own = plan.base.checkpoint.tensors

    def is_base(write: TensorWrite) -> bool:
        plain = tuple(step for step in write.steps if not isinstance(step, LowRank))
        return not plain and write.inputs == (own.get(write.name),)

    reasons: list[str] = []
    for node in plan.nodes:
        if node.children:
            reasons.append(f"expert {node.name} is a mixture itself")
        elif not all(is_base(write) for row in node.ffn.values() for write in row.values()):
            reasons.append(f"expert {node.name} is not the base's FFN with an adapter")
    if plan.shared:
        reasons.append("it has a shared expert")
    changed = next((write.name for write in plan.backbone if not is_base(write)), None)
    if changed is not None:
        reasons.append(f"its backbone is not the base's, as {changed} shows")
    if not reasons and not any(row for node in plan.nodes for row in node.loras.values()):
        reasons.append("no expert has an adapter")
    if reasons:
        more = f", and {len(reasons) - 1} more such reasons" if len(reasons) > 1 else ""
        raise PlanError(f"as PEFT adapters this MoE would be another model: {reasons[0]}{more}", hint=HINT)


def _base_name(plan: Plan) -> str:
    """The base as PEFT finds it from anywhere: its hub id, else its absolute path."""
    name = plan.base.name.path
    return str(plan.base.folder) if is_folder(name, folder=plan.recipe.folder) else name


def _terms(node: ExpertNode) -> dict[str, LowRank]:
    """Dense name of a linear layer -> the term of an expert's adapter."""
    return {
        node.ffn[layer][suffix].name.removesuffix(".weight"): lora
        for layer, row in node.loras.items()
        for suffix, lora in row.items()
    }


def _factors(lora: LowRank) -> tuple[Floats, Floats]:
    """A and B with the scale in B, in float32."""
    return values(lora.a).astype(np.float32), values(lora.b).astype(np.float32) * np.float32(lora.scale)


def _padded(
    terms: Mapping[str, LowRank], layers: Mapping[str, LowRank], rank: int
) -> Iterator[tuple[str, Floats, Floats]]:
    """(layer, A, B) of an expert for every layer that any expert has, with rows of zeros up to `rank`."""
    for name, like in sorted(layers.items()):
        a_RI = np.zeros((rank, like.a.shape[1]), np.float32)
        b_OR = np.zeros((like.b.shape[0], rank), np.float32)
        if name in terms:
            a, b = _factors(terms[name])
            a_RI[: len(a)], b_OR[:, : len(a)] = a, b
        yield name, a_RI, b_OR


def _write(folder: Path, factors: Iterable[tuple[str, Floats, Floats]], *, base: str) -> None:
    folder.mkdir()
    with AdapterWriter(folder) as writer:
        for name, a_RI, b_OR in factors:
            writer.add(name, a_RI, b_OR, dtype=DTYPE)
        writer.finish(base=base)


def arrow_code(made: PeftFolder) -> str:
    """Lines of Python that load the LoRAs with PEFT's Arrow."""
    paths = list(map(str, made.experts.values()))
    return (
        "from peft.tuners.lora import ArrowConfig, create_arrow_model\n"
        "from transformers import AutoModelForCausalLM\n\n"
        f"base = AutoModelForCausalLM.from_pretrained({made.base!r})\n"
        f"model = create_arrow_model(base, {paths!r}, ArrowConfig(top_k={made.arrow_top_k}, rng_seed=0))"
    )
