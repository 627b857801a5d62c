"""The six questions of an audit, answered from facts: a number and a plain sentence each, per layer and over layers.

Layers are never averaged: what is said of all of them is a range, or the layer where it is worst.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Facts = Mapping[str, Any]

GOOD, MIND, BAD, OPEN = "good", "mind", "bad", "open"
CROWDED = 1.0  # MaxVio above which an expert has more than twice its even share
MOVED = 0.01  # a layer whose output moves by less is hardly an MoE
CHANGE = "of its output, least layer"
DROPS = 0.1  # share of assignments over capacity 1.25 that is worth a warning
ALIKE = 0.99  # a cosine at which two rows choose as one
CONDITIONED = 5.0  # mergekit's limit, held against the centred rows: their mean decides nothing
TRAINED = "1.25"  # the capacity factor most training code uses


@dataclass(frozen=True)
class Whole:
    """What answers over all layers need: outer routers' facts and nested ones', experts' names by path, groups of equal
    experts by name, output change with other experts (nats per token), and what is known of the base."""

    routers: Sequence[Facts]
    names: Mapping[str, str]
    identical: Sequence[Sequence[str]]
    all_identical: bool
    divergence: float | None
    base: Mapping[str, Any] | None
    labelled: bool
    nested: Sequence[Facts] = ()


@dataclass(frozen=True)
class Answer:
    """One question's answer. `verdict` is a word or two, `level` good, mind, bad or open; `number` is what `unit` is
    counted in, None where nothing can be measured."""

    key: str
    question: str
    verdict: str
    level: str
    number: float | None
    unit: str
    sentence: str


def answers(whole: Whole) -> tuple[Answer, ...]:
    """The six answers in the order a person asks."""
    return tuple(answer(whole) for answer in (_is_moe, _who, _domain, _gate, _survive, _token))


def layer_sentences(facts: Facts, names: Mapping[str, str]) -> dict[str, str]:
    """Question -> one sentence about one router."""
    experts = [names[_inside(facts["path"], index)] for index in range(facts["experts"])]
    return {key: say(facts, experts) for key, say in LAYER.items()}


def spelt(number: float, unit: str) -> str:
    """An answer's number as its unit wants it: shares in percent."""
    shares = ("of its output", "of tokens", "switches", "dropped")
    return percent(number) if unit.startswith(shares) else _two(number)


def percent(share: float) -> str:
    """A share as people read it; what is small but not nothing stays visible."""
    return f"{share:.0%}" if share == 0 or share >= 0.005 else "under 1%"


def _inside(path: str, index: int) -> str:
    return f"{path}.{index}" if path else str(index)


def _experts(count: int) -> str:
    return "1 expert" if count == 1 else f"{count} experts"


def _tokens(count: int) -> str:
    return "1 token" if count == 1 else f"{count:,} tokens"


def _layers(numbers: Sequence[int]) -> str:
    if len(numbers) == 1:
        return f"layer {numbers[0]}"
    shown = ", ".join(map(str, numbers[:6]))
    return f"layers {shown}{' and more' if len(numbers) > 6 else ''}"


def _span(values: Sequence[tuple[float, int]], spell: Callable[[float], str]) -> str:
    """`0.12 (layer 0) to 0.82 (layer 3)`; one value where they are equal as shown."""
    low, high = min(values), max(values)
    if spell(low[0]) == spell(high[0]):
        return f"{spell(low[0])} in every layer" if len(values) > 1 else spell(low[0])
    return f"{spell(low[0])} (layer {low[1]}) to {spell(high[0])} (layer {high[1]})"


def _two(value: float) -> str:
    return f"{value:.2f}"


def _dead(whole: Whole) -> list[tuple[int, str]]:
    """(layer, expert) of each that got no token; of nested ones only where tokens came to their router."""
    return sorted(
        (facts["layer"], whole.names[_inside(facts["path"], index)])
        for facts in (*whole.routers, *whole.nested)
        if facts["tokens"]
        for index in facts["load"]["dead"]
    )


# 1. is it an MoE at all?


def _is_moe(whole: Whole) -> Answer:
    asked = ("moe", "Is it an MoE at all?")
    base, first = whole.base, whole.routers[0]
    moved = [
        (layer["apart"]["moved"], layer["layer"]) for layer in whole.routers if layer["apart"]["moved"] is not None
    ]
    number = min(moved)[0] if moved else None
    if base and base["computes_base"]:
        return Answer(
            *asked, "no", BAD, 0.0, CHANGE,
            f"This MoE computes its base exactly: every expert is the base's own FFN, and logits differ by at most "
            f"{base['largest']:.1e}, which is rounding. Break the symmetry first, with noise_relative or adapters.",
        )  # fmt: skip
    if whole.all_identical:
        return Answer(
            *asked, "no", BAD, 0.0, CHANGE,
            f"All {len(whole.names)} experts hold the same numbers, so this is one dense model, whatever routers say.",
        )  # fmt: skip
    if number is None:
        told = (
            f"Every token uses all {first['experts']} experts, so the routers weigh but do not choose."
            if first["experts"] > 1
            else "Every token uses the only expert there is, so the routers have nothing to choose from."
        )
        return Answer(*asked, "no choice", MIND, None, CHANGE, told)
    same = "; ".join(" = ".join(group) for group in whole.identical)
    pairs = [(layer["apart"]["median"], layer["layer"]) for layer in whole.routers]
    weights = f"In units of the {_norm_of(first)}, experts lie apart by {_span(pairs, _two)}"
    outputs = f"with the next best experts chosen, outputs move by {_span(moved, percent)}"
    nats = f", predictions by {whole.divergence:.2f} nats per token" if whole.divergence is not None else ""
    level = BAD if max(moved)[0] < MOVED else MIND if same or number < MOVED else GOOD
    verdict = {GOOD: "yes", MIND: "in part", BAD: "hardly"}[level]
    told = f" Equal by content: {same}." if same else ""
    return Answer(*asked, verdict, level, number, CHANGE, f"{weights}; {outputs}{nats}.{told}")


def _norm_of(facts: Facts) -> str:
    return "base's FFN norm" if facts["apart"]["reference"] == "base" else "norm of the experts' mean"


def _moe_layer(facts: Facts, experts: Sequence[str]) -> str:
    apart = facts["apart"]
    if apart is None:
        return (
            f"A router inside an expert, over {_experts(len(experts))}; its experts are compared with all others there."
        )
    if apart["median"] is None:
        return "One expert alone: this layer is dense."
    if apart["farthest"] == 0:
        return f"All {_experts(len(apart['paths']))} hold the same numbers: this layer is dense."
    moved = (
        f"with the next best chosen the output moves by {percent(apart['moved'])}"
        if apart["moved"] is not None
        else "every token uses all of them"
    )
    near, far = _two(apart["nearest"]), _two(apart["farthest"])
    distance = near if near == far else f"{near} to {far}"
    return f"Experts lie {distance} of the {_norm_of(facts)} apart; {moved}."


# 2. who gets the tokens?


def _who(whole: Whole) -> Answer:
    asked = ("load", "Who gets the tokens?")
    violations = [(layer["load"]["max_vio"], layer["layer"]) for layer in whole.routers]
    variation = [(layer["load"]["cv"], layer["layer"]) for layer in whole.routers]
    dead = _dead(whole)
    worst = max(violations)
    layer = next(facts for facts in whole.routers if facts["layer"] == worst[1])
    share = max(layer["load"]["share"])
    busiest = whole.names[str(layer["load"]["share"].index(share))]
    tokens = _tokens(whole.routers[0]["tokens"])
    places = _layers(sorted({layer for layer, _ in dead}))
    lost = f"{_experts(len(dead))} got none of {tokens}, in {places}" if dead else f"none is dead after {tokens}"
    level = BAD if dead else MIND if worst[0] > CROWDED else GOOD
    verdict = {GOOD: "all of them", MIND: "some crowd", BAD: "not all"}[level]
    return Answer(
        *asked, verdict, level, worst[0], "MaxVio, worst layer",
        f"The load's coefficient of variation (0 is even) is {_span(variation, _two)}. The busiest expert is {busiest} "
        f"with {percent(share)} of layer {worst[1]} ({percent(1 / layer['experts'])} is even); {lost}.",
    )  # fmt: skip


def _who_layer(facts: Facts, experts: Sequence[str]) -> str:
    load = facts["load"]
    share = max(load["share"])
    dead = [experts[index] for index in load["dead"]]
    lost = f"dead: {', '.join(dead)}" if dead else "none is dead"
    close = f"; {percent(load['close_share'])} of choices were close calls" if load["close_share"] is not None else ""
    return (
        f"{experts[load['share'].index(share)]} gets most, {percent(share)} of the assignments "
        f"({percent(1 / facts['experts'])} is even), MaxVio {load['max_vio']:.2f}; {lost}{close}."
    )


# 3. does routing follow the domain?


def _domain(whole: Whole) -> Answer:
    asked = ("domain", "Does routing follow the domain?")
    if not whole.labelled:
        return Answer(
            *asked, "not asked", OPEN, None, "of tokens",
            "The text has no labels; name its expert with --data EXPERT=FILE, or write `data` in the recipe.",
        )  # fmt: skip
    chance = 1 / whole.routers[0]["experts"]
    if chance == 1:
        return Answer(*asked, "no choice", OPEN, None, "of tokens", "Every token goes to the only expert there is.")
    shares = [(_own(layer), layer["layer"]) for layer in whole.routers]
    told = [(layer["domains"]["information"], layer["layer"]) for layer in whole.routers]
    most = whole.routers[0]["domains"]["most_information"]
    bits = f"; of {most:.2f} bits of the domain the choice tells {_span(told, _two)}" if most else ""
    worst = min(shares)
    enough = min(2 * chance, (1 + chance) / 2)  # twice chance would be all tokens where there are two experts
    level = GOOD if worst[0] >= enough else MIND if max(shares)[0] >= 1.2 * chance else BAD
    verdict = {GOOD: "yes", MIND: "in part", BAD: "hardly"}[level]
    return Answer(
        *asked, verdict, level, worst[0], "of tokens, worst layer",
        f"The share of tokens that go first to their domain's own expert is {_span(shares, percent)}, by chance "
        f"{percent(chance)}{bits}.",
    )  # fmt: skip


def _own(facts: Facts) -> float:
    """One layer's share of tokens that go first to their own expert, every labelled domain weighing the same."""
    shares = [share for share in facts["domains"]["own_first"].values() if share is not None]
    return sum(shares) / len(shares) if shares else 0.0


def _domain_layer(facts: Facts, experts: Sequence[str]) -> str:
    domains = facts["domains"]
    if domains is None:
        return "The text has no labels for these experts."
    shares = {name: share for name, share in domains["own_first"].items() if share is not None}
    if not shares:
        return "No text of a labelled domain came here."
    worst, most = min(shares, key=lambda name: shares[name]), domains["most_information"]
    bits = f"; the choice tells {domains['information']:.2f} of {most:.2f} bits" if most else ""
    return (
        f"{percent(_own(facts))} of tokens go first to their own expert ({percent(1 / len(experts))} by chance), "
        f"fewest of {worst} ({percent(shares[worst])}){bits}."
    )


# 4. is the router conditioned?


def _gate(whole: Whole) -> Answer:
    asked = ("gate", "Is the router conditioned?")
    gates = [(layer["gate"], layer["layer"]) for layer in whole.routers]
    cosines = [(gate["largest_cosine"], layer) for gate, layer in gates if gate["largest_cosine"] is not None]
    if not cosines:
        return Answer(
            *asked, "one row", OPEN, None, "condition number", "A router over one expert has nothing to tell apart."
        )
    conditions = [(gate["condition"], layer) for gate, layer in gates]
    centred = [(gate["condition_centred"], layer) for gate, layer in gates]
    degenerate = [layer for gate, layer in gates if gate["degenerate"]]
    spreads = [(gate["logit_spread"], layer) for gate, layer in gates]
    infinite = any(condition is None for condition, _ in centred)
    number = None if infinite else max(centred)[0]
    level = BAD if number is None or max(cosines)[0] > ALIKE else MIND if number > CONDITIONED else GOOD
    verdict = {GOOD: "yes", MIND: "weakly", BAD: "no"}[level]
    advice = (
        ", but only by the mean of their rows, on which no choice depends."
        if level == GOOD
        else ". Fit the rows at the true router input, or give experts prompts that differ more."
    )
    called = f" mergekit calls a gate above 5 degenerate: {len(degenerate)} of {len(gates)} are{advice}"
    return Answer(
        *asked, verdict, level, number, "centred condition number, worst layer",
        f"The cosine of the two rows most alike is {_span(cosines, _two)}, and the spread of a token's logits over "
        f"experts {_span(spreads, _two)}. The condition number is {_conditions(conditions)}, of the "
        f"rows less their mean {_conditions(centred)}.{called if degenerate else ''}",
    )  # fmt: skip


def _conditions(found: Sequence[tuple[float | None, int]]) -> str:
    """A span of condition numbers, of which None are infinite."""
    finite = [(condition, layer) for condition, layer in found if condition is not None]
    infinite = [layer for condition, layer in found if condition is None]
    if not finite:
        return "infinite in every layer" if len(found) > 1 else "infinite"
    return _span(finite, _two) + (f", infinite in {_layers(infinite)}" if infinite else "")


def _gate_layer(facts: Facts, experts: Sequence[str]) -> str:
    gate = facts["gate"]
    if gate["most_alike"] is None:
        return "One row: nothing to tell apart."
    one, two = (experts[index] for index in gate["most_alike"])
    condition, centred = (
        "infinite" if gate[key] is None else f"{gate[key]:.1f}" for key in ("condition", "condition_centred")
    )
    called = "above 5, which mergekit calls degenerate" if gate["degenerate"] else "fine (5 is mergekit's limit)"
    return (
        f"{one} and {two} are most alike (cosine {gate['largest_cosine']:.2f}); the condition number is {condition}, "
        f"{called}, and {centred} of the rows less their mean; logits spread by {gate['logit_spread']:.2f} at a hidden "
        f"norm of {gate['hidden_norm']:.1f}."
    )


# 5. would it survive?


def _survive(whole: Whole) -> Answer:
    asked = ("survive", "Would it survive?")
    over = [(layer["capacity"]["over"][TRAINED], layer["layer"]) for layer in whole.routers]
    dead = [f"{name} in layer {layer}" for layer, name in _dead(whole)]
    fewest = [(layer["capacity"]["fewest_tokens"], layer["layer"]) for layer in whole.routers]
    level = BAD if dead else MIND if max(over)[0] > DROPS else GOOD
    verdict = {GOOD: "yes", MIND: "with losses", BAD: "not all"}[level]
    listed = ", ".join(dead[:4]) + (f" and {len(dead) - 4} more" if len(dead) > 4 else "")
    quantized = (
        f"imatrix, GPTQ and AWQ would find no data for {listed}: calibrate on more text, or leave these unquantized"
        if dead
        else f"every expert has data to calibrate on, {_tokens(min(fewest)[0])} at least (layer {min(fewest)[1]})"
    )
    return Answer(
        *asked, verdict, level, max(over)[0], f"dropped at capacity {TRAINED}, worst layer",
        f"In batches of one domain's text, the share of assignments that a capacity of {TRAINED} would drop is "
        f"{_span(over, percent)}; {quantized}.",
    )  # fmt: skip


def _survive_layer(facts: Facts, experts: Sequence[str]) -> str:
    over = ", ".join(f"{percent(share)} at {factor}" for factor, share in facts["capacity"]["over"].items())
    dead = [experts[index] for index in facts["load"]["dead"]]
    data = f"no calibration data for {', '.join(dead)}" if dead else "every expert has calibration data"
    return f"Assignments over capacity: {over}; {data} (fewest tokens: {facts['capacity']['fewest_tokens']:,})."


# 6. what did this token see?


def _token(whole: Whole) -> Answer:
    switches = [(layer["tokens_seen"]["switches"], layer["layer"]) for layer in whole.routers]
    used = [(layer["tokens_seen"]["used"], layer["layer"]) for layer in whole.routers]
    shown, experts = whole.routers[0]["tokens_seen"]["tokens"], whole.routers[0]["experts"]
    return Answer(
        "token", "What did this token see?", "look below", OPEN, max(switches)[0], "switches, liveliest layer",
        f"The number of experts, of {experts}, that come first for any of the {_tokens(shown)} shown is "
        f"{_span(used, lambda count: f'{count:.0f}')}; the share of tokens with another first expert than the token "
        f"before is {_span(switches, percent)}.",
    )  # fmt: skip


def _token_layer(facts: Facts, experts: Sequence[str]) -> str:
    seen = facts.get("tokens_seen")
    if seen is None:
        return "Tokens are shown for the outer routers."
    return (
        f"The tokens shown use {seen['used']} of {_experts(len(experts))} first; {percent(seen['switches'])} have "
        "another first expert than the token before."
    )


LAYER: Mapping[str, Callable[[Facts, Sequence[str]], str]] = {
    "moe": _moe_layer,
    "load": _who_layer,
    "domain": _domain_layer,
    "gate": _gate_layer,
    "survive": _survive_layer,
    "token": _token_layer,
}
