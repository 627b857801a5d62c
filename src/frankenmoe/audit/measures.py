"""The measures of one router that reports show: page, comparison and terminal take their columns from this table.

Does not import torch.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from frankenmoe.palette import mark

Facts = Mapping[str, Any]
Value = float | int | str | Sequence[int] | None

CAPACITIES = (1.0, 1.25, 2.0)
NEVER, PAGE, ROOMY, NARROW = "never", "on the page only", "in a terminal with room", "in every terminal"


@dataclass(frozen=True)
class Measure:
    """One column of the reports.

    `read` takes the value from a router's facts; None means that nothing can be measured. `title` heads the column on
    the page (without one it is not on the page), `short` in the terminal. `shown` says where its question's table shows
    it, `compared` where the comparison of two audits shows it.
    """

    key: str
    question: str
    read: Callable[[Facts], Value]
    title: str = ""
    short: str = ""
    unit: str = ""
    decimals: int = 3
    share: bool = False  # shown in percent
    infinite: bool = False  # JSON has no infinity, so the facts say None
    shown: str = NARROW
    compared: str = NEVER

    @property
    def heading(self) -> str:
        return f"{self.title}, {self.unit}" if self.unit else self.title


def on_page(question: str) -> list[Measure]:
    """The columns of a question's table on the page."""
    return [measure for measure in MEASURES if measure.question == question and measure.title]


def in_terminal(question: str, *, roomy: bool) -> list[Measure]:
    """The columns of a question's table in the terminal."""
    return [measure for measure in MEASURES if measure.question == question and _fits(measure.shown, roomy)]


def compared() -> list[Measure]:
    """The measures that JSON and page compare between two audits."""
    return [measure for measure in MEASURES if measure.compared != NEVER]


def compared_in_terminal(*, roomy: bool) -> list[Measure]:
    """Those of them that the terminal shows."""
    return [measure for measure in MEASURES if _fits(measure.compared, roomy)]


def own_share(facts: Facts) -> float | None:
    """Mean over labelled domains of the share of tokens that go first to their own expert."""
    shares = own_shares(facts)
    return sum(shares.values()) / len(shares) if shares else None


def own_shares(facts: Facts) -> dict[str, float]:
    """Labelled domain -> the share of its tokens that go first to its own expert."""
    found = facts["domains"]["own_first"] if facts["domains"] else {}
    return {name: share for name, share in found.items() if share is not None}


def _fits(place: str, roomy: bool) -> bool:
    return place == NARROW or (roomy and place == ROOMY)


def _at(part: str, key: str) -> Callable[[Facts], Value]:
    return lambda facts: None if facts[part] is None else facts[part][key]


def _over(factor: float) -> Callable[[Facts], Value]:
    return lambda facts: float(facts["capacity"]["over"][str(factor)])


def _lowest(facts: Facts) -> str | None:
    shares = own_shares(facts)
    name = min(shares, key=lambda each: shares[each], default=None)
    return None if name is None else f"{shares[name]:.0%} {name}"


def _most_alike(facts: Facts) -> str | None:
    pair = facts["gate"]["most_alike"]
    return None if pair is None else "/".join(mark(index).digit for index in pair)


MEASURES = (
    Measure("nearest", "moe", _at("apart", "nearest"), "nearest pair", "nearest"),
    Measure("median", "moe", _at("apart", "median"), "median pair", "median"),
    Measure("farthest", "moe", _at("apart", "farthest"), "farthest pair", "farthest"),
    Measure("moved", "moe", _at("apart", "moved"), "output moves by", "moves", compared=NARROW),
    Measure("cv", "load", _at("load", "cv"), "CV", "CV", compared=NARROW),
    Measure("max_vio", "load", _at("load", "max_vio"), "MaxVio", "MaxVio", compared=ROOMY),
    Measure("dead", "load", _at("load", "dead"), "dead", "dead"),
    Measure(
        "entropy_share", "load", _at("load", "entropy_share"), "gate entropy", "entropy", "share of ln E",
        shown=ROOMY, compared=NARROW,
    ),
    Measure("entropy", "load", _at("load", "entropy"), "gate entropy", "in nats", "nats", shown=ROOMY),
    Measure("margin", "load", _at("load", "margin"), "margin", "margin", "nats", shown=ROOMY, compared=PAGE),
    Measure("close_share", "load", _at("load", "close_share"), "close calls", shown=PAGE),
    Measure("switch_balance", "load", _at("load", "switch_balance"), "Switch balance", shown=PAGE),
    Measure("own", "domain", own_share, "to their own expert", "own", share=True),
    Measure(
        "information", "domain", _at("domains", "information"), "mutual information", "bits", "bits", compared=ROOMY
    ),
    Measure("lowest", "domain", _lowest, short="fewest"),
    Measure("largest_cosine", "gate", _at("gate", "largest_cosine"), "largest cosine", "cosine", compared=PAGE),
    Measure("most_alike", "gate", _most_alike, "most alike rows", "of"),
    Measure(
        "condition", "gate", _at("gate", "condition"), "condition number", "condition",
        decimals=2, infinite=True, compared=ROOMY,
    ),
    Measure(
        "condition_centred", "gate", _at("gate", "condition_centred"), "centred", "centred",
        decimals=2, infinite=True, shown=ROOMY,
    ),
    Measure("logit_spread", "gate", _at("gate", "logit_spread"), "logit spread", "spread"),
    Measure("hidden_norm", "gate", _at("gate", "hidden_norm"), "hidden norm", "hidden norm", decimals=2, shown=ROOMY),
    *(
        Measure(f"over_{factor}", "survive", _over(factor), f"over {factor}", f"at {factor}", share=True)
        for factor in CAPACITIES
    ),
    Measure("dead", "survive", _at("load", "dead"), short="dead"),
    Measure(
        "fewest_tokens", "survive", _at("capacity", "fewest_tokens"), "fewest tokens", "fewest tokens",
        decimals=0, shown=ROOMY,
    ),
    Measure("dropped", "survive", _at("capacity", "dropped"), "dropped here", shown=PAGE),
)  # fmt: skip
