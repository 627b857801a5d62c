"""Greedy continuations for many prompts, a slot taking the next prompt as soon as its text is done; knows no tasks.

Shape suffixes: S slots, H key heads, C columns of a slot, T new tokens, D head size, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from frankenmoe.errors import NumericsError
from frankenmoe.evaluate.memory import Budget

SLOTS_CPU = 8
SLOTS_GPU = 64
SPARE = 6  # tokens that are decoded beyond the longest stop string's characters, for tokens without any character


class _SlotLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer's keys and values of all slots, written in place: no copy of what is there when a token is added."""

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
        """Filling a slot: what is new is kept there and is all that is seen. A step: one token for each live slot."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        slots = self.slots
        if slots.filling is not None:
            self.keys[slots.filling, :, : key_states.shape[2]] = key_states[0]
            self.values[slots.filling, :, : value_states.shape[2]] = value_states[0]
            return key_states, value_states
        live = len(slots.lengths)
        at = torch.tensor(slots.lengths, device=key_states.device)
        line = torch.arange(live, device=key_states.device)
        self.keys[line, :, at] = key_states[:, :, 0]
        self.values[line, :, at] = value_states[:, :, 0]
        seen = max(slots.lengths) + 1
        return self.keys[:live, :, :seen], self.values[:live, :, :seen]

    def move(self, source: int, target: int, length: int) -> None:
        """A slot's content into another one."""
        self.keys[target, :, :length] = self.keys[source, :, :length]
        self.values[target, :, :length] = self.values[source, :, :length]

    def get_seq_length(self, *_: Any) -> int:
        return 0 if self.slots.filling is not None else max(self.slots.lengths, default=0)

    def get_mask_sizes(self, query_length: int, *_: Any) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        return -1


@dataclass
class _Slots:
    """How full each live slot is; the slots 0 .. live-1 are in use. `filling` is the one that a prompt is read into."""

    count: int
    columns: int
    lengths: list[int] = field(default_factory=list)
    filling: int | None = None


@dataclass
class _Text:
    """A prompt on its way: its number, and the tokens made so far."""

    number: int
    made: list[int]


@dataclass(frozen=True)
class Prompt:
    """Token ids to go on from, the strings at which to stop, and whether the left end is missing."""

    tokens: tuple[int, ...]
    stops: tuple[str, ...]
    cut: bool = False


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    new_tokens: int,
    end: frozenset[int],
    budget: Budget,
    on_text: Callable[[int, str], None],
) -> None:
    """The greedy continuation of every prompt, at most `new_tokens` long, cut before its first stop string or `end`.

    Prompts go through slots, as many as the budget allows; the longest first, so that too little memory shows at once.
    NumericsError for a model that computes NaN.
    """
    order = sorted(range(len(prompts)), key=lambda number: -len(prompts[number].tokens))
    columns = len(prompts[order[0]].tokens) + new_tokens
    slots = _Slots(_slot_count(budget, columns, len(prompts), model.device.type), columns)
    cache = Cache(layer_class_to_replicate=lambda **_: _SlotLayer(slots))
    live: list[_Text] = []
    with torch.inference_mode():
        while order or live:
            while order and len(live) < slots.count:
                number = order.pop(0)
                first = _fill(model, cache, slots, prompts[number].tokens, number)
                live.append(_Text(number, [first]))
                slots.lengths.append(len(prompts[number].tokens))
            for at in reversed(range(len(live))):
                text = live[at]
                said = _finished(tokenizer, text.made, prompts[text.number].stops, new_tokens, end)
                if said is not None:
                    on_text(text.number, said)
                    _free(cache, slots, live, at)
            if live and not (order and len(live) < slots.count):
                _step(model, cache, slots, live)


def _slot_count(budget: Budget, columns: int, prompts: int, device: str) -> int:
    if budget.rows is not None:
        return min(budget.rows, prompts)
    most = SLOTS_CPU if device == "cpu" else SLOTS_GPU
    return max(1, min(most, prompts, budget.bytes // (columns * budget.sizes.kept)))


def _fill(model: Any, cache: Cache, slots: _Slots, tokens: Sequence[int], number: int) -> int:
    """Reads a prompt into the next free slot; its first new token."""
    slots.filling = len(slots.lengths)
    ids_BT = torch.tensor([list(tokens)], device=model.device)
    out = model(
        input_ids=ids_BT,
        position_ids=torch.arange(len(tokens), device=model.device)[None],
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    slots.filling = None
    return _best(out.logits[:, -1], [number])[0]


def _step(model: Any, cache: Cache, slots: _Slots, live: Sequence[_Text]) -> None:
    """One more token for every live slot."""
    device = model.device
    lengths_S = torch.tensor(slots.lengths, device=device)
    seen_SC = torch.arange(int(max(slots.lengths)) + 1, device=device)[None] <= lengths_S[:, None]
    mask = torch.zeros(seen_SC.shape, dtype=model.dtype, device=device)
    mask.masked_fill_(~seen_SC, torch.finfo(model.dtype).min)
    out = model(
        input_ids=torch.tensor([[text.made[-1]] for text in live], device=device),
        position_ids=lengths_S[:, None],
        attention_mask=mask[:, None, None],
        past_key_values=cache,
        use_cache=True,
    )
    for text, token in zip(live, _best(out.logits[:, -1], [text.number for text in live]), strict=True):
        text.made.append(token)
    slots.lengths = [length + 1 for length in slots.lengths]


def _best(logits_SV: torch.Tensor, numbers: Sequence[int]) -> list[int]:
    # a NaN or infinity anywhere shows in the sum
    bad = (~torch.isfinite(logits_SV.float().logsumexp(dim=-1))).nonzero()
    if len(bad):
        raise NumericsError(
            f"the model computes NaN or infinity for prompt {numbers[int(bad[0])]}", hint="check the model's weights"
        )
    return [int(token) for token in logits_SV.argmax(dim=-1).tolist()]


def _free(cache: Cache, slots: _Slots, live: list[_Text], at: int) -> None:
    """Gives slot `at` back; the last live slot moves into its place."""
    last = len(live) - 1
    if at != last:
        for layer in cache.layers:
            layer.move(last, at, slots.lengths[last])
        live[at], slots.lengths[at] = live[last], slots.lengths[last]
    live.pop()
    slots.lengths.pop()


def _finished(
    tokenizer: Any, made: Sequence[int], stops: Sequence[str], new_tokens: int, end: frozenset[int]
) -> str | None:
    """The text once it is done, else None. Only its end is looked at in most steps, the whole is decoded to be sure."""
    ended = made[-1] in end
    if not ended and len(made) < new_tokens:
        longest = max(map(len, stops), default=0)
        tail = tokenizer.decode(made[-longest - SPARE :], skip_special_tokens=True)
        if not any(stop in tail for stop in stops):
            return None
    kept = made[:-1] if ended else made
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
    """The same, prompt by prompt and without a cache of ours: for models that cannot be read in parts."""
    with torch.inference_mode():
        for number, prompt in enumerate(prompts):
            past, made = None, []
            ids_BT = torch.tensor([list(prompt.tokens)], device=model.device)
            said = None
            while said is None:
                out = model(input_ids=ids_BT, past_key_values=past, use_cache=True)
                past = getattr(out, "past_key_values", None)
                made.append(_best(out.logits[:, -1], [number])[0])
                new = torch.tensor([[made[-1]]], device=model.device)
                # a model that gives no cache back is read from the beginning each time
                ids_BT = new if past is not None else torch.cat([ids_BT, new], dim=1)
                said = _finished(tokenizer, made, prompt.stops, new_tokens, end)
            on_text(number, said)
