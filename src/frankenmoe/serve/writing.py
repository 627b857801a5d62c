"""Watches a generation token by token: its text without stop strings, probabilities and experts, and where it ends."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from frankenmoe.moe.trace import LayerTrace

# T tokens, V vocabulary

PARTIAL = "�"  # what a tokenizer makes of a part of a character
LONGEST_CHARACTER = 16  # tokens; more than that are no character
Row = dict[str, Any]  # what a layer did with a token: `experts`, `weights`, `next`
IMPOSSIBLE = -9999.0  # logarithm of no probability, as in OpenAI's API: JSON has no infinity


@dataclass(frozen=True)
class Likely:
    """A token with the logarithm of its probability."""

    id: int
    text: str
    logprob: float


@dataclass(frozen=True)
class Token:
    """A token of an answer, with what was asked for: how likely it and others were, its experts in each layer."""

    id: int
    text: str
    logprob: float | None = None
    top: tuple[Likely, ...] = ()
    layers: tuple[Row, ...] | None = None


@dataclass(frozen=True)
class Piece:
    """More of the answer number `index`, and the tokens it was made of."""

    index: int
    text: str
    tokens: tuple[Token, ...] = ()


@dataclass(frozen=True)
class Ended:
    """The answer number `index` is whole. `reason` is stop or length."""

    index: int
    reason: str


@dataclass(frozen=True)
class Usage:
    """How many tokens were read and written, and how many of the former were known from an earlier request."""

    prompt: int
    completion: int
    cached: int = 0

    def __add__(self, other: "Usage") -> "Usage":
        return Usage(self.prompt + other.prompt, self.completion + other.completion, self.cached + other.cached)


class Decoder:
    """Tokens one by one -> text, which is held back while it ends within a character."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._from = self._done = 0  # text is decoded from the one token on, and known to the other

    def add(self, token: int) -> str:
        """The text that is now certain."""
        self._ids.append(token)
        before, now = self._text(self._done), self._text(len(self._ids))
        if now.endswith(PARTIAL) and len(self._ids) - self._done < LONGEST_CHARACTER:
            return ""
        if len(now) > len(before):  # tokenizers strip the first space, so a token with text stays in front
            self._from = self._done
        self._done = len(self._ids)
        return now[len(before) :]

    def rest(self) -> str:
        """The text that was held back."""
        return self._text(len(self._ids))[len(self._text(self._done)) :]

    def _text(self, end: int) -> str:
        return str(self._tokenizer.decode(self._ids[self._from : end], skip_special_tokens=True))


class Stopper:
    """Text bit by bit -> the text before the first stop string."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.stopped = False

    def add(self, text: str) -> str:
        """The text that is certain not to belong to a stop string."""
        self._held += text
        found = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            self._held = self._held[: min(found)]
            return self.rest()
        begun = max((_begun(self._held, stop) for stop in self._stops), default=0)
        certain, self._held = self._held[: len(self._held) - begun], self._held[len(self._held) - begun :]
        return certain

    def rest(self) -> str:
        """What was held back; the text ends here."""
        held, self._held = self._held, ""
        return held


def _begun(text: str, stop: str) -> int:
    """How many characters at the end of `text` begin the stop string."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)


class Writer:
    """Writes one answer from its tokens.

    `ends` are the tokens that end an answer, `most` is its length. `top` and `tracing` say what to tell of each token.
    The experts of a token are known after the model has read it, so a traced token is written one token later.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        index: int,
        ends: Sequence[int],
        most: int,
        stops: Sequence[str],
        top: int | None,
        tracing: bool,
        say: Callable[[Piece], None],
    ) -> None:
        self._tokenizer, self._index, self._ends, self._most = tokenizer, index, ends, most
        self._top, self._tracing, self._say = top, tracing, say
        self._decoder, self._stopper = Decoder(tokenizer), Stopper(stops)
        self._last: Token | None = None
        self._unsaid: list[Token] = []
        self.count = 0
        self.reason = None if most else "length"  # why the answer has ended, if it has

    @property
    def wanted(self) -> int:
        """The number of tokens to generate."""
        return self._most + self._tracing

    def add(self, token: int, logits_V: torch.Tensor, layers: tuple[Row, ...]) -> None:
        """The next token, the logits that it was chosen by, and what the layers did with the token before it."""
        told = self._told(token, logits_V)
        if not self._tracing:
            self._write(told)
        else:
            if self._last is not None:
                self._write(replace(self._last, layers=layers))
            self._last = told

    def end(self, *, cut: bool) -> Ended:
        """No token follows: says what was held back. `cut` says that there would have been more."""
        if self.reason is None and self._last is not None:
            self._write(self._last)
        if not self._stopper.stopped:
            text = self._stopper.add(self._decoder.rest())
            text += self._stopper.rest()
        else:
            text = ""
        if text or self._unsaid:
            self._say(Piece(self._index, text, tuple(self._unsaid)))
        return Ended(self._index, self.reason or ("length" if cut else "stop"))

    def _write(self, token: Token) -> None:
        if self.reason is not None:
            return
        self.count += 1
        if token.id in self._ends:
            self.reason = "stop"
            return
        self._unsaid.append(token)
        text = self._stopper.add(self._decoder.add(token.id))
        if self._stopper.stopped:
            self.reason = "stop"
        elif self.count >= self._most:
            self.reason = "length"
        if text:
            self._say(Piece(self._index, text, tuple(self._unsaid)))
            self._unsaid = []

    def _told(self, token: int, logits_V: torch.Tensor) -> Token:
        if self._top is None:
            return Token(token, self._tokenizer.decode([token]) if self._tracing else "")
        return told(self._tokenizer, token, logits_V.float().log_softmax(-1), self._top)


def told(tokenizer: Any, token: int, logprobs_V: torch.Tensor, top: int) -> Token:
    """A token with its probability and the `top` likeliest ones."""
    finite_V = logprobs_V.clamp(min=IMPOSSIBLE)
    best = finite_V.topk(min(top, len(finite_V)))
    likely = tuple(
        Likely(id, tokenizer.decode([id]), logprob)
        for id, logprob in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    )
    return Token(token, tokenizer.decode([token]), float(finite_V[token]), likely)


def row(trace: LayerTrace, at: int) -> Row:
    """What a layer did with one of its tokens: the chosen experts, their weights, and the next best one."""
    experts = trace.ids_TK[at].tolist()
    best = trace.logits_TE[at].topk(min(len(experts) + 1, trace.experts))
    ranked = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    others = [expert for expert, logit in ranked if expert not in experts and logit > float("-inf")]
    weights = [round(weight, 6) for weight in trace.weights_TK[at].tolist()]
    return {"experts": experts, "weights": weights, "next": others[0] if others else None}
