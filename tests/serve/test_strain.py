"""The server stands what clients do to it: fuzzed bodies, cancelled streams, slow readers, many at once."""

import http.client
import json
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

import frankenmoe as fm
from frankenmoe.export.run import export_gguf
from serving import Server, make_models, start

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
CLIENTS, REQUESTS, WARM = 16, 512, 208
LONG = 16000  # tokens that no request here waits for


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("strained")
    make_models(folder)
    running = start(folder, "--max-tokens", str(LONG))
    yield running
    assert running.process.poll() is None
    assert "Traceback" not in running.end()


def test_no_fuzzed_request_fails_the_server(tmp_path: Path) -> None:
    make_models(tmp_path)
    (file,) = export_gguf(tmp_path / "moe.yml", tmp_path, types=["f32"], allow_random=True)
    running = start(tmp_path, "--max-tokens", "4", "--beside", "llama0", "--beside", file.path.name)
    command = [
        *(sys.executable, "-m", "schemathesis.cli", "run", f"{running.url}/openapi.json"),
        *("--checks", "not_a_server_error", "--max-examples", "60", "--seed", "1"),
        *("--phases", "examples,coverage,fuzzing"),
        *("--suppress-health-check", "too_slow"),  # a busy machine is no fault of the server
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    said = running.end()
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert "Traceback" not in said


def test_a_crowd_of_clients_of_all_kinds(served: Server) -> None:
    path = "/v1/chat/completions"
    results: Counter[str] = Counter()

    def body(**fields: Any) -> bytes:
        said = [{"role": "user", "content": f"number {random.random()}"}]
        return json.dumps({"model": "moe", "messages": said, "max_tokens": random.randint(1, 8), **fields}).encode()

    def opened(sent: bytes) -> http.client.HTTPConnection:
        place = urlsplit(served.url)
        connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=120)
        connection.request("POST", path, sent)
        return connection

    def whole() -> str:
        answered = opened(body(trace=random.random() < 0.3)).getresponse()
        found = json.load(answered)
        assert answered.status in (200, 429), found
        return "answered" if answered.status == 200 else "refused"

    def streamed() -> str:
        text = opened(body(stream=True)).getresponse().read()
        assert b"[DONE]" in text or b'"error"' in text, text
        return "streamed"

    def slowly() -> str:
        answered = opened(body(stream=True, n=2)).getresponse()
        while answered.read(200):
            time.sleep(0.02)
        return "read slowly"

    def cancelled() -> str:
        connection = opened(body(stream=True, max_tokens=LONG))
        answered = connection.getresponse()
        answered.readline()
        answered.close()
        connection.close()
        return "cancelled"

    def left() -> str:
        connection = opened(body(max_tokens=LONG))
        time.sleep(random.random() / 5)
        connection.close()
        return "left"

    def malformed() -> str:
        sent = random.choice([b"", b"{", b"\0" * 100, b"[1]", body(temperature="x"), body(model="?"), body(top=1)])
        status = opened(sent).getresponse().status
        assert status in (400, 404), sent
        return "malformed"

    def large() -> str:
        assert opened(b" " * 10_000_000).getresponse().status == 413
        return "large"

    kinds = [*[whole] * 5, *[streamed] * 5, slowly, *[cancelled] * 3, left, *[malformed] * 3, large]
    failures: list[BaseException] = []

    def crowd(requests: int) -> None:
        def client() -> None:
            for _ in range(requests // CLIENTS):
                try:
                    results[random.choice(kinds)()] += 1
                except BaseException as error:
                    failures.append(error)

        threads = [threading.Thread(target=client) for _ in range(CLIENTS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    random.seed(3)
    crowd(WARM)
    before = memory(served)
    crowd(REQUESTS)
    assert failures == []
    assert sum(results.values()) == WARM + REQUESTS
    begun = time.monotonic()
    assert json.load(opened(body(max_tokens=1)).getresponse())["choices"]  # no generation of those who left goes on
    assert time.monotonic() - begun < 10
    place = urlsplit(served.url)
    asks = http.client.HTTPConnection(place.hostname or "", place.port)
    asks.request("GET", "/health")
    assert json.load(asks.getresponse()) == {"status": "ok", "waiting": 0}
    assert memory(served) < before * 1.05


def memory(server: Server) -> int:
    """Bytes of the server's own memory, without files."""
    lines = Path(f"/proc/{server.process.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024


def test_lm_eval_scores_as_it_does_in_this_process(served: Server) -> None:
    pytest.importorskip("tenacity", reason="lm-eval's clients need `pip install lm-eval[api]`")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    moe: Any = fm.load(served.recipe)
    ours = HFLM(pretrained=moe.model, tokenizer=moe.tokenizer(), batch_size=1)
    theirs = LocalCompletionsAPI(
        base_url=f"{served.url}/v1/completions",
        model="moe",
        tokenizer=str(served.base),
        tokenizer_backend="huggingface",
    )
    pairs = [
        ("The quick brown", " fox"),
        ("It's 2024, and", " we've"),
        ("", "déjà vu"),
        ("def f(x):", "\n    return x"),
    ]
    asked = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)]
    for one, two in zip(ours.loglikelihood(asked), theirs.loglikelihood(asked), strict=True):
        assert one[0] == pytest.approx(two[0], abs=1e-3)
        assert one[1] == two[1]
    settings = {"until": ["never"], "max_gen_toks": 8, "temperature": 0, "do_sample": False}
    asked = [Instance("generate_until", {}, ("The quick", settings), 0)]
    assert ours.generate_until(asked) == theirs.generate_until(asked)
