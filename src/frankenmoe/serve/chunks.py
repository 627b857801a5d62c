"""Pieces of an answer as OpenAI's API words them: whole answers, and the chunks of a stream."""

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from typing import Any

from frankenmoe.serve.bodies import Asked
from frankenmoe.serve.writing import Ended, Likely, Piece, Token, Usage

Data = dict[str, Any]


class Form(ABC):
    """The words for one request; `whole` and `chunk` name the object in OpenAI's API."""

    whole: str
    chunk: str
    prefix: str

    def __init__(self, body: Asked) -> None:
        self._body = body
        self._head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": body.model}
        self._begun: set[int] = set()
        self._told_of: dict[int, int] = {}  # characters of an answer whose tokens were told

    def answer(self, events: Iterable[Any]) -> Data:
        """The whole answer."""
        pieces: dict[int, list[Piece]] = {}
        ends: dict[int, str] = {}
        usage = Usage(0, 0)
        for event in events:
            match event:
                case Piece():
                    pieces.setdefault(event.index, []).append(event)
                case Ended():
                    ends[event.index] = event.reason
                case Usage():
                    usage = event
        choices = []
        for index in sorted(ends):
            text = "".join(piece.text for piece in pieces.get(index, []))
            tokens = [token for piece in pieces.get(index, []) for token in piece.tokens]
            told = self._told(index, tokens)
            choices.append({"index": index, **self._said(text), "finish_reason": ends[index], **told})
        return {**self._head, "object": self.whole, "choices": choices, "usage": _usage(usage)}

    def chunks(self, event: Any) -> Iterator[Data]:
        """The chunks that tell of an event."""
        match event:
            case Piece():
                if event.index not in self._begun:
                    self._begun.add(event.index)
                    yield from self._beginning(event.index)
                yield self._chunk(event.index, self._more(event.text), None, self._told(event.index, event.tokens))
            case Ended():
                if event.index not in self._begun:
                    yield from self._beginning(event.index)
                yield self._chunk(event.index, self._more(""), event.reason, {})
            case Usage() if self._body.stream_options.include_usage:
                yield {**self._head, "object": self.chunk, "choices": [], "usage": _usage(event)}

    def _chunk(self, index: int, said: Data, reason: str | None, told: Data) -> Data:
        choice = {"index": index, **said, "finish_reason": reason, **told}
        return {**self._head, "object": self.chunk, "choices": [choice]}

    def _told(self, index: int, tokens: Sequence[Token]) -> Data:
        """What is told beside the text."""
        at = self._told_of.get(index, 0)
        self._told_of[index] = at + sum(len(token.text) for token in tokens)
        found: Data = {"logprobs": self._logprobs(tokens, at) if self._body.top is not None else None}
        if self._body.trace:
            found["trace"] = [
                {"id": token.id, "text": token.text, "layers": list(token.layers)}
                for token in tokens
                if token.layers is not None
            ]
        return found

    @abstractmethod
    def _said(self, text: str) -> Data:
        """The fields of a choice that hold its whole text."""

    @abstractmethod
    def _more(self, text: str) -> Data:
        """The fields of a chunk's choice that hold more text."""

    @abstractmethod
    def _beginning(self, index: int) -> Iterator[Data]:
        """The chunks before the first text of a choice."""

    @abstractmethod
    def _logprobs(self, tokens: Sequence[Token], at: int) -> Data:
        """The probabilities of tokens; the first one begins at character `at` of the answer."""


class ChatForm(Form):
    """Answers of /v1/chat/completions."""

    whole, chunk, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def _said(self, text: str) -> Data:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _more(self, text: str) -> Data:
        return {"delta": {"content": text} if text else {}}

    def _beginning(self, index: int) -> Iterator[Data]:
        yield self._chunk(index, {"delta": {"role": "assistant", "content": ""}}, None, {"logprobs": None})

    def _logprobs(self, tokens: Sequence[Token], at: int) -> Data:
        return {
            "content": [
                {**_entry(token.text, token.logprob), "top_logprobs": [_entry(o.text, o.logprob) for o in token.top]}
                for token in tokens
            ],
            "refusal": None,
        }


class TextForm(Form):
    """Answers of /v1/completions, which have the older form of probabilities."""

    whole, chunk, prefix = "text_completion", "text_completion", "cmpl"

    def _said(self, text: str) -> Data:
        return {"text": text}

    def _more(self, text: str) -> Data:
        return {"text": text}

    def _beginning(self, index: int) -> Iterator[Data]:
        yield from ()

    def _logprobs(self, tokens: Sequence[Token], at: int) -> Data:
        return {
            "tokens": [token.text for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [_best(token) for token in tokens],
            "text_offset": list(accumulate((len(token.text) for token in tokens[:-1]), initial=at)) if tokens else [],
        }


def _best(token: Token) -> dict[str, float] | None:
    """The likeliest tokens by text; of several with one text the likeliest."""
    if token.logprob is None:
        return None
    found: dict[str, float] = {}
    for one in (*token.top, Likely(token.id, token.text, token.logprob)):
        found.setdefault(one.text, one.logprob)
    return found


def _entry(text: str, logprob: float | None) -> Data:
    return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


def _usage(usage: Usage) -> Data:
    return {
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.completion,
        "total_tokens": usage.prompt + usage.completion,
        "prompt_tokens_details": {"cached_tokens": usage.cached},
    }
