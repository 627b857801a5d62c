"""Writes answers with one model, several at once: each step reads the latest token of all of them.

An answer begins between two steps, as soon as there is room, and leaves when it has ended. Its tokens do not depend on
who is beside it, up to the rounding of sums.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from frankenmoe.moe.continuation import Continuation, Together
from frankenmoe.moe.generate import room
from frankenmoe.moe.generation import end_tokens
from frankenmoe.moe.joining import branch
from frankenmoe.moe.load import MoE
from frankenmoe.moe.promptcache import PromptCache, size
from frankenmoe.moe.steering import steered
from frankenmoe.moe.trace import LayerTrace, stream
from frankenmoe.serve.asked import Task
from frankenmoe.serve.line import HaltedError, Ticket
from frankenmoe.serve.writing import Piece, Row, Token, Usage, Writer, row, told

# V vocabulary, B answers at once

MOST = 8  # answers at once
BYTES = 2**30  # of the caches of several answers, if all get their full length
READ_AT_ONCE = 256  # tokens of a prompt whose probabilities are computed together
NOTHING = Usage(0, 0)


class Request:
    """A ticket, the number of its answers that have not ended, and the tokens of those that have."""

    def __init__(self, ticket: Ticket) -> None:
        self.ticket = ticket
        self._left = len(ticket.asked.prompts) * ticket.asked.n
        self._total = NOTHING

    def ended(self, usage: Usage) -> None:
        """One of its answers has ended; the last one ends the request."""
        self._left -= 1
        self._total += usage
        if not self._left:
            self.ticket.say(self._total)
            self.ticket.end()


@dataclass
class Prompt:
    """Tokens to continue, with their probabilities if these are told. Between its first answer and its last, also their
    cache and the logits behind them."""

    ids: Sequence[int]
    tokens: tuple[Token, ...] = ()
    read: tuple[Any, torch.Tensor] | None = None


@dataclass(eq=False)
class Answer:
    """An answer that waits or is written: the one number `choice` of a prompt, number `index` of its request."""

    request: Request
    prompt: Prompt
    index: int
    choice: int
    writer: Writer
    part: Continuation | None = None  # from its beginning on
    joins: bool = False  # whether that can be read together with others
    read: Usage = NOTHING

    @property
    def asked(self) -> Task:
        asked: Task = self.request.ticket.asked
        return asked

    @property
    def done(self) -> bool:
        """Whether it gets no more tokens."""
        over = self.part is None or self.part.ended or self.writer.reason is not None
        return over or self.request.ticket.halted

    def add(self, logits_V: torch.Tensor, layers: tuple[Row, ...]) -> None:
        """Chooses the next token and writes it; `layers` is what they did with the token that was read."""
        assert self.part is not None
        self.writer.add(self.part.choose(logits_V), logits_V, layers)


class Batch:
    """The answers that a model writes at once: at most MOST, and one if its sequences cannot be read together.

    `layers` are its decoder layers, between which it can be stopped, and `cache` has the prompts that it knows.
    """

    def __init__(self, moe: MoE, tokenizer: Any, *, cache: PromptCache, layers: Sequence[torch.nn.Module]) -> None:
        self._moe, self._tokenizer, self._cache, self._layers = moe, tokenizer, cache, layers
        self._live: list[Answer] = []
        self._together = Together(moe.model)
        self._bytes_per_token = 0.0
        self._computed_for: list[Ticket] = []
        self._traces: dict[int, LayerTrace] = {}

    def write(self, first: Ticket) -> None:
        """Writes all answers of a request, and of those that come meanwhile and go the same way."""
        queue, newest = deque(self._answers(first)), first
        try:
            with self._watched(first.asked):
                while queue or self._live:
                    if queue and self._fits(queue[0].asked):
                        self._begin(queue.popleft())  # one for each step, so that nobody waits for many prompts
                    if self._live:
                        self._step()
                    if not queue and (more := first.along(self._fits)):
                        newest = more
                        queue.extend(self._answers(more))
        except Exception as error:  # of the model, so nobody gets an answer
            newest.end(error)
            for answer in (*queue, *self._live):
                answer.request.ticket.end(error)
            raise

    def _answers(self, ticket: Ticket) -> Iterator[Answer]:
        asked, request = ticket.asked, Request(ticket)
        ends = end_tokens(self._moe.model.generation_config, self._tokenizer)
        for at, prompt in enumerate(Prompt(ids) for ids in asked.prompts):
            for choice in range(asked.n):
                index = at * asked.n + choice
                writer = Writer(
                    self._tokenizer,
                    index=index,
                    ends=ends,
                    most=min(asked.most, room(self._moe.model.config, prompt.ids)),
                    stops=asked.stops,
                    top=asked.top,
                    tracing=asked.trace,
                    say=ticket.say,
                )
                yield Answer(request, prompt, index, choice, writer)

    def _fits(self, asked: Task) -> bool:
        """Whether there is room for one more answer."""
        if not self._live:
            return True
        if len(self._live) >= MOST or not all(answer.joins for answer in self._live):
            return False
        longest = max(max(map(len, each.prompts)) + each.most for each in (asked, *(one.asked for one in self._live)))
        return (len(self._live) + 1) * longest * self._bytes_per_token <= BYTES

    def _begin(self, answer: Answer) -> None:
        """Begins an answer, and lets it join the others unless that is all of it."""
        self._computed_for = [answer.request.ticket]
        if not answer.request.ticket.halted:
            with self._failing(answer):
                self._write_first(answer)
        if answer.done:
            self._finish(answer)
        else:
            self._set_live([*self._live, answer])

    def _write_first(self, answer: Answer) -> None:
        """Reads the prompt, writes it if that is asked for, and writes the first token."""
        asked, prompt = answer.asked, answer.prompt
        if answer.choice == 0:
            answer.read = Usage(len(prompt.ids), 0)
        logits_V = self._read(answer) if asked.most or asked.scored else None
        if asked.echo:
            text = self._tokenizer.decode(prompt.ids, skip_special_tokens=True)
            answer.request.ticket.say(Piece(answer.index, text, prompt.tokens))
        if logits_V is not None and asked.most:
            answer.add(logits_V, self._rows(answer, -1))

    def _read(self, answer: Answer) -> torch.Tensor:
        """logits_V behind the prompt, which is read unless an earlier answer has done that."""
        asked, prompt = answer.asked, answer.prompt
        if prompt.read is not None:
            past = branch(prompt.read[0]), len(prompt.ids)
        else:
            past = (None, 0) if asked.scored else self._cache.take(prompt.ids, way=asked.steering)
        part = Continuation(
            self._moe,
            self._tokenizer,
            prompt.ids,
            max_new_tokens=max(1, answer.writer.wanted),
            temperature=asked.temperature,
            seed=None if asked.seed is None else asked.seed + answer.choice,
            past=past,
            **({} if asked.top_p is None or not asked.temperature else {"top_p": asked.top_p}),
        )
        if prompt.read is None:
            answer.read = Usage(len(prompt.ids), 0, part.known)
            logits_V = self._score(prompt, part, asked) if asked.scored else part.read()
            self._bytes_per_token = size(part.cache) / len(prompt.ids)
            if asked.n > 1:
                prompt.read = branch(part.cache), logits_V
        else:
            logits_V = prompt.read[1]
        if answer.choice == asked.n - 1:
            prompt.read = None
        answer.part, answer.joins = part, part.can_join
        return logits_V

    def _score(self, prompt: Prompt, part: Continuation, asked: Task) -> torch.Tensor:
        """Reads a prompt and notes the probabilities of its tokens but the first: logits_V behind it."""
        assert asked.top is not None
        tokens = [Token(prompt.ids[0], self._tokenizer.decode([prompt.ids[0]]))]
        for logits_TV in part.read_all(at_once=READ_AT_ONCE):
            for token, logits_V in zip(prompt.ids[len(tokens) :], logits_TV, strict=False):
                tokens.append(told(self._tokenizer, token, logits_V.float().log_softmax(-1), asked.top))
        prompt.tokens = tuple(tokens)
        return logits_TV[-1]

    def _step(self) -> None:
        """Reads one token of every answer and writes the next one."""
        live = self._live
        self._computed_for = [answer.request.ticket for answer in live]
        try:
            logits_BV = self._together.read()
        except HaltedError:  # the caches now hold a part of a token's states
            self._live, self._together = [], Together(self._moe.model)
            for answer in live:
                answer.part = None
                self._finish(answer)
            return
        for at, answer in enumerate(live):
            with self._failing(answer):
                answer.add(logits_BV[at], self._rows(answer, at))
        over = [answer for answer in live if answer.done]
        if over:
            self._set_live([answer for answer in live if answer not in over])
        for answer in over:
            self._finish(answer)

    def _set_live(self, live: list[Answer]) -> None:
        self._live = live
        self._together.change([answer.part for answer in live if answer.part is not None])

    def _finish(self, answer: Answer) -> None:
        """Says the rest of an answer, and keeps its cache; one of several for the same prompt is enough."""
        part, ticket = answer.part, answer.request.ticket
        if part is not None and answer.choice == 0:
            ids = part.ids_1T[0, : part.known].tolist()
            self._cache.keep(ids, part.cache, prompt=len(answer.prompt.ids), way=answer.asked.steering)
        with self._failing(answer):
            ticket.say(answer.writer.end(cut=ticket.halted))
        answer.request.ended(answer.read + Usage(0, answer.writer.count))

    def _rows(self, answer: Answer, at: int) -> tuple[Row, ...]:
        """What the layers did with the token number `at` of those that were just read."""
        return tuple(row(self._traces[layer], at) for layer in sorted(self._traces)) if answer.asked.trace else ()

    @contextmanager
    def _failing(self, answer: Answer) -> Iterator[None]:
        """What fails within the context ends this answer's request only."""
        try:
            yield
        except HaltedError:
            answer.part = None
        except Exception as error:
            answer.part = None
            answer.request.ticket.end(error)

    @contextmanager
    def _watched(self, asked: Task) -> Iterator[None]:
        """Within the context the model chooses experts as is asked, tells of them, and stops when all are halted."""

        def check(*_: object) -> None:
            if all(ticket.halted for ticket in self._computed_for):
                raise HaltedError

        def on_trace(trace: LayerTrace, _hidden_TD: torch.Tensor) -> None:
            if not trace.path:
                self._traces[trace.layer] = trace

        with ExitStack() as hooks:
            hooks.enter_context(torch.no_grad())
            hooks.enter_context(steered(self._moe.model, asked.steering))
            for layer in self._layers:
                hooks.callback(layer.register_forward_pre_hook(check).remove)
            if asked.trace:
                hooks.enter_context(stream(self._moe.model, on_trace))
            yield
