"""Generates a reply with an MoE and records the routing of its tokens.

Shape suffixes: T tokens.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from frankenmoe.data.templates import rendered
from frankenmoe.errors import SourceError
from frankenmoe.moe.generation import end_tokens, plain_generation
from frankenmoe.moe.load import MoE
from frankenmoe.moe.trace import LayerTrace, RoutingTrace, concat, record


@dataclass(frozen=True)
class Reply:
    """A reply: its text, the tokens of prompt and reply [T], the routing of all tokens but the last, and tokens/s."""

    text: str
    tokens: list[int]
    routing: RoutingTrace
    tokens_per_second: float

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
) -> Reply:
    """Generates a reply with a KV cache, so earlier tokens are not computed or routed again.

    `history` is a list of {"role", "content"}. `temperature` 0 is greedy. `streamer` is a transformers streamer. The
    reply ends at the model's maximum length, even before `max_new_tokens`.
    Raises SourceError for a prompt without tokens, and for generation settings that cannot be used.
    """
    ids = _encode(tokenizer, history, moe.model.config).to(moe.model.device)
    limit = getattr(moe.model.config, "max_position_embeddings", None)
    room = max_new_tokens if limit is None else min(max_new_tokens, limit - ids.shape[-1])
    ends = end_tokens(moe.model.generation_config, tokenizer)
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    began = time.perf_counter()
    where = str(moe.folder / "generation_config.json")
    with torch.no_grad(), plain_generation(moe.model, where=where), record(moe.model) as layers:
        out = moe.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=room,
            streamer=streamer,
            tokenizer=tokenizer,  # for stop strings
            eos_token_id=list(ends) or None,
            pad_token_id=ends[0] if ends else 0,
            **sampling,
        )[0]
    seconds = time.perf_counter() - began
    made = out[ids.shape[1] :].tolist()
    return Reply(
        tokenizer.decode(made, skip_special_tokens=True), out.tolist(), _on_cpu(concat(layers)), len(made) / seconds
    )


def _on_cpu(trace: RoutingTrace) -> RoutingTrace:
    """A trace that is read token by token, which would wait for a GPU each time."""
    return RoutingTrace(
        tuple(
            replace(each, weights_TK=each.weights_TK.cpu(), ids_TK=each.ids_TK.cpu(), logits_TE=each.logits_TE.cpu())
            for each in trace.layers
        )
    )


def _encode(tokenizer: Any, history: Sequence[dict[str, str]], config: Any) -> torch.Tensor:
    """The conversation as ids [1, T], formatted with the chat template if there is one.

    SourceError if it has no tokens, too many tokens for a model of this `config`, or ids without an embedding.
    """
    if tokenizer.chat_template:
        text = rendered(history, tokenizer, add_generation_prompt=True)
        found = tokenizer(text, add_special_tokens=False, return_tensors="pt")
    else:
        found = tokenizer("".join(turn["content"] for turn in history), return_tensors="pt")
    ids = found["input_ids"]
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and ids.shape[-1] >= limit:
        raise SourceError(
            f"the conversation has {ids.shape[-1]} tokens, but the model sees {limit} at most, including its reply",
            hint="shorten the prompt, or start a new conversation",
        )
    if ids.numel() and int(ids.max()) >= config.vocab_size:
        raise SourceError(
            f"the tokenizer gives the id {int(ids.max())}, but the model has {config.vocab_size} embeddings",
            hint="the tokenizer in the base's folder belongs to another model",
        )
    if not ids.shape[-1]:
        raise SourceError("the prompt has no tokens in this tokenizer", hint="write a longer prompt")
    assert isinstance(ids, torch.Tensor)
    return ids.long()


def weight_shares(traces: Sequence[LayerTrace], position: int) -> list[float]:
    """Each expert's share of the routing weight of one token, over all layers. Sums to 1 if any assignment was kept."""
    total_E = torch.zeros(traces[0].experts)
    for trace in traces:
        kept_K = trace.ids_TK[position] >= 0
        total_E.index_add_(0, trace.ids_TK[position][kept_K], trace.weights_TK[position][kept_K].float())
    shares: list[float] = (total_E / total_E.sum().clamp(min=1e-9)).tolist()
    return shares
