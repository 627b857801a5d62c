"""Greedy continuations of many prompts. A slot takes the next prompt as soon as its text is finished.

Prompt lookup: a slot guesses its next tokens from what followed the same tokens earlier in its prompt and text. One
pass checks all guesses and keeps those that the model itself would have chosen.

Shape suffixes: S slots, H key heads, C columns of a slot, T new tokens, D head size, V vocabulary.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from frankenmoe.errors import NumericsError
from frankenmoe.evaluate.memory import Budget
from frankenmoe.evaluate.scorer import check_ids

SLOTS_CPU = 8
SLOTS_GPU = 64
GUESSES = 8  # tokens guessed at once, at most
GRAMS = (3, 2)  # how many last tokens must agree, tried in this order
SPARE = 6  # tokens decoded beyond a stop string's length, since some tokens have no characters


class _SlotLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer's keys and values of all slots. New ones are written in place, without a copy of the old ones."""

    is_sliding = False

    def __init__(self, slots: "_Slots", **_: Any) -> None:
        super().__init__()
        self.slots = slots
        self.is_initialized = False

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        shape = (self.slots.count, key_states.shape[1], self.slots.columns)
        self.keys = key_states.new_zeros(*shape, key_states.shape[-1])
        self.values = value_states.new_zeros(*shape, value_states.shape[-1])
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores new states: a prompt in the slot that is filled, or T tokens in each live slot."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        slots = self.slots
        if slots.filling is not None:
            self.keys[slots.filling, :, : key_states.shape[2]] = key_states[0]
            self.values[slots.filling, :, : value_states.shape[2]] = value_states[0]
            return key_states, value_states
        live, new = len(slots.lengths), key_states.shape[2]
        line_S1 = torch.arange(live, device=key_states.device)[:, None]
        at_ST = torch.tensor(slots.lengths, device=key_states.device)[:, None] + torch.arange(
            new, device=key_states.device
        )
        self.keys[line_S1, :, at_ST] = key_states.transpose(1, 2)
        self.values[line_S1, :, at_ST] = value_states.transpose(1, 2)
        seen = max(slots.lengths) + new
        return self.keys[:live, :, :seen], self.values[:live, :, :seen]

    def move(self, source: int, target: int, length: int) -> None:
        """Copies a slot's content to another slot."""
        self.keys[target, :, :length] = self.keys[source, :, :length]
        self.values[target, :, :length] = self.values[source, :, :length]

    def get_seq_length(self, *_: Any) -> int:
        return 0 if self.slots.filling is not None else max(self.slots.lengths, default=0)

    def get_mask_sizes(self, query_length: int, *_: Any) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1


@dataclass(frozen=True)
class Prompt:
    """Token ids to continue, the stop strings, whether the left end was cut, and a name for errors."""

    tokens: tuple[int, ...]
    stops: tuple[str, ...]
    cut: bool = False
    name: str = "a prompt"


@dataclass
class _Continuation:
    """A prompt in work: its number, all its tokens with the new ones, and the index for guesses.

    `after` maps the token sequences of each length in GRAMS to the place behind their latest occurrence in `tokens`.
    `reach` is the number of tokens guessed at once: two more after a pass with only right guesses, else one less.
    """

    number: int
    prompt: Prompt
    tokens: list[int] = field(default_factory=list)
    reach: int = GUESSES // 2
    after: dict[tuple[int, ...], int] = field(default_factory=dict)

    @property
    def made(self) -> list[int]:
        """The new tokens."""
        return self.tokens[len(self.prompt.tokens) :]

    def add(self, tokens: Sequence[int]) -> None:
        """Appends tokens and updates `after`."""
        for token in tokens:
            end = len(self.tokens)
            for gram in GRAMS:
                if end >= gram:
                    self.after[tuple(self.tokens[end - gram :])] = end
            self.tokens.append(token)

    def guess(self, most: int) -> list[int]:
        """What followed the last tokens at their latest occurrence, repeated if that is too short."""
        for gram in GRAMS:
            at = self.after.get(tuple(self.tokens[-gram:]))
            if at is not None:
                period = len(self.tokens) - at  # short where a text repeats itself
                return [self.tokens[at + step % period] for step in range(min(most, self.reach))]
        return []


class _Slots:
    """The continuations in work and the length of each of their slots; slots 0 .. live-1 are in use.

    A prompt is being read into slot `filling`.
    """

    def __init__(self, model: Any, *, count: int, columns: int, plain_head: bool) -> None:
        self.model, self.count, self.columns, self.plain_head = model, count, columns, plain_head
        self.live: list[_Continuation] = []
        self.lengths: list[int] = []
        self.filling: int | None = None

    def fill(self, cache: Cache, number: int, prompt: Prompt) -> None:
        """Reads a prompt into the next free slot and adds its first new token."""
        ids_BT = torch.tensor([list(prompt.tokens)], device=self.model.device)
        self.filling = len(self.lengths)
        out = self.model(
            input_ids=ids_BT,
            position_ids=torch.arange(len(prompt.tokens), device=self.model.device)[None],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.filling = None
        text = _Continuation(number, prompt)
        text.add([*prompt.tokens, *_best(out.logits[:, -1], [prompt.name])])
        self.live.append(text)
        self.lengths.append(len(prompt.tokens))

    def step(self, cache: Cache, new_tokens: int) -> None:
        """Adds tokens to every live slot: the right guesses and the model's own next token."""
        device = self.model.device
        guesses = [text.guess(new_tokens - len(text.made) - 1) for text in self.live]
        width = 1 + max(map(len, guesses))
        rows = [[text.tokens[-1], *guess] for text, guess in zip(self.live, guesses, strict=True)]
        ids_ST = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)
        positions_ST = torch.tensor(self.lengths, device=device)[:, None] + torch.arange(width, device=device)
        seen_STC = torch.arange(max(self.lengths) + width, device=device) <= positions_ST[..., None]
        mask = torch.zeros(seen_STC.shape, dtype=self.model.dtype, device=device)
        mask.masked_fill_(~seen_STC, torch.finfo(self.model.dtype).min)
        inputs = {"position_ids": positions_ST, "attention_mask": mask[:, None], "past_key_values": cache}
        # the head is expensive in a small model, so it does not run on padding
        there = [(at, place) for at, row in enumerate(rows) for place in range(len(row))]
        line_N, place_N = (torch.tensor(column, device=device) for column in zip(*there, strict=True))
        if self.plain_head:
            hidden_STD = self.model.base_model(input_ids=ids_ST, use_cache=True, **inputs).last_hidden_state
            logits_NV = self.model.get_output_embeddings()(hidden_STD[line_N, place_N])
        else:
            logits_NV = self.model(input_ids=ids_ST, use_cache=True, **inputs).logits[line_N, place_N]
        said = iter(_best(logits_NV, [self.live[at].prompt.name for at, _ in there]))
        for at, (text, guess) in enumerate(zip(self.live, guesses, strict=True)):
            own = list(islice(said, len(guess) + 1))
            right = next((place for place, token in enumerate(guess) if token != own[place]), len(guess))
            text.add(own[: right + 1])
            self.lengths[at] += right + 1
            if guess:
                text.reach = min(GUESSES, text.reach + 2) if right == len(guess) else max(1, text.reach - 1)

    def free(self, cache: Cache, at: int) -> None:
        """Frees slot `at`; the last live slot moves into its place."""
        last = len(self.live) - 1
        if at != last:
            for layer in cache.layers:
                layer.move(last, at, self.lengths[last])
            self.live[at], self.lengths[at] = self.live[last], self.lengths[last]
        self.live.pop()
        self.lengths.pop()


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    new_tokens: int,
    end: frozenset[int],
    budget: Budget,
    plain_head: bool,
    on_text: Callable[[int, str], None],
) -> None:
    """The greedy continuation of every prompt, at most `new_tokens` long, cut before its first stop string or `end`.

    The budget limits the number of slots. The longest prompts go first, so too little memory shows at once; then half
    as many slots go on. Raises NumericsError for NaN, PlanError if the memory is too small for one prompt.
    """
    check_ids(model, (prompt.tokens for prompt in prompts))
    order = sorted(range(len(prompts)), key=lambda number: -len(prompts[number].tokens))
    done: set[int] = set()

    def on_done(number: int, text: str) -> None:
        done.add(number)
        on_text(number, text)

    while order:
        longest = len(prompts[order[0]].tokens)
        columns = longest + new_tokens + GUESSES
        count = _slot_count(budget, longest, columns, len(order), model.device.type)
        slots = _Slots(model, count=count, columns=columns, plain_head=plain_head)
        with budget.shrinking(count, columns):
            _through_slots(slots, tokenizer, prompts, list(order), new_tokens=new_tokens, end=end, on_text=on_done)
        order = [number for number in order if number not in done]


def _through_slots(
    slots: _Slots,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    order: list[int],
    *,
    new_tokens: int,
    end: frozenset[int],
    on_text: Callable[[int, str], None],
) -> None:
    cache = Cache(layer_class_to_replicate=lambda **_: _SlotLayer(slots))
    live = slots.live
    with torch.inference_mode():
        while order or live:
            while order and len(live) < slots.count:
                number = order.pop(0)
                slots.fill(cache, number, prompts[number])
            for at in reversed(range(len(live))):
                said = _finished(tokenizer, live[at].made, live[at].prompt.stops, new_tokens, end)
                if said is not None:
                    on_text(live[at].number, said)
                    slots.free(cache, at)
            if live and not (order and len(live) < slots.count):
                slots.step(cache, new_tokens)


def _slot_count(budget: Budget, longest: int, columns: int, prompts: int, device: str) -> int:
    """How many slots fit in memory while the longest prompt is read into one of them."""
    budget.check(columns)
    if budget.rows is not None:
        return min(budget.rows, prompts)
    most = SLOTS_CPU if device == "cpu" else SLOTS_GPU
    slot = columns * budget.sizes.kept
    return max(1, min(most, prompts, (budget.bytes - budget.cost(1, longest, 0)) // slot))


def _best(logits_SV: torch.Tensor, names: Sequence[str]) -> list[int]:
    """The most likely token of each row. `names` are the rows' prompts, for errors."""
    best_S = logits_SV.argmax(dim=-1)
    # argmax treats NaN as the largest value, so it finds a NaN anywhere in a row
    bad = (~torch.isfinite(logits_SV.gather(-1, best_S[:, None])[:, 0])).nonzero()
    if len(bad):
        raise NumericsError(
            f"{names[int(bad[0])]}: the model computes NaN or infinity",
            hint="check the model's weights; float16 may overflow",
        )
    return [int(token) for token in best_S.tolist()]


def _finished(
    tokenizer: Any, made: Sequence[int], stops: Sequence[str], new_tokens: int, end: frozenset[int]
) -> str | None:
    """The text if it is finished, else None. Most steps decode the end only; the whole text confirms a stop."""
    recent = list(made[-GUESSES - 1 :])
    ended = not end.isdisjoint(recent)
    if not ended and len(made) < new_tokens:
        longest = max(map(len, stops), default=0)
        tail = tokenizer.decode(made[-longest - SPARE - GUESSES :], skip_special_tokens=True)
        if not any(stop in tail for stop in stops):
            return None
    last = next((at for at, token in enumerate(made) if token in end), len(made)) if ended else len(made)
    kept = made[: min(last, new_tokens)]
    text = str(tokenizer.decode(kept, skip_special_tokens=True))
    if ended or len(made) >= new_tokens or any(stop in text for stop in stops):
        return cut(text, stops)
    return None


def cut(text: str, stops: Sequence[str]) -> str:
    """The text before the first stop string in it."""
    return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]


def generate_plainly(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    new_tokens: int,
    end: frozenset[int],
    on_text: Callable[[int, str], None],
) -> None:
    """The same, one prompt at a time with the model's own cache: for models without shared reading."""
    check_ids(model, (prompt.tokens for prompt in prompts))
    # without positions, some models (Bamba) count from 0 again behind a cache
    placed = "position_ids" in inspect.signature(model.forward).parameters
    inputs: dict[str, Any] = {}
    with torch.inference_mode():
        for number, prompt in enumerate(prompts):
            past: Any = None
            made: list[int] = []
            ids_BT = torch.tensor([list(prompt.tokens)], device=model.device)
            said = None
            while said is None:
                before = len(prompt.tokens) + len(made) - ids_BT.shape[1]
                if placed:
                    positions = torch.arange(before, before + ids_BT.shape[1], device=model.device)
                    inputs = {"position_ids": positions[None]}
                out = model(input_ids=ids_BT, past_key_values=past, use_cache=True, **inputs)
                past = getattr(out, "past_key_values", None)
                made.append(_best(out.logits[:, -1], [prompt.name])[0])
                new = torch.tensor([[made[-1]]], device=model.device)
                # a model without a cache reads everything again for each token
                ids_BT = new if past is not None else torch.cat([ids_BT, new], dim=1)
                said = _finished(tokenizer, made, prompt.stops, new_tokens, end)
            on_text(number, said)
