"""How sharp a router should be: one line search over a factor on all gates; does not know what the loss is of."""

import math
from collections.abc import Callable

FACTOR = 1.6
MOST = 12
DEVIATION = 0.5  # of the logarithm of the factor, before any text was seen


def search(loss: Callable[[float], float], *, start: float, tokens: int) -> tuple[float, dict[float, float]]:
    """The best factor found, and every one that was tried with its value.

    The value is the loss, nats per token over `tokens` tokens, and the share of each token in a log-normal prior around
    `start`: with thousands of held-out tokens the prior is nothing, with a few hundred it keeps chance differences from
    making routers very sharp or flat. Walks from `start` by FACTOR in the direction that helps until it helps no more,
    then looks half a step to either side: about six losses, at most MOST. Over the logarithm of the factor the loss is
    smooth and has one valley: at 0 experts are averaged, at infinity only the first counts.
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
