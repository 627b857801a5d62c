"""The page in a real browser before the real server and a small MoE: what it shows is what the model does."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from openai import OpenAI

import tiny
from browsing import WAIT, launched, open_tab, whole
from frankenmoe.recipe.model import Recipe

LONG = 6000  # tokens of a reply that is not over before the test has done something


@dataclass
class Served:
    """A server in a process of its own, always at one address."""

    recipe: Path
    beside: Path
    port: int
    process: subprocess.Popen[str] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        command = [sys.executable, "-m", "frankenmoe", "serve", self.recipe, "--beside", self.beside]
        command += ["--port", str(self.port), "--max-tokens", "7000"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert self.process.stdout is not None
        assert self.url in self.process.stdout.readline()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Whatever time the browser takes, the server does nothing meanwhile."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
            self.process = None

    def answer(self, **fields: Any) -> str:
        """What the model says to "prompt 1", asked by another client."""
        client = OpenAI(base_url=f"{self.url}/v1", api_key="none")
        messages: Any = [{"role": "user", "content": "prompt 1"}]
        reply = client.chat.completions.create(
            model="toy", messages=messages, temperature=0, max_tokens=30, extra_body=fields
        )
        return reply.choices[0].message.content or ""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    root = tmp_path_factory.mktemp("toy")
    sizes = {"max_position_embeddings": 8192, "eos_token_id": None}
    parents = [tiny.make_parent(root / f"p{seed}", seed=seed, **sizes) for seed in range(3)]
    for parent in parents:  # no token ends a reply
        tokenizer = tiny.make_tokenizer()
        tokenizer.eos_token = None
        tokenizer.save_pretrained(parent)
    recipe = tiny.write_recipe(root / "toy.yml", parents[0], parents, prompts=True, gate_mode="centroid")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    served = Served(recipe, parents[1], port)
    served.start()
    yield served
    served.kill()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with launched() as browser:
        yield browser


@pytest.fixture
def tab(browser: Any, served: Served) -> Iterator[Any]:
    if served.process is None:
        served.start()
    tab = open_tab(browser, served.url)
    tab.fill("#limit", "30")
    yield tab
    assert tab.said == []
    tab.context.close()


def ask(tab: Any, text: str = "prompt 1", *, replies: int = 1) -> None:
    tab.fill("#prompt", text)
    tab.keyboard.press("Enter")
    whole(tab, replies)


def begun(tab: Any) -> None:
    """Asks for a long reply, and waits for its first tokens."""
    tab.fill("#limit", str(LONG))
    tab.fill("#prompt", "prompt 1")
    tab.keyboard.press("Enter")
    tab.locator(".t").nth(5).wait_for(timeout=WAIT)


def text(tab: Any, reply: int = 0) -> str:
    """The text of a reply as the page keeps it."""
    return tab.evaluate(
        "async at => { dispatchEvent(new Event('pagehide'));"
        " return JSON.parse(sessionStorage['frankenmoe-1']).turns.flatMap(turn => turn.replies)[at].text; }",
        reply,
    )


def test_it_says_what_the_model_says(tab: Any, served: Served) -> None:
    ask(tab)
    assert text(tab) == served.answer()
    assert tab.locator(".t").count() == 30
    tab.locator(".t").nth(4).hover()
    weights = [float(cell) for cell in re.findall(r"\b[01]\.\d{3}", tab.locator("#token").inner_text())]
    assert sum(weights) == pytest.approx(1, abs=0.01)


def test_without_an_expert_the_text_is_another(tab: Any, served: Served) -> None:
    tab.select_option("#beside", "=")
    tab.locator(".switch").nth(1).click()
    ask(tab, replies=2)
    assert [text(tab, 0), text(tab, 1)] == [served.answer(disable_experts=["e1"]), served.answer()]
    assert text(tab, 0) != text(tab, 1)
    first, second = tab.locator(".reply").all()
    assert "1" not in first.locator(".t").evaluate_all("all => all.map(each => each.dataset.d)")
    assert "1" in second.locator(".t").evaluate_all("all => all.map(each => each.dataset.d)")
    assert re.match("They (part|differ)", tab.locator(".differ").inner_text())


def test_bias_and_count_reach_the_router(tab: Any, served: Served) -> None:
    for name, value in (("#count", 1), (".bias input >> nth=2", 8)):
        tab.locator(name).evaluate(
            "(slider, value) => { slider.value = value; slider.dispatchEvent(new Event('input')); }", value
        )
    ask(tab)
    assert text(tab) == served.answer(experts_per_token=1, expert_bias={"e2": 8})


def test_a_dense_model_beside_it(tab: Any) -> None:
    tab.select_option("#beside", "p1")
    ask(tab, replies=2)
    assert tab.locator(".reply").nth(1).locator(".t").count() == 0
    assert len(text(tab, 1)) > 0


def test_a_reload_in_the_middle_keeps_what_had_come(tab: Any) -> None:
    begun(tab)
    tab.reload()
    tab.wait_for_selector("html[data-ready]")
    assert "The page was loaded again while this reply came" in tab.locator(".foot").inner_text()
    assert 5 < tab.locator(".t").count() < LONG
    tab.fill("#limit", "8")
    tab.locator("#again").click()
    whole(tab, 1)  # so the first request does not occupy the server any more
    assert tab.locator(".t").count() == 8


def test_two_tabs_do_not_mix(tab: Any, browser: Any, served: Served) -> None:
    other = open_tab(browser, served.url)
    other.fill("#limit", "10")
    begun(tab)
    other.fill("#prompt", "prompt 2")
    other.keyboard.press("Enter")
    whole(other, 1)
    assert tab.locator("#stop").is_visible()  # its reply goes on
    with served.paused():
        other.locator(".switch").nth(1).click()
        other.locator("#again").click()
    other.get_by_text("Waits its turn: 1 request before it.").wait_for(timeout=WAIT)
    tab.locator("#stop").click()
    whole(tab, 1)
    whole(other, 1)
    assert other.locator(".you p").all_inner_texts() == ["prompt 2"]
    assert tab.locator(".you p").all_inner_texts() == ["prompt 1"]
    assert other.locator(".t").count() == 10
    other.context.close()


def test_a_killed_server_is_noticed_and_found_again(tab: Any, served: Served) -> None:
    begun(tab)
    served.kill()
    whole(tab, 1)
    assert "The server stopped in the middle of the reply." in tab.locator(".foot").inner_text()
    tab.get_by_text("The server does not answer.").wait_for(timeout=WAIT)
    assert tab.locator("#send").is_disabled()
    tab.fill("#prompt", "prompt 2")
    tab.keyboard.press("Enter")  # nothing is lost
    assert tab.input_value("#prompt") == "prompt 2"
    served.start()
    tab.locator("#notice").wait_for(state="hidden", timeout=WAIT)
    tab.fill("#limit", "8")
    tab.locator("#prompt").press("Enter")
    whole(tab, 2)
    assert tab.locator(".reply").nth(1).locator(".t").count() == 8
    assert tab.said
    tab.said.clear()  # the browser's own notes about the server


def test_edited_prompts_refit_the_routers(tab: Any, served: Served) -> None:
    ask(tab)
    before = text(tab)
    tab.locator(".teach").click()
    tab.select_option("#refit-to", "e2")
    tab.locator("#prompts details").nth(0).locator("summary").click()
    tab.locator("#prompts details").nth(0).locator("textarea").first.fill(
        'something "quite" different: #\nin two lines'
    )
    tab.locator("#refit").click()
    tab.locator("#refit-dialog").wait_for(state="hidden", timeout=WAIT)
    tab.locator("#again").click()
    whole(tab, 1)
    assert text(tab) == served.answer() != before
    tab.locator(".switch").nth(1).click()
    tab.locator("#as").click()
    tab.locator("input[value=recipe]").check()
    found = yaml.safe_load(tab.locator("#written").inner_text())
    own = Recipe.load(served.recipe)
    assert found == {
        "experts_per_token": own.experts_per_token,
        "experts": [
            {
                "name": "e0",
                "positive_prompts": [
                    'something "quite" different: #\nin two lines',
                    own.experts[0].positive_prompts[1],
                ],
            },
            {"name": "e2", "positive_prompts": [*own.experts[2].positive_prompts, "prompt 1"]},
        ],
    }


def test_a_refit_that_cannot_be_done_says_why(tab: Any) -> None:
    tab.locator("#edit-prompts").click()
    for area in tab.locator("#prompts details").first.locator("textarea").all():
        area.fill("")
    tab.locator("#refit").click()
    tab.locator("#refit-problem:not(:empty)").wait_for(timeout=WAIT)
    assert "positive" in tab.locator("#refit-problem").inner_text()
    tab.said.clear()  # the browser's own note about the status 400


def test_a_refit_can_be_cancelled(tab: Any, served: Served) -> None:
    before = served.answer()
    client = OpenAI(base_url=f"{served.url}/v1", api_key="none")
    long = client.completions.create(model="toy", prompt="prompt", max_tokens=4000, stream=True)
    next(iter(long))  # the refit waits behind it
    tab.locator("#edit-prompts").click()
    tab.locator("#prompts details").first.locator("textarea").first.fill("something quite different")
    tab.locator("#refit").click()
    tab.locator("#refit-close", has_text="Cancel").click()
    tab.locator("#refit-problem:not(:empty)").wait_for(timeout=WAIT)
    assert "as before" in tab.locator("#refit-problem").inner_text()
    assert tab.locator("#refit").is_enabled()
    long.close()
    assert served.answer() == before
    tab.locator("#refit-close", has_text="Close").click()
    tab.locator("#refit-dialog").wait_for(state="hidden", timeout=WAIT)


def test_what_is_copied_says_the_same_elsewhere(tab: Any, served: Served, tmp_path: Path) -> None:
    tab.locator(".switch").nth(1).click()
    tab.fill("#prompt", 'it\'s "prompt" 1 $HOME `x` \\')
    tab.locator("#as").click()
    copied = {}
    for form in ("curl", "python"):
        tab.locator(f"input[value={form}]").check()
        copied[form] = tab.locator("#written").inner_text()
    tab.keyboard.press("Escape")
    tab.locator("#prompt").press("Enter")
    whole(tab, 1)
    python = subprocess.run([sys.executable, "-c", copied["python"]], capture_output=True, text=True, timeout=120)
    assert python.stdout == text(tab), python.stderr
    if shutil.which("curl"):
        curl = subprocess.run(["sh", "-c", copied["curl"]], capture_output=True, text=True, timeout=120, env=os.environ)
        pieces = re.findall(r'"content":("(?:[^"\\]|\\.)*")', curl.stdout)
        assert "".join(map(yaml.safe_load, pieces)) == text(tab), curl.stderr
