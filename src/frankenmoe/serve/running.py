"""A model that torch runs: an MoE, or a dense model beside it."""

from typing import Any

from frankenmoe.moe.dense import layer_modules
from frankenmoe.moe.generate import checked, encode
from frankenmoe.moe.generation import check_generation
from frankenmoe.moe.joining import turns
from frankenmoe.moe.load import MoE
from frankenmoe.moe.promptcache import PromptCache
from frankenmoe.moe.steering import UNCHANGED
from frankenmoe.moe.trace import outer_blocks
from frankenmoe.serve.asked import PENALTIES, ROUTING, refuse, steering, task
from frankenmoe.serve.batch import Batch
from frankenmoe.serve.bodies import Asked, Chat, Complete
from frankenmoe.serve.errors import UNAVAILABLE, RequestError
from frankenmoe.serve.line import HaltedError, Job, Ticket
from frankenmoe.serve.refitting import Refitter


class Running:
    """A loaded model with its tokenizer and the caches of its latest conversations.

    `moe` has no experts if the model is dense. `most` is the largest number of tokens of an answer. `refitter` fits the
    routers again, where that is possible.
    """

    def __init__(self, moe: MoE, *, most: int, recipe: str | None = None, refitter: Refitter | None = None) -> None:
        self._moe, self._most, self._recipe, self._refitter = moe, most, recipe, refitter
        self._tokenizer = moe.tokenizer()
        self._cache = PromptCache(turns=turns(moe.model.config))
        outer = outer_blocks(moe.model).values() if moe.experts else ()
        self._layers = len(outer)
        self._top_k = max((block.router.top_k for block in outer), default=0)
        self._decoders = list(layer_modules(moe.model).values())  # none if the model is built in an unusual way
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

    def job(self, body: Asked) -> Job:
        """What a body asks for. Raises RequestError or SourceError if the model cannot do it."""
        refuse(body, PENALTIES, why="transformers has no such penalty")
        change = UNCHANGED
        if self._moe.experts:
            change = steering(body, self._moe.experts, top_k=self._top_k)
        else:
            refuse(body, ROUTING, why="it has no experts")
        asked = task(body, self._prompts(body), most=self._most, steering=change)
        return Job(self.write, asked, way=(self, asked.steering, asked.trace))

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

    def write(self, ticket: Ticket) -> None:
        """Writes the answers of a request, and of those that come meanwhile and go the same way."""
        Batch(self._moe, self._tokenizer, cache=self._cache, layers=self._decoders).write(ticket)

    def refit(self, ticket: Ticket) -> None:
        """Fits the routers again from the prompts that are asked for.

        Raises RequestError if this model cannot be refitted, and if the ticket is halted before all gates are known;
        then nothing has changed.
        """
        if self._refitter is None:
            raise RequestError("this model has no prompts to fit its routers from; serve a recipe with prompts")
        try:
            self._refitter.refit(self._moe, ticket.asked, check=ticket.check)
        except HaltedError:
            why = "the refit was cancelled, or took longer than --timeout allows; the routers are as before"
            raise RequestError(why, status=UNAVAILABLE) from None
        self._cache.clear()
