"""Adds an expert to fitted routers: its text is added to their statistics, and no other text is read.

Nested routers and the gate of a shared expert stay as they are.
"""

from collections.abc import Mapping

import torch

from frankenmoe.gates.cost import Meter
from frankenmoe.gates.fit import Gates, closed_gates, lowered, lowering, times
from frankenmoe.gates.fitted import FittedRouters, encoded_gates, load_with_zeros, text_facts
from frankenmoe.gates.forcing import forced, set_gates
from frankenmoe.gates.own import Statistics, read_moments
from frankenmoe.gates.states import mean_loss
from frankenmoe.gates.statistics import Fitted, RouterText, statistics_bytes, with_text
from frankenmoe.gates.texts import fitted_blocks, read_texts, size_of
from frankenmoe.moe.dense import load_tokenizer
from frankenmoe.moe.device import AUTO
from frankenmoe.planning import Plan
from frankenmoe.planning.fitting import AFTER, OWN_LOSS, STATISTICS
from frankenmoe.planning.layout import SHARED, gate_paths
from frankenmoe.progress import SILENT, Progress
from frankenmoe.recipe.sections import FitSettings


def add_text(
    plan: Plan,
    known: Fitted,
    *,
    name: str,
    method: str,
    old: Mapping[str, torch.Tensor],
    settings: FitSettings,
    device: str = AUTO,
    dtype: str | None = None,
    progress: Progress = SILENT,
) -> FittedRouters:
    """Routers for a plan whose last expert, `name`, is new. `known` are the statistics without it, `old` the gates.

    `method` is a closed form. Its scale is the one that was found when all texts were read. The report has the held-out
    loss of the new expert only.
    """
    tokenizer = load_tokenizer(plan.base.folder)
    texts = read_texts(plan, tokenizer, tokens=settings.tokens, length=settings.block, only=name)
    (text,) = (each for each in texts if not each.negative)
    moe = load_with_zeros(plan, device=device, dtype=dtype)
    gates = _old_gates(plan, old)
    set_gates(moe.model, gates)
    size = size_of(text)
    meter = Meter(moe.model, text=round(size.kept + size.held), progress=progress)
    progress.start("reading", round(meter.layers * (size.kept + size.unseen) + 2 * size.held), "tokens")
    on_tokens = meter.reading(STATISTICS, head=False)
    moments = read_moments(moe.model, text, fitted_blocks(text), on_tokens=on_tokens)
    onehot = tuple(float(index == text.path[0]) for index in range(plan.experts))
    statistics = {**known.routers, (): with_text(known.routers[()], RouterText(name, onehot), moments)}
    scale = float(str(known.facts["closed_scale"]))
    outer: Statistics = {(): statistics[()]}
    gates[()] = lowered(times(closed_gates(outer, method), scale), lowering(outer, moe.model))[()]
    with forced(moe.model, text.path):
        own = mean_loss(moe.model, text.held, on_tokens=meter.reading(OWN_LOSS))
    set_gates(moe.model, gates)
    after = mean_loss(moe.model, text.held, on_tokens=meter.reading(AFTER))
    report = {
        **known.facts,
        "method": method,
        "scale": scale,
        "added": name,
        "text": {**_mapping(known.facts["text"]), name: text_facts(text)},
        "held_out_loss": {
            "before": None,
            "after": {name: after},
            "own_expert": {name: own},
        },
        "cost": meter.cost().to_dict(),
    }
    routers = encoded_gates(plan, gates, None)
    return FittedRouters(routers, statistics_bytes(Fitted(statistics, report)), report)


def _old_gates(plan: Plan, old: Mapping[str, torch.Tensor]) -> Gates:
    """All gates except the outer ones, which have one more row."""
    paths = [path for path in gate_paths(plan.nodes) if path != ()] + ([SHARED] if plan.gated_shared else [])
    names = {path: plan.router_names(path).values() for path in paths}
    return {path: [old[each].float() for each in names[path]] for path in paths}


def _mapping(value: object) -> Mapping[str, object]:
    assert isinstance(value, Mapping)
    return value
