"""Changes for a while how every outer router chooses: more or fewer experts, some preferred, some never chosen.

Shape suffixes: T tokens, E experts.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from frankenmoe.moe.router import Router, Routing
from frankenmoe.moe.trace import outer_blocks

NEVER = float("-inf")  # the bias of an expert that is not chosen


@dataclass(frozen=True)
class Steering:
    """What to change; by default nothing. Two that are equal give the same model.

    `top_k` is the number of experts per token, `bias_E` is added to the logits. An expert with the bias NEVER gets no
    token, and the weights of the others are what they would be without it.
    """

    top_k: int | None = None
    bias_E: tuple[float, ...] | None = None


UNCHANGED = Steering()


@contextmanager
def steered(model: nn.Module, steering: Steering) -> Iterator[None]:
    """Within the context the outer routers of `model` choose as `steering` says. Traces show what they then chose."""
    with ExitStack() as hooks:
        for block in outer_blocks(model).values() if steering != UNCHANGED else ():
            hooks.callback(block.router.register_forward_hook(_hook(block.router, steering)).remove)
        yield


def _hook(router: Router, steering: Steering) -> Callable[..., Routing]:
    top_k = steering.top_k or router.top_k
    bias_E = None if steering.bias_E is None else torch.tensor(steering.bias_E, device=router.weight.device)

    def choose(_module: nn.Module, _inputs: object, routing: Routing) -> Routing:
        # in float32: a bias would be rounded in 16 bits
        logits_TE = routing.logits_TE if bias_E is None else routing.logits_TE.float() + bias_E
        return router.choose(logits_TE, top_k=top_k)

    return choose
