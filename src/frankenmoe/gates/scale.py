"""Finds how sharp routers should be: a line search over one factor for all gates."""

import math
from collections.abc import Callable

FACTOR = 1.6
MOST = 12
DEVIATION = 0.5  # of the prior of the factor's logarithm


def search(loss: Callable[[float], float], *, start: float, tokens: int) -> tuple[float, dict[float, float]]:
    """The best factor, and the value of every factor that was tried.

    The value is the loss (nats per token over `tokens` tokens) plus each token's share of a log-normal prior around
    `start`. With thousands of held-out tokens the prior has no effect. With a few hundred it keeps chance from making
    routers very sharp or flat.

    The search goes from `start` in steps of FACTOR while the value falls, then tries half a step to either side: about
    six losses, at most MOST. The loss is smooth in the factor's logarithm and has one minimum: at 0 experts are
    averaged, at infinity only the first one counts.
    """
    tried: dict[float, float] = {}

    def look(factor: float) -> float:
        if factor not in tried:
            prior = (math.log(factor / start) / DEVIATION) ** 2 / 2
            tried[factor] = loss(factor) + prior / max(tokens, 1)
        return tried[factor]

    best = start
    look(best)
    for step in (FACTOR, 1 / FACTOR):
        while len(tried) < MOST and look(best * step) < tried[best]:
            best *= step
        if best != start:
            break
    for step in (FACTOR**0.5, FACTOR**-0.5):
        look(best * step)
    return min(tried, key=lambda factor: tried[factor]), tried
