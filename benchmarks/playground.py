"""The frames of the server's page while a reply comes in: 60 tokens a second, each with the routing of 32 layers.

The server here has no model (tests/speaking.py), so only the page is measured, in Chromium without a window. On a busy
machine frames come late whatever the page does. So the same page at rest is the floor, and the processor time of the
longest task of the page's thread says what the page itself takes.
"""

import json
import statistics
import sys
from typing import Any

from common import REPOSITORY, Row, arguments, publish, workspace

PER_SECOND, LAYERS, EXPERTS = 60, 32, 16
MOST = 50  # milliseconds of a frame
TOKENS = {"smoke": 30, "small": 300, "full": 1500}
REST = 2000  # milliseconds of the page at rest
PAGE, FLOOR = "page", "the page at rest"
NOTE_FRAMES = """
window.gaps = [];
let last = performance.now();
const frame = (now) => { window.gaps.push(now - last); last = now; requestAnimationFrame(frame); };
requestAnimationFrame(frame);
"""


def main() -> None:
    options = arguments("Stream a reply into the page and measure its frames.", name="playground")
    sys.path.append(str(REPOSITORY / "tests"))
    with workspace(options.work) as work:
        tasks: list[float] = []
        late: dict[str, list[float]] = {PAGE: [], FLOOR: []}
        for _ in range(options.rounds):
            found = one_reply(TOKENS[options.scale])
            tasks.append(max(found["tasks"]))
            for name in late:
                gaps = sorted(found[name])
                late[name].append(gaps[int(len(gaps) * 0.99)])
        rows = [
            Row("processor time of the longest task", statistics.median(tasks), "ms", MOST, {PAGE: tasks}),
            Row("99 % of frames come within", statistics.median(late[PAGE]), "ms", MOST, late),
        ]
        publish("playground", rows, options=options, work=work)


def one_reply(tokens: int) -> dict[str, list[float]]:
    """Milliseconds: between the frames at rest and during one reply, and of each task; a token is pointed at."""
    from browsing import launched
    from speaking import Speech, speaking

    names = tuple(f"expert {index}" for index in range(EXPERTS))
    speech = Speech(experts=names, layers=LAYERS, tokens=tokens, per_second=PER_SECOND)
    with speaking(speech) as url, launched() as browser:
        tab: Any = browser.new_page(viewport={"width": 1280, "height": 800})
        tab.add_init_script(NOTE_FRAMES)
        tab.goto(url)
        tab.wait_for_selector("html[data-ready]")
        tab.fill("#limit", str(tokens))
        tab.fill("#prompt", "Hello")
        rest = _gaps(tab, lambda: tab.wait_for_timeout(REST))
        browser.start_tracing(page=tab, categories=["toplevel"])
        gaps = _gaps(tab, lambda: _reply(tab, tokens))
        return {FLOOR: rest, PAGE: gaps, "tasks": _tasks(json.loads(browser.stop_tracing())["traceEvents"])}


def _reply(tab: Any, tokens: int) -> None:
    tab.keyboard.press("Enter")
    tab.locator(".t").nth(9).hover()
    tab.locator(".reply[aria-busy=false]").wait_for(timeout=60_000 + 2_000 * tokens / PER_SECOND)
    shown = tab.locator(".t").count()
    if shown != tokens:
        raise RuntimeError(f"the page shows {shown} tokens, expected {tokens}")


def _gaps(tab: Any, meanwhile: Any) -> list[float]:
    tab.evaluate("() => { window.gaps.length = 0; }")
    meanwhile()
    return list(tab.evaluate("() => window.gaps"))


def _tasks(events: list[dict[str, Any]]) -> list[float]:
    """Milliseconds of processor time of each task of the busiest thread that runs a page."""
    threads = {
        (event["pid"], event["tid"])
        for event in events
        if event["name"] == "thread_name" and event["args"]["name"] == "CrRendererMain"
    }
    tasks: dict[tuple[int, int], list[float]] = {thread: [] for thread in threads}
    for event in events:
        if event["name"].endswith("RunTask") and (event["pid"], event["tid"]) in threads:
            tasks[event["pid"], event["tid"]].append(event.get("tdur", 0) / 1000)
    return max(tasks.values(), key=sum)


if __name__ == "__main__":
    main()
