"""Plan + text -> fitted routers, their statistics and a report."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from frankenmoe.artifact.folder import Routers
from frankenmoe.checkpoint.tensors import DTYPES
from frankenmoe.data.blocks import joined_spans
from frankenmoe.gates.chance import encoded
from frankenmoe.gates.fit import Fit, fit_gates
from frankenmoe.gates.forcing import gates_of
from frankenmoe.gates.statistics import Fitted, statistics_bytes
from frankenmoe.gates.texts import OwnText, read_texts
from frankenmoe.moe.bylayer import placed
from frankenmoe.moe.dense import load_tokenizer, torch_dtype
from frankenmoe.moe.device import AUTO, CPU, Weights, check_room, free_memory, resolve
from frankenmoe.moe.load import MoE, load_parts
from frankenmoe.planning import Plan
from frankenmoe.planning.layout import SHARED, RouterPath, gate_paths
from frankenmoe.planning.parts import parts_of_plan, sharing_equal_experts
from frankenmoe.progress import SILENT, Progress
from frankenmoe.recipe.sections import FitSettings

DEFAULTS = FitSettings()


@dataclass(frozen=True)
class FittedRouters:
    """Fitted gates as stored in an artifact, the bytes of the statistics file, and the report as plain data.

    `better` is False if the gates do not lower the mean held-out loss of those that they were compared with.
    """

    routers: Routers
    statistics: bytes
    report: Mapping[str, Any]
    better: bool = True


def fit_plan(
    plan: Plan,
    *,
    method: str,
    moe: MoE | None = None,
    data: Mapping[str, Sequence[str]] | None = None,
    folder: Path | None = None,
    settings: FitSettings = DEFAULTS,
    together: bool = False,
    device: str = AUTO,
    dtype: str | None = None,
    progress: Progress = SILENT,
) -> FittedRouters:
    """Fits every router of a plan by `method`, a gate mode. `data` and `folder` are those of `read_texts`.

    `moe` is the plan's MoE with its current routers, which the new ones are compared with. By default, an MoE with
    gates of zeros is loaded on `device`, computes in `dtype`, and nothing is compared. With `together`, a launcher's
    processes share the work, and all of them call this.
    """
    tokenizer = load_tokenizer(plan.base.folder)
    texts = read_texts(plan, tokenizer, data=data, folder=folder, tokens=settings.tokens, length=settings.block)
    running = moe or load_with_zeros(plan, device=device, dtype=dtype)
    classes = gate_paths(plan.nodes) | ({SHARED: 2} if any(text.path == SHARED for text in texts) else {})
    made = fit_gates(
        running.model,
        texts,
        classes,
        method=method,
        bos=tokenizer.bos_token_id,
        compare=moe is not None,
        together=together,
        progress=progress,
    )
    report = report_of(made, texts)
    return FittedRouters(
        encoded_gates(plan, made.gates, moe),
        statistics_bytes(Fitted(made.statistics, report)),
        report,
        better=made.better,
    )


def report_of(made: Fit, texts: Sequence[OwnText]) -> dict[str, Any]:
    """Method, scale, text by expert, and held-out losses (nats per token): before, after, own expert forced."""
    return {
        "method": made.method,
        "scale": made.scale,
        "closed_scale": made.closed_scale,
        "text": {text.title: text_facts(text) for text in texts},
        "held_out_seen": made.seen_held_out,
        "held_out_loss": {
            "before": dict(made.before.by_expert) if made.before else None,
            "after": dict(made.after.by_expert),
            "own_expert": dict(made.own.by_expert),
        },
        "cost": made.cost.to_dict(),
    }


def text_facts(text: OwnText) -> dict[str, Any]:
    """What a record says about a text: its size, and where in the data the tokens that were fitted lie."""
    return {
        "from": list(text.origin),
        "tokens": sum(len(block.ids) for block in text.kept),
        "held_out_tokens": sum(block.targets for block in text.held),
        **(
            {"longest": max(len(block.ids) for block in (*text.kept, *text.held))}
            if text.from_prompts
            else {"block": len(text.kept[0].ids), "spans": joined_spans(text.kept)}
        ),
    }


def encoded_gates(plan: Plan, gates: Mapping[RouterPath, Sequence[torch.Tensor]], moe: MoE | None) -> Routers:
    """All gates in the plan's stored type. A gate of a shared expert that was not fitted keeps its value in `moe`."""
    rows = {name: np.zeros(shape, np.float32) for name, shape in plan.routers.items()}
    if plan.gated_shared and moe is not None and SHARED not in gates:
        rows |= _named(plan, SHARED, gates_of(moe.model, [SHARED])[SHARED])
    for path, layers in gates.items():
        rows |= _named(plan, path, layers)
    return encoded(plan, rows)


def has_bfloat16_units() -> bool:
    """Whether this CPU multiplies matrices of bfloat16 itself (AMX, or AVX-512's BF16)."""
    return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


def _named(plan: Plan, path: RouterPath, layers: Sequence[torch.Tensor]) -> dict[str, Any]:
    names = plan.router_names(path).values()
    return {name: gate.float().cpu().numpy() for name, gate in zip(names, layers, strict=True)}


def load_with_zeros(plan: Plan, *, device: str = AUTO, dtype: str | None = None) -> MoE:
    """The plan's MoE with gates of zeros, in `dtype` (by default `computing_dtype`).

    On a device that is too small for it, it runs layer by layer.
    """
    place = resolve(device)
    name = dtype or computing_dtype(plan, place)
    wanted = getattr(torch, name) if name else None
    kind = wanted or torch_dtype(plan.dtype)
    gates = {name: torch.zeros(shape, dtype=kind) for name, shape in plan.routers.items()}
    check_room(Weights(plan.bill.memory_virtual, torch_dtype(plan.dtype)), CPU, dtype=wanted)
    moe = load_parts(sharing_equal_experts(parts_of_plan(plan), plan), gates, dtype=wanted)
    placed(moe.model, place)
    return moe


def computing_dtype(plan: Plan, device: torch.device, *, stored: int | None = None) -> str | None:
    """On a CPU float32, if the weights then take at most half of the free memory; otherwise None (as stored).

    The weights are those of the plan, or `stored` bytes. 16 bits are less exact, and several times slower on CPUs
    without 16-bit units. Where a CPU has units for bfloat16, bfloat16 stays, which is two to three times faster there.
    """
    if plan.dtype == "BF16" and has_bfloat16_units():
        return None
    size = (stored or plan.bill.memory_virtual) * 4 // DTYPES[plan.dtype].itemsize
    return "float32" if device.type == "cpu" and size <= free_memory() // 2 else None
