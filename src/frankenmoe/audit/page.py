"""A self-contained HTML page with an audit's answers, charts, tables and tokens.

Names and tokens are escaped, and a content policy forbids all requests.
"""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from itertools import zip_longest
from typing import Any

from frankenmoe.audit.answers import spelt
from frankenmoe.audit.charts import Figure, charts, figures
from frankenmoe.audit.compare import OTHER_TEXT, paired, same_text
from frankenmoe.audit.examine import Audit
from frankenmoe.audit.measures import Facts, Measure, compared, on_page, own_shares
from frankenmoe.audit.tokens import encoded
from frankenmoe.charts import ChartError, can_draw
from frankenmoe.counted import counted
from frankenmoe.errors import FrankenMoEWarning
from frankenmoe.palette import mark
from frankenmoe.webpage import inlined, json_in_html, marks

LARGEST = 4_900_000  # bytes of a page; token data is thinned out to stay below
PACKAGE = "frankenmoe.audit"
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
HALF_WIDE = 6  # so many experts' table fits in half of the page


def page(audits: Sequence[Audit]) -> str:
    """The page of one audit or of two side by side. If charts cannot be drawn, the page says why, and has the rest."""
    reports = [audit.report for audit in audits]
    names = [report["subject"]["name"] for report in reports]
    title = f"Audit of {' and '.join(dict.fromkeys(names))}"
    layers = max(len(_outer(report)) for report in reports)
    drawn = _drawn(reports)
    body = "".join(_question(number, reports, drawn) for number in range(len(reports[0]["answers"])))
    head = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{escape(title)}</title>
<style>{inlined(PACKAGE, "css")}</style>
</head>
<body class="{_layout(reports)}">
<a class="skip" href="#token">Skip to the tokens</a>
<header>
<div class="top"><h1>{escape(title)}</h1><button type="button" id="theme" class="theme">light / dark</button></div>
{"".join(_subject(report) for report in reports)}
<ul class="cards">{"".join(_cards(reports))}</ul>
</header>
<div class="bar"><div>
<label><output id="layer-name" for="layer">Layer</output>
<input type="range" id="layer" min="0" max="{layers - 1}" value="0" step="1" aria-label="layer"></label>
{_legend(reports)}
</div></div>
<main>
<noscript><p>Without JavaScript the slider and the tokens do not work; every number is in the tables.</p></noscript>
{_comparison(reports)}
{body}
</main>
<footer>{"".join(_footer(report) for report in reports)}
<p>Made by frankenmoe. Charts were drawn by Vega-Lite (BSD-3-Clause) beforehand; this page loads nothing.</p></footer>
"""
    script = f'<script type="module">{inlined(PACKAGE, "js")}</script>\n</body>\n</html>\n'
    data = _data(audits, room=LARGEST - len(storable(head + script)))
    return storable(f'{head}<script type="application/json" id="data">{data}</script>\n{script}').decode()


def _layout(reports: Sequence[Facts]) -> str:
    """CSS classes of the layout: tables of many experts need the whole width."""
    many = max(len(report["routers"][0]["apart"]["paths"]) for report in reports) > HALF_WIDE
    return " ".join([*(["two"] if len(reports) > 1 else []), *(["many"] if many else [])])


def storable(text: str) -> bytes:
    """UTF-8. Lone surrogates, from bytes in a path that are not text, are written as escapes."""
    return text.encode("utf-8", "backslashreplace")


def _outer(report: Facts) -> list[Facts]:
    return [facts for facts in report["routers"] if not facts["path"]]


def _subject(report: Facts) -> str:
    model, text = report["model"], report["text"]
    read = ", ".join(f"{part['tokens']:,} of {name}" for name, part in text.items())
    shared = ", and one shared expert that every token uses" if model["shared_expert"] else ""
    nested = f", {counted(model['nested_routers'], 'nested router')}" if model["nested_routers"] else ""
    return (
        f"<p><strong>{escape(report['subject']['name'])}</strong>: {escape(report['subject']['what'])}, "
        f"{counted(model['layers'], 'layer')}, {counted(len(model['experts']), 'expert')}, "
        f"{model['experts_per_token']} per token{shared}{nested}. "
        f'<span class="soft">Tokens read: {escape(read)}.</span></p>'
    )


def _cards(reports: Sequence[Facts]) -> Iterable[str]:
    for number, answer in enumerate(reports[0]["answers"]):
        rows = "".join(
            f'<span class="row">{_big(report["answers"][number])}</span>{_who(report, reports)}' for report in reports
        )
        title = f"<strong>{number + 1}. {escape(answer['question'])}</strong>"
        yield f'<li><a href="#{answer["key"]}">{title}{rows}</a></li>'


def _who(report: Facts, reports: Sequence[Facts]) -> str:
    return f'<span class="who">{escape(_called(report, reports))}</span>' if len(reports) > 1 else ""


def _called(report: Facts, reports: Sequence[Facts]) -> str:
    """The title of one of two audits. If both have the same name, as before and after training, it adds the path."""
    names = [(each["subject"]["name"], each["subject"]["what"]) for each in reports]
    place = f" in {report['subject']['path']}" if len(set(names)) < len(names) else ""
    return f"{report['subject']['name']}, {report['subject']['what']}{place}"


def _big(answer: Facts) -> str:
    number = answer["number"]
    shown = "–" if number is None else spelt(number, answer["unit"])
    return f'<span class="big">{shown}</span>{_verdict(answer)}<span class="unit">{escape(answer["unit"])}</span>'


def _verdict(answer: Facts) -> str:
    return f'<span class="verdict {answer["level"]}">{escape(answer["verdict"])}</span>'


def _legend(reports: Sequence[Facts]) -> str:
    """The experts' marks and names. If two audits have different experts with one number, both names."""
    numbered = zip_longest(*(report["model"]["experts"] for report in reports))
    names = [" / ".join(name for name in dict.fromkeys(both) if name is not None) for both in numbered]
    items = "".join(f"<li>{_chip(index)} {escape(name)}</li>" for index, name in enumerate(names))
    return f'<ul class="legend" aria-label="experts" tabindex="0">{items}</ul>'


def _chip(expert: int) -> str:
    own = mark(expert)
    stroke = "rgb(255 255 255 / .38)" if own.ink == "#FFFFFF" else "rgb(0 0 0 / .24)"
    style = f"background-color:{own.colour};color:{own.ink};--stroke:{stroke}"
    return f'<span class="chip {own.pattern}" style="{style}">{own.digit}</span>'


def _question(number: int, reports: Sequence[Facts], drawn: Sequence[Mapping[str, str]]) -> str:
    answer = reports[0]["answers"][number]
    sides = "".join(
        _side(report["answers"][number], report, index, reports, drawn[index]) for index, report in enumerate(reports)
    )
    return (
        f'<section class="question" id="{answer["key"]}"><h2>{number + 1}. {escape(answer["question"])}</h2>'
        f'<div class="sides">{sides}</div></section>'
    )


def _side(answer: Facts, report: Facts, index: int, reports: Sequence[Facts], drawn: Mapping[str, str]) -> str:
    key = answer["key"]
    title = f"<h3>{escape(_called(report, reports))}</h3>" if len(reports) > 1 else ""
    tokens = _tokens(index) if key == "token" else ""
    return (
        f'<div class="side">{title}<p>{_verdict(answer)} {escape(answer["sentence"])}</p>'
        f'<div class="{"both" if key != "token" else ""}">{drawn.get(key, "")}'
        f'<div class="here" id="here-{key}-{index}"></div></div>{tokens}{_table(key, report)}</div>'
    )


def _drawn(reports: Sequence[Facts]) -> list[dict[str, str]]:
    """For each report: the key of a question -> its charts as HTML, or the reason why there are none."""
    found = [charts(_outer(report), report["model"]["experts"]) for report in reports]
    try:
        drawn = figures(found)
    except ChartError as error:
        if can_draw():  # otherwise the command has said so before its work
            warnings.warn(f"the page has no charts: {error.message}", FrankenMoEWarning, stacklevel=2)
        why = f'<p class="soft">No charts: {escape(str(error), quote=False)}. All numbers are below.</p>'
        return [{chart.key: why for chart in each} for each in found]
    return [
        {key: _figures([figure for figure in each if figure.chart.key == key]) for key in {it.chart.key for it in each}}
        for each in drawn
    ]


def _figures(found: Sequence[Figure]) -> str:
    return f'<div class="charts">{"".join(map(_figure, found))}</div>'


def _figure(figure: Figure) -> str:
    drawings = "".join(
        f'<div class="chart {name}">{svg}</div>' for name, svg in (("wide", figure.wide), ("narrow", figure.narrow))
    )
    start = f"<figure{' class=full' if figure.full else ''}><figcaption>{escape(figure.chart.caption)}</figcaption>"
    return f"{start}{drawings}</figure>"


def _tokens(index: int) -> str:
    return (
        "<p class=soft>Point at a token, or reach it with <kbd>Tab</kbd>; <kbd>←</kbd> <kbd>→</kbd> go to its "
        "neighbours, <kbd>↑</kbd> <kbd>↓</kbd> through the layers. The small character is the first expert.</p>"
        f'<div class="seen"><div><div class="pages" id="pages-{index}"></div><div class="tokens" id="tokens-{index}">'
        f'</div></div><aside class="panel" id="panel-{index}" aria-live="polite">'
        '<p class="soft">Nothing pointed at yet.</p></aside></div>'
    )


def _table(key: str, report: Facts) -> str:
    """Every layer's numbers, nested routers included."""
    measures = on_page(key)
    rows = report["routers"] if key in ("load", "gate", "survive") else _outer(report)
    if not measures:
        return ""
    domains = _by_domain(rows) if key == "domain" else {}
    titles = ["layer", *(measure.heading for measure in measures), *domains]
    heads = "".join(f"<th scope=col>{escape(title)}</th>" for title in titles)
    body = "".join(
        "<tr>"
        f"<th scope=row>{_place(facts)}</th>"
        + "".join(f"<td>{_cell(measure, facts)}</td>" for measure in measures)
        + "".join(f"<td>{_share(each[row])}</td>" for each in domains.values())
        + "</tr>"
        for row, facts in enumerate(rows)
    )
    return (
        f"<details><summary>All layers in numbers</summary><div class=scroll tabindex=0><table><tr>{heads}</tr>{body}"
        "</table></div></details>"
    )


def _place(facts: Facts) -> str:
    """The layer of a router, and the expert that contains it if it is nested."""
    return f"{facts['layer']}, in expert {facts['path']}" if facts["path"] else str(facts["layer"])


def _by_domain(rows: Sequence[Facts]) -> dict[str, list[float | None]]:
    """A column per labelled domain: how much of its text went to its own expert."""
    return {
        f"{name} to its own": [facts["domains"]["own_first"][name] for facts in rows]
        for name in (own_shares(rows[0]) if rows else ())
    }


def _cell(measure: Measure, facts: Facts, *, decimals: int | None = None) -> str:
    match measure.read(facts):
        case None:
            return "infinite" if measure.infinite else "–"
        case str(text):
            return escape(text)
        case float() | int() as number:
            digits = measure.decimals if decimals is None else decimals
            return _share(number) if measure.share else f"{number:,.{digits}f}"
        case experts:
            return ", ".join(map(str, experts)) or "none"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _comparison(reports: Sequence[Facts]) -> str:
    """The changes from the first to the second audit, by layer."""
    if len(reports) < 2:
        return ""
    heads = "".join(f"<th scope=col>{escape(measure.heading)}</th>" for measure in compared())
    rows = "".join(
        f"<tr><th scope=row>{left['layer']}</th>"
        + "".join(
            f"<td>{_cell(measure, left, decimals=2)} → {_cell(measure, right, decimals=2)}</td>"
            for measure in compared()
        )
        + "</tr>"
        for left, right in paired(*reports)
    )
    other = "" if same_text(*reports) else f"<p>{OTHER_TEXT}</p>"
    return (
        f'<section class="question"><h2>From the first to the second</h2>{other}<div class=scroll tabindex=0><table>'
        f"<tr><th scope=col>layer</th>{heads}</tr>{rows}</table></div></section>"
    )


def _footer(report: Facts) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    sources = (
        "" if report["model"]["sources_at_hand"] else " The sources are gone: distances are from the experts' mean."
    )
    return (
        f"<p>{escape(report['subject']['path'])}, finished {report['finished']}, recipe "
        f"{report['recipe_digest'][:16]}, computed in {report['model']['dtype']}; {escape(versions)}.{sources}</p>"
    )


def _data(audits: Sequence[Audit], *, room: int) -> str:
    """The data of page.js in about `room` bytes: token data is thinned out, the rest is complete."""
    shown = [_shown(audit) for audit in audits]
    left = room - len(storable(json_in_html({"audits": shown})))
    traces = [encoded(audit.trace, budget=left // len(audits)) for audit in audits]
    return json_in_html({"audits": [each | {"trace": trace} for each, trace in zip(shown, traces, strict=True)]})


def _shown(audit: Audit) -> dict[str, Any]:
    report = audit.report
    return {
        "experts": report["model"]["experts"],
        "paths": report["model"]["paths"],
        "marks": marks(len(report["model"]["experts"])),
        "routers": [_slim(facts) for facts in _outer(report)],
        "passages": [{"label": each["label"], "tokens": each["tokens"]} for each in report["passages"]],
    }


def _slim(facts: Facts) -> Facts:
    """The facts of a router that page.js shows, with matrices rounded to three digits."""
    keys = ("layer", "experts", "load", "domains", "capacity", "sentences")
    apart = facts["apart"]
    return {key: facts[key] for key in keys} | {
        "gate": {"cosines": _short(facts["gate"]["cosines"])},
        "apart": apart and apart | {"pairs": _short(apart["pairs"])},
    }


def _short(matrix: Sequence[Sequence[float]]) -> list[list[float]]:
    return [[round(value, 3) for value in row] for row in matrix]
