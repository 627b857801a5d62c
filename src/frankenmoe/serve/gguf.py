"""A GGUF file that llama.cpp runs."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from frankenmoe.export.llama import Engine
from frankenmoe.serve.asked import ROUTING, Task, refuse, task
from frankenmoe.serve.bodies import Asked, Chat, Complete
from frankenmoe.serve.errors import RequestError
from frankenmoe.serve.line import Job, Ticket
from frankenmoe.serve.writing import Ended, Likely, Piece, Token, Usage

RANDOM = 2**32 - 1  # for llama.cpp this seed is a new one each time


class Gguf:
    """A loaded file. llama.cpp keeps the cache of the latest conversation itself."""

    def __init__(self, file: Path, *, most: int) -> None:
        self._most = most
        self._engine = Engine(file, exact_cache=False)
        self._begins = self._engine.begins()

    def facts(self) -> dict[str, Any]:
        """What /v1/models tells about it; llama.cpp tells nothing about experts."""
        none: dict[str, Any] = {"experts": [], "layers": 0, "experts_per_token": 0, "max_experts": 0}
        return {"kind": "gguf", **none, "prompts": None, "recipe": None, "controls": []}

    def job(self, body: Asked) -> Job:
        """What a body asks for. Raises RequestError if llama.cpp cannot do it."""
        return Job(self.write, self._task(body))

    def _task(self, body: Asked) -> Task:
        refuse(body, ROUTING, why="llama.cpp does not tell or change its experts")
        if isinstance(body, Chat):
            said = self._engine.said([message.turn() for message in body.messages])
            return task(body, [self._checked(said)], most=self._most)
        assert isinstance(body, Complete)
        refuse(body, ("echo",), why="llama.cpp does not repeat the prompt")
        if body.most == 0:
            raise RequestError("max_tokens must be at least 1: llama.cpp always writes a token", param="max_tokens")
        return task(body, [self._checked(prompt) for prompt in body.prompts], most=self._most)

    def _checked(self, said: Any) -> Any:
        """The same. Raises RequestError for an empty text that llama.cpp would answer with nothing."""
        if said == "" and not self._begins:
            raise RequestError("the prompt has no tokens in this tokenizer; write a longer prompt", param="prompt")
        return said

    def write(self, ticket: Ticket) -> None:
        """Writes all answers, one after the other, and says the number of tokens at the end."""
        asked: Task = ticket.asked
        total = Usage(0, 0)
        for at, prompt in enumerate(asked.prompts):
            for choice in range(asked.n):
                index = at * asked.n + choice
                if ticket.halted:
                    ticket.say(Ended(index, "length"))
                    continue
                made = self._answer(asked, prompt, index, choice, ticket)
                total += made if choice == 0 else Usage(0, made.completion)  # llama.cpp knows a prompt that it has read
        ticket.say(total)

    def _answer(self, asked: Task, said: Any, index: int, choice: int, ticket: Ticket) -> Usage:
        usage, reason = Usage(0, 0), "length"

        def hear(chunk: Mapping[str, Any]) -> bool:
            nonlocal usage, reason
            for each in chunk.get("choices") or ():
                text = (each.get("delta") or {}).get("content") or each.get("text") or ""
                told = tuple(_token(one) for one in (each.get("logprobs") or {}).get("content") or ())
                if text or told:
                    ticket.say(Piece(index, text, told))
                reason = each.get("finish_reason") or reason
            if chunk.get("usage"):
                cached = chunk["usage"].get("prompt_tokens_details", {}).get("cached_tokens", 0)
                usage = Usage(chunk["usage"]["prompt_tokens"], chunk["usage"]["completion_tokens"], cached)
            return ticket.halted

        self._engine.stream(said, _options(asked, choice), hear)
        ticket.say(Ended(index, reason))
        return usage

    def refit(self, _ticket: Ticket) -> None:
        """Raises RequestError: a file has no recipe."""
        raise RequestError("a GGUF file has no routers that can be fitted again; serve a recipe with prompts")


def _options(asked: Task, choice: int) -> dict[str, Any]:
    """llama.cpp's names of what was asked for."""
    options: dict[str, Any] = {
        "n_predict": asked.most,
        "max_tokens": asked.most,
        "temperature": asked.temperature,
        "stop": list(asked.stops),
        "cache_prompt": True,
        "stream_options": {"include_usage": True},
        **asked.penalties,
    }
    if asked.top_p is not None:
        options["top_p"] = asked.top_p
    if asked.seed is not None:
        options["seed"] = (asked.seed + choice) % RANDOM
    if asked.top is not None:
        options |= {"logprobs": True, "top_logprobs": asked.top, "n_probs": max(asked.top, 1)}
    return options


def _token(entry: Mapping[str, Any]) -> Token:
    likely = (
        Likely(int(each["id"]), str(each["token"]), float(each["logprob"])) for each in entry.get("top_logprobs") or ()
    )
    return Token(int(entry["id"]), str(entry["token"]), float(entry["logprob"]), tuple(likely))
