"""An MoE and text -> an Audit: one pass over the text, then weights, outputs, and a few passages token by token."""

from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from hashlib import blake2b
from typing import Any

import torch

from frankenmoe.audit.answers import Whole, answers, layer_sentences
from frankenmoe.audit.collect import Blocks, RouterSums, collect
from frankenmoe.audit.facts import Facts, identical_everywhere, rounded, router_facts
from frankenmoe.audit.probe import Change, against_base, swapped
from frankenmoe.audit.tokens import Passage, TokenTrace, as_data, trace_tokens
from frankenmoe.audit.weights import Distances, base_ffn, distances, silent_experts
from frankenmoe.errors import SourceError
from frankenmoe.moe.load import MoE
from frankenmoe.moe.trace import blocks
from frankenmoe.planning import Plan
from frankenmoe.planning.names import named_experts
from frankenmoe.progress import SILENT, Progress

KIND, VERSION = "frankenmoe audit", 1
PROBE = 128  # tokens of a passage on which outputs are compared


@dataclass(frozen=True)
class DomainText:
    """The text of one domain: a stream of blocks of token ids, and their origin.

    `own` is the index of the expert that the domain belongs to; None for text without a label.
    """

    blocks: Blocks
    origin: tuple[str, ...]
    own: int | None


@dataclass(frozen=True)
class Audit:
    """`report` is plain data, ready for JSON; `trace` holds the tokens of the passages shown."""

    report: dict[str, Any]
    trace: TokenTrace = field(repr=False)


def examine(
    moe: MoE,
    *,
    plan: Plan | None,
    texts: Mapping[str, DomainText],
    passages: Sequence[Passage],
    subject: Mapping[str, Any],
    limit: int,
    window: int,
    artifact: str | None = None,
    progress: Progress = SILENT,
) -> Audit:
    """Audits an MoE. `plan` is None if the sources are missing. `subject` is copied into the report: what was audited,
    its record, its recipe. `artifact` is the folder that experts can be taken out of.

    Reads at most `limit` tokens per domain. Raises SourceError for a text without tokens, NumericsError for a router
    with logits that are not finite.
    """
    digests = {name: blake2b(digest_size=16) for name in texts}
    blocks_read = {name: _digested(text.blocks, digests[name]) for name, text in texts.items()}
    sums, read = collect(moe, blocks_read, limit=limit, progress=progress)
    for name, tokens in read.items():
        if not tokens:
            raise SourceError(
                f"the text of {name} has no tokens in this tokenizer, so there is nothing to route",
                hint="give text that the base's tokenizer can read",
            )
    probes = [passage.ids[:PROBE] for passage in passages]
    moved, change = swapped(moe, probes)
    apart = {found.layer: found for found in distances(moe.model, base_ffn(plan) if plan else None, progress=progress)}
    trace = trace_tokens(moe, passages, window=window)
    names = _names(moe, plan)
    base = _against_base(moe, plan, probes)
    routers = list(_routers(moe, sums, texts, apart, moved, trace))
    same = identical_everywhere(list(apart.values()))
    leaves = len(next(iter(apart.values())).paths)
    whole = Whole(
        routers=[facts for facts in routers if not facts["path"]],
        nested=[facts for facts in routers if facts["path"]],
        names=names,
        identical=[[names[path] for path in group] for group in same],
        all_identical=leaves > 1 and any(len(group) == leaves for group in same),
        divergence=None if change is None else change.divergence,
        base=base,
        labelled=any(text.own is not None for text in texts.values()),
        silent=[names[path] for path in silent_experts(moe.model)],
        artifact=artifact,
    )
    report = {
        "kind": KIND,
        "version": VERSION,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        **subject,
        "model": _model(moe, plan, names),
        "text": {
            name: {
                "tokens": read[name],
                "origin": list(text.origin),
                "own_expert": text.own,
                "digest": digests[name].hexdigest(),
            }
            for name, text in texts.items()
        },
        "answers": [asdict(answer) for answer in answers(whole)],
        "outputs": {
            "tokens": sum(map(len, probes)),
            "other_experts": None if change is None else _change(change),
            "base": base,
        },
        "identical_experts": [list(group) for group in whole.identical],
        "routers": [facts | {"sentences": layer_sentences(facts, names)} for facts in routers],
        "passages": as_data(trace),
    }
    return Audit(report, trace)


def _digested(blocks: Blocks, digest: blake2b) -> Iterator[Sequence[int]]:
    """The same blocks, hashed on the way: two audits compare the digests of their text."""
    for block in blocks:
        digest.update(array("q", block).tobytes())
        yield block


def _routers(
    moe: MoE,
    sums: Sequence[RouterSums],
    texts: Mapping[str, DomainText],
    apart: Mapping[int, Distances],
    moved: Mapping[int, float],
    trace: TokenTrace,
) -> Iterator[Facts]:
    gates = {(layer, path): block.router.weight for layer, path, block in blocks(moe.model)}
    for each in sums:
        outer = not each.path
        facts = router_facts(
            each,
            gates[each.layer, each.path],
            domains=list(texts),
            own=[text.own if outer else None for text in texts.values()],
            distances=apart[each.layer] if outer else None,
            moved=moved.get(each.layer) if outer else None,
        )
        yield facts | {"tokens_seen": _seen(trace, each.layer) if outer else None}


def _seen(trace: TokenTrace, layer: int) -> Facts:
    """Of the tokens shown: their number, how many experts are first for any, how often the first expert changes."""
    first_T = trace.ids_LTK[trace.layers.index(layer), :, 0]
    passages = torch.split(first_T, [len(passage.ids) for passage in trace.passages])
    changed = torch.cat([first[1:] != first[:-1] for first in passages])
    return {
        "tokens": len(first_T),
        "used": len(set(first_T[first_T >= 0].tolist())),
        "switches": rounded(float(changed.float().mean())) if len(changed) else 0.0,
    }


def _against_base(moe: MoE, plan: Plan | None, probes: Sequence[Sequence[int]]) -> Facts | None:
    """The distance of outputs from the base's. They count as equal only if plan and logits agree on it."""
    if plan is None:
        return None
    found = against_base(moe, plan, probes)
    agrees = found.within_rounding(next(moe.model.parameters()).dtype)
    return _change(found) | {"plan_says_equal": plan.equals_base, "computes_base": plan.equals_base and agrees}


def _change(change: Change) -> Facts:
    return {key: rounded(value) for key, value in asdict(change).items()}


def _names(moe: MoE, plan: Plan | None) -> dict[str, str]:
    """Path -> an expert's name: "maths", or "inner/maths" for a nested one."""
    if plan is None:
        return {str(index): name for index, name in enumerate(moe.experts)}
    return {".".join(map(str, path)): name for name, path, _ in named_experts(plan.nodes)}


def _model(moe: MoE, plan: Plan | None, names: Mapping[str, str]) -> Facts:
    outer = [block for _, path, block in blocks(moe.model) if not path]
    shared = [block for block in outer if block.shared is not None]
    return {
        "class": type(moe.model).__name__,
        "layers": len(outer),
        "experts": list(moe.experts),
        "paths": dict(names),
        "experts_per_token": outer[0].router.top_k,
        "shared_expert": bool(shared),
        "shared_gated": any(block.shared_gate is not None for block in shared),
        "nested_routers": sum(1 for _, path, _ in blocks(moe.model) if path),
        "dtype": str(next(moe.model.parameters()).dtype).removeprefix("torch."),
        "sources_at_hand": plan is not None,
    }
