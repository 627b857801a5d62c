"""Generates a reply with an MoE and records the routing of its tokens.

Shape suffixes: T tokens.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from frankenmoe.data.templates import rendered
from frankenmoe.errors import SourceError
from frankenmoe.moe.generation import MOST, end_tokens, plain_generation
from frankenmoe.moe.load import MoE
from frankenmoe.moe.promptcache import PromptCache
from frankenmoe.moe.trace import LayerTrace, RoutingTrace, concat, record


@dataclass(frozen=True)
class Reply:
    """A reply: its text, the tokens of prompt and reply [T], the routing of the tokens that were read, and tokens/s.

    These are all tokens but the last one, and but those that were known from an earlier reply.
    """

    text: str
    tokens: list[int]
    routing: RoutingTrace
    tokens_per_second: float

    @property
    def read(self) -> list[int]:
        """The tokens whose routing is known."""
        return self.tokens[len(self.tokens) - 1 - len(self.layers[0].ids_TK) : -1]

    @property
    def layers(self) -> list[LayerTrace]:
        """The traces of the outer routers, layer by layer."""
        return [trace for trace in self.routing.layers if not trace.path]


def reply(
    moe: MoE,
    tokenizer: Any,
    history: Sequence[dict[str, str]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    streamer: Any = None,
    cache: PromptCache | None = None,
) -> Reply:
    """Generates a reply with a KV cache, so earlier tokens are not computed or routed again.

    With a `cache`, nor are the tokens of earlier replies that were generated with the same one.

    `history` is a list of {"role", "content"}. `temperature` 0 is greedy. `streamer` is a transformers streamer. The
    reply ends at the model's maximum length, even before `max_new_tokens`.
    Raises SourceError for a prompt without tokens, and for generation settings that cannot be used.
    """
    ids = encode(tokenizer, history, moe.model.config)
    began = time.perf_counter()
    past = cache and cache.take(ids)[0]
    with record(moe.model) as layers:
        out, states = generate(
            moe,
            tokenizer,
            ids,
            max_new_tokens=min(max_new_tokens, room(moe.model.config, ids)),
            temperature=temperature,
            past=past,
            streamer=streamer,
        )
    seconds = time.perf_counter() - began
    if cache is not None:
        cache.keep(out[:-1], states, prompt=len(ids))
    made = out[len(ids) :]
    return Reply(tokenizer.decode(made, skip_special_tokens=True), out, _on_cpu(concat(layers)), len(made) / seconds)


def generate(
    moe: MoE,
    tokenizer: Any,
    ids: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    past: Any = None,
    **options: Any,
) -> tuple[list[int], Any]:
    """(the tokens `ids` with those generated behind them, the cache of all of these but the last).

    `past` is such a cache of the first of `ids`, which are then not computed again; it is changed. `options` are those
    of transformers' `generate`, such as streamer, stopping_criteria and top_p. What they leave out is as the model's
    generation_config.json says.
    """
    with plain_generation(moe.model, where=str(moe.folder / "generation_config.json")):
        asked = request(moe, tokenizer, ids, max_new_tokens=max_new_tokens, temperature=temperature)
        out = moe.model.generate(
            tokenizer=tokenizer,  # for stop strings
            return_dict_in_generate=True,
            **({} if past is None else {"past_key_values": past}),
            **asked,
            **options,
        )
    return out.sequences[0].tolist(), out.get("past_key_values")


def request(moe: MoE, tokenizer: Any, ids: Sequence[int], *, max_new_tokens: int, temperature: float) -> dict[str, Any]:
    """What transformers' `generate` is asked for one reply to `ids`, within `plain_generation`."""
    inputs = torch.tensor([list(ids)], device=moe.model.device)
    ends = end_tokens(moe.model.generation_config, tokenizer)
    return {
        "input_ids": inputs,
        "attention_mask": torch.ones_like(inputs),
        "max_new_tokens": max_new_tokens,
        "eos_token_id": list(ends) or None,
        "pad_token_id": ends[0] if ends else 0,
        **({"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}),
    }


def _on_cpu(trace: RoutingTrace) -> RoutingTrace:
    """A trace that is read token by token, which would wait for a GPU each time."""
    return RoutingTrace(
        tuple(
            replace(each, weights_TK=each.weights_TK.cpu(), ids_TK=each.ids_TK.cpu(), logits_TE=each.logits_TE.cpu())
            for each in trace.layers
        )
    )


def encode(tokenizer: Any, history: Sequence[Mapping[str, Any]], config: Any) -> list[int]:
    """The conversation as ids, formatted with the chat template if there is one; errors are those of `checked`."""
    if tokenizer.chat_template:
        text = rendered(history, tokenizer, add_generation_prompt=True)
        return checked(tokenizer(text, add_special_tokens=False)["input_ids"], config)
    return checked(tokenizer("".join(turn["content"] for turn in history))["input_ids"], config)


def checked(ids: Sequence[int], config: Any) -> list[int]:
    """The same ids. SourceError for none, more than a model of this `config` sees, or ids without an embedding."""
    if room(config, ids) < 1:
        raise SourceError(
            f"the conversation has {len(ids)} tokens, but the model sees {config.max_position_embeddings} at most, "
            "including its reply",
            hint="shorten the prompt, or start a new conversation",
        )
    if max(ids, default=0) >= config.vocab_size:
        raise SourceError(
            f"the tokenizer gives the id {max(ids)}, but the model has {config.vocab_size} embeddings",
            hint="the tokenizer in the base's folder belongs to another model",
        )
    if not ids:
        raise SourceError("the prompt has no tokens in this tokenizer", hint="write a longer prompt")
    return list(ids)


def room(config: Any, ids: Sequence[int]) -> int:
    """How many tokens a model of this `config` can add to `ids`; MOST if it has no limit."""
    limit = getattr(config, "max_position_embeddings", None)
    return MOST if limit is None else limit - len(ids)


def weight_shares(traces: Sequence[LayerTrace], position: int) -> list[float]:
    """Each expert's share of the routing weight of one token, over all layers. Sums to 1 if any assignment was kept."""
    total_E = torch.zeros(traces[0].experts)
    for trace in traces:
        kept_K = trace.ids_TK[position] >= 0
        total_E.index_add_(0, trace.ids_TK[position][kept_K], trace.weights_TK[position][kept_K].float())
    shares: list[float] = (total_E / total_E.sum().clamp(min=1e-9)).tolist()
    return shares
