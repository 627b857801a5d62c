"""A model in this process: what is left after a request that ended early, and what is refused before it starts."""

import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from frankenmoe.serve.bodies import Chat, read
from frankenmoe.serve.models import Loading, load_models
from frankenmoe.serve.writing import Ended, Piece, Usage, told
from refusals import cli, refused
from serving import Server, make_models


class Told:
    """A ticket that keeps what it is told and halts at a given question."""

    def __init__(self, questions: int = 10**9) -> None:
        self.left = questions
        self.events: list[Any] = []

    def say(self, event: object) -> None:
        self.events.append(event)

    @property
    def halted(self) -> bool:
        self.left -= 1
        return self.left < 0

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.events if isinstance(event, Piece))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("running")
    make_models(folder)
    models = load_models([folder / "moe.yml", folder / "llama0", folder / "llama0"], how=Loading(most=16))
    assert list(models.by_name) == ["moe", "llama0", "llama0-2"]
    return models.find("moe")


def asked(model: Any, **fields: Any) -> Any:
    said = [{"role": "user", "content": "some words to read"}]
    body = {"model": "moe", "messages": said, "temperature": 0, "max_tokens": 8, **fields}
    return model.task(read(Chat, json.dumps(body).encode()))


@pytest.mark.parametrize("trace", [False, True])
@pytest.mark.parametrize("questions", [*range(12), 20, 30])
def test_after_any_early_end_the_next_answer_is_right(questions: int, trace: bool, model: Any) -> None:
    whole = Told()
    model.write(asked(model, trace=trace), whole)
    model._cache.clear()
    cut = Told(questions)
    model.write(asked(model, trace=trace), cut)
    assert whole.text.startswith(cut.text)
    assert cut.events[-1].completion <= 8
    assert cut.events[-2] == Ended(0, "length")
    again = Told()
    model.write(asked(model, trace=trace), again)
    assert again.text == whole.text
    assert [event for event in again.events if isinstance(event, Ended)] == [Ended(0, "length")]


def test_the_number_of_experts_can_be_set_for_all_requests(model: Any, server: Server) -> None:
    one = load_models([server.recipe], how=Loading(most=16, experts_per_token=1)).find("moe")
    assert one.facts()["experts_per_token"] == 1
    fewer, asks = Told(), Told()
    one.write(asked(one), fewer)
    model.write(asked(model, experts_per_token=1), asks)
    assert fewer.text == asks.text


def test_an_answer_has_at_most_the_servers_length(model: Any) -> None:
    told = Told()
    model.write(asked(model, max_tokens=1000), told)
    assert told.events[-1].completion == 16
    assert isinstance(told.events[-1], Usage)


def test_a_name_on_the_disk_that_is_no_text(server: Server) -> None:
    odd = server.folder / os.fsdecode(b"odd\xff.yml")
    odd.write_text(server.recipe.read_text())
    models = load_models([odd], how=Loading(most=16))
    assert list(models.by_name) == ["odd\ufffd"]
    assert json.dumps(models.entry("odd\ufffd"), ensure_ascii=False).encode()


def test_an_impossible_token_has_a_probability_that_json_can_say() -> None:
    tokenizer = tiny.make_tokenizer()
    found = told(tokenizer, 1, torch.tensor([0.0, float("-inf"), -1.0]), 20)
    assert found.logprob == -9999.0
    assert [each.logprob for each in found.top] == [0.0, -1.0, -9999.0]


def test_what_cannot_be_served_is_refused_first(server: Server, tmp_path: Path) -> None:
    recipe = server.recipe
    refused("serve", server.base, inside=tmp_path, facts=(server.base, "expected"), hint="--beside")
    refused("serve", tmp_path / "no.yml", inside=tmp_path, facts=(tmp_path / "no.yml",))
    refused("serve", recipe, "--host", "0.0.0.0", inside=tmp_path, facts=("0.0.0.0", "key"), hint="FRANKENMOE_API_KEY")
    refused("serve", recipe, "--port", "0", "--beside", tmp_path / "no.gguf", inside=tmp_path, facts=("no.gguf",))
    refused("serve", recipe, "--api-key", "", inside=tmp_path, facts=("API key",), hint="openssl")
    refused("serve", recipe, "--cors", "*", inside=tmp_path, facts=("--cors", "'*'"), hint="wildcard")
    gguf = server.folder / "moe-F32.gguf"
    outcome = cli("serve", gguf, "--experts-per-token", 1)
    assert (outcome.code, "need an artifact" in outcome.stderr) == (2, True)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        refused("serve", recipe, "--port", port, inside=tmp_path, facts=(port, "in use"), hint="--port")
    host = f"\u00e9{'a' * 70}"  # longer than a name may be
    refused("serve", recipe, "--host", host, "--api-key", "x", inside=tmp_path, facts=(host,), hint="--host")
