"""What the sources' licences mean for a model made of them. This is not legal advice."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from frankenmoe.planning.compare import shared_licence

# what a licence demands from those who share derived works, by patterns of the hub's names for licences
NO_DERIVATIVES = re.compile(r"cc-by-(nc-)?nd-.*")
NO_COMMERCE = re.compile(r"cc-by-nc-.*|fair-noncommercial-research-license|intel-research")
SHARE_ALIKE = re.compile(r"cc-by-(nc-)?sa-.*|a?gpl(-\d\.0)?")
FREE = re.compile(
    r"cc|cc-by-\d\.\d|cc0-1\.0|cdla-permissive-\d\.0|odc-by|pddl|mit|isc|ncsa|zlib|unlicense|wtfpl|ms-pl"
    r"|apache-2\.0|bsd|bsd-2-clause|bsd-3-clause(-clear)?|bsl-1\.0|afl-3\.0|artistic-2\.0"
)
TERMS: Mapping[re.Pattern[str], str] = {
    NO_DERIVATIVES: "forbids passing on changed versions, and a mixture is one",
    NO_COMMERCE: "forbids commercial use, which then holds for the whole mixture",
    SHARE_ALIKE: "asks that what is made from it be passed on under the same licence",
}


@dataclass(frozen=True)
class Licences:
    """`chosen` is the licence that the card declares, or None. `findings` are sentences for the reader."""

    by_source: tuple[tuple[str, str | None], ...]
    chosen: str | None
    findings: tuple[str, ...]


def weigh(by_source: Sequence[tuple[str, str | None]], *, declared: str | None = None) -> Licences:
    """The licence of a model made of these sources, (name, licence or None) each.

    A licence that all sources share becomes the model's, unless the author declares one (`declared`). Licences that
    differ, forbid something or are missing are listed, and none is chosen.
    """
    rows = tuple(dict.fromkeys(by_source))
    holders: dict[str, list[str]] = {}
    for source, licence in rows:
        if licence:
            holders.setdefault(licence, []).append(source)
    silent = [source for source, licence in rows if not licence]
    shared = shared_licence([licence for _, licence in rows])
    findings = []
    if len(holders) > 1:
        listed = "; ".join(f"{licence} ({', '.join(names)})" for licence, names in sorted(holders.items()))
        findings.append(f"the sources are under different licences: {listed}")
    findings += [text for licence, names in sorted(holders.items()) for text in _terms(licence, names)]
    copyleft = sorted(filter(SHARE_ALIKE.fullmatch, holders))
    if len(copyleft) > 1:
        findings.append(f"{' and '.join(copyleft)} each ask to be the licence of the whole, and only one can be")
    if silent:
        findings.append(
            f"no licence is declared in {', '.join(silent)}: without one, nobody has permission to pass it on"
        )
    if declared and any(licence != declared for licence in holders):
        others = ", ".join(sorted(holders.keys() - {declared}))
        findings.append(f"the author declares {declared}, and the sources {others}")
    return Licences(rows, declared or shared, tuple(findings))


def _terms(licence: str, names: Sequence[str]) -> list[str]:
    who = f"{licence} ({', '.join(names)})"
    found = [f"{who} {words}" for pattern, words in TERMS.items() if pattern.fullmatch(licence)]
    if not found and not FREE.fullmatch(licence):
        found.append(f"{who} has terms of its own: read them before you use or pass on the mixture")
    return found
