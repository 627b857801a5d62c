"""The server's page in a real browser, before a server without a model that says what a test wants to see."""

import re
from collections.abc import Iterator
from typing import Any

import pytest

from browsing import WAIT, launched, legible, open_tab, shoot, whole
from frankenmoe.palette import mark
from speaking import Speech, speaking

NASTY = "<img src=x onerror=document.title='owned'>"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with launched() as browser:
        yield browser


@pytest.fixture
def speech() -> Speech:
    return Speech()


@pytest.fixture
def url(speech: Speech) -> Iterator[str]:
    with speaking(speech) as url:
        yield url


@pytest.fixture
def tab(browser: Any, url: str) -> Iterator[Any]:
    tab = open_tab(browser, url)
    yield tab
    assert tab.said == []
    assert all(asked.startswith((url, "data:")) for asked in tab.asked)
    tab.context.close()


def ask(tab: Any, text: str = "Which expert?", *, replies: int = 1) -> None:
    """Sends a message, and waits until the page has so many whole replies."""
    tab.fill("#prompt", text)
    tab.keyboard.press("Enter")
    whole(tab, replies)


def digits(tab: Any) -> list[str]:
    return tab.locator(".t").evaluate_all("all => all.map(each => each.dataset.d)")


def slide(tab: Any, name: str, value: float) -> None:
    tab.locator(name).evaluate(
        "(slider, value) => { slider.value = value; slider.dispatchEvent(new Event('input')); }", value
    )


def test_tokens_have_the_colour_of_their_expert(tab: Any, speech: Speech) -> None:
    ask(tab)
    for layer in (-1, 0, 5):
        slide(tab, "#layer", layer)
        firsts = [_most(said) if layer < 0 else said[layer]["experts"][0] for said in speech.said]
        assert digits(tab) == [mark(first).digit for first in firsts]
        share = firsts.count(2) / len(firsts)
        assert tab.locator("#experts tbody tr").nth(2).locator(".share").inner_text() == f"{int(share * 100 + 0.5)}%"


def _most(layers: list[dict[str, Any]]) -> int:
    """The expert with most weight over all layers."""
    sums = [0.0] * 4
    for layer in layers:
        for expert, weight in zip(layer["experts"], layer["weights"], strict=True):
            sums[expert] += weight
    return sums.index(max(sums))


def test_a_token_shows_experts_weights_and_the_runner_up(tab: Any, speech: Speech) -> None:
    ask(tab)
    for token, layer in ((0, 0), (17, 3), (39, 5)):
        slide(tab, "#layer", layer)
        tab.locator(f".t[data-i='{token}']").hover()
        said = speech.said[token][layer]
        rows = [" ".join(row.split()) for row in tab.locator("#token tr").all_inner_texts()[1:]]
        names = [f"{mark(expert).digit} {speech.experts[expert]}" for expert in [*said["experts"], said["next"]]]
        shown = [f"{weight:.3f}" for weight in said["weights"]]
        assert rows == [f"{name} {what}" for name, what in zip(names, [*shown, "runner-up"], strict=True)]
    tab.locator("#token summary").click()
    tab.locator("#token details tr").nth(6).wait_for()  # the page fills it in after the click
    lines = tab.locator("#token details tr").all_inner_texts()[1:]
    assert len(lines) == 6
    assert [line.split()[1] for line in lines] == [mark(said["experts"][0]).digit for said in speech.said[39]]
    tab.locator("#token .strip button").nth(1).click()
    assert tab.locator("#layer-name").inner_text() == "Layer 1"


def test_the_keyboard_alone_is_enough(tab: Any) -> None:
    tab.keyboard.press("Tab")
    assert tab.evaluate("document.activeElement.textContent") == "Skip to the message"
    tab.keyboard.press("Enter")
    tab.keyboard.type("Hello")
    tab.keyboard.press("Shift+Enter")
    tab.keyboard.type("you")
    tab.keyboard.press("Enter")
    whole(tab, 1)
    assert tab.locator(".you p").inner_text() == "Hello\nyou"
    for _ in range(3):  # back from the message
        tab.keyboard.press("Shift+Tab")
        if tab.evaluate("document.activeElement.className") == "tokens":
            break
    tab.keyboard.press("ArrowRight")
    tab.keyboard.press("ArrowRight")
    assert tab.locator(".t.now").get_attribute("data-i") == "1"
    assert re.match(r"router, all layers: \w+ 0\.\d\d", tab.locator("#say").inner_text())
    tab.keyboard.press("ArrowUp")
    assert "Token 2 of 40, layer 0" in tab.locator("#token").inner_text()
    assert re.match(r"router, layer 0: .*; next \w+", tab.locator("#say").inner_text())
    tab.keyboard.press("End")
    assert tab.locator(".t.now").get_attribute("data-i") == "39"
    tab.keyboard.press("Escape")
    assert tab.evaluate("document.activeElement.id") == "prompt"
    assert tab.locator(".t.now").count() == 0
    stops = []
    for _ in range(40):
        tab.keyboard.press("Tab")
        stops.append(tab.evaluate("document.activeElement.id || document.activeElement.className"))
    assert {"again", "new", "as", "count", "switch", "temperature", "limit", "theme", "model", "layer"} <= set(stops)
    tab.locator("#again").focus()
    tab.keyboard.press("Enter")
    # the focus is not lost with the button that is hidden
    tab.wait_for_function("() => !again.disabled && document.activeElement.id === 'again'", timeout=WAIT)
    tab.locator(".switch").nth(1).focus()
    tab.keyboard.press("Space")
    assert not tab.locator(".switch").nth(1).is_checked()


def test_a_screen_reader_gets_names_and_few_words(tab: Any) -> None:
    ask(tab)
    tab.locator(".t").nth(3).hover()
    controls = tab.locator("button:visible, input:visible, select:visible, textarea:visible")
    for control in controls.all():
        assert control.evaluate(
            "each => (each.getAttribute('aria-label') || each.labels?.[0]?.textContent || each.textContent).trim()"
        )
    assert tab.locator("#which").get_attribute("aria-valuetext").startswith("token 4 of 40: an, all layers: ")
    live = tab.locator("[aria-live], [role=status], [role=alert], [role=log]").evaluate_all("all => all.map(e => e.id)")
    assert live == ["state", "notice", "say", "refit-problem"]
    assert tab.locator("#say").inner_text().startswith("moe: The router chose an expert.")  # once, when it is whole
    assert tab.get_by_role("switch", name="code on").is_checked()
    assert tab.get_by_role("img", name=re.compile(r"Tokens by expert: \w+ \d+%")).count() == 1


def test_what_is_changed_is_asked_for(tab: Any, speech: Speech) -> None:
    ask(tab)
    assert not {"experts_per_token", "disable_experts", "expert_bias"} & speech.bodies[0].keys()
    slide(tab, "#count", 1)
    tab.locator(".switch").nth(1).click()
    slide(tab, ".bias input >> nth=2", 2.5)
    slide(tab, ".bias input >> nth=1", 4)  # of an expert that is off: not asked for
    slide(tab, "#temperature", 0.7)
    tab.fill("#limit", "12")
    assert "call" in tab.locator("#again").get_attribute("class")
    tab.locator("#again").click()
    whole(tab, 1)
    asked = {key: value for key, value in speech.bodies[1].items() if not key.startswith(("messages", "stream"))}
    assert asked == {
        "model": "moe", "experts_per_token": 1, "disable_experts": ["code"], "expert_bias": {"maths": 2.5},
        "temperature": 0.7, "max_tokens": 12, "trace": True,
    }  # fmt: skip
    assert tab.locator(".reply header .soft").inner_text() == "top-1 · without code · maths +2.5"
    assert "Cut at the limit of tokens." in tab.locator(".foot").inner_text()
    tab.locator("#reset").click()
    tab.locator("#again").click()
    whole(tab, 1)
    assert not {"experts_per_token", "disable_experts", "expert_bias"} & speech.bodies[2].keys()


def test_the_last_expert_cannot_be_switched_off(tab: Any, speech: Speech) -> None:
    for index in range(3):
        tab.locator(".switch").nth(index).click()
    assert tab.locator(".switch").nth(3).is_disabled()
    ask(tab)
    assert (speech.bodies[0]["experts_per_token"], speech.bodies[0]["disable_experts"]) == (
        1,
        ["prose", "code", "maths"],
    )


def test_two_models_side_by_side_have_a_conversation_each(tab: Any, speech: Speech) -> None:
    tab.select_option("#beside", "base")
    ask(tab, "one", replies=2)
    assert tab.locator(".reply h3").all_inner_texts() == ["moe", "base"]
    assert tab.locator(".reply").nth(1).locator(".t").count() == 0  # no experts, no colours
    assert tab.locator(".differ").inner_text() == "Both say the same."
    ask(tab, "two", replies=4)
    assert [body["model"] for body in speech.bodies] == ["moe", "base"] * 2
    assert "trace" not in speech.bodies[1]
    assert [message["role"] for message in speech.bodies[3]["messages"]] == ["user", "assistant", "user"]
    tab.select_option("#model", "base")
    assert tab.locator("#no-routing").is_visible()
    assert not tab.locator("#routing").is_visible()


def test_one_that_waits_says_how_many_are_before_it(tab: Any, speech: Speech) -> None:
    speech.faults = [2]
    tab.evaluate(
        "() => { window.seen = []; new MutationObserver(() => seen.push(document.querySelector('.foot')?.textContent))"
        ".observe(document.getElementById('talk'), { childList: true, subtree: true }); }"
    )
    ask(tab)
    seen = list(dict.fromkeys(tab.evaluate("() => window.seen.filter(text => text.startsWith('Waits'))")))
    assert seen == [
        "Waits for the first token.",
        "Waits its turn: 2 requests before it.",
        "Waits its turn: 1 request before it.",
    ]


def test_errors_are_text(tab: Any, speech: Speech) -> None:
    speech.faults = [f"no expert {NASTY}", "gone"]
    ask(tab)
    assert f"No expert {NASTY}." in tab.locator(".foot").inner_text()
    assert tab.locator(".foot img").count() == 0
    tab.said.clear()  # the browser's own note about the status 400
    tab.locator("#again").click()
    whole(tab, 1)
    assert "The server stopped in the middle of the reply." in tab.locator(".foot").inner_text()
    assert tab.locator(".t").count() == 20


def test_a_reply_can_be_stopped(tab: Any, speech: Speech) -> None:
    speech.tokens, speech.per_second = 150, 20
    tab.fill("#prompt", "Hello")
    tab.keyboard.press("Enter")
    tab.locator(".t").nth(3).wait_for(timeout=WAIT)
    tab.locator("#stop").click()
    whole(tab, 1)
    assert "You stopped it here." in tab.locator(".foot").inner_text()
    assert 4 <= tab.locator(".t").count() < 150


def test_a_reload_keeps_the_conversation_and_its_routing(tab: Any, speech: Speech) -> None:
    ask(tab)
    tab.locator(".switch").nth(1).click()
    tab.fill("#prompt", "not sent yet")
    before = digits(tab)
    tab.reload()
    tab.wait_for_selector("html[data-ready]")
    assert digits(tab) == before
    assert tab.input_value("#prompt") == "not sent yet"
    assert not tab.locator(".switch").nth(1).is_checked()
    tab.locator(".t").nth(7).hover()
    assert "Token 8 of 40" in tab.locator("#token").inner_text()
    tab.locator("#new").click()
    tab.reload()
    tab.wait_for_selector("html[data-ready]")
    assert tab.locator(".reply").count() == 0


def test_when_the_storage_is_full_the_text_stays(tab: Any, speech: Speech) -> None:
    ask(tab)
    ask(tab, replies=2)
    tab.evaluate(
        "() => { let size = 2 ** 23; while (size > 500) { try { sessionStorage.setItem('full',"
        " (sessionStorage.getItem('full') ?? '') + 'x'.repeat(size)); } catch { size /= 2; } } }"
    )
    texts = tab.locator(".tokens").all_inner_texts()
    ask(tab, replies=3)
    tab.reload()
    tab.wait_for_selector("html[data-ready]")
    assert tab.locator(".reply").count() == 3
    assert tab.locator(".reply").first.locator(".t").count() == 0
    assert "Its routing was not kept." in tab.locator(".foot").first.inner_text()
    assert tab.locator(".tokens").first.inner_text().split()[:5] == texts[0].replace("⏎", "").split()[:5]


def test_the_key_is_asked_for_and_kept_out_of_what_is_copied(browser: Any) -> None:
    with speaking(Speech(key="sesame")) as url:
        context = browser.new_context()
        tab = context.new_page()
        tab.goto(url)
        tab.locator("#key").press("Escape")
        tab.get_by_text("The server wants its API key; load this page again to enter it.").wait_for(timeout=WAIT)
        tab.reload()
        tab.locator("#key").fill("ключ")  # no header can have it
        tab.keyboard.press("Enter")
        assert tab.locator("#key-dialog").is_visible()
        assert not tab.locator("#key").evaluate("input => input.validity.valid")
        tab.locator("#key").fill("wrong ")
        tab.keyboard.press("Enter")
        tab.locator("#key-wrong").wait_for(timeout=WAIT)
        tab.locator("#key").fill("sesame")
        tab.keyboard.press("Enter")
        tab.get_by_text("ready").wait_for(timeout=WAIT)
        ask(tab)
        tab.locator("#as").click()
        for form in ("curl", "python", "recipe"):
            tab.locator(f"input[value={form}]").check()
            assert "sesame" not in tab.locator("#written").inner_text()
        tab.reload()
        tab.wait_for_selector("html[data-ready]")
        assert not tab.locator("#key-dialog").is_visible()
        context.close()


def test_markup_in_names_and_tokens_stays_text(browser: Any) -> None:
    names = (NASTY, "b&b", "\u202eabc", "x" * 200)
    prompts = {name: {"positive": [f"{NASTY} {name}"], "negative": []} for name in names}
    speech = Speech(experts=names, words=(NASTY, "</script>", "\u202e", "\x00", "�"), prompts=prompts, others=(NASTY,))
    with speaking(speech) as url:
        tab = open_tab(browser, url, width=390)
        tab.select_option("#beside", NASTY)
        ask(tab, NASTY, replies=2)
        tab.locator(".t").first.hover()
        shown = [text.strip() for text in tab.locator(".reply").first.locator(".t").all_inner_texts()[:5]]
        assert shown == [NASTY, "</script>", "\\u202e", "\\u0000", "�"]
        tab.locator(".teach").click()
        tab.locator("#refit-to").select_option(index=1)
        tab.keyboard.press("Escape")  # the dialog
        tab.keyboard.press("Escape")  # the token, whose details cover the buttons of a phone
        tab.locator("#as").click()
        assert tab.locator("img").count() == 0
        assert tab.title() == "frankenmoe playground"
        assert tab.evaluate("document.documentElement.scrollWidth") <= 390
        assert tab.said == []
        tab.context.close()


def test_parts_of_a_letter_and_lost_spaces_come_out_right(tab: Any, speech: Speech) -> None:
    """A chunk whose tokens do not add up to its text: the last token has the text."""
    shown = tab.evaluate(
        """async () => {
            const { Reply } = await import('/reply.js');
            const facts = { model: 'm', experts: ['a'], fields: {} };
            const reply = new Reply(facts, { marks: [], layer: 0, point: () => {} });
            const layers = [{ experts: [0], weights: [1], next: null }];
            const token = (text) => ({ id: 0, text, layers });
            reply.add('ab', [token('a'), token('b')]);
            reply.add(' word', [token('word')]);
            reply.add('é', [token('\ufffd'), token('\ufffd')]);
            return [reply.text, reply.words];
        }"""
    )
    assert shown == ["ab word\u00e9", ["a", "b", " word", "", "\u00e9"]]


def test_lines_end_where_the_text_has_line_ends(tab: Any, speech: Speech) -> None:
    speech.words = ("def f():", "\n    ", "return", " 1", "\n", "\n", "so", ".\n\n", "It")
    speech.tokens = len(speech.words)
    ask(tab)
    lines = [text.replace("\n", "") for text in tab.locator(".line").all_inner_texts()]
    assert lines == ["def f():", "⏎    return 1⏎", "⏎", "so.⏎⏎", "It"]


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")])
def test_light_dark_and_phone(width: int, scheme: str, browser: Any) -> None:
    speech = Speech(prompts={name: {"positive": ["yes"], "negative": []} for name in Speech.experts}, layers=32)
    with speaking(speech) as url:
        tab = open_tab(browser, url, width=width, scheme=scheme, height=800)
        shoot(tab, f"playground-{width}-{scheme}-hello")
        legible(tab)
        ask(tab)
        tab.locator(".t").nth(9).hover()
        shoot(tab, f"playground-{width}-{scheme}-token")
        legible(tab)
        tab.keyboard.press("Escape")
        if width < 500:
            tab.locator("#drawer").click()
        tab.locator(".switch").nth(1).click()
        shoot(tab, f"playground-{width}-{scheme}-controls")
        legible(tab)
        if width < 500:
            tab.locator("#drawer").click()
        tab.select_option("#beside", "base")
        tab.locator("#again").click()
        whole(tab, 2)
        shoot(tab, f"playground-{width}-{scheme}-two")
        legible(tab)
        tab.locator(".teach").click()
        shoot(tab, f"playground-{width}-{scheme}-refit")
        legible(tab)
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        assert tab.said == []
        tab.context.close()


def test_sixty_four_experts_and_long_conversations_fit(browser: Any) -> None:
    speech = Speech(experts=tuple(f"expert {index}" for index in range(64)), layers=48, tokens=150)
    with speaking(speech) as url:
        tab = open_tab(browser, url)
        ask(tab)
        tab.locator(".t").nth(9).hover()
        shoot(tab, "playground-64")
        assert tab.locator("#experts tbody tr").count() == 64
        assert "more" in tab.locator(".names").inner_text()
        box = tab.locator("#compose").bounding_box()
        assert box["y"] + box["height"] <= 900
        assert tab.said == []
        tab.context.close()
