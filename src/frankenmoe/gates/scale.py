"""Finds how sharp routers should be: a search over one factor for all gates."""

import math
from collections.abc import Callable

FACTOR = 1.6
MOST = 12  # tries
DEVIATION = 0.5  # of the prior of the factor's logarithm
FARTHEST = 1.5  # steps from the middle one of three factors to where their parabola is trusted


def search(loss: Callable[[float], float], *, start: float, tokens: int) -> float:
    """The factor of lowest value, after usually three tries, at most MOST.

    The value is the loss (nats per token over `tokens` tokens) plus each token's share of a log-normal prior around
    `start`. With thousands of held-out tokens the prior has no effect. With a few hundred it keeps chance from making
    routers very sharp or flat.

    The search tries `start`, a step of FACTOR up, and the next step on the better side, further while the parabola
    through the best three falls beyond them. The lowest point of this parabola is the result, or the best try if there
    is none. The loss is smooth in the factor's logarithm and has one minimum: at 0 experts are averaged, at infinity
    only the first one counts.
    """
    tried: dict[float, float] = {}  # steps from `start` -> value

    def look(steps: float) -> float:
        prior = (steps * math.log(FACTOR) / DEVIATION) ** 2 / 2
        tried[steps] = loss(start * FACTOR**steps) + prior / max(tokens, 1)
        return tried[steps]

    look(2.0 if look(0.0) > look(1.0) else -1.0)
    while (beyond := _beyond(tried)) is not None and len(tried) < MOST:
        look(beyond)
    lowest = _lowest(tried)
    best = min(tried, key=lambda steps: tried[steps]) if lowest is None else lowest
    return float(start * FACTOR**best)


def _beyond(tried: dict[float, float]) -> float | None:
    """The next factor on the outside if the lowest point lies far outside of those that were tried."""
    first, last = min(tried), max(tried)
    lowest, best = _lowest(tried), min(tried, key=lambda steps: tried[steps])
    if best == first and (lowest is None or lowest <= first - FARTHEST + 1):
        return first - 1
    if best == last and (lowest is None or lowest >= last + FARTHEST - 1):
        return last + 1
    return None


def _lowest(tried: dict[float, float]) -> float | None:
    """Where the parabola through the best factor and its neighbours is lowest, not too far out; None if nowhere."""
    places = sorted(tried)
    best = min(places, key=lambda steps: tried[steps])
    at = min(max(places.index(best), 1), len(places) - 2)
    x0, x1, x2 = places[at - 1 : at + 2]
    left, right = (tried[x1] - tried[x0]) / (x1 - x0), (tried[x2] - tried[x1]) / (x2 - x1)
    bend = (right - left) / (x2 - x0)
    if not bend > 0:
        return None
    return min(max((x0 + x1) / 2 - left / (2 * bend), x1 - FARTHEST), x1 + FARTHEST)
