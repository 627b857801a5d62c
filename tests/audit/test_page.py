"""The page in a real browser: opens from disk without a request or an error, and every way to point at a token works.

Screenshots go to build/screenshots, which CI keeps.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import synthetic
from browsing import launched, open_tab, shoot
from frankenmoe import palette
from frankenmoe.audit.page import page
from frankenmoe.audit.write import write_report
from frankenmoe.errors import FrankenMoEWarning

LIMIT = 5_000_000


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with launched() as browser:
        yield browser


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a synthetic MoE of 6 layers, 10 experts and 700 tokens: more than one page of tokens."""
    audit = synthetic.make_audit(experts=10, layers=6, tokens=700)
    return write_report([audit], tmp_path_factory.mktemp("page")) / "audit.html"


@pytest.fixture
def opened(browser: Any, report: Path) -> Iterator[Any]:
    with_page = open_tab(browser, report.as_uri(), width=1280, scheme="light")
    yield with_page
    assert with_page.said == []
    assert with_page.asked == [report.as_uri()]
    with_page.context.close()


def _panel(tab: Any) -> str:
    return tab.locator("#panel-0").inner_text()


def test_hovering_a_token_shows_its_experts(opened: Any) -> None:
    opened.locator("#tokens-0 .t").nth(4).hover()
    panel = _panel(opened)
    assert "token 5 of 700, layer 0" in panel
    assert len(re.findall(r"expert \d", panel)) == 10  # two chosen, eight others
    assert panel.count("not chosen") == 8
    weights = [float(found) for found in re.findall(r"\b([01]\.\d\d)\t", panel)]
    assert sum(weights[:2]) == pytest.approx(1, abs=0.02)


def test_the_panel_shows_what_the_router_decided(opened: Any) -> None:
    audit = synthetic.make_audit(experts=10, layers=6, tokens=700)
    for token, layer in ((0, 0), (123, 3), (499, 5)):
        _slide(opened, layer)
        opened.locator(f"#tokens-0 [data-i='{token}']").hover()
        rows = opened.locator("#panel-0 tr").all_inner_texts()[1:3]
        for k, row in enumerate(rows):
            expert, weight = int(audit.trace.ids_LTK[layer, token, k]), float(audit.trace.weights_LTK[layer, token, k])
            logit = float(audit.trace.logits_LTE[layer, token, expert])
            name, shown_weight, shown_logit = (cell.strip() for cell in row.split("\t"))
            assert name.endswith(f"expert {expert}")
            assert float(shown_weight) == pytest.approx(weight, abs=0.011)
            assert float(shown_logit) == pytest.approx(logit, abs=0.011)


def _slide(tab: Any, layer: int) -> None:
    tab.locator("#layer").evaluate(f"slider => {{ slider.value = {layer}; slider.dispatchEvent(new Event('input')); }}")


def test_the_slider_moves_the_whole_page(opened: Any) -> None:
    marks = opened.locator("#tokens-0 .t").evaluate_all("all => all.map(each => each.dataset.d)")
    before = opened.locator("#here-load-0").inner_text()
    opened.locator("#layer").focus()
    for _ in range(3):
        opened.keyboard.press("ArrowRight")
    assert opened.locator("#layer-name").inner_text() == "Layer 3"
    after = opened.locator("#here-load-0").inner_text()
    assert before.startswith("Layer 0.")
    assert after.startswith("Layer 3.")
    assert opened.locator("#tokens-0 .t").evaluate_all("all => all.map(each => each.dataset.d)") != marks
    shoot(opened, "slider-moved")


def test_the_keyboard_reaches_everything(opened: Any) -> None:
    opened.locator("#tokens-0 .t").first.focus()
    opened.keyboard.press("Tab")
    assert "token 2 of 700, layer 0" in _panel(opened)
    opened.keyboard.press("ArrowUp")
    opened.keyboard.press("ArrowUp")
    opened.keyboard.press("ArrowDown")
    assert "token 2 of 700, layer 1" in _panel(opened)
    opened.keyboard.press("ArrowRight")
    opened.keyboard.press("ArrowRight")
    opened.keyboard.press("ArrowLeft")
    assert "token 3 of 700, layer 1" in _panel(opened)
    opened.keyboard.press("ArrowDown")
    opened.keyboard.press("ArrowDown")
    assert "layer 0" in _panel(opened)  # and no further
    opened.reload()
    opened.wait_for_selector("html[data-ready]")
    opened.keyboard.press("Tab")
    assert opened.evaluate("document.activeElement.textContent") == "Skip to the tokens"
    opened.asked.pop()


def test_later_tokens_are_a_button_away(opened: Any) -> None:
    assert opened.locator("#tokens-0 .t").count() == 500
    opened.get_by_role("button", name="later tokens").click()
    assert opened.locator("#tokens-0 .t").count() == 200
    assert "tokens 501 to 700 of 700" in opened.locator("#pages-0").inner_text()
    opened.locator("#tokens-0 .t").first.hover()
    assert "token 501 of 700" in _panel(opened)
    assert opened.get_by_role("button", name="later tokens").is_disabled()


def test_a_strip_of_layers_leads_to_each(opened: Any) -> None:
    opened.locator("#tokens-0 .t").nth(7).hover()
    opened.locator("#panel-0 .strip button").nth(4).click()
    assert opened.locator("#layer-name").inner_text() == "Layer 4"
    assert "token 8 of 700, layer 4" in _panel(opened)


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")])
def test_light_dark_and_phone(width: int, scheme: str, browser: Any, report: Path) -> None:
    tab = open_tab(browser, report.as_uri(), width=width, scheme=scheme)
    try:
        shoot(tab, f"{width}-{scheme}", whole=True)
        assert tab.evaluate("document.documentElement.scrollWidth") <= width  # nothing sticks out sideways
        paper = tab.evaluate("getComputedStyle(document.body).backgroundColor")
        light = sum(map(int, re.findall(r"\d+", paper)[:3])) > 3 * 128
        assert light == (scheme == "light")
        tab.locator("#theme").click()
        assert tab.evaluate("getComputedStyle(document.body).backgroundColor") != paper
        tab.locator("#theme").click()
        assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == paper
        tab.locator("#tokens-0 .t").nth(9).hover()
        shoot(tab, f"{width}-{scheme}-token")
        assert tab.said == []
        assert tab.asked == [report.as_uri()]
    finally:
        tab.context.close()


def test_text_on_every_expert_can_be_read(browser: Any, tmp_path: Path) -> None:
    """Sixty-four experts: no two share colour, pattern and character, and the browser shows what the palette says."""
    file = write_report([synthetic.make_audit(experts=64, layers=2, tokens=300)], tmp_path) / "audit.html"
    tab = open_tab(browser, file.as_uri(), width=1280, scheme="light")
    try:
        chips = tab.locator(".legend .chip").evaluate_all(
            "all => all.map(each => [getComputedStyle(each).backgroundColor, each.className, each.textContent,"
            " getComputedStyle(each).backgroundImage + getComputedStyle(each).boxShadow])"
        )
        assert len({tuple(chip) for chip in chips}) == len({(chip[0], chip[3]) for chip in chips}) == 64
        tab.locator("#tokens-0").scroll_into_view_if_needed()
        shoot(tab, "64-experts")
        assert tab.said == []
    finally:
        tab.context.close()


def test_two_audits_side_by_side(browser: Any, tmp_path: Path) -> None:
    pair = [
        synthetic.make_audit(experts=4, layers=3, tokens=60, name=name, seed=seed) for seed, name in enumerate("ab")
    ]
    file = write_report(pair, tmp_path) / "audit.html"
    tab = open_tab(browser, file.as_uri(), width=1280, scheme="light")
    try:
        assert tab.locator("#here-load-0").inner_text() != tab.locator("#here-load-1").inner_text()
        tab.locator("#tokens-1 .t").nth(2).hover()
        assert "token 3 of 60" in tab.locator("#panel-1").inner_text()
        shoot(tab, "two", whole=True)
        assert (tab.said, tab.asked) == ([], [file.as_uri()])
        assert tab.evaluate("document.documentElement.scrollWidth") <= 1280
    finally:
        tab.context.close()


def test_two_of_one_name_and_different_experts_can_be_told_apart(browser: Any, tmp_path: Path) -> None:
    pair = [synthetic.make_audit(experts=count, layers=3, tokens=60, seed=count) for count in (3, 4)]
    pair[1].report["model"]["experts"][0] = "law"
    pair[1].report["subject"]["path"] = "after/"
    tab = open_tab(browser, (write_report(pair, tmp_path) / "audit.html").as_uri(), width=1280, scheme="light")
    try:
        legend = [" ".join(text.split()) for text in tab.locator(".legend li").all_inner_texts()]
        assert legend == [
            "0 expert 0 / law",
            "1 expert 1",
            "2 expert 2",
            "3 expert 3",
        ]
        assert tab.locator("#load h3").all_inner_texts() == [
            "synthetic, recipe in synthetic.yml",
            "synthetic, recipe in after/",
        ]
        tab.locator("#tokens-0 .t").first.hover()
        box = tab.locator("#panel-0").bounding_box()
        assert 0 <= box["y"] < box["y"] + box["height"] <= 900  # what a token saw is seen beside it
        assert tab.said == []
    finally:
        tab.context.close()


@pytest.mark.parametrize(("experts", "width"), [(4, 1280), (4, 390), (16, 1280), (64, 1280)])
def test_tables_are_not_cut(experts: int, width: int, browser: Any, tmp_path: Path) -> None:
    audit = synthetic.make_audit(experts=experts, layers=2, tokens=60)
    tab = open_tab(browser, (write_report([audit], tmp_path) / "audit.html").as_uri(), width=width, scheme="dark")
    try:
        cut = tab.locator(".here .scroll").evaluate_all(
            "all => all.filter(each => each.scrollWidth > each.clientWidth).map(each => each.closest('.here').id)"
        )
        assert cut == []
        tab.locator("#tokens-0 .t").first.focus()
        tab.locator(".seen").evaluate("seen => seen.scrollIntoView()")
        bar, panel = (tab.locator(name).bounding_box() for name in (".bar", "#panel-0"))
        assert panel["y"] >= bar["y"] + bar["height"]
        assert panel["y"] + panel["height"] <= 900
        assert tab.said == []
    finally:
        tab.context.close()


def test_letters_nobody_sees_and_counts_of_none_are_shown(browser: Any, tmp_path: Path) -> None:
    audit = synthetic.make_audit(experts=3, layers=1, tokens=5)
    odd = replace(audit.trace.passages[0], shown=(" ", "\u202eabc", "a\x00", "</script><b>", "\t\n"))
    audit.report["passages"][0]["tokens"] = list(odd.shown)
    audit.report["routers"][0]["load"]["assignments"] = [0, 1, 9]
    tab = open_tab(browser, (write_report([audit], tmp_path) / "audit.html").as_uri(), width=1280, scheme="light")
    try:
        shown = tab.locator("#tokens-0 .t").all_inner_texts()
        assert [text.strip() for text in shown] == ["␣", "\\u202eabc", "a\\u0000", "</script><b>", "⇥⏎"]
        capacity = tab.locator("#here-survive-0 tr").all_inner_texts()
        assert [row.split() for row in capacity[1:3]] == [["fewest", "0"], ["most", "9"]]
        assert tab.said == []
    finally:
        tab.context.close()


def test_a_large_audit_stays_small() -> None:
    """16 experts x 26 layers x 20,000 tokens."""
    html = page([synthetic.make_audit(experts=16, layers=26, tokens=20_000, plain=False)]).encode()
    assert len(html) < LIMIT
    data = json.loads(re.search(rb'id="data">(.*?)</script>', html, re.S)[1])
    (audit,) = data["audits"]
    assert (audit["trace"]["kept"], audit["trace"]["tokens"]) == (3, 20_000)  # both chosen and the next


def test_sixty_four_experts_stay_small() -> None:
    html = page([synthetic.make_audit(experts=64, layers=26, tokens=300, plain=False)]).encode()
    assert len(html) < LIMIT


def test_nothing_is_loaded_from_anywhere() -> None:
    html = page([synthetic.make_audit(experts=3, layers=2, tokens=20)])
    links = set(re.findall(r"https?://[^\s\"'<]+", html))
    assert links <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}  # names, never fetched
    assert "default-src 'none'" in html
    assert not re.findall(r"<(?:link|img|iframe|object)\b|@import|url\(", html)


def test_without_the_drawing_library_the_page_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("frankenmoe.charts.can_draw", lambda: False)
    monkeypatch.setattr("frankenmoe.audit.page.can_draw", lambda: False)
    html = page([synthetic.make_audit(experts=3, layers=2, tokens=20)])
    assert "pip install 'frankenmoe[audit]'" in html
    assert "<svg" not in html
    assert "All layers in numbers" in html


def test_a_drawing_library_that_crashes_costs_the_charts_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("frankenmoe.charts.NOT_XML", re.compile("(?!)"))  # lets ESC through, on which it aborts
    audit = synthetic.make_audit(experts=3, layers=2, tokens=20)
    audit.report["model"]["experts"][0] = "law\x1b"
    with pytest.warns(FrankenMoEWarning, match="no charts: the drawing library 'vl_convert' failed"):
        html = page([audit])
    assert "<svg" not in html
    assert "No charts: the drawing library 'vl_convert' failed" in html
    assert "All layers in numbers" in html


def test_control_characters_in_an_experts_name_are_replaced_in_charts() -> None:
    audit = synthetic.make_audit(experts=3, layers=2, tokens=20)
    audit.report["model"]["experts"][0] = "law\x00\x1b"
    assert "law\ufffd\ufffd" in page([audit])


def test_marks_are_told_apart_without_colour() -> None:
    marks = [palette.mark(expert) for expert in range(64)]
    assert len({mark.digit for mark in marks}) == 64
    assert len({(mark.colour, mark.pattern) for mark in marks}) == 64
    assert all(palette.contrast(mark.ink, mark.colour) >= 4.5 for mark in marks)  # WCAG 2.2, AA
    assert palette.mark(-1).digit == "-"
    assert palette.mark(64).digit == palette.BEYOND


def test_contrast_by_hand() -> None:
    assert palette.contrast("#000000", "#FFFFFF") == pytest.approx(21)
    assert palette.contrast("#777777", "#FFFFFF") == pytest.approx(4.48, abs=0.01)
