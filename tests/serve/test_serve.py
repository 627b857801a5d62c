"""The server says what `chat` says, tells what `audit` tells, and answers whatever it is sent."""

import http.client
import json
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest
import torch

import frankenmoe as fm
from frankenmoe.evaluate.parents import stock_model
from frankenmoe.export.run import export_gguf
from frankenmoe.moe.generate import reply
from frankenmoe.moe.load import MoE
from serving import Server, chunks, make_models, start

ASK: list[Any] = [{"role": "user", "content": "The quick brown fox"}]
SHORT: dict[str, Any] = {"temperature": 0, "max_tokens": 12}


@pytest.fixture(scope="module")
def moe(server: Server) -> Any:
    return fm.load(server.recipe)


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60)


def said(model: MoE, messages: list[Any] = ASK, *, tokens: int = 12) -> str:
    """What `chat` answers."""
    return reply(model, model.tokenizer(), messages, max_new_tokens=tokens).text


def answer(client: openai.OpenAI, messages: list[Any] = ASK, model: str = "moe", **extra: Any) -> Any:
    return client.chat.completions.create(model=model, messages=messages, **(SHORT | extra))


def sent(server: Server, method: str, path: str, body: bytes | None = None, **headers: str) -> http.client.HTTPResponse:
    place = urlsplit(server.url)
    connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=60)
    connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
    return connection.getresponse()


def asked(**fields: Any) -> bytes:
    return json.dumps({"model": "moe", "messages": ASK} | SHORT | fields).encode()


def stream(server: Server, **fields: Any) -> http.client.HTTPResponse:
    return sent(server, "POST", "/v1/chat/completions", asked(stream=True, **fields))


def waiting(server: Server) -> int:
    return int(json.load(sent(server, "GET", "/health"))["waiting"])


def test_models_say_what_they_are(client: openai.OpenAI) -> None:
    moe, base, gguf = client.models.list().data
    assert [each.id for each in (moe, base, gguf)] == ["moe", "llama0", "moe-F32"]
    facts = moe.frankenmoe  # type: ignore[attr-defined]
    assert facts["experts"] == ["e0", "e1", "e2"]
    assert (facts["kind"], facts["layers"], facts["experts_per_token"], facts["max_experts"]) == ("moe", 2, 2, 3)
    assert facts["prompts"]["e1"]["positive"] == ["prompt 1", "1 is another one, longer"]
    assert "gate_mode: hidden" in facts["recipe"]
    assert [each.frankenmoe["controls"] for each in (base, gguf)] == [[], []]  # type: ignore[attr-defined]
    assert client.models.retrieve("llama0") == base
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_an_answer_is_that_of_chat_whole_and_streamed(client: openai.OpenAI, moe: Any) -> None:
    whole = answer(client)
    assert whole.choices[0].message.content == said(moe)
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage.completion_tokens == 12
    parts = list(answer(client, stream=True, stream_options={"include_usage": True}))
    assert "".join(part.choices[0].delta.content or "" for part in parts if part.choices) == said(moe)
    assert parts[-2].choices[0].finish_reason == "length"
    assert parts[-1].usage.completion_tokens == 12


def test_a_dense_model_and_a_text_without_template(client: openai.OpenAI, server: Server) -> None:
    base: Any = MoE(stock_model(server.base, dtype=None), (), server.base)
    tokenizer = base.tokenizer()
    ids = torch.tensor([tokenizer("déjà vu")["input_ids"]])
    made = base.model.generate(ids, max_new_tokens=9, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
    for prompt in ("déjà vu", ids[0].tolist()):
        text = client.completions.create(model="llama0", prompt=prompt, temperature=0, max_tokens=9).choices[0].text
        assert text == tokenizer.decode(made, skip_special_tokens=True)


@pytest.mark.parametrize("model", ["moe", "llama0", "moe-F32"])
def test_an_empty_prompt_is_refused_where_the_tokenizer_begins_with_nothing(model: str, client: openai.OpenAI) -> None:
    """As vLLM does; llama.cpp's own server answers with nothing."""
    for prompt in ("", ["A", ""]):
        for streamed in (False, True):
            with pytest.raises(openai.BadRequestError, match="no tokens in this tokenizer"):
                client.completions.create(model=model, prompt=prompt, max_tokens=3, stream=streamed)


def test_an_empty_prompt_is_the_beginning_of_a_text_where_there_is_a_token_for_it(tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    make_models(tmp_path, bos=True)
    (file,) = export_gguf(tmp_path / "moe.yml", tmp_path, types=["f32"], allow_random=True)
    server = start(tmp_path, "--beside", "llama0", "--beside", file.path.name)
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60)
    moe, base, gguf = (
        client.completions.create(model=model, prompt="", temperature=0, max_tokens=8)
        for model in ("moe", "llama0", "moe-F32")
    )
    server.end()
    assert moe.choices[0].text == gguf.choices[0].text != base.choices[0].text
    assert [each.usage.prompt_tokens for each in (moe, base, gguf) if each.usage] == [1, 1, 1]


@pytest.mark.parametrize("streamed", [False, True])
def test_a_trace_is_that_of_the_audit(streamed: bool, client: openai.OpenAI, moe: Any) -> None:
    made = answer(client, stream=streamed, extra_body={"trace": True})
    choices = [part.choices[0] for part in made] if streamed else [made.choices[0]]
    tokens = [token for choice in choices for token in getattr(choice, "trace", None) or []]
    whole = reply(moe, moe.tokenizer(), ASK, max_new_tokens=12).tokens
    assert [token["id"] for token in tokens] == whole[-12:]
    _, trace = moe.forward_with_trace(torch.tensor([whole]))
    for at, token in enumerate(tokens):
        for row, layer in zip(token["layers"], trace.layers, strict=True):
            place = len(whole) - 12 + at
            assert row["experts"] == layer.ids_TK[place].tolist()
            assert row["weights"] == pytest.approx(layer.weights_TK[place].tolist(), abs=1e-5)
            assert row["next"] == int(layer.logits_TE[place].argsort(descending=True)[2])
    if streamed:
        texts = [choice.delta.content or "" for choice in choices]
        assert "".join(texts) == said(moe)


def test_an_expert_that_is_disabled_is_as_if_it_were_not_there(
    client: openai.OpenAI, server: Server, tmp_path: Path
) -> None:
    text = server.recipe.read_text()
    one, two, three = (part for part in text.partition("experts:\n")[2].split("- source_model")[1:])
    without = tmp_path / "without.yml"
    without.write_text(text.replace(f"- source_model{two}", ""))
    made = answer(client, extra_body={"disable_experts": ["e1"], "trace": True}).choices[0]
    assert made.message.content == said(fm.load(without)) != said(fm.load(server.recipe))
    chosen = {expert for token in made.trace for row in token["layers"] for expert in row["experts"]}
    assert chosen == {0, 2}
    assert {row["next"] for token in made.trace for row in token["layers"]} == {None}
    assert one != three


def test_the_number_of_experts_and_a_bias(client: openai.OpenAI, server: Server, tmp_path: Path) -> None:
    fewer = tmp_path / "fewer.yml"
    fewer.write_text(f"{server.recipe.read_text()}experts_per_token: 1\n")
    assert answer(client, extra_body={"experts_per_token": 1}).choices[0].message.content == said(fm.load(fewer))
    forced = answer(client, extra_body={"experts_per_token": 1, "expert_bias": {"e0": 100}})
    dense = answer(client, model="llama0")  # e0 is the base
    assert forced.choices[0].message.content == dense.choices[0].message.content
    left = answer(client, extra_body={"disable_experts": ["e1", "e2"]})
    assert left.choices[0].message.content == dense.choices[0].message.content


def test_a_history_is_read_once_unless_the_routing_is_another(client: openai.OpenAI, moe: Any) -> None:
    first = [{"role": "user", "content": "a history of some length, which need not be read again"}]
    start = answer(client, first)
    turns = [*first, {"role": "assistant", "content": start.choices[0].message.content}, *ASK]
    second = answer(client, turns)
    assert second.usage.prompt_tokens_details.cached_tokens >= start.usage.prompt_tokens
    assert second.choices[0].message.content == said(moe, turns)
    other = answer(client, turns, extra_body={"experts_per_token": 1})
    assert other.usage.prompt_tokens_details.cached_tokens == 0
    again = answer(client, turns)
    assert again.usage.prompt_tokens_details.cached_tokens == again.usage.prompt_tokens - 1
    assert again.choices[0].message.content == said(moe, turns)


def test_stop_strings_are_no_part_of_the_answer(client: openai.OpenAI, moe: Any) -> None:
    whole = said(moe)
    stop = whole[5:8]
    for streamed in (False, True):
        made = answer(client, stop=["not in it", stop], stream=streamed)
        if streamed:
            parts = list(made)
            assert "".join(part.choices[0].delta.content or "" for part in parts) == whole[: whole.index(stop)]
            assert parts[-1].choices[0].finish_reason == "stop"
        else:
            assert made.choices[0].message.content == whole[: whole.index(stop)]
            assert made.choices[0].finish_reason == "stop"


def test_equal_seeds_give_equal_answers_and_n_gives_several(client: openai.OpenAI) -> None:
    hot: dict[str, Any] = {"temperature": 1.5, "seed": 7}
    three = [choice.message.content for choice in answer(client, n=3, **hot).choices]
    assert len(set(three)) == 3
    assert answer(client, **hot).choices[0].message.content == three[0]
    assert answer(client, temperature=1.5, seed=8).choices[0].message.content == three[1]
    streamed: dict[int, str] = {}
    for part in answer(client, n=3, stream=True, **hot):
        choice = part.choices[0]
        streamed[choice.index] = streamed.get(choice.index, "") + (choice.delta.content or "")
    assert [streamed[index] for index in range(3)] == three


def test_probabilities_are_those_of_the_model(client: openai.OpenAI, moe: Any) -> None:
    whole = reply(moe, moe.tokenizer(), ASK, max_new_tokens=12).tokens
    logprobs_TV = moe.model(torch.tensor([whole])).logits[0].log_softmax(-1)
    found = answer(client, logprobs=True, top_logprobs=3).choices[0].logprobs.content
    wanted = [float(logprobs_TV[at - 1, whole[at]]) for at in range(len(whole) - 12, len(whole))]
    assert [token.logprob for token in found] == pytest.approx(wanted, abs=1e-4)
    assert all(token.top_logprobs[0].logprob == pytest.approx(token.logprob) for token in found)
    echoed = client.completions.create(model="moe", prompt=whole, max_tokens=1, temperature=0, logprobs=1, echo=True)
    told = echoed.choices[0].logprobs
    assert told.token_logprobs[0] is None
    wanted = [float(logprobs_TV[at - 1, whole[at]]) for at in range(1, len(whole))]
    assert told.token_logprobs[1:-1] == pytest.approx(wanted, abs=1e-4)


def test_a_request_of_another_routing_waits_and_is_told_so(server: Server) -> None:
    first = stream(server, max_tokens=16000)
    events = chunks(iter(first.readline, b""))
    assert next(events)["choices"]
    second = chunks(iter(stream(server, experts_per_token=1).readline, b""))
    assert next(second) == ": queued 1"
    assert waiting(server) == 1
    third = chunks(iter(stream(server).readline, b""))  # could go with the first one, but does not overtake the second
    assert next(third) == ": queued 2"
    first.close()  # which ends its generation
    for events in (second, third):
        rest = [event for event in events if not isinstance(event, str)]
        assert rest[-1]["choices"][0]["finish_reason"] == "length"
    assert waiting(server) == 0


def test_requests_of_one_routing_are_answered_at_once(client: openai.OpenAI, moe: Any, server: Server) -> None:
    long = stream(server, max_tokens=16000)
    events = chunks(iter(long.readline, b""))
    assert next(events)["choices"]
    turns = [[{"role": "user", "content": f"{number} words of the sea"}] for number in range(3)]
    with ThreadPoolExecutor(3) as pool:
        for messages, made in zip(turns, pool.map(partial(answer, client), turns), strict=True):
            assert made.choices[0].message.content == said(moe, messages)
    assert next(events)["choices"]  # it goes on meanwhile
    long.close()


@pytest.mark.parametrize("streamed", [False, True])
def test_a_client_that_hangs_up_ends_its_generation(streamed: bool, server: Server) -> None:
    place = urlsplit(server.url)
    connection = http.client.HTTPConnection(place.hostname or "", place.port)
    connection.request("POST", "/v1/chat/completions", asked(max_tokens=16000, stream=streamed))
    time.sleep(0.5)
    connection.close()
    assert connection.sock is None
    begun = time.monotonic()
    assert json.load(sent(server, "POST", "/v1/chat/completions", asked(max_tokens=1)))["choices"]
    assert time.monotonic() - begun < 10  # 16,000 tokens take far longer


MALFORMED: list[tuple[bytes, str | None]] = [
    (b"", None),
    (b"{", None),
    (b"[]", None),
    (b"\xff\xfe", None),
    (b'{"model": "moe", "messages": [{"role": "user", "content": "\\ud800"}]}', None),
    (b"[" * 100_000, None),
    (asked(messages=[]), "messages"),
    (asked(messages=[{"role": "user"}]), "messages.0.content"),
    (asked(messages=[{"role": "tool", "content": "x"}]), "messages.0.role"),
    (asked(temperature="hot"), "temperature"),
    (asked(temperature=-1), "temperature"),
    (asked(max_tokens=0), "max_tokens"),
    (asked(n=1000), "n"),
    (asked(tools=[{}]), "tools"),
    (asked(presence_penalty=1), "presence_penalty"),
    (asked(experts_per_token=4), "experts_per_token"),
    (asked(disable_experts=["e0", "e1", "e2"]), "disable_experts"),
    (asked(expert_bias={"e7": 1}), "expert_bias"),
    (asked(expert_bias={"e0": 1e9}), "expert_bias.e0"),
    (asked(model="llama0", trace=True), "trace"),
    (asked(model="../moe.yml"), "model"),
    (asked(messages=[{"role": "user", "content": "word " * 100_000}]), None),
    (asked(messages=[{"role": "user", "content": [1] * 300_000}]), "messages.0.content"),
    (asked(stop=["x"] * 65), "stop"),
    (asked(**{"top-k": 1}), "'top-k'"),
    (asked(**{"": 1}), "''"),
    (asked(messages=[{"role": "user", "content": "x", "cache-control": 1}]), "messages.0.'cache-control'"),
    (asked(expert_bias={"stop": "x"}), "expert_bias.stop"),
    (asked(expert_bias={"an expert": "x"}), "expert_bias.'an expert'"),
    (asked(expert_bias={"x" * 1001: 1}), f"expert_bias.{'x' * 135}...{'x' * 50}"),
    (b'{"seed": ' + b"9" * 5000 + b"}", None),
    (asked(temperature=float("nan")), "temperature"),
]


@pytest.mark.parametrize(("body", "param"), MALFORMED)
def test_a_malformed_body_is_refused_by_name(body: bytes, param: str | None, server: Server) -> None:
    answered = sent(server, "POST", "/v1/chat/completions", body)
    error = json.load(answered)["error"]
    assert answered.status == (404 if param == "model" else 400)
    assert (error["param"], error["type"]) == (param, "invalid_request_error")
    assert error["message"]


def test_a_large_body_and_unknown_paths(server: Server) -> None:
    assert sent(server, "POST", "/v1/completions", b" " * 10_000_000).status == 413
    nothing = sent(server, "POST", "/v1/completions", b'{"model": "moe", "prompt": "hi", "max_tokens": 0}')
    assert json.load(nothing)["choices"][0]["finish_reason"] == "length"
    strange = sent(server, "POST", "/v1/completions", b'{"model": "moe", "prompt": [1, 100000]}')
    assert (strange.status, json.load(strange)["error"]["param"]) == (400, "prompt")
    for method, path, status, says in (
        ("GET", "/v1/nothing", 404, "/openapi.json"),
        ("GET", "/v1/models/", 404, "there is no model ''"),
        ("GET", "/health/", 404, "/openapi.json"),
        ("GET", "/../etc/passwd", 404, "/openapi.json"),
        ("GET", "/v1/completions", 405, "method"),
    ):
        answered = sent(server, method, path)
        assert answered.status == status
        assert says in json.load(answered)["error"]["message"]


def test_other_sites_and_names_are_refused(server: Server) -> None:
    path = "/v1/chat/completions"
    assert sent(server, "POST", path, asked(), Origin="https://evil.example").status == 403
    assert sent(server, "POST", path, asked(), Origin="null").status == 403
    assert sent(server, "GET", "/v1/models", Host="evil.example").status == 403
    port = urlsplit(server.url).port
    assert sent(server, "POST", path, asked(), Origin=f"http://127.0.0.1:{port}").status == 200
    assert sent(server, "GET", "/v1/models", Host=f"localhost:{port}").status == 200


def test_refitted_routers_are_those_of_the_recipe(client: openai.OpenAI, server: Server, tmp_path: Path) -> None:
    texts = {"e0": "maths and numbers", "e1": "a poem of the sea", "e2": "def f(x): return x"}
    text = server.recipe.read_text()
    for index, prompt in enumerate(texts.values()):
        text = text.replace(f"- prompt {index}\n  - {index} is another one, longer", f"- {json.dumps(prompt)}")
    other = tmp_path / "other.yml"
    other.write_text(text)
    assert text.count("prompt ") == 0
    before = client.models.list().data[0].frankenmoe["prompts"]  # type: ignore[attr-defined]

    def refit(prompts: Any, model: str = "moe") -> http.client.HTTPResponse:
        return sent(server, "POST", "/v1/frankenmoe/refit", json.dumps({"model": model, "prompts": prompts}).encode())

    changed = refit({name: {"positive": [prompt]} for name, prompt in texts.items()})
    assert json.load(changed)["frankenmoe"]["prompts"]["e1"]["positive"] == ["a poem of the sea"]
    assert answer(client).choices[0].message.content == said(fm.load(other))
    assert refit({"e1": {"positive": []}}).status == 400
    assert refit({"e9": {"positive": ["x"]}}).status == 400
    assert refit({}, model="llama0").status == 400
    assert answer(client).choices[0].message.content == said(fm.load(other))
    assert refit(before).status == 200
    assert answer(client).choices[0].message.content == said(fm.load(server.recipe))


def test_a_refit_ends_with_its_client(client: openai.OpenAI, moe: Any, server: Server) -> None:
    facts = client.models.list().data[0].frankenmoe  # type: ignore[attr-defined]
    many = [f"{number} {'words of many kinds ' * 40}" for number in range(1000)]  # which take some seconds to read
    place = urlsplit(server.url)
    connection = http.client.HTTPConnection(place.hostname or "", place.port)
    connection.request(
        "POST", "/v1/frankenmoe/refit", json.dumps({"model": "moe", "prompts": {"e1": {"positive": many}}}).encode()
    )
    time.sleep(0.5)
    connection.close()
    assert answer(client).choices[0].message.content == said(moe)
    assert client.models.list().data[0].frankenmoe == facts  # type: ignore[attr-defined]


def test_llama_cpp_answers_like_the_model_it_was_made_from(client: openai.OpenAI, moe: Any) -> None:
    whole = answer(client, model="moe-F32", max_tokens=8, logprobs=True, top_logprobs=2)
    assert whole.choices[0].message.content == said(moe, tokens=8)
    assert whole.usage.completion_tokens == 8
    ours = [each.logprob for each in answer(client, max_tokens=8, logprobs=True).choices[0].logprobs.content]
    theirs = [each.logprob for each in whole.choices[0].logprobs.content]  # llama.cpp tells nothing of split characters
    assert len(theirs) >= 4
    assert all(min(abs(one - other) for other in ours) < 0.01 for one in theirs)
    with pytest.raises(openai.BadRequestError, match="invalid tokens"):
        client.completions.create(model="moe-F32", prompt=[100000])
    hot: dict[str, Any] = {"model": "moe-F32", "temperature": 1.5, "seed": -1}
    one, other = (answer(client, **hot).choices[0].message.content for _ in range(2))
    assert one == other
    two = client.completions.create(model="moe-F32", prompt=["The", "quick"], n=2, temperature=1, seed=1, max_tokens=4)
    assert [choice.index for choice in two.choices] == [0, 1, 2, 3]
    parts = list(answer(client, model="moe-F32", max_tokens=8, stream=True))
    assert "".join(part.choices[0].delta.content or "" for part in parts) == said(moe, tokens=8)


def test_a_key_a_site_and_a_signal_in_mid_stream(tmp_path: Path) -> None:
    make_models(tmp_path)
    site = "https://my.site"
    running = start(tmp_path, "--max-tokens", "16000", "--cors", site, FRANKENMOE_API_KEY="secret")
    asks = {"Origin": site, "Access_Control_Request_Method": "POST", "Access_Control_Request_Headers": "authorization"}
    assert sent(running, "OPTIONS", "/v1/completions", **asks).getheader("Access-Control-Allow-Origin") == site
    allowed = sent(running, "POST", "/v1/chat/completions", asked(), Authorization="Bearer secret", Origin=site)
    assert (allowed.status, allowed.getheader("Access-Control-Allow-Origin")) == (200, site)
    evil = sent(running, "POST", "/v1/chat/completions", asked(), Authorization="Bearer secret", Origin=f"{site}.evil")
    assert (evil.status, evil.getheader("Access-Control-Allow-Origin")) == (403, None)
    assert sent(running, "POST", "/v1/chat/completions", asked()).status == 401
    for wrong in ("Bearer wrong", "Bearer \u00e9", "Bearer", "Basic secret", "secret"):
        assert sent(running, "GET", "/health", Authorization=wrong).status == 401
    assert sent(running, "GET", "/openapi.json").status == 401  # which names the models
    assert sent(running, "GET", "/").status == 200
    answered = sent(
        running, "POST", "/v1/chat/completions", asked(stream=True, max_tokens=16000), Authorization="Bearer secret"
    )
    events: Iterator[Any] = chunks(iter(answered.readline, b""))
    assert next(events)["choices"]
    running.process.send_signal(signal.SIGTERM)
    *_, last = events
    assert last["error"]["message"] == "the server is stopping"
    errors = running.process.communicate(timeout=60)[1]
    assert "secret" not in errors
    assert "Traceback" not in errors
    assert running.process.returncode == -signal.SIGTERM
