"""An artifact -> the same one without some experts: those that the user names, or those that matter least on text.

Never changes the artifact. The result is written whole or not at all.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from frankenmoe.artifact.folder import Artifact, refuse_occupied
from frankenmoe.build.run import build
from frankenmoe.counted import counted
from frankenmoe.data.given import Pair, Texts, located
from frankenmoe.data.labelled import Labelled, labelled
from frankenmoe.errors import PlanError, RecipeError
from frankenmoe.gates.fitted import computing_dtype
from frankenmoe.gates.forcing import replaced
from frankenmoe.gates.made import MadeRouters
from frankenmoe.gates.states import mean_loss
from frankenmoe.gates.statistics import Fitted
from frankenmoe.gates.texts import OwnText, data_text, prompts_text
from frankenmoe.moe.device import AUTO, resolve
from frankenmoe.moe.load import MoE
from frankenmoe.planning import Plan
from frankenmoe.planning.kind import kind_of
from frankenmoe.planning.names import named_experts
from frankenmoe.progress import SILENT, Progress
from frankenmoe.recipe.sections import PruneSettings
from frankenmoe.recipe.settings import settings_with
from frankenmoe.smaller.among import routers_among
from frankenmoe.smaller.bylayer import plan_by_layer, standard, write_by_layer
from frankenmoe.smaller.gates import (
    KEPT,
    RestRouters,
    check_refit,
    fitted_statistics,
    kept_rows,
    rest_routers,
)
from frankenmoe.smaller.rest import kept_without, plan_without, whole_plan, with_same_tensors
from frankenmoe.smaller.saliency import Ranking, Saliency, saliency
from frankenmoe.subject import Subject, open_subject
from frankenmoe.suggest import did_you_mean

REMOVE, PRUNE = "remove-expert", "prune"  # the stages in the record


@dataclass(frozen=True)
class Smaller:
    """`artifact` is None if nothing was written. `report` says what went, what stayed, and for `prune` at what cost."""

    artifact: Artifact | None
    report: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """The result as plain data."""
        return {"artifact": str(self.artifact.folder) if self.artifact else None, **self.report}


@dataclass(frozen=True)
class _Job:
    """An opened MoE. `known` are the statistics of its routers that must stay true; None if their rows just stay."""

    subject: Subject
    plan: Plan
    known: Fitted | None
    method: str | None
    data: Texts
    progress: Progress

    def load(self, device: str, dtype: str | None) -> MoE:
        wanted = dtype or computing_dtype(self.plan, resolve(device))
        return self.subject.load(dtype=wanted, device=device, by_layer=True, progress=self.progress)

    def routers(self, made: Plan, kept: Sequence[int], moe: MoE | None) -> RestRouters:
        return rest_routers(
            self.subject, moe, self.plan, made, kept,
            known=self.known, method=self.method, data=self.data, progress=self.progress,
        )  # fmt: skip

    @property
    def inside(self) -> Path | None:
        """The folder that may hold extracted adapters."""
        return self.subject.artifact.folder if self.subject.artifact else None


def remove_expert(
    what: Subject | Artifact | str | Path,
    out: str | Path,
    *,
    experts: Sequence[str],
    method: str | None = None,
    keep_gates: bool = False,
    data: Texts | None = None,
    device: str = AUTO,
    dtype: str | None = None,
    progress: Progress = SILENT,
) -> Smaller:
    """Writes a copy of an artifact without `experts`, given by name or number, to `out`.

    If the routers were fitted in closed form, the new ones are those of a fit that never saw these experts, times the
    earlier scale: the experts' text is read once more and leaves the stored statistics. `method` refits other fitted
    routers so; by default their rows stay, as do those of all routers that were not fitted. `keep_gates` keeps the
    rows in any case, reads no text and leaves the statistics behind. `data` says where the experts' text is now.
    `device` and `dtype` are those of `fit`. Raises ArtifactError for an unknown expert, PlanError if none would stay,
    SourceError if the text is not that of the fit.
    """
    out = Path(os.path.realpath(out))
    refuse_occupied(out)
    hint = "delete the expert from the recipe"
    job = _opened(what, method=method, keep_gates=keep_gates, data=data, hint=hint, progress=progress)
    kept = kept_without(job.plan, experts, where=job.subject.origin)
    going = [name for name, path, _ in named_experts(job.plan.nodes) if path[0] not in kept]
    for name in job.data:
        if name not in going:
            raise RecipeError(
                f"data is given for {name!r}, which is no expert that goes", hint=did_you_mean(name, going)
            )
    moe = job.load(device, dtype) if job.known else None
    made = plan_without(job.plan, kept, inside=job.inside)
    found = job.routers(made, kept, moe)
    report = _report(job.plan, made, [kept], found)
    return Smaller(_written(job, made, kept, found, out, stage=REMOVE, report=report), report)


def prune(
    what: Subject | Artifact | str | Path,
    out: str | Path | None = None,
    *,
    experts: int,
    data: Sequence[Pair] = (),
    settings: PruneSettings | None = None,
    method: str | None = None,
    keep_gates: bool = False,
    per_layer: bool = False,
    keep_anyway: bool = False,
    device: str = AUTO,
    dtype: str | None = None,
    progress: Progress = SILENT,
    **changes: Any,
) -> Smaller:
    """Finds the `experts` experts that matter most on text, and writes a copy of an artifact with them alone to `out`.

    Experts without a token go first, then those that equal another one, then those whose outputs, weighted by the
    gates, are smallest (see `saliency`). `data` are pairs of (expert or None, file or hub dataset), by default the
    recipe's data or prompts. A tenth of it (a quarter of prompts) is held out and measured before and after. Without
    `out` nothing is written. Raises PlanError if the mean held-out loss rises by more than the setting `rise`, unless
    `keep_anyway`. With `per_layer` every layer keeps its own experts, whose rows of the gates stay; the result is a
    standard checkpoint, adopted. `changes` are settings by name; the other arguments are those of `remove_expert`.
    """
    settings = settings_with(settings or PruneSettings(), changes)
    if per_layer and method is not None:
        raise PlanError(
            f"--method {method} fits one row per expert of all layers, but --per-layer keeps other experts in each",
            hint="leave one of the two out",
        )
    if out is not None:
        out = Path(os.path.realpath(out))
        refuse_occupied(out)
    hint, keep = "build it first; with --virtual that takes megabytes", keep_gates or per_layer
    job = _opened(what, method=method, keep_gates=keep, data=None, hint=hint, progress=progress)
    old, subject = job.plan, job.subject
    if not 1 <= experts < old.experts:
        raise PlanError(
            f"--experts is {experts}, expected at least 1 and fewer than {subject.origin} has ({old.experts})",
            hint="it is the number of experts that stay" if old.experts > 1 else "there is only one, which must stay",
        )
    if per_layer:
        standard(old)
    domains = labelled(subject.recipe, data)
    moe = job.load(device, dtype)
    texts = [_text(name, domain, moe, settings, old) for name, domain in domains.items()]
    blocks = [block for text in texts for block in text.kept]
    progress.start("ranking experts", sum(len(block.ids) for block in blocks), "tokens")
    found = saliency(moe, blocks, progress=progress)
    ranking = found.ranked(old.identical_experts)
    by_layer = found.ranked_by_layer(old.identical_experts) if per_layer else [ranking] * len(old.expert_layers)
    kept_L = [each.kept(experts) for each in by_layer]
    before = _losses(moe, texts, progress)
    made, routers = _made(job, moe, kept_L, per_layer=per_layer)
    with replaced(routers_among(moe, made, routers.made.routers, kept_L)):
        after = _losses(moe, texts, progress)
    report = {
        **_report(old, made, kept_L, routers),
        "ranking": _rows(old, found, ranking, kept_L),
        "by_layer": [[old.nodes[index].name for index in kept] for kept in kept_L] if per_layer else None,
        "ranked_on": {
            name: {"from": list(domain.origin), "tokens": sum(len(block.ids) for block in text.kept)}
            for (name, domain), text in zip(domains.items(), texts, strict=True)
        },
        "held_out_loss": {"before": before, "after": after},
        "rise": fmean(after.values()) - fmean(before.values()),
        "settings": settings.model_dump(),
    }
    if out is None:
        return Smaller(None, report)
    if report["rise"] > settings.rise and not keep_anyway:
        raise _too_much(report, settings.rise, out)
    if per_layer:
        return Smaller(write_by_layer(made, routers.made.routers, out, report=report, progress=progress), report)
    return Smaller(_written(job, made, kept_L[0], routers, out, stage=PRUNE, report=report), report)


def _made(job: _Job, moe: MoE, kept_L: Sequence[Sequence[int]], *, per_layer: bool) -> tuple[Plan, RestRouters]:
    """The smaller plan and its routers."""
    if per_layer:
        made = plan_by_layer(job.plan, kept_L)
        rows = kept_rows(job.subject.routers(job.progress).routers, job.plan, made, kept_L)
        return made, RestRouters(MadeRouters(rows), KEPT)
    made = plan_without(job.plan, kept_L[0], inside=job.inside)
    return made, job.routers(made, kept_L[0], moe)


def _opened(
    what: Subject | Artifact | str | Path, *, method: str | None, keep_gates: bool, data: Texts | None, hint: str,
    progress: Progress,
) -> _Job:  # fmt: skip
    """The MoE of an artifact or a mixture's folder. A recipe is refused with this hint."""
    subject = open_subject(what)
    if subject.artifact is None and kind_of(subject.origin) != "mixture":
        subject.need_artifact(hint=hint)
    known, old, texts = fitted_statistics(subject), whole_plan(subject), located(data or {})
    check_refit(old, known, method=method, keep_gates=keep_gates, data=texts, where=subject.origin)
    return _Job(subject, old, None if keep_gates else known, method, texts, progress)


def _text(name: str, domain: Labelled, moe: MoE, settings: PruneSettings, plan: Plan) -> OwnText:
    """A domain's text: `kept` is for the ranking, `held` for the loss."""
    tokenizer, path = moe.tokenizer(), () if domain.own is None else (domain.own,)
    longest = plan.base.config.get("max_position_embeddings")
    length = min(settings.block, longest) if isinstance(longest, int) else settings.block
    if domain.names:
        return data_text(name, path, domain.names, tokenizer, domain.folder, settings.tokens, length)
    return prompts_text(name, path, domain.prompts, tokenizer, length, negative=False)


def _losses(moe: MoE, texts: Sequence[OwnText], progress: Progress) -> dict[str, float]:
    """Held-out loss by domain, nats per token."""
    progress.start("held-out loss", sum(len(block.ids) for text in texts for block in text.held), "tokens")
    return {text.name: mean_loss(moe.model, text.held, on_tokens=progress.advance) for text in texts}


def _report(old: Plan, made: Plan, kept_L: Sequence[Sequence[int]], routers: RestRouters) -> dict[str, Any]:
    stay = {index for kept in kept_L for index in kept}
    return {
        "removed": [node.name for index, node in enumerate(old.nodes) if index not in stay],
        "experts": [node.name for node in made.nodes],
        "experts_per_token": made.recipe.experts_per_token,
        "experts_per_token_before": old.recipe.experts_per_token,
        "gates": routers.method,
    }


def _rows(old: Plan, found: Saliency, ranking: Ranking, kept_L: Sequence[Sequence[int]]) -> list[dict[str, Any]]:
    """A row per expert, the first to go first; `goes` is the number of layers that it leaves."""
    load_E = (found.tokens_LE.sum(dim=0) / found.tokens_LE.sum().clamp(min=1)).tolist()
    return [
        {
            "expert": old.nodes[index].name,
            "saliency": ranking.scores[index],
            "load": load_E[index],
            "copy_of": old.nodes[ranking.copies[index]].name if index in ranking.copies else None,
            "goes": sum(index not in kept for kept in kept_L),
        }
        for index in ranking.order
    ]


def _too_much(report: Mapping[str, Any], limit: float, out: Path) -> PlanError:
    before, after = report["held_out_loss"]["before"], report["held_out_loss"]["after"]
    worst = max(after, key=lambda name: after[name] - before[name])
    return PlanError(
        f"with {counted(len(report['experts']), 'expert')} the mean held-out loss rises by {report['rise']:.4f} "
        f"nats per token (most on {worst}, {before[worst]:.4f} to {after[worst]:.4f}), expected at most {limit:g}; "
        f"{out} was not written",
        hint="keep more experts, or allow more with --rise; without a folder OUT all losses are shown",
    )


def _written(
    job: _Job,
    made: Plan,
    kept: Sequence[int],
    routers: RestRouters,
    out: Path,
    *,
    stage: str,
    report: Mapping[str, Any],
) -> Artifact:
    """The artifact of a smaller plan, in the form of the one that it comes from (virtual for a mixture's folder)."""
    subject = job.subject
    with with_same_tensors(job.plan, made, kept, out=out, inside=job.inside) as whole:
        smaller = Subject(
            whole.recipe,
            dtype=whole.dtype_name,
            trust_remote_code=subject.trust_remote_code,
            maker=lambda *_: routers.made,
            known=whole,
        )
        return build(
            smaller,
            out,
            virtual=not subject.built,
            allow_identical=True,
            progress=job.progress,
            stage=stage,
            said={"from": subject.origin, **report},
            earlier=subject.artifact.record["stages"] if subject.artifact else (),
        )
