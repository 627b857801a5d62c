"""A model in this process: what is left after a request that ended early, and what is refused before it starts."""

import json
import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from frankenmoe import subject
from frankenmoe.serve.batch import MOST
from frankenmoe.serve.bodies import Chat, Complete, read
from frankenmoe.serve.errors import RequestError
from frankenmoe.serve.line import HaltedError, Job
from frankenmoe.serve.models import Loading, load_models
from frankenmoe.serve.running import Running
from frankenmoe.serve.writing import Ended, Piece, Usage, told
from refusals import cli, refused
from serving import Server, make_models


class Told:
    """A ticket that keeps what it is told and halts at a given question. Others go with it, as soon as they fit."""

    def __init__(self, job: Job, questions: int = 10**9, *, others: Sequence["Told"] = ()) -> None:
        self.job, self.asked, self.left, self._others = job, job.asked, questions, list(others)
        self.events: list[Any] = []
        self.ends: list[Exception | None] = []

    def along(self, fits: Callable[[Any], bool]) -> "Told | None":
        other = self._others[0] if self._others else None
        fitting = other is not None and other.job.way == self.job.way and fits(other.asked)
        return self._others.pop(0) if fitting else None

    def check(self, *_: object) -> None:
        if self.halted:
            raise HaltedError

    def end(self, error: Exception | None = None) -> None:
        self.ends.append(error)

    def write(self) -> "Told":
        self.job.work(self)  # type: ignore[arg-type]
        return self

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


def asked(model: Any, **fields: Any) -> Job:
    said = [{"role": "user", "content": "some words to read"}]
    body = {"model": "moe", "messages": said, "temperature": 0, "max_tokens": 8} | fields
    return model.job(read(Chat, json.dumps(body).encode()))


@pytest.mark.parametrize("trace", [False, True])
@pytest.mark.parametrize("questions", [*range(12), 20, 30])
def test_after_any_early_end_the_next_answer_is_right(questions: int, trace: bool, model: Any) -> None:
    whole = Told(asked(model, trace=trace)).write()
    model._cache.clear()
    cut = Told(asked(model, trace=trace), questions).write()
    assert whole.text.startswith(cut.text)
    assert cut.events[-1].completion <= 8
    assert cut.events[-2] == Ended(0, "length")
    again = Told(asked(model, trace=trace)).write()
    assert again.text == whole.text
    assert [event for event in again.events if isinstance(event, Ended)] == [Ended(0, "length")]


# requests that are answered together: unlike lengths, settings and ends
CROWD: list[dict[str, Any]] = [
    {"max_tokens": 14},
    {"messages": [{"role": "user", "content": "x"}], "max_tokens": 3},
    {"temperature": 1.3, "seed": 5, "n": 3, "max_tokens": 9},
    {"messages": [{"role": "user", "content": "more words " * 9}], "logprobs": True, "top_logprobs": 2},
    {"temperature": 0.8, "seed": 6, "top_p": 0.9, "max_tokens": 1},
    {"stop": ["a", "e"], "max_tokens": 16},
    {"n": 2, "max_tokens": 6, "temperature": 1, "seed": -1},
    {"max_tokens": 16, "temperature": 1.1, "seed": 9},
]


def of_answer(events: Sequence[Any], index: int) -> tuple[list[Any], list[float]]:
    """What one answer was told, and apart from it the numbers that can differ by rounding."""
    exact: list[Any] = []
    numbers: list[float] = []
    for event in events:
        if getattr(event, "index", None) != index:
            continue
        exact.append(replace(event, tokens=()) if isinstance(event, Piece) else event)
        for token in getattr(event, "tokens", ()):
            exact += [token.id, token.text, [one.id for one in token.top]]
            numbers += [one.logprob for one in (token, *token.top) if one.logprob is not None]
            for layer in token.layers or ():
                exact.append((layer["experts"], layer["next"]))
                numbers += layer["weights"]
    return exact, numbers


@pytest.mark.parametrize("trace", [False, True])
def test_answers_do_not_depend_on_those_beside_them(trace: bool, model: Any) -> None:
    jobs = [asked(model, trace=trace, **fields) for fields in CROWD]
    alone = []
    for job in jobs:
        model._cache.clear()
        alone.append(Told(job).write())
    model._cache.clear()
    others = [Told(job) for job in jobs[1:]]
    first = Told(jobs[0], others=others).write()
    for one, other in zip(alone, [first, *others], strict=True):
        assert other.ends == [None]
        for index in range(one.asked.n):  # the answers of one request come in any order
            (mine, my_numbers), (theirs, their_numbers) = (of_answer(told.events, index) for told in (other, one))
            assert mine == theirs
            assert my_numbers == pytest.approx(their_numbers, abs=1e-4)
        assert replace(other.events[-1], cached=0) == replace(one.events[-1], cached=0)


def test_who_leaves_or_fails_disturbs_nobody(model: Any) -> None:
    whole = Told(asked(model)).write()
    leaves = Told(asked(model, max_tokens=16), 8)
    broken = asked(model)
    fails = Told(replace(broken, asked=replace(broken.asked, prompts=((10**6,),))))  # there is no such token
    stays = Told(asked(model))
    first = Told(asked(model), others=[leaves, fails, stays]).write()
    assert first.text == stays.text == whole.text
    assert (first.ends, leaves.ends, stays.ends) == ([None], [None], [None])
    assert leaves.events[-2] == Ended(0, "length")
    assert 0 < len(leaves.text) < 16
    assert isinstance(fails.ends[0], IndexError)


class Broken:
    """A tokenizer that cannot decode some tokens, as some of sentencepiece cannot where a model has more embeddings."""

    def __init__(self, tokenizer: Any, tokens: set[int]) -> None:
        self._tokenizer, self._tokens = tokenizer, tokens

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def decode(self, ids: Sequence[int], **options: Any) -> str:
        if self._tokens & set(ids):
            raise IndexError("piece id is out of range")
        return str(self._tokenizer.decode(ids, **options))


def test_a_token_without_text_disturbs_nobody_else(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    turns = [{"role": "user", "content": "sea"}]
    plain = [asked(model), asked(model, messages=turns)]
    whole, other = (
        Told(job).write() for job in (asked(model, logprobs=True), asked(model, logprobs=True, messages=turns))
    )
    mine, theirs = (
        [token.id for piece in each.events if isinstance(piece, Piece) for token in piece.tokens]
        for each in (whole, other)
    )
    only = next(token for token in theirs[1:] if token not in mine)
    monkeypatch.setattr(model, "_tokenizer", Broken(model._tokenizer, {only}))
    for first, second in ((0, 1), (1, 0)):
        beside = Told(plain[second])
        told = {first: Told(plain[first], others=[beside]).write(), second: beside}
        assert (told[0].text, told[0].ends) == (whole.text, [None])
        assert isinstance(told[1].ends[0], IndexError)


def echoed(model: Any, **fields: Any) -> Told:
    body = {"model": "moe", "prompt": "some words " * 40, "echo": True, "temperature": 0, "max_tokens": 0} | fields
    return Told(model.job(read(Complete, json.dumps(body).encode()))).write()


@pytest.mark.parametrize("most", [0, 3])
@pytest.mark.parametrize("logprobs", [None, 0, 2])
def test_a_prompt_that_is_repeated_is_counted_and_read_once(logprobs: int | None, most: int, model: Any) -> None:
    length = echoed(model).events[-1].prompt
    assert length > 256  # which are scored at a time
    model._cache.clear()
    sizes, told = inputs_of(model, lambda: echoed(model, logprobs=logprobs, max_tokens=most, n=3))
    assert told.events[-1] == Usage(length, 3 * most)
    assert sum(sizes) == (length if most or logprobs is not None else 0) + 3 * max(0, most - 1)
    pieces = [[event for event in told.events if getattr(event, "index", None) == index] for index in range(3)]
    assert pieces[0][0].text == "some words " * 40
    assert len(pieces[0][0].tokens) == (0 if logprobs is None else length)
    for some in pieces:
        assert replace(some[0], index=0) == pieces[0][0]
        assert [getattr(each, "text", "ended") for each in some[1:]] == [
            getattr(each, "text", "ended") for each in pieces[0][1:]
        ]


def inputs_of(model: Any, write: Callable[[], Told]) -> tuple[list[int], Told]:
    """How many tokens the model read at a time, and what was told."""
    sizes: list[int] = []
    embeddings = model._moe.model.get_input_embeddings()
    hook = embeddings.register_forward_hook(lambda _, inputs, __: sizes.append(inputs[0].numel()))
    told = write()
    hook.remove()
    return sizes, told


def test_answers_to_one_prompt_read_it_once(model: Any) -> None:
    model._cache.clear()
    sizes, told = inputs_of(model, Told(asked(model, n=4, temperature=1, seed=3)).write)
    prompt = told.events[-1].prompt
    assert sizes[0] == prompt
    assert max(sizes[1:]) == 4  # a token of each
    assert sum(sizes) == prompt + 4 * 7  # the last token of an answer is not read
    assert told.events[-1].completion == 32


def test_who_goes_along(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def taken(one: Any, *others: Job) -> int:
        waiting = [Told(job) for job in others]
        Told(one, others=waiting).write()
        return sum(bool(each.events) for each in waiting)

    plain = asked(model)
    assert taken(plain, *[plain] * 9) == 9
    assert taken(plain, asked(model, experts_per_token=1), plain) == 0
    assert taken(plain, asked(model, trace=True)) == 0
    at_once: list[int] = []
    read = model._moe.model.register_forward_pre_hook(
        lambda _, __, inputs: at_once.append(len(inputs["input_ids"])), with_kwargs=True
    )
    long = asked(model, max_tokens=16)
    taken(long, *[long] * 11)
    assert max(at_once) == MOST
    at_once.clear()
    monkeypatch.setattr("frankenmoe.serve.batch.BYTES", 0)
    assert taken(plain, plain, plain) == 2  # one after the other
    assert max(at_once) == 1
    read.remove()


def test_the_number_of_experts_can_be_set_for_all_requests(model: Any, server: Server) -> None:
    one = load_models([server.recipe], how=Loading(most=16, experts_per_token=1)).find("moe")
    assert one.facts()["experts_per_token"] == 1
    fewer, asks = Told(asked(one)).write(), Told(asked(model, experts_per_token=1)).write()
    assert fewer.text == asks.text


def test_an_answer_has_at_most_the_servers_length(model: Any) -> None:
    told = Told(asked(model, max_tokens=1000)).write()
    assert told.events[-1].completion == 16
    assert isinstance(told.events[-1], Usage)


def test_a_refit_that_is_cancelled_at_any_time_changes_nothing(tmp_path: Path) -> None:
    make_models(tmp_path)
    one = load_models([tmp_path / "moe.yml"], how=Loading(most=16)).find("moe")
    assert isinstance(one, Running)

    def gates() -> dict[str, torch.Tensor]:
        return {name: weight.clone() for name, weight in one._moe.model.named_parameters() if "router" in name}

    before, facts, text = gates(), one.facts(), Told(asked(one)).write().text
    prompts = {
        "e0": {"positive": ["maths", "numbers"], "negative": ["a poem"]},
        "e2": {"positive": ["x"], "negative": []},
    }
    for questions in count():
        try:
            Told(Job(one.refit, prompts), questions).write()
            break
        except RequestError as refused:
            why = str(refused)
        assert "the routers are as before" in why
        assert one.facts() == facts
        assert all(torch.equal(weight, before[name]) for name, weight in gates().items())
        assert Told(asked(one)).write().text == text
    assert questions > 6  # it asks at each prompt and at the end
    assert one.facts()["prompts"]["e0"] == prompts["e0"]
    assert not any(torch.equal(weight, before[name]) for name, weight in gates().items())


def test_a_recipe_is_planned_once_and_its_warnings_are_told(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    plan = subject.plan

    def counted(*args: Any, **options: Any) -> Any:
        made.append(plan(*args, **options))
        return made[-1]

    monkeypatch.setattr(subject, "plan", counted)
    warnings: list[str] = []
    load_models([server.recipe], how=Loading(most=16), on_warnings=warnings.extend)
    assert len(made) == 1
    assert warnings == list(made[0].warnings) != []


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
