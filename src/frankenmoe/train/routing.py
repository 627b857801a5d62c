"""Routers during training: noise, another top-k, straight-through gradients, a capacity. Evaluation is unchanged.

Shape suffixes: T tokens, D hidden, E experts, K top-k.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from frankenmoe.moe.block import Capacity, MoEBlock
from frankenmoe.moe.router import Router, Routing


class LearningRouter(Router):
    """In training mode only: jitters its input, adds noise to its logits, and may use another top-k.

    `straight_through`: the renormalised weight of a single expert is always 1 and has no gradient. It stays exactly 1,
    but gets the gradient of the expert's probability (arXiv 1308.3432).

    Jitter multiplies the router's input, not the experts', by numbers from 1 - jitter to 1 + jitter (Switch
    Transformer, arXiv 2101.03961, section 2.2). Noise is Gaussian (arXiv 1701.06538, eq. 4, with a fixed width). Both
    use torch's generator, which is seeded at every step.
    """

    def __init__(self, router: Router, *, top_k: int, noise: float, jitter: float, straight_through: bool) -> None:
        super().__init__(
            router.weight.detach(),
            top_k=router.top_k,
            renormalize=router.renormalize,
            rule=router.rule,
        )
        self.weight = router.weight
        self.learning_top_k, self.noise, self.jitter = top_k, noise, jitter
        self.straight_through = straight_through and self.renormalize and top_k == 1

    def forward(self, hidden_TD: torch.Tensor) -> Routing:
        if not self.training:
            return super().forward(hidden_TD)
        if self.jitter:
            hidden_TD = hidden_TD * torch.empty_like(hidden_TD).uniform_(1 - self.jitter, 1 + self.jitter)
        logits_TE = self.logits(hidden_TD)
        if self.noise:
            logits_TE = logits_TE + self.noise * torch.randn_like(logits_TE)
        routing = self.choose(logits_TE, top_k=self.learning_top_k)
        if not self.straight_through:
            return routing
        prob_T1 = self.scores(logits_TE).gather(1, routing.ids_TK)
        weight_T1 = 1 + (prob_T1 - prob_T1.detach())  # the difference is exactly 0
        return routing._replace(weights_TK=weight_T1.to(routing.weights_TK.dtype))


class LearningCapacity(Capacity):
    """A capacity for training mode only; in evaluation mode the block's own applies."""

    def __init__(self, capacity: Capacity, *, factor: float) -> None:
        super().__init__(factor, policy=capacity.policy)
        self.own = capacity

    def forward(self, routing: Routing) -> Routing:
        found = super().forward(routing) if self.training else self.own(routing)
        assert isinstance(found, Routing)
        return found


def prepare_routers(
    blocks: dict[int, MoEBlock],
    *,
    top_k: int | None,
    noise: float,
    jitter: float,
    straight_through: bool,
    capacity_factor: float | None,
) -> None:
    """Puts a LearningRouter into every block, nested ones too; only outer ones get another top-k."""
    for outer in blocks.values():
        for block in [module for module in outer.modules() if isinstance(module, MoEBlock)]:
            own = block.router.top_k if block is not outer or top_k is None else top_k
            block.router = LearningRouter(
                block.router, top_k=own, noise=noise, jitter=jitter, straight_through=straight_through
            )
            if capacity_factor is not None:
                block.capacity = LearningCapacity(block.capacity, factor=capacity_factor)


@contextmanager
def seen_routings(blocks: Mapping[int, MoEBlock]) -> Iterator[list[Routing]]:
    """Collects the decisions of the layers' own routers within the context, in order, with their graphs."""
    found: list[Routing] = []

    def append(_module: nn.Module, _inputs: object, routing: Routing) -> None:
        found.append(routing)

    with ExitStack() as hooks:
        for block in blocks.values():
            hooks.callback(block.router.register_forward_hook(append).remove)
        yield found
