"""What routers do differently while they learn: noise, top-k, gradients, a capacity; without a trace when they do not.

Shape suffixes: T tokens, D hidden, E experts, K top-k.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from frankenmoe.moe.block import Capacity, MoEBlock
from frankenmoe.moe.router import Router, Routing


class LearningRouter(Router):
    """A router that, in training mode only, reads jittered states, adds noise to its scores and may use another top-k.

    `straight_through`: where one expert is chosen and its weight is divided by itself, the weight stays exactly 1 and
    has the gradient of the expert's probability (arXiv 1308.3432), where otherwise it would have none.

    Jitter multiplies what the router reads, and not what the experts read, by numbers from 1 - jitter to 1 + jitter
    (Switch Transformer, arXiv 2101.03961, section 2.2); noise is Gaussian (arXiv 1701.06538, eq. 4, of one width).
    Both are drawn from torch's generator, which the trainer seeds anew at every step.
    """

    def __init__(self, router: Router, *, top_k: int, noise: float, jitter: float, straight_through: bool) -> None:
        super().__init__(
            router.weight.detach(),
            top_k=router.top_k,
            renormalize=router.renormalize,
            round_weights=router.round_weights,
        )
        self.weight = router.weight
        self.learning_top_k, self.noise, self.jitter = top_k, noise, jitter
        self.straight_through = straight_through and self.renormalize and top_k == 1

    def forward(self, hidden_TD: torch.Tensor) -> Routing:
        if not self.training:
            return super().forward(hidden_TD)
        if self.jitter:
            hidden_TD = hidden_TD * torch.empty_like(hidden_TD).uniform_(1 - self.jitter, 1 + self.jitter)
        logits_TE = nn.functional.linear(hidden_TD, self.weight)
        if self.noise:
            logits_TE = logits_TE + self.noise * torch.randn_like(logits_TE)
        routing = self.choose(logits_TE, top_k=self.learning_top_k)
        if not self.straight_through:
            return routing
        prob_T1 = logits_TE.softmax(dim=-1, dtype=torch.float32).gather(1, routing.ids_TK)
        weight_T1 = 1 + (prob_T1 - prob_T1.detach())  # the difference is exactly 0
        return routing._replace(weights_TK=weight_T1.to(routing.weights_TK.dtype))


class LearningCapacity(Capacity):
    """A capacity that counts in training mode only; otherwise the block's own."""

    def __init__(self, capacity: Capacity, *, factor: float) -> None:
        super().__init__(factor, policy=capacity.policy)
        self.own = capacity

    def forward(self, routing: Routing) -> Routing:
        found = super().forward(routing) if self.training else self.own(routing)
        assert isinstance(found, Routing)
        return found


@dataclass(frozen=True)
class Seen:
    """What one router decided in one forward, with its graph: `outer` for a layer's own router."""

    outer: bool
    routing: Routing


def prepare_routers(
    blocks: dict[int, MoEBlock],
    *,
    top_k: int | None,
    noise: float,
    jitter: float,
    straight_through: bool,
    capacity_factor: float | None,
) -> None:
    """Puts learning routers into all blocks, nested ones too; the top-k is changed in the outer ones only."""
    for outer in blocks.values():
        for block in [module for module in outer.modules() if isinstance(module, MoEBlock)]:
            own = block.router.top_k if block is not outer or top_k is None else top_k
            block.router = LearningRouter(
                block.router, top_k=own, noise=noise, jitter=jitter, straight_through=straight_through
            )
            if capacity_factor is not None:
                block.capacity = LearningCapacity(block.capacity, factor=capacity_factor)


@contextmanager
def seen_routings(blocks: dict[int, MoEBlock]) -> Iterator[list[Seen]]:
    """Within the context, every router that runs adds what it decided, in order."""
    found: list[Seen] = []

    def hook(outer: bool) -> object:
        def append(_module: nn.Module, _inputs: object, routing: Routing) -> None:
            found.append(Seen(outer, routing))

        return append

    with ExitStack() as hooks:
        for outer in blocks.values():
            for block in [module for module in outer.modules() if isinstance(module, MoEBlock)]:
                handle = block.router.register_forward_hook(hook(block is outer))  # type: ignore[arg-type]
                hooks.callback(handle.remove)
        yield found
