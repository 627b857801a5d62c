"""How sharp a router should be: one line search over a factor on all gates; does not know what the loss is of."""

from collections.abc import Callable

FACTOR = 1.6
MOST = 12


def search(loss: Callable[[float], float], *, start: float = 1.0) -> tuple[float, dict[float, float]]:
    """The best factor found, and every one that was tried with its loss.

    Walks from `start` by FACTOR in the direction that helps until it helps no more, then looks half a step to either
    side: about six losses, at most MOST. The loss over the logarithm of the factor is smooth and has one valley: at 0
    experts are averaged, at infinity only the first counts.
    """
    tried: dict[float, float] = {}

    def look(factor: float) -> float:
        if factor not in tried:
            tried[factor] = loss(factor)
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
