"""One expert more for fitted routers: its text joins the statistics that are there; nobody else's text is read.

Does not know artifacts or files. Nested routers and a shared expert's gate stay as they are.
"""

from collections.abc import Mapping

import torch

from frankenmoe.gates.fit import Gates, check_states, closed_gates, times, unseen
from frankenmoe.gates.forcing import forced, moe_blocks, set_gates
from frankenmoe.gates.stage import FittedRouters, encoded_gates, load_with_zeros
from frankenmoe.gates.states import mean_loss, watch_inputs
from frankenmoe.gates.statistics import Fitted, Moments, Text, statistics_bytes, with_text
from frankenmoe.gates.texts import LENGTH, TOKENS, OwnText, read_texts
from frankenmoe.moe.dense import load_tokenizer
from frankenmoe.moe.load import MoE
from frankenmoe.planning import Plan
from frankenmoe.planning.layout import SHARED, gate_paths
from frankenmoe.progress import SILENT, Progress


def add_text(
    plan: Plan,
    known: Fitted,
    *,
    name: str,
    method: str,
    old: Mapping[str, torch.Tensor],
    tokens: int = TOKENS,
    length: int = LENGTH,
    trust_remote_code: bool = False,
    progress: Progress = SILENT,
) -> FittedRouters:
    """Routers for a plan whose last expert, `name`, is new: `known` are the statistics without it, `old` the gates.

    `method` is a closed form; its scale is the one that was found with all texts at hand. The report has the new
    expert's held-out loss only.
    """
    tokenizer = load_tokenizer(plan.base.folder)
    (text,) = (
        each for each in read_texts(plan, tokenizer, tokens=tokens, length=length, only=name) if not each.negative
    )
    moe = load_with_zeros(plan, trust_remote_code=trust_remote_code)
    gates = _old_gates(plan, old)
    set_gates(moe.model, gates)
    progress.start("reading", sum(len(block.ids) for block in (*text.kept, *text.held)), "tokens")
    moments = _moments(moe, text, progress)
    onehot = tuple(float(index == text.path[0]) for index in range(plan.experts))
    statistics = {**known.routers, (): with_text(known.routers[()], Text(name, onehot), moments)}
    scale = float(str(known.facts["closed_scale"]))
    gates[()] = times(closed_gates({(): statistics[()]}, method), scale)[()]
    with forced(moe.model, text.path):
        own = mean_loss(moe.model, text.held)
    set_gates(moe.model, gates)
    report = {
        **known.facts,
        "method": method,
        "scale": scale,
        "added": name,
        "text": {**_mapping(known.facts["text"]), name: {"from": list(text.origin), "tokens": int(moments.count_L[0])}},
        "held_out_loss": {
            "before": None,
            "after": {name: mean_loss(moe.model, text.held)},
            "own_expert": {name: own},
        },
    }
    routers = encoded_gates(plan, gates, None)
    return FittedRouters(routers, statistics_bytes(Fitted(statistics, report)), report)


def _moments(moe: MoE, text: OwnText, progress: Progress) -> Moments:
    blocks = moe_blocks(moe.model)
    moments = Moments(layers=len(blocks), hidden=blocks[0].router.weight.shape[1])
    with forced(moe.model, text.path):
        watch_inputs(moe.model, [*text.kept, *unseen(text)], moments.add, on_tokens=progress.advance)
    check_states(moments, text)
    return moments


def _old_gates(plan: Plan, old: Mapping[str, torch.Tensor]) -> Gates:
    """Every gate but the outer ones, which have grown."""
    paths = [path for path in gate_paths(plan.nodes) if path != ()] + ([SHARED] if plan.gated_shared else [])
    return {path: [old[each].float() for each in plan.router_names(path)] for path in paths}


def _mapping(value: object) -> Mapping[str, object]:
    assert isinstance(value, Mapping)
    return value
