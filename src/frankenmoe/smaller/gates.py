"""The routers of an MoE without some of its experts.

Where the routers were fitted, the text of the experts that go is read once more and taken out of the stored
statistics. No other text is read. Closed forms then give the gates of a fit without these experts, times the scale of
the earlier fit. All other gates keep the rows of the experts that stay. The gate of a shared expert stays as it is.

Shape suffixes: C classes, U texts, E experts, D hidden.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from frankenmoe.artifact.folder import STATISTICS, Routers
from frankenmoe.data.blocks import text_blocks
from frankenmoe.data.documents import read_documents
from frankenmoe.data.given import Texts
from frankenmoe.errors import PlanError, SourceError
from frankenmoe.gates.closed import CLOSED
from frankenmoe.gates.fit import closed_gates, lowered, lowering, times
from frankenmoe.gates.fitted import encoded_gates
from frankenmoe.gates.made import MadeRouters
from frankenmoe.gates.own import Statistics, read_moments
from frankenmoe.gates.statistics import (
    Fitted,
    Moments,
    RouterStatistics,
    load_statistics,
    statistics_bytes,
    without_texts,
)
from frankenmoe.gates.texts import PROMPTS, OwnText, fitted_blocks, read_texts
from frankenmoe.moe.load import MoE
from frankenmoe.planning import Plan
from frankenmoe.planning.layout import SHARED, RouterPath, gate_paths
from frankenmoe.planning.names import named_experts
from frankenmoe.progress import Progress
from frankenmoe.subject import Subject

KEPT = "kept"  # in place of a method: the rows stayed
NEAR = 0.01  # the largest relative distance of a text's mean state from the stored one
OTHERWISE = "--keep-gates keeps the other experts' rows as they are and reads no text"
ELSEWHERE = f"if it is elsewhere now, tell `frankenmoe remove-expert` with --data {{name}}=FILE; {OTHERWISE}"


@dataclass(frozen=True)
class RestRouters:
    """Routers of the smaller MoE. `method` is the closed form that made the gates, or KEPT."""

    made: MadeRouters
    method: str


def fitted_statistics(subject: Subject) -> Fitted | None:
    """What the routers of an artifact were fitted from; None if they were made in another way."""
    file = subject.artifact.folder / STATISTICS if subject.artifact else None
    return load_statistics(file) if file is not None and file.is_file() else None


def check_refit(
    plan: Plan, known: Fitted | None, *, method: str | None, keep_gates: bool, data: Texts, where: str
) -> None:
    """Raises PlanError for a method or data that these gates cannot use, and for gates that need `keep_gates`."""
    if known is not None and not keep_gates:
        _refuse_negative(plan, known.routers[()])
    elif data:
        raise PlanError(
            f"--data names the text of {', '.join(data)}, but the other experts' rows stay and no text is read",
            hint="leave --data out",
        )
    if method is None:
        return
    if method not in CLOSED:
        raise PlanError(
            f"method {method} needs the text of every expert, expected one of {', '.join(CLOSED)}",
            hint="leave --method out, then run `frankenmoe fit` on the smaller MoE",
        )
    if known is None or keep_gates:
        reason = "--keep-gates keeps them" if keep_gates else f"{where} has no {STATISTICS}"
        raise PlanError(
            f"--method {method} refits the gates from their statistics, but {reason}",
            hint="leave --method out",
        )


def rest_routers(
    subject: Subject,
    moe: MoE | None,
    old: Plan,
    made: Plan,
    kept: Sequence[int],
    *,
    known: Fitted | None,
    method: str | None,
    data: Texts,
    progress: Progress,
) -> RestRouters:
    """The routers of the plan `made`, which has the experts `kept` of the plan `old`.

    `moe` is the running MoE of `old`, needed if there are statistics (`known`). `method` is a closed form, by default
    the one of the earlier fit; after any other fit the rows stay. `data` names other places of the texts of experts
    that go. Raises SourceError if their text is not that of the fit.
    """
    rows = kept_rows(subject.routers(progress).routers, old, made, [kept] * len(old.expert_layers))
    if known is None:
        return RestRouters(MadeRouters(rows), KEPT)
    assert moe is not None
    gone = list(_gone_texts(old, moe, known, kept, data))
    progress.start("reading", sum(len(block.ids) for text in gone for block in fitted_blocks(text)), "tokens")
    statistics = _without(known, gone, moe, made, kept, progress)
    facts = _facts(known.facts, [text.name for text in gone])
    chosen = method or str(facts["method"])
    if chosen not in CLOSED:
        return RestRouters(MadeRouters(rows, statistics_bytes(Fitted(statistics, facts))), KEPT)
    outer: Statistics = {(): statistics[()]}
    scale = float(facts["closed_scale"])
    gates = lowered(times(closed_gates(outer, chosen), scale), lowering(outer, moe.model))
    fresh = encoded_gates(made, gates, None)
    rows = {**rows, **{name: fresh[name] for name in made.router_names(()).values()}}
    facts |= {"method": chosen, "scale": scale}
    return RestRouters(MadeRouters(rows, statistics_bytes(Fitted(statistics, facts))), chosen)


def _without(
    known: Fitted, gone: Sequence[OwnText], moe: MoE, made: Plan, kept: Sequence[int], progress: Progress
) -> Statistics:
    """The statistics of every router that stays; the outer one's without the texts `gone`, which are read again."""
    outer, moments = known.routers[()], dict[str, Moments]()
    for text in gone:
        moments[text.name] = read_moments(moe.model, text, fitted_blocks(text), on_tokens=progress.advance)
        _check_same(outer, text, moments[text.name])
    found: Statistics = {(): without_texts(outer, moments, classes=kept)}
    found |= {path: known.routers[kept[path[0]], *path[1:]] for path in gate_paths(made.nodes) if path}
    return found | ({SHARED: known.routers[SHARED]} if SHARED in known.routers else {})


def kept_rows(routers: Routers, old: Plan, made: Plan, kept_L: Sequence[Sequence[int]]) -> Routers:
    """The gates with the rows of the experts that stay, kept_L[layer]; nested routers' and a shared expert's whole."""
    found = {}
    paths: list[RouterPath] = [*gate_paths(made.nodes), *([SHARED] if made.gated_shared else [])]
    for path in paths:
        before = path if path in ((), SHARED) else (kept_L[0][path[0]], *path[1:])
        names = (each.router_names(at).values() for each, at in ((old, before), (made, path)))
        for was, name, kept in zip(*names, kept_L, strict=True):
            dtype, (count, hidden), raw = routers[was]
            if path == ():
                raw, count = raw.reshape(count, -1)[list(kept)].reshape(-1), len(kept)
            found[name] = (dtype, (count, hidden), raw)
    return found


def _gone_texts(old: Plan, moe: MoE, known: Fitted, kept: Sequence[int], data: Texts) -> Iterator[OwnText]:
    """The fitted text of every expert that goes, and of those nested in it, as far as it was fitted on."""
    named = {text.name for text in known.routers[()].texts}
    facts: Any = known.facts["text"]
    for name, path, _ in named_experts(old.recipe.experts):
        if path[0] not in kept and name in named:
            yield _text_again(old, moe.tokenizer(), name, path, facts[name], data.get(name))


def _text_again(
    plan: Plan, tokenizer: Any, name: str, path: RouterPath, fact: Mapping[str, Any], other: Sequence[str] | None
) -> OwnText:
    """The text that an expert's statistics were read from: the same blocks of the same data, or its prompts."""
    if tuple(fact["from"]) == PROMPTS:
        texts = read_texts(plan, tokenizer, tokens=fact["tokens"], length=fact.get("longest", 256), only=name)
        return next(text for text in texts if not text.negative)
    if "spans" not in fact:
        raise SourceError(
            f"the statistics do not say which tokens of {', '.join(fact['from'])} they were read from: an earlier "
            "frankenmoe made them",
            hint=f"fit the routers again; {OTHERWISE}",
        )
    names = tuple(other or fact["from"])
    room = fact["block"] - (tokenizer.bos_token_id is not None)
    last = fact["spans"][-1][1]
    try:
        documents = read_documents(names, folder=plan.recipe.folder)
        blocks = text_blocks(documents, tokenizer, length=fact["block"], limit=-(-last // room), whole=True)
    except SourceError as error:
        raise SourceError(
            f"the text of expert {name!r} must leave the routers' statistics, but it cannot be read: {error.message}",
            hint=ELSEWHERE.format(name=name),
        ) from error
    spans = fact["spans"]
    fitted = (block for block in blocks if any(start <= block.span[0] < end for start, end in spans))
    return OwnText(name, path, False, names, tuple(fitted), ())


def _check_same(outer: RouterStatistics, text: OwnText, moments: Moments) -> None:
    """Raises SourceError unless the moments are those of the stored text: equal counts, nearly equal means."""
    at = [each.name for each in outer.texts].index(text.name)
    wanted, count = int(outer.count_U[at]), int(moments.count_L[0])
    mean_LD = moments.sum_LD / max(count, 1)
    apart = float((mean_LD - outer.mean_ULD[at]).norm() / outer.mean_ULD[at].norm())
    if wanted != count or apart > NEAR:
        other = f"other text (the mean state differs by {apart:.0%})" if wanted == count else f"{count}"
        raise SourceError(
            f"the text of expert {text.name!r} is not the one that the routers were fitted to: expected {wanted} "
            f"tokens of it, found {other} in {', '.join(text.origin)}",
            hint=ELSEWHERE.format(name=text.name),
        )


def _refuse_negative(old: Plan, outer: RouterStatistics) -> None:
    """Raises PlanError for negative prompts: their states depend on all other experts, also on those that go."""
    negative = [f"not {name}" for name, _, expert in named_experts(old.recipe.experts) if expert.negative_prompts]
    found = next((text.name for text in outer.texts if text.name in negative), None)
    if found is not None:
        raise PlanError(
            f"the negative prompts of expert {found.removeprefix('not ')!r} were read with all other experts, so the "
            "routers' statistics are no longer right when one of them goes",
            hint=OTHERWISE,
        )


def _facts(known: Mapping[str, object], gone: Sequence[str]) -> dict[str, Any]:
    """What is still true of the earlier fit."""
    texts: Any = known["text"]
    left = {name: fact for name, fact in texts.items() if name not in gone}
    before: Any = known.get("removed", [])
    stale = ("held_out_loss", "cost", "added")
    return {
        **{key: value for key, value in known.items() if key not in stale},
        "text": left,
        "removed": [*before, *gone],
    }
