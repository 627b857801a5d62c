"""What the sources' licences mean for a model made of them. This is no legal advice."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from frankenmoe.planning.compare import shared_licence

# what a licence asks of whoever shares something made from it, by the hub's names for licences
NO_DERIVATIVES = frozenset({"cc-by-nd-4.0", "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0"})
NO_COMMERCE = frozenset(
    {
        "cc-by-nc-2.0",
        "cc-by-nc-3.0",
        "cc-by-nc-4.0",
        "cc-by-nc-sa-2.0",
        "cc-by-nc-sa-3.0",
        "cc-by-nc-sa-4.0",
        "cc-by-nc-nd-3.0",
        "cc-by-nc-nd-4.0",
        "fair-noncommercial-research-license",
        "intel-research",
    }
)
SHARE_ALIKE = frozenset(
    {
        "agpl-3.0",
        "cc-by-nc-sa-2.0",
        "cc-by-nc-sa-3.0",
        "cc-by-nc-sa-4.0",
        "cc-by-sa-3.0",
        "cc-by-sa-4.0",
        "gpl",
        "gpl-2.0",
        "gpl-3.0",
    }
)
FREE = frozenset(
    {
        "afl-3.0",
        "apache-2.0",
        "artistic-2.0",
        "bsd",
        "bsd-2-clause",
        "bsd-3-clause",
        "bsd-3-clause-clear",
        "bsl-1.0",
        "cc",
        "cc-by-2.0",
        "cc-by-2.5",
        "cc-by-3.0",
        "cc-by-4.0",
        "cc0-1.0",
        "cdla-permissive-1.0",
        "cdla-permissive-2.0",
        "isc",
        "mit",
        "ms-pl",
        "ncsa",
        "odc-by",
        "pddl",
        "unlicense",
        "wtfpl",
        "zlib",
    }
)


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
    copyleft = sorted(holders.keys() & SHARE_ALIKE)
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
    rules: Mapping[frozenset[str], str] = {
        NO_DERIVATIVES: "forbids passing on changed versions, and a mixture is one",
        NO_COMMERCE: "forbids commercial use, which then holds for the whole mixture",
        SHARE_ALIKE: "asks that what is made from it be passed on under the same licence",
    }
    found = [f"{who} {words}" for group, words in rules.items() if licence in group]
    if not found and licence not in FREE:
        found.append(f"{who} has terms of its own: read them before you use or pass on the mixture")
    return found
