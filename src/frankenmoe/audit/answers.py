"""The six questions of an audit, answered from facts: a number and plain sentences, per layer and over all layers.

Layers are never averaged: an answer over all layers is a range, or names the worst layer.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from frankenmoe.audit.measures import Facts, own_share, own_shares
from frankenmoe.audit.spare import one_of_each, without
from frankenmoe.counted import counted

GOOD, MIND, BAD, OPEN = "good", "mind", "bad", "open"
CROWDED = 1.0  # MaxVio above this: an expert has more than twice its even share
MOVED = 0.01  # a layer whose output changes by less is hardly an MoE
CHANGE = "change of output, least affected layer"
DROPS = 0.1  # more assignments than this over capacity 1.25 are worth a warning
ALIKE = 0.99  # above this cosine two rows choose alike
CONDITIONED = 5.0  # mergekit's limit, applied to the centred rows, because the mean row changes no choice
TRAINED = "1.25"  # the capacity factor most training code uses


@dataclass(frozen=True)
class Whole:
    """What answers over all layers need.

    `routers` and `nested` are facts of outer and nested routers, `names` the experts' names by path, `identical` groups
    of equal experts, `divergence` the change of predictions with other experts (nats per token), `base` the comparison
    with the base. `silent` are experts whose output is always zero, `artifact` is the folder that experts can be taken
    out of; None for a recipe.
    """

    routers: Sequence[Facts]
    names: Mapping[str, str]
    identical: Sequence[Sequence[str]]
    all_identical: bool
    divergence: float | None
    base: Mapping[str, Any] | None
    labelled: bool
    nested: Sequence[Facts] = ()
    silent: Sequence[str] = ()
    artifact: str | None = None


@dataclass(frozen=True)
class Answer:
    """One question's answer. `verdict` is a word or two, `level` good, mind, bad or open. `number` is in `unit`; None
    means that nothing can be measured."""

    key: str
    question: str
    verdict: str
    level: str
    number: float | None
    unit: str
    sentence: str


def answers(whole: Whole) -> tuple[Answer, ...]:
    """The six answers, in the order in which they are shown."""
    return tuple(answer(whole) for answer in (_is_moe, _who, _domain, _gate, _survive, _token))


def layer_sentences(facts: Facts, names: Mapping[str, str]) -> dict[str, str]:
    """Question -> one sentence about one router."""
    experts = [names[_inside(facts["path"], index)] for index in range(facts["experts"])]
    return {key: say(facts, experts) for key, say in LAYER.items()}


def spelt(number: float, unit: str) -> str:
    """An answer's number as text: shares in percent."""
    shares = ("change of output", "of tokens", "dropped")
    return percent(number) if unit.startswith(shares) else _two(number)


def percent(share: float) -> str:
    """A share in whole percent; a small one above zero stays visible."""
    return f"{share:.0%}" if share == 0 or share >= 0.005 else "under 1%"


def _inside(path: str, index: int) -> str:
    return f"{path}.{index}" if path else str(index)


def _layers(numbers: Sequence[int]) -> str:
    if len(numbers) == 1:
        return f"layer {numbers[0]}"
    shown = ", ".join(map(str, numbers[:6]))
    return f"layers {shown}{' and more' if len(numbers) > 6 else ''}"


def _by_layer(whole: Whole, part: str, key: str) -> list[tuple[Any, int]]:
    """(value, layer) of the outer routers that have one."""
    return [(facts[part][key], facts["layer"]) for facts in whole.routers if facts[part][key] is not None]


def _span(values: Sequence[tuple[float, int]], spell: Callable[[float], str]) -> str:
    """`0.12 (layer 0) to 0.82 (layer 3)`, or one value if all layers show the same."""
    low, high = min(values), max(values)
    if spell(low[0]) == spell(high[0]):
        return f"{spell(low[0])} in every layer" if len(values) > 1 else spell(low[0])
    return f"{spell(low[0])} (layer {low[1]}) to {spell(high[0])} (layer {high[1]})"


def _two(value: float) -> str:
    return f"{value:.2f}"


def _dead(whole: Whole) -> list[tuple[int, str]]:
    """(layer, name) of every expert without a token; nested ones only if their router got tokens."""
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
    moved = _by_layer(whole, "apart", "moved")
    number = min(moved)[0] if moved else None
    if base and base["computes_base"]:
        return Answer(
            *asked, "no", BAD, 0.0, CHANGE,
            f"This MoE computes its base exactly: every expert is the base's own FFN. Logits differ by at most "
            f"{base['largest']:.1e}, which is rounding. Break the symmetry first: use noise_relative or adapters.",
        )  # fmt: skip
    if whole.all_identical:
        return Answer(
            *asked, "no", BAD, 0.0, CHANGE,
            f"All {len(whole.names)} experts have the same weights, so this is one dense model, whatever the routers "
            "choose.",
        )  # fmt: skip
    if number is None:
        sentence = (
            f"Every token uses all {first['experts']} experts. The routers weigh experts but do not choose."
            if first["experts"] > 1
            else "There is only one expert, so the routers have nothing to choose."
        )
        return Answer(*asked, "no choice", MIND, None, CHANGE, sentence)
    same = "; ".join(" = ".join(group) for group in whole.identical)
    pairs = _by_layer(whole, "apart", "median")
    weights = f"The distance between experts is {_span(pairs, _two)}, relative to the {_norm_of(first)}"
    outputs = f"With the next best experts chosen, outputs change by {_span(moved, percent)}"
    nats = f", and predictions by {whole.divergence:.2f} nats per token" if whole.divergence is not None else ""
    level = BAD if max(moved)[0] < MOVED else MIND if same or number < MOVED else GOOD
    verdict = {GOOD: "yes", MIND: "in part", BAD: "hardly"}[level]
    return Answer(*asked, verdict, level, number, CHANGE, f"{weights}. {outputs}{nats}.{_copies(whole, same)}")


def _copies(whole: Whole, same: str) -> str:
    """What is said of experts that add nothing, or nothing of their own."""
    zero, left = whole.silent, len(whole.names) - sum(len(group) - 1 for group in whole.identical)
    found = f" The output of {', '.join(zero)} is always zero: {without(zero, whole.artifact)}." if zero else ""
    if not same:
        return found
    outer = all(facts["path"] == "" for facts in whole.routers) and not whole.nested
    advice = f"; {one_of_each(left, whole.artifact)}" if outer else ""
    return f" Experts with the same weights: {same}{advice}.{found}"


def _norm_of(facts: Facts) -> str:
    return "norm of the base's FFN" if facts["apart"]["reference"] == "base" else "norm of the experts' mean"


def _moe_layer(facts: Facts, experts: Sequence[str]) -> str:
    apart = facts["apart"]
    if apart is None:
        count = counted(len(experts), "expert")
        return f"A router inside an expert, over {count}. They are compared in the outer router's row."
    if apart["median"] is None:
        return "There is only one expert: this layer is dense."
    if apart["farthest"] == 0:
        return f"All {counted(len(apart['paths']), 'expert')} have the same weights: this layer is dense."
    moved = (
        f"With the next best experts chosen, the output changes by {percent(apart['moved'])}"
        if apart["moved"] is not None
        else "Every token uses all of them"
    )
    near, far = _two(apart["nearest"]), _two(apart["farthest"])
    distance = near if near == far else f"{near} to {far}"
    return f"The distance between experts is {distance}, relative to the {_norm_of(facts)}. {moved}."


# 2. who gets the tokens?


def _who(whole: Whole) -> Answer:
    asked = ("load", "Who gets the tokens?")
    dead, worst = _dead(whole), max(_by_layer(whole, "load", "max_vio"))
    variation = _by_layer(whole, "load", "cv")
    layer = next(facts for facts in whole.routers if facts["layer"] == worst[1])
    share = max(layer["load"]["share"])
    busiest = whole.names[str(layer["load"]["share"].index(share))]
    tokens = counted(whole.routers[0]["tokens"], "token")
    places = _layers(sorted({layer for layer, _ in dead}))
    lost = (
        f"{counted(len(dead), 'expert')} got none of {tokens} ({places})"
        if dead
        else f"No expert is dead after {tokens}"
    )
    level = BAD if dead else MIND if worst[0] > CROWDED else GOOD
    idle = [name for name in whole.names.values() if all((each["layer"], name) in dead for each in whole.routers)]
    advice = f" {', '.join(idle)} got none in any layer: {without(idle, whole.artifact)}." if idle else ""
    verdict = {GOOD: "all of them", MIND: "some crowd", BAD: "not all"}[level]
    return Answer(
        *asked, verdict, level, worst[0], "MaxVio, worst layer",
        f"The coefficient of variation of the load (0 is even) is {_span(variation, _two)}. The busiest expert is "
        f"{busiest}, with {percent(share)} of the assignments in layer {worst[1]} (an even share is "
        f"{percent(1 / layer['experts'])}). {lost}.{advice}",
    )  # fmt: skip


def _who_layer(facts: Facts, experts: Sequence[str]) -> str:
    load = facts["load"]
    share = max(load["share"])
    dead = [experts[index] for index in load["dead"]]
    lost = f"Dead: {', '.join(dead)}" if dead else "No expert is dead"
    close = f" {percent(load['close_share'])} of choices were close." if load["close_share"] is not None else ""
    return (
        f"{experts[load['share'].index(share)]} gets most: {percent(share)} of the assignments (an even share is "
        f"{percent(1 / facts['experts'])}), MaxVio {load['max_vio']:.2f}. {lost}.{close}"
    )


# 3. does routing follow the domain?


def _domain(whole: Whole) -> Answer:
    asked = ("domain", "Does routing follow the domain?")
    if not whole.labelled:
        return Answer(
            *asked, "no labels", OPEN, None, "of tokens",
            "The text has no labels. Name its expert with --data EXPERT=FILE, or add `data` to the recipe.",
        )  # fmt: skip
    chance = 1 / whole.routers[0]["experts"]
    if chance == 1:
        return Answer(*asked, "no choice", OPEN, None, "of tokens", "There is only one expert.")
    shares = [(own_share(layer) or 0.0, layer["layer"]) for layer in whole.routers]
    information = _by_layer(whole, "domains", "information")
    most = whole.routers[0]["domains"]["most_information"]
    bits = (
        f" Its information about the domain is {_span(information, _two)}, of {most:.2f} bits possible." if most else ""
    )
    worst = min(shares)
    enough = min(2 * chance, (1 + chance) / 2)  # with two experts, twice chance would be all tokens
    level = GOOD if worst[0] >= enough else MIND if max(shares)[0] >= 1.2 * chance else BAD
    verdict = {GOOD: "yes", MIND: "in part", BAD: "hardly"}[level]
    return Answer(
        *asked, verdict, level, worst[0], "of tokens, worst layer",
        f"The share of tokens whose first expert is their domain's own is {_span(shares, percent)}; chance is "
        f"{percent(chance)}.{bits}",
    )  # fmt: skip


def _domain_layer(facts: Facts, experts: Sequence[str]) -> str:
    domains = facts["domains"]
    if domains is None:
        return "The text has no labels for these experts."
    shares, mean = own_shares(facts), own_share(facts)
    if mean is None:
        return "No token of a labelled domain came here."
    worst, most = min(shares, key=lambda name: shares[name]), domains["most_information"]
    bits = f" The first expert tells {domains['information']:.2f} of {most:.2f} bits about the domain." if most else ""
    return (
        f"{percent(mean)} of tokens have their own expert first (chance is {percent(1 / len(experts))}), fewest of "
        f"{worst} ({percent(shares[worst])}).{bits}"
    )


# 4. is the router conditioned?


def _gate(whole: Whole) -> Answer:
    asked = ("gate", "Is the router conditioned?")
    cosines, spreads = _by_layer(whole, "gate", "largest_cosine"), _by_layer(whole, "gate", "logit_spread")
    if not cosines:
        return Answer(*asked, "one row", OPEN, None, "condition number", "A router over one expert has a single row.")
    centred = _by_layer(whole, "gate", "condition_centred")
    degenerate = sum(layer["gate"]["degenerate"] for layer in whole.routers)
    number = max(centred)[0] if len(centred) == len(whole.routers) else None
    level = BAD if number is None or max(cosines)[0] > ALIKE else MIND if number > CONDITIONED else GOOD
    verdict = {GOOD: "yes", MIND: "weakly", BAD: "no"}[level]
    advice = (
        ", but only because of their mean row, which changes no choice."
        if level == GOOD
        else ". Fit the gates at the true router input, or give the experts prompts that differ more."
    )
    called = f" mergekit calls a gate above 5 degenerate: {degenerate} of {len(whole.routers)} are{advice}"
    return Answer(
        *asked, verdict, level, number, "centred condition number, worst layer",
        f"The largest cosine of two rows is {_span(cosines, _two)}. The spread of a token's logits over the experts "
        f"is {_span(spreads, _two)}. The condition number is {_conditions(whole, 'condition')}; without the mean row "
        f"it is {_conditions(whole, 'condition_centred')}.{called if degenerate else ''}",
    )  # fmt: skip


def _conditions(whole: Whole, key: str) -> str:
    """A span of condition numbers; facts without one stand for infinity."""
    finite = _by_layer(whole, "gate", key)
    infinite = [facts["layer"] for facts in whole.routers if facts["gate"][key] is None]
    if not finite:
        return "infinite in every layer" if len(infinite) > 1 else "infinite"
    return _span(finite, _two) + (f", infinite in {_layers(infinite)}" if infinite else "")


def _gate_layer(facts: Facts, experts: Sequence[str]) -> str:
    gate = facts["gate"]
    if gate["most_alike"] is None:
        return "One expert has a single row."
    one, two = (experts[index] for index in gate["most_alike"])
    condition, centred = (
        "infinite" if gate[key] is None else f"{gate[key]:.1f}" for key in ("condition", "condition_centred")
    )
    called = "degenerate by mergekit's limit of 5" if gate["degenerate"] else "below mergekit's limit of 5"
    return (
        f"{one} and {two} are most alike (cosine {gate['largest_cosine']:.2f}). The condition number is {condition} "
        f"({called}); without the mean row it is {centred}. The spread of a token's logits is "
        f"{gate['logit_spread']:.2f}, at a hidden norm of {gate['hidden_norm']:.1f}."
    )


# 5. would it survive?


def _survive(whole: Whole) -> Answer:
    asked = ("survive", "Would it survive?")
    over = [(layer["capacity"]["over"][TRAINED], layer["layer"]) for layer in whole.routers]
    dead = [f"{name} in layer {layer}" for layer, name in _dead(whole)]
    fewest = _by_layer(whole, "capacity", "fewest_tokens")
    level = BAD if dead else MIND if max(over)[0] > DROPS else GOOD
    verdict = {GOOD: "yes", MIND: "with losses", BAD: "not all"}[level]
    listed = ", ".join(dead[:4]) + (f" and {len(dead) - 4} more" if len(dead) > 4 else "")
    quantized = (
        f"imatrix, GPTQ and AWQ would find no data for {listed}: calibrate on more text, or leave these unquantized"
        if dead
        else f"Every expert has data to calibrate on, at least {counted(min(fewest)[0], 'token')} (layer "
        f"{min(fewest)[1]})"
    )
    return Answer(
        *asked, verdict, level, max(over)[0], f"dropped at capacity {TRAINED}, worst layer",
        f"In batches of one domain's text, the share of assignments that a capacity of {TRAINED} would drop is "
        f"{_span(over, percent)}. {quantized}.",
    )  # fmt: skip


def _survive_layer(facts: Facts, experts: Sequence[str]) -> str:
    over = ", ".join(f"{percent(share)} at {factor}" for factor, share in facts["capacity"]["over"].items())
    dead = [experts[index] for index in facts["load"]["dead"]]
    data = f"No calibration data for {', '.join(dead)}" if dead else "Every expert has calibration data"
    return f"Assignments over capacity: {over}. {data} (fewest tokens: {facts['capacity']['fewest_tokens']:,})."


# 6. what did this token see?


def _token(whole: Whole) -> Answer:
    switches, used = _by_layer(whole, "tokens_seen", "switches"), _by_layer(whole, "tokens_seen", "used")
    shown, experts = whole.routers[0]["tokens_seen"]["tokens"], whole.routers[0]["experts"]
    return Answer(
        "token", "What did this token see?", "see below", OPEN, max(switches)[0],
        "of tokens switch expert, most active layer",
        f"Of {counted(experts, 'expert')}, the number that are first for any of the {counted(shown, 'token')} shown is "
        f"{_span(used, lambda count: f'{count:.0f}')}. The share of tokens whose first expert differs from the "
        f"previous token's is {_span(switches, percent)}.",
    )  # fmt: skip


def _token_layer(facts: Facts, experts: Sequence[str]) -> str:
    seen = facts.get("tokens_seen")
    if seen is None:
        return "Tokens are shown for the outer routers."
    return (
        f"For the tokens shown, {seen['used']} of {counted(len(experts), 'expert')} are first. "
        f"{percent(seen['switches'])} of tokens have another first expert than the previous token."
    )


LAYER: Mapping[str, Callable[[Facts, Sequence[str]], str]] = {
    "moe": _moe_layer,
    "load": _who_layer,
    "domain": _domain_layer,
    "gate": _gate_layer,
    "survive": _survive_layer,
    "token": _token_layer,
}
