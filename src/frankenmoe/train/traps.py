"""Checks before the first step that a run can learn something. Each raises PlanError with a reason and a hint."""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import nn

from frankenmoe.errors import PlanError
from frankenmoe.planning import ExpertNode, Plan
from frankenmoe.planning.buildable import check_parents
from frankenmoe.recipe.backbone import ATTENTION, AVERAGE, BASE
from frankenmoe.recipe.train import TrainSettings
from frankenmoe.suggest import did_you_mean
from frankenmoe.train.data import Domain

ZERO = 1e-12  # a smaller gradient in the gates is only rounding


def check(settings: TrainSettings, *, plan: Plan | None, top_k: int, renormalize: bool, experts: Sequence[str]) -> None:
    """Checks settings and plan. `plan` is None for a built artifact, whose routers alone can be trained."""
    _check_built(settings, plan)
    k = settings.experts_per_token or top_k
    _check_top_k(settings, k=k, renormalize=renormalize, experts=len(experts))
    _check_straight_through(settings, plan, k=k, renormalize=renormalize)
    if plan is not None:
        _check_nested(settings, plan)
        _check_merged(settings, plan)
        _check_identical(settings, plan)
        _check_backbone(settings, plan)


def check_domains(settings: TrainSettings, domains: Sequence[Domain], *, experts: Sequence[str]) -> None:
    """Checks that every domain is named after an expert if a loss term needs the expert that owns a text."""
    for term in ("distill", "domain"):
        if not getattr(settings, term):
            continue
        unowned = [domain.name for domain in domains if domain.owner < 0]
        if unowned:
            raise PlanError(
                f"the loss term {term} needs the expert that owns each text, found none called {unowned[0]}",
                hint=did_you_mean(unowned[0], list(experts)) or f"name the data after experts: {', '.join(experts)}",
            )


def check_experts(layers: Iterable[nn.ModuleList]) -> None:
    """Checks that some layer has experts that differ; in most models the first two compared do."""
    if all(_same(expert, layer[0]) for layer in layers for expert in layer):
        raise PlanError(
            "the experts of every layer hold the same numbers, so the loss has no gradient in the gates",
            hint="train adapters together with the gates, on the virtual form: build with --virtual, then train with "
            "--what routers,adapters",
        )


def _same(one: nn.Module, two: nn.Module) -> bool:
    return one is two or all(map(torch.equal, one.parameters(), two.parameters()))


def check_gradient(largest: float, *, of: str) -> None:
    """Checks the first gradient of the gates, for reasons that the other checks do not cover."""
    if largest < ZERO:
        raise PlanError(
            f"the loss has no gradient in the gates ({largest:.1e} in {of}), so training would not change them",
            hint="the experts may compute the same thing; train adapters too: --what routers,adapters",
        )


def _check_built(settings: TrainSettings, plan: Plan | None) -> None:
    others = [part for part in settings.what if part != "routers"]
    if plan is None and others:
        raise PlanError(
            f"a built artifact can have its routers trained, but not its {', '.join(others)}: its body is never "
            "rewritten",
            hint="train the virtual form (`build --virtual`, or the recipe itself), then build",
        )
    if plan is not None and settings.distill:
        check_parents(plan, doing="distill", hint="leave out distill")
    if plan is None and settings.distill:
        raise PlanError(
            "a built artifact no longer has its parents, so it cannot be distilled from them",
            hint="train the virtual form, or leave out distill",
        )


def _check_top_k(settings: TrainSettings, *, k: int, renormalize: bool, experts: int) -> None:
    if k > experts:
        raise PlanError(
            f"training with {k} experts per token needs at least {k} experts, found {experts}",
            hint="lower experts_per_token in the training settings (--train-top-k)",
        )
    learns = settings.domain or settings.straight_through
    if k == 1 and renormalize and "routers" in settings.what and not learns:
        if experts == 1:
            raise PlanError(
                "the MoE has one expert, whose weight is always 1, so its routers cannot learn",
                hint="train other parts: --what adapters,norms, for example",
            )
        raise PlanError(
            "with one expert per token and renormalised weights the weight is always 1, so the language-model loss has "
            "no gradient in the gates",
            hint="use two experts per token during training (--train-top-k 2), a straight-through gradient "
            "(--straight-through), or the domain-classification loss (--domain 0.1)",
        )


def _check_straight_through(settings: TrainSettings, plan: Plan | None, *, k: int, renormalize: bool) -> None:
    nested = plan is not None and any(node.top_k == 1 for node in _mixtures(plan.nodes))
    if settings.straight_through and not (k == 1 and renormalize) and not nested:
        found = f"{k} experts per token" if k > 1 else "a weight that is not renormalised"
        raise PlanError(
            f"--straight-through is for one expert per token whose weight is always 1, found {found}",
            hint="leave --straight-through out: the gates have a gradient without it",
        )


def _check_nested(settings: TrainSettings, plan: Plan) -> None:
    """Nested weights are always renormalised; neither --train-top-k nor the domain loss applies to nested gates."""
    alone = next((node for node in _mixtures(plan.nodes) if node.top_k == 1 < len(node.children)), None)
    if alone is not None and "routers" in settings.what and not settings.straight_through:
        raise PlanError(
            f"expert {alone.name} is an MoE that takes one expert per token, whose weight is always 1, so the "
            "language-model loss has no gradient in its gates",
            hint="use a straight-through gradient (--straight-through), or set experts_per_token: 2 for that expert",
        )


def _mixtures(nodes: Sequence[ExpertNode]) -> Iterator[ExpertNode]:
    """Every expert that is itself an MoE, at any depth."""
    for node in nodes:
        if node.children:
            yield node
        yield from _mixtures(node.children)


def _check_merged(settings: TrainSettings, plan: Plan) -> None:
    """An adapter is saved beside the model it belongs to, and a merge is no model on disk."""
    leaves = (leaf for node in (*plan.nodes, *plan.shared) for leaf in node.leaves())
    merged = next((leaf for leaf in leaves if leaf.source is not None and leaf.source.merged is not None), None)
    if merged is not None and "adapters" in settings.what:
        raise PlanError(
            f"expert {merged.name} is a merge of several models, and an adapter needs one model",
            hint="train whole experts: --what routers,experts; or merge first and name the result as source_model",
        )


def _check_identical(settings: TrainSettings, plan: Plan) -> None:
    if plan.all_identical and not {"adapters", "experts"} & set(settings.what):
        raise PlanError(
            f"all {plan.experts} experts are bit-identical, so the routers have no gradient and cannot learn",
            hint="break the symmetry: --what routers,adapters, or noise_relative in the recipe",
        )


def _check_backbone(settings: TrainSettings, plan: Plan) -> None:
    merge = plan.choice.by_group[ATTENTION]
    if "attention" in settings.what and merge.method != BASE:
        words = "the parents' average" if merge.method == AVERAGE else f"merged from the parents' ({merge})"
        raise PlanError(
            f"an attention adapter is stored on the base model, but this recipe's backbone is {words}",
            hint="use backbone: base, or leave attention out of --what",
        )
    if plan.experts < 2 and settings.what == ("routers",):
        raise PlanError("one expert needs no router, so there is nothing to learn", hint="train its adapters instead")
