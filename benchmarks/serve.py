"""A server against `chat`: tokens per second of one stream, the first token of a turn whose history is known; and
several streams at once against one after the other.

Both run the same model and write the same text. `chat` is measured where it makes its tokens, the server from outside,
by a client that reads its stream.
"""

import argparse
import json
import string
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import openai
import psutil
import torch
from common import ENVIRONMENT, Row, arguments, interleave, log, publish, ratio, workspace
from sources import SHAPES, make_source, write_recipe
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.generation.streamers import BaseStreamer

from frankenmoe.moe.generate import reply
from frankenmoe.moe.linear import prepare_kernels
from frankenmoe.moe.promptcache import PromptCache
from frankenmoe.subject import load

CHAT, SERVE, TRACED = "chat", "serve", "serve, traced"
PROMPT = {"smoke": 20, "small": 300, "full": 600}  # tokens of the first message; the second one has a tenth
TOKENS = {"smoke": 8, "small": 64, "full": 128}  # of an answer
STREAMS = (2, 4, 8)


class Turns(NamedTuple):
    """What a conversation of two turns took: tokens per second of the first answer after its first token, the seconds
    to the first token of the second one, and the processor's seconds for both. `text` is the first answer."""

    rate: float
    first: float
    cpu: float
    text: str


class Clock(BaseStreamer):  # type: ignore[misc]  # transformers has no types
    """Notes when transformers gives it a token; the prompt comes first."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def main() -> None:
    options = arguments("Chat and serve, side by side.", name="serve")
    with workspace(options.work) as work:
        recipe = make_models(options, work)
        moe = load(recipe)
        prepare_kernels(moe.model)
        with running(recipe) as (url, process):
            client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600)
            contestants = {
                CHAT: partial(chatted, moe, options.scale),
                SERVE: partial(served, client, process, options.scale),
                TRACED: partial(served, client, process, options.scale, extra_body={"trace": True}),
            }
            for contestant in contestants.values():  # reads the files and compiles kernels
                contestant()
            found = interleave(contestants, rounds=options.rounds)
            crowds = {
                (count, threads): partial(crowd, client, options.scale, count, threads=threads)
                for count in STREAMS
                for threads in (count, 1)
            }
            totals = interleave({_at_once(*key): run for key, run in crowds.items()}, rounds=options.rounds)
        assert len({turns.text for runs in found.values() for turns in runs}) == 1, "chat and serve must say the same"
        rates = {name: [turns.rate for turns in runs] for name, runs in found.items()}
        cpu = {name: [turns.cpu for turns in runs] for name, runs in found.items()}
        firsts = {name: [turns.first * 1000 for turns in runs] for name, runs in found.items()}
        rows = [
            Row("tokens/s through serve against chat", ratio(rates, SERVE, to=CHAT), "x", None, rates, at_least=0.97),
            Row("tokens/s with a trace against chat", ratio(rates, TRACED, to=CHAT), "x", None, rates),
            Row("processor time of serve against chat", ratio(cpu, SERVE, to=CHAT), "x", None, cpu),
            Row("first token, known history, against chat", ratio(firsts, SERVE, to=CHAT), "x", 1.2, firsts),
        ]
        for count in STREAMS:
            names = _at_once(count, count), _at_once(count, 1)
            rates = {name: totals[name] for name in names}
            rows.append(
                Row(f"tokens/s of {count} streams at once", ratio(rates, names[0], to=names[1]), "x", None, rates)
            )
        publish("serve", rows, options=options, work=work)


def make_models(options: argparse.Namespace, work: Path) -> Path:
    """A recipe over two random sources whose answers have their full length, and whose tokens are ASCII."""
    shape = SHAPES[options.scale]
    sources = [make_source(work / f"source-{seed}", shape, dtype="bfloat16", seed=seed) for seed in range(2)]
    letters = string.ascii_letters + string.digits + " "
    words = ["<s>", "</s>", *letters, *(f"word{number} " for number in range(shape.vocab))][: shape.vocab]
    raw = Tokenizer(models.WordLevel({word: at for at, word in enumerate(words)}, unk_token="a"))
    raw.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    raw.decoder = decoders.Fuse()
    for source in sources:
        (source / "generation_config.json").write_text(json.dumps({"eos_token_id": []}))
        PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>").save_pretrained(source)
    return write_recipe(work / "recipe.yml", sources)


@contextmanager
def running(recipe: Path) -> Iterator[tuple[str, psutil.Process]]:
    """A server for a recipe: its address and its process."""
    command = [sys.executable, "-m", "frankenmoe", "serve", str(recipe), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        log(line.strip())
        yield line.split()[-1], psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait()


def conversation(scale: str) -> tuple[dict[str, str], dict[str, str]]:
    """The user's two messages; as the model has no template, the text goes on."""
    long = ("abcdefghij " * PROMPT[scale])[: PROMPT[scale]]
    return {"role": "user", "content": long}, {"role": "user", "content": long[: PROMPT[scale] // 10]}


def chatted(moe: Any, scale: str) -> Turns:
    """A conversation as `chat` makes it."""
    tokenizer, cache, clock = moe.tokenizer(), PromptCache(sequences=1), Clock()
    before = time.process_time()
    first, second = conversation(scale)
    made = reply(moe, tokenizer, [first], max_new_tokens=TOKENS[scale], streamer=clock, cache=cache)
    _, begun, *_, ended = clock.times
    clock, asked = Clock(), time.perf_counter()
    turns = [first, {"role": "assistant", "content": made.text}, second]
    reply(moe, tokenizer, turns, max_new_tokens=4, streamer=clock, cache=cache)
    cpu = time.process_time() - before
    return Turns((TOKENS[scale] - 1) / (ended - begun), clock.times[1] - asked, cpu, made.text)


def served(client: openai.OpenAI, process: psutil.Process, scale: str, **more: Any) -> Turns:
    """The same conversation, asked from the server. The client's own processor time does not count."""
    forget(client)
    before = process.cpu_times()
    first, second = conversation(scale)
    options = {"model": "recipe", "temperature": 0, "stream": True, **more}
    text, times = "", []
    for chunk in client.chat.completions.create(messages=[first], max_tokens=TOKENS[scale], **options):
        said = chunk.choices[0].delta.content
        if said:
            times.append(time.perf_counter())
            text += said
    turns = [first, {"role": "assistant", "content": text}, second]
    asked = time.perf_counter()
    stream = client.chat.completions.create(messages=turns, max_tokens=4, **options)
    begun = next(time.perf_counter() for chunk in stream if chunk.choices[0].delta.content)
    for _ in stream:
        pass
    after = process.cpu_times()
    cpu = after.user + after.system - before.user - before.system
    return Turns((len(times) - 1) / (times[-1] - times[0]), begun - asked, cpu, text)


def _at_once(count: int, threads: int) -> str:
    return f"{count} streams at once" if threads > 1 else f"{count} streams, one by one"


def crowd(client: openai.OpenAI, scale: str, count: int, *, threads: int) -> float:
    """Tokens per second of `count` streams with prompts of several lengths; `threads` of them are asked for at once."""

    def stream(number: int) -> int:
        prompt = string.ascii_lowercase[number] * (PROMPT[scale] // 8 + number)
        chunks = client.completions.create(
            model="recipe", prompt=prompt, max_tokens=TOKENS[scale], temperature=0, stream=True
        )
        return sum(bool(chunk.choices[0].text) for chunk in chunks)

    begun = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        made = sum(pool.map(stream, range(count)))
    assert made == count * TOKENS[scale]
    return made / (time.perf_counter() - begun)


def forget(client: openai.OpenAI) -> None:
    """Fills the server's cache with other conversations, so that the first turn is a new one."""
    for letter in "wxyz":
        client.completions.create(model="recipe", prompt=letter * 3, max_tokens=1, temperature=0)


if __name__ == "__main__":
    main()
