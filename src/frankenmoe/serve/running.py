"""A model that torch runs: an MoE, or a dense model beside it."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from transformers import StoppingCriteriaList

from frankenmoe.moe.dense import layer_modules
from frankenmoe.moe.generate import checked, encode, generate, room
from frankenmoe.moe.generation import check_generation, end_tokens
from frankenmoe.moe.load import MoE
from frankenmoe.moe.promptcache import PromptCache
from frankenmoe.moe.steering import UNCHANGED, steered
from frankenmoe.moe.trace import outer_blocks, stream
from frankenmoe.serve.asked import PENALTIES, ROUTING, Task, answer_all, refuse, steering, task
from frankenmoe.serve.bodies import Asked, Chat, Complete
from frankenmoe.serve.errors import RequestError
from frankenmoe.serve.line import Ticket
from frankenmoe.serve.refitting import Refitter
from frankenmoe.serve.writing import Piece, Token, Usage, Writer, told

# T tokens, V vocabulary

READ_AT_ONCE = 256  # tokens of a prompt whose probabilities are computed together
SEEDS = 2**63


class HaltedError(Exception):
    """The request was cancelled, or its time is over, while the model read its prompt."""


class Running:
    """A loaded model with its tokenizer and the caches of its latest conversations.

    `moe` has no experts if the model is dense. `most` is the largest number of tokens of an answer. `refitter` fits the
    routers again, where that is possible.
    """

    def __init__(self, moe: MoE, *, most: int, recipe: str | None = None, refitter: Refitter | None = None) -> None:
        self._moe, self._most, self._recipe, self._refitter = moe, most, recipe, refitter
        self._tokenizer = moe.tokenizer()
        self._cache = PromptCache()
        blocks = outer_blocks(moe.model).values() if moe.experts else ()
        self._layers = len(blocks)
        self._top_k = max((block.router.top_k for block in blocks), default=0)
        self._decoders = _decoders(moe.model)
        # settings that cannot be used are refused now, not at the first request
        check_generation(
            moe.model.generation_config,
            vocab=moe.model.config.vocab_size,
            where=str(moe.folder / "generation_config.json"),
        )

    def facts(self) -> dict[str, Any]:
        """What /v1/models tells about it."""
        experts = list(self._moe.experts)
        return {
            "kind": "moe" if experts else "dense",
            "experts": experts,
            "layers": self._layers,
            "experts_per_token": self._top_k,
            "max_experts": len(experts),
            "prompts": self._refitter.prompts if self._refitter else None,
            "recipe": self._refitter.recipe if self._refitter else self._recipe,
            "controls": list(ROUTING) if experts else [],
        }

    def task(self, body: Asked) -> Task:
        """What a body asks for. Raises RequestError or SourceError if the model cannot do it."""
        refuse(body, PENALTIES, why="transformers has no such penalty")
        change = UNCHANGED
        if self._moe.experts:
            change = steering(body, self._moe.experts, top_k=self._top_k)
        else:
            refuse(body, ROUTING, why="it has no experts")
        return task(body, self._prompts(body), most=self._most, steering=change)

    def _prompts(self, body: Asked) -> list[list[int]]:
        config = self._moe.model.config
        if isinstance(body, Chat):
            return [encode(self._tokenizer, [message.turn() for message in body.messages], config)]
        assert isinstance(body, Complete)
        return [checked(self._ids(one), config) for one in body.prompts]

    def _ids(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str):
            return list(self._tokenizer(prompt)["input_ids"])
        size = self._moe.model.config.vocab_size
        if max(prompt) >= size:
            raise RequestError(f"prompt must have token ids from 0 to {size - 1}, found {max(prompt)}", param="prompt")
        return prompt

    def write(self, asked: Task, ticket: Ticket) -> None:
        """Writes the answers to all prompts, and says the number of tokens at the end."""

        def answer(ids: Sequence[int], index: int, choice: int) -> Usage:
            _seed(asked.seed, choice)
            return self._answer(asked, ids, index, ticket)

        with steered(self._moe.model, asked.steering):
            answer_all(asked, ticket, answer)

    def _answer(self, asked: Task, ids: Sequence[int], index: int, ticket: Ticket) -> Usage:
        model = self._moe.model
        if asked.echo:
            self._echo(asked, ids, index, ticket)
        writer = Writer(
            self._tokenizer,
            index=index,
            ends=end_tokens(model.generation_config, self._tokenizer),
            most=min(asked.most, room(model.config, ids)),
            stops=asked.stops,
            top=asked.top,
            tracing=asked.trace,
            say=ticket.say,
            halted=lambda: ticket.halted,
        )
        known = 0
        if asked.most:
            past, known = self._cache.take(ids, way=asked.steering)
            sampling = {} if asked.top_p is None or not asked.temperature else {"top_p": asked.top_p}
            with self._watched(writer, asked, ticket):
                out, cache = generate(
                    self._moe,
                    self._tokenizer,
                    ids,
                    max_new_tokens=writer.wanted,
                    temperature=asked.temperature,
                    past=past,
                    stopping_criteria=StoppingCriteriaList([writer]),
                    **sampling,
                )
                self._cache.keep(out[:-1], cache, prompt=len(ids), way=asked.steering)
        ticket.say(writer.end())
        return Usage(len(ids), writer.count, 0 if asked.echo else known)  # the echo has just read them

    @contextmanager
    def _watched(self, writer: Writer, asked: Task, ticket: Ticket) -> Iterator[None]:
        """Within the context the writer sees what it must tell, and the model stops between two layers when halted."""

        def check(*_: object) -> None:
            if ticket.halted:
                raise HaltedError

        with ExitStack() as hooks:
            for layer in self._decoders:
                hooks.callback(layer.register_forward_pre_hook(check).remove)
            if asked.top is not None:
                hooks.callback(self._moe.model.register_forward_hook(writer.on_output).remove)
            if asked.trace:
                hooks.enter_context(stream(self._moe.model, writer.on_trace))
            with suppress(HaltedError):  # the cache then holds a part of a token's states, and is not kept
                yield

    def _echo(self, asked: Task, ids: Sequence[int], index: int, ticket: Ticket) -> None:
        """Says the prompt, with the probabilities of its tokens but the first."""
        text = self._tokenizer.decode(ids, skip_special_tokens=True)
        if asked.top is None:
            return ticket.say(Piece(index, text))
        tokens = [Token(ids[0], self._tokenizer.decode([ids[0]]))]
        cache: Any = None
        for start in range(0, len(ids), READ_AT_ONCE):
            if ticket.halted:
                return
            some = torch.tensor([ids[start : start + READ_AT_ONCE]], device=self._moe.model.device)
            with torch.no_grad():
                out = self._moe.model(input_ids=some, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            targets = ids[start + 1 : start + READ_AT_ONCE + 1]
            for token, logits_V in zip(targets, out.logits[0], strict=False):
                tokens.append(told(self._tokenizer, token, logits_V.float().log_softmax(-1), asked.top))
        self._cache.keep(ids, cache, prompt=len(ids), way=asked.steering)
        ticket.say(Piece(index, text, tuple(tokens)))

    def refit(self, prompts: Mapping[str, Any]) -> None:
        """Fits the routers again from these prompts. Raises RequestError if this model cannot be refitted."""
        if self._refitter is None:
            raise RequestError("this model has no prompts to fit its routers from; serve a recipe with prompts")
        self._refitter.refit(self._moe, prompts)
        self._cache.clear()


def _decoders(model: Any) -> list[torch.nn.Module]:
    """The layers of a model; none if it is built in an unusual way, and is then stopped only between tokens."""
    return list(layer_modules(model).values())


def _seed(seed: int | None, choice: int) -> None:
    """Seeds torch for one answer; without a seed, from the system's randomness."""
    if seed is None:
        torch.seed()
    else:
        torch.manual_seed((seed + choice + SEEDS) % (2 * SEEDS) - SEEDS)
