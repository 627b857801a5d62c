"""The parents' predictions on their own text, computed once and cached on disk; one parent in memory at a time.

Shape suffixes: N blocks, T tokens, M kept tokens, V vocabulary.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save

from frankenmoe.checkpoint.writer import write_atomic
from frankenmoe.data.blocks import Block
from frankenmoe.errors import PlanError
from frankenmoe.moe.dense import load_source
from frankenmoe.planning import Plan
from frankenmoe.train.data import Domain

KEPT = 32  # most likely tokens whose probability is kept; the sum of the others follows
BATCH = 8

Teachers = dict[int, tuple[torch.Tensor, torch.Tensor]]
"""A domain's index -> its parent's log-probabilities [N, T, M] in float16, and their token ids [N, T, M]."""


def cache_teachers(
    folder: Path,
    domains: Sequence[Domain],
    plan: Plan,
    *,
    dtype: torch.dtype | None,
    device: torch.device,
    context: Callable[[], AbstractContextManager[Any]],
    on_block: Callable[[int], None],
) -> None:
    """Writes `folder/OWNER.safetensors` for every domain that has none yet; its own expert is the teacher."""
    folder.mkdir(exist_ok=True)
    for domain in domains:
        file = folder / f"{domain.owner}.safetensors"
        if file.exists():
            on_block(len(domain.blocks))
            continue
        model = _parent(plan, domain, dtype=dtype).to(device)
        found = [_best(model, part, device=device, context=context, on_block=on_block) for part in _batches(domain)]
        values, ids = (torch.cat(column) for column in zip(*found, strict=True))
        write_atomic(file, save({"log_probs": values, "ids": ids}))


def open_teachers(folder: Path, domains: Sequence[Domain]) -> Teachers:
    """Reads what `cache_teachers` wrote."""
    found = {index: load_file(folder / f"{domain.owner}.safetensors") for index, domain in enumerate(domains)}
    return {index: (each["log_probs"], each["ids"].long()) for index, each in found.items()}


def _parent(plan: Plan, domain: Domain, *, dtype: torch.dtype | None) -> Any:
    """The dense model that a domain's expert comes from, with its adapter merged."""
    source = plan.nodes[domain.owner].source
    if source is None:
        raise PlanError(
            f"expert {domain.name} is itself an MoE, so it has no single parent to distil from",
            hint="leave out distill, or name the data after experts that are FFNs",
        )
    return load_source(source, stored=plan.dtype, dtype=dtype)


def _batches(domain: Domain) -> list[Sequence[Block]]:
    return [domain.blocks[start : start + BATCH] for start in range(0, len(domain.blocks), BATCH)]


@torch.no_grad()
def _best(
    model: Any,
    blocks: Sequence[Block],
    *,
    device: torch.device,
    context: Callable[[], AbstractContextManager[Any]],
    on_block: Callable[[int], None],
) -> tuple[torch.Tensor, torch.Tensor]:
    ids_NT = torch.tensor([block.ids for block in blocks], device=device)
    with context():
        logits_NTV = model(input_ids=ids_NT, use_cache=False).logits
    kept = min(KEPT, logits_NTV.shape[-1] - 1)
    # one block at a time: the intermediate float32 values are as large as the logits
    found = [logits_TV.float().log_softmax(dim=-1).topk(kept) for logits_TV in logits_NTV]
    on_block(len(blocks))
    values_NTM, ids_NTM = (torch.stack(column) for column in zip(*found, strict=True))
    return values_NTM.half().cpu(), ids_NTM.int().cpu()
