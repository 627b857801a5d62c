"""Why a run could not learn anything, found before its first step; changes nothing and writes nothing.

Every trap raises PlanError with its reason and a way out.
"""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import nn

from frankenmoe.errors import PlanError
from frankenmoe.planning import ExpertNode, Plan
from frankenmoe.recipetrain import Train
from frankenmoe.suggest import did_you_mean
from frankenmoe.train.data import Domain

ZERO = 1e-12  # a gradient this small relative to the gate is rounding and nothing else


def check(settings: Train, *, plan: Plan | None, top_k: int, renormalize: bool, experts: Sequence[str]) -> None:
    """What the settings and the plan alone show. `plan` is None for a built artifact, of which only routers learn."""
    _check_built(settings, plan)
    k = settings.experts_per_token or top_k
    _check_top_k(settings, k=k, renormalize=renormalize, experts=len(experts))
    _check_straight_through(settings, plan, k=k, renormalize=renormalize)
    if plan is not None:
        _check_nested(settings, plan)
        _check_identical(settings, plan)
        _check_backbone(settings, plan)


def check_domains(settings: Train, domains: Sequence[Domain], *, experts: Sequence[str]) -> None:
    """What the names of the domains show: terms that need to know a text's own expert have to find one."""
    for term in ("distill", "domain"):
        if not getattr(settings, term):
            continue
        lost = [domain.name for domain in domains if domain.owner < 0]
        if lost:
            raise PlanError(
                f"the loss term {term} needs the expert that owns each text, found none called {lost[0]}",
                hint=did_you_mean(lost[0], list(experts)) or f"name the data after experts: {', '.join(experts)}",
            )


def check_experts(layers: Iterable[nn.ModuleList]) -> None:
    """PlanError where the experts of every layer hold the same numbers; most layers are done with the first two."""
    if all(_same(expert, layer[0]) for layer in layers for expert in layer):
        raise PlanError(
            "the experts of every layer hold the same numbers, so the loss has no gradient in the gates",
            hint="train adapters with the gates, on the virtual form: build it with --virtual and say "
            "--what routers,adapters",
        )


def _same(one: nn.Module, two: nn.Module) -> bool:
    return one is two or all(map(torch.equal, one.parameters(), two.parameters()))


def check_gradient(largest: float, *, of: str) -> None:
    """After the first gradient: PlanError where the gates got none, for a reason that nothing above knew."""
    if largest < ZERO:
        raise PlanError(
            f"the loss has no gradient in the gates ({largest:.1e} in {of}), so no training would move them",
            hint="the experts may compute the same thing; train adapters with them: --what routers,adapters",
        )


def _check_built(settings: Train, plan: Plan | None) -> None:
    others = [part for part in settings.what if part != "routers"]
    if plan is None and others:
        raise PlanError(
            f"a built artifact can have its routers trained, and not its {', '.join(others)}: its body is never "
            "rewritten",
            hint="train the virtual form (`build --virtual`, or straight from the recipe), and build afterwards",
        )
    if plan is None and settings.distill:
        raise PlanError(
            "a built artifact does not know its parents as models, so nothing can be distilled from them",
            hint="train the virtual form, or leave distill out",
        )


def _check_top_k(settings: Train, *, k: int, renormalize: bool, experts: int) -> None:
    if k > experts:
        raise PlanError(
            f"training with {k} experts per token needs as many, found {experts}",
            hint="lower experts_per_token in the settings of training",
        )
    learns = settings.domain or settings.straight_through
    if k == 1 and renormalize and "routers" in settings.what and not learns:
        raise PlanError(
            "with one expert per token and renormalised weights the weight is always 1, so the language-model loss has "
            "no gradient in the gates",
            hint="train with two (--train-top-k 2), which is used while training only, let the weight pass on the "
            "gradient of the expert's probability (--straight-through), or give --domain a coefficient",
        )


def _check_straight_through(settings: Train, plan: Plan | None, *, k: int, renormalize: bool) -> None:
    nested = plan is not None and any(node.top_k == 1 for node in _mixtures(plan.nodes))
    if settings.straight_through and not (k == 1 and renormalize) and not nested:
        found = f"{k} experts per token" if k > 1 else "a weight that is not renormalised"
        raise PlanError(
            f"a straight-through weight is for one expert per token with a weight that is always 1, found {found}",
            hint="leave --straight-through out: the gates have a gradient without it",
        )


def _check_nested(settings: Train, plan: Plan) -> None:
    """Nested weights are always renormalised, and neither --train-top-k nor the domain term reaches their gates."""
    alone = next((node for node in _mixtures(plan.nodes) if node.top_k == 1 < len(node.children)), None)
    if alone is not None and "routers" in settings.what and not settings.straight_through:
        raise PlanError(
            f"expert {alone.name} is an MoE that takes one expert per token, whose weight is always 1, so the "
            "language-model loss has no gradient in its gates",
            hint="let the weight pass on the gradient of the expert's probability (--straight-through), or give it "
            "experts_per_token: 2",
        )


def _mixtures(nodes: Sequence[ExpertNode]) -> Iterator[ExpertNode]:
    """Every expert from these down that is an MoE of its own."""
    for node in nodes:
        if node.children:
            yield node
        yield from _mixtures(node.children)


def _check_identical(settings: Train, plan: Plan) -> None:
    if plan.all_identical and not {"adapters", "experts"} & set(settings.what):
        raise PlanError(
            f"all {plan.experts} experts are bit-identical, so the routers have no gradient and nothing can come of it",
            hint="break the symmetry: --what routers,adapters, or noise_relative in the recipe",
        )


def _check_backbone(settings: Train, plan: Plan) -> None:
    if "attention" in settings.what and plan.recipe.backbone == "average":
        raise PlanError(
            "an adapter on attention belongs to the base, and this recipe takes its backbone from the parents' average",
            hint="use backbone: base, or leave attention out of --what",
        )
    if plan.experts < 2 and settings.what == ("routers",):
        raise PlanError("one expert needs no router, so there is nothing to learn", hint="train its adapters instead")
