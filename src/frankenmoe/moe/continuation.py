"""Continues a sequence token by token, by the rules that transformers makes of a model's settings.

`generate` does all of it for one sequence. Here each step is a call, so that several sequences can share one.

Shape suffixes: B sequences, T tokens, V vocabulary.
"""

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import StoppingCriteriaList, StopStringCriteria

from frankenmoe.moe.generate import request
from frankenmoe.moe.generation import plain_generation
from frankenmoe.moe.joining import can_join, compact, joined, moves, padding, parted, turns
from frankenmoe.moe.load import MoE


class Continuation:
    """One sequence, `ids_1T`. `cache` holds the states of its first `known` tokens.

    `past` is a cache of the first tokens and their number, as a PromptCache gives it; it is changed. `temperature` 0 is
    greedy. Otherwise chance decides, which the `seed` sets, or without one the system; nothing that is computed
    meanwhile changes it. `options` are settings of transformers that go before those of generation_config.json. Raises
    SourceError for settings that cannot be used.
    """

    def __init__(
        self,
        moe: MoE,
        tokenizer: Any,
        ids: Sequence[int],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int | None = None,
        past: tuple[Any, int] = (None, 0),
        **options: Any,
    ) -> None:
        self._model = moe.model
        with plain_generation(moe.model, where=str(moe.folder / "generation_config.json")):
            asked = request(moe, tokenizer, ids, max_new_tokens=max_new_tokens, temperature=temperature)
            stops, moe.model.generation_config.stop_strings = moe.model.generation_config.stop_strings, None
            moe.model.generate(**asked, **options, custom_generate=self._prepared)
        self._moving, self._turns = moves(moe.model.config), turns(moe.model.config)
        if past[0] is not None:
            self.cache, self.known = past
        if stops:  # transformers does not give the tokenizer, which these need, to a custom_generate
            self._stopping.append(StopStringCriteria(tokenizer, stops))
        self._generator = torch.Generator(self.ids_1T.device)
        if seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(seed)
        accepted = inspect.signature(moe.model.forward).parameters
        self._placed = "position_ids" in accepted  # without them, some models count from 0 again behind a cache
        self._last = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}

    def _prepared(
        self,
        _model: Any,
        input_ids: torch.Tensor,
        logits_processor: Any,
        stopping_criteria: StoppingCriteriaList,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> None:
        self.ids_1T = input_ids
        self.cache, self.known = model_kwargs.get("past_key_values"), 0
        self._process, self._stopping, self._sample = logits_processor, stopping_criteria, generation_config.do_sample

    @property
    def can_join(self) -> bool:
        """Whether it can be read together with others. It must have been read before."""
        return self._placed and not self._moving and can_join(self.cache)

    def read(self) -> torch.Tensor:
        """Reads the tokens that are not known: logits_V of the next one."""
        if self.known and any(self.known <= turn < self.ids_1T.shape[1] for turn in self._turns):  # as Phi-3's class
            self.cache, self.known = None, 0
        return self._read(self.ids_1T.shape[1], **self._last)[-1]

    def read_all(self, *, at_once: int) -> Iterator[torch.Tensor]:
        """Reads all tokens, none of which is known, and `at_once` of them at a time: logits_TV behind each of these."""
        length = self.ids_1T.shape[1]
        for start in range(0, length, length if self._moving else at_once):
            end = length if self._moving else min(start + at_once, length)
            yield self._read(end)[start - end :]

    def _read(self, end: int, **options: Any) -> torch.Tensor:
        """Reads the tokens before `end` that are not known: logits_TV."""
        unread_1T = self.ids_1T[:, self.known : end]
        if self._placed:
            options["position_ids"] = torch.arange(self.known, end, device=unread_1T.device)[None]
        out = self._model(input_ids=unread_1T, past_key_values=self.cache, use_cache=True, **options)
        self.cache = out.get("past_key_values")
        if self.cache is not None:  # a model without a cache reads everything again
            self.known = end
        logits_TV: torch.Tensor = out.logits[0]
        return logits_TV

    def choose(self, logits_V: torch.Tensor) -> int:
        """Adds the next token, and returns it."""
        scores_1V = self._process(self.ids_1T, logits_V[None].to(torch.float32, copy=True))
        if self._sample:
            token_11 = torch.multinomial(scores_1V.softmax(-1), 1, generator=self._generator)
        else:
            token_11 = scores_1V.argmax(-1, keepdim=True)
        self.ids_1T = torch.cat([self.ids_1T, token_11], dim=1)
        return int(token_11)

    @property
    def ended(self) -> bool:
        """Whether the settings end it here: its length, a token or a text."""
        return bool(self._stopping(self.ids_1T, None).all())


class Together:
    """Continuations that are read at once, each of which has one token that is not known."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._parts: list[Continuation] = []
        self._cache: Any = None  # of several parts, whose own caches are then None

    def change(self, parts: Sequence[Continuation]) -> None:
        """Reads these from now on. If there are several, each must be one that can join."""
        if len(self._parts) > 1:
            for part, cache in zip(self._parts, parted(self._cache, self._lengths), strict=True):
                part.cache = cache if part in parts else compact(cache)
        self._parts, self._cache = list(parts), None
        if len(parts) > 1:
            self._cache = joined([part.cache for part in parts], self._lengths)
            for part in parts:
                part.cache = None

    @property
    def _lengths(self) -> list[int]:
        return [part.known for part in self._parts]

    def read(self) -> torch.Tensor:
        """Reads the last token of each part: logits_BV of the next ones."""
        if len(self._parts) == 1:
            return self._parts[0].read()[None]
        lengths = self._lengths
        ids_B1 = torch.cat([part.ids_1T[:, -1:] for part in self._parts])
        out = self._model(
            input_ids=ids_B1,
            position_ids=torch.tensor(lengths, device=ids_B1.device)[:, None],
            attention_mask=padding(lengths, ids_B1.device),
            past_key_values=self._cache,
            use_cache=True,
        )
        for part in self._parts:
            part.known += 1
        logits_BV: torch.Tensor = out.logits[:, -1]
        return logits_BV
