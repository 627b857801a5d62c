"""Finds out whether sequences may share the reading of a common beginning in a model.

First the config decides, then a few sequences are scored with and without sharing. If the scores differ, every sequence
is read separately, and the report says why.
"""

from dataclasses import replace
from typing import Any

import torch

from frankenmoe.evaluate.memory import Budget
from frankenmoe.evaluate.scorer import Query, Scorer, Sharing, scored
from frankenmoe.moe.block import Capacity
from frankenmoe.moe.joining import moves

ANY_LENGTH = 2**62
WINDOWS = ("sliding_window", "attention_chunk_size")
LOCAL = ("sliding_attention", "chunked_attention")
GLOBAL = "full_attention"
NOISE = 4.0  # shared reading may differ from plain reading by so many times the difference of two plain ones
FLOOR = 1e-5  # nats per token: the difference allowed in float32 in any case
PROOF_ROW = 24  # tokens of a row in the proof: small, so that few sequences make trunks, branches and rows
LONG = 300
LONG_ONES = 2  # sequences of LONG tokens, the first of the sample
IDS = 64  # distinct token ids in the sample: each loads pages of a mapped embedding
HALF_FLOOR = 2e-2  # the same in bfloat16 and float16


def sharing(model: Any, budget: Budget) -> Sharing:
    """What may be shared in this model."""
    head = _plain_head(model)
    if any(isinstance(module, Capacity) and module.factor is not None for module in model.modules()):
        return Sharing(0, head, "its experts have a capacity, so what a token gets depends on all others", alone=True)
    longest, reason = _from_config(model)
    if longest == 0:
        return Sharing(0, head, reason)
    wrong = _proof(model, replace(budget, rows=4), longest, head)
    return Sharing(0, head, wrong) if wrong else Sharing(longest, head, reason)


def _from_config(model: Any) -> tuple[int, str | None]:
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    if kinds - {GLOBAL, *LOCAL} or getattr(model, "_is_stateful", False):
        return (
            0,
            f"it has layers without keys and values ({', '.join(sorted(kinds - {GLOBAL, *LOCAL})) or 'state'})",
        )
    if getattr(config, "is_encoder_decoder", False):
        return 0, "it is an encoder and a decoder"
    if str(getattr(config, "_attn_implementation", "sdpa")).startswith("flash"):
        return 0, f"its attention ({config._attn_implementation}) takes no masks of ours"
    if moves(config):
        return 0, "its rotary angles depend on the length of the input"
    windows = [value for name in WINDOWS if (value := getattr(config, name, None))]
    if windows and (not kinds or kinds & set(LOCAL)):
        return min(windows), f"longer sequences than its window of {min(windows)} tokens are read alone"
    return ANY_LENGTH, None


def _plain_head(model: Any) -> bool:
    """Whether the logits are just the output embedding of the last hidden state."""
    ids_BT = torch.arange(8, device=model.device)[None] % model.config.get_text_config().vocab_size
    try:
        with torch.inference_mode():
            logits = model(input_ids=ids_BT, use_cache=False).logits
            hidden = model.base_model(input_ids=ids_BT, use_cache=False).last_hidden_state
            made = model.get_output_embeddings()(hidden)
    except Exception:  # a model's own code may raise anything at an unknown call
        return False
    return made.shape == logits.shape and torch.allclose(made.float(), logits.float(), atol=1e-5, rtol=1e-4)


def _proof(model: Any, budget: Budget, longest: int, plain_head: bool) -> str | None:
    """Why shared reading is wrong for this model, or None. Scores a few sequences both ways."""
    queries = _sample(model.config.get_text_config(), longest)
    plain, other, shared = ([0.0] * len(queries) for _ in range(3))

    def into(found: list[float]) -> Any:
        def keep(number: int, answer: Any) -> None:
            found[number] = answer.loglikelihood

        return keep

    Scorer(model, budget, Sharing(0, plain_head, alone=True)).score(queries, into(plain))
    _padded(model, queries, other, plain_head)
    try:
        # the long ones in one row: a trunk that long would need the most memory of all
        for part, row_tokens in ((slice(LONG_ONES), LONG * LONG_ONES), (slice(LONG_ONES, None), PROOF_ROW)):
            found = shared[part]
            scorer = Scorer(model, budget, Sharing(longest, plain_head), row_tokens=row_tokens)
            scorer.score(queries[part], into(found))
            shared[part] = found
    except Exception as error:  # a model that rejects our mask, cache or positions may raise anything
        return f"it refuses to be read in parts ({type(error).__name__}: {' '.join(str(error).split())[:80]})"
    floor = FLOOR if model.dtype == torch.float32 else HALF_FLOOR
    noise = max(abs(a - b) for a, b in zip(plain, other, strict=True))
    tokens = max(len(query.targets) for query in queries)
    worst = max(abs(a - b) for a, b in zip(plain, shared, strict=True))
    if not worst <= max(NOISE * noise, floor * tokens):
        return f"read in parts it gives other scores (by {worst:.2g} nats where {noise:.2g} is noise)"
    return None


def _padded(model: Any, queries: list[Query], found: list[float], plain_head: bool) -> None:
    """Scores the queries in batches with padding behind, which is also right: its difference is noise.

    The two long ones are read separately, so that this is not the largest pass of all.
    """
    for batch in (range(1), range(1, 2), range(2, len(queries))):
        width = max(len(queries[at].tokens) for at in batch)
        rows = [[*queries[at].tokens, *[0] * (width - len(queries[at].tokens))] for at in batch]
        places = [
            (line * width + queries[number].first + at, target, number, at)
            for line, number in enumerate(batch)
            for at, target in enumerate(queries[number].targets)
        ]
        with torch.inference_mode():
            ids_BT = torch.tensor(rows, device=model.device)
            for some, logprobs, _ in scored(model, ids_BT, places, plain_head=plain_head, use_cache=False):
                for (_, _, number, _), logprob in zip(some, logprobs, strict=True):
                    found[number] += logprob


def _sample(config: Any, longest: int) -> list[Query]:
    """Queries with nested trunks and branches of several lengths, over a few ids from the whole vocabulary."""
    generator = torch.Generator().manual_seed(0)
    known = torch.randint(config.vocab_size, (IDS,), generator=generator)

    def words(count: int) -> tuple[int, ...]:
        return tuple(known[torch.randint(IDS, (count,), generator=generator)].tolist())

    room = min(longest, getattr(config, "max_position_embeddings", None) or ANY_LENGTH)
    # a long document, for windows missing in the config, then short ones with many branches
    long = words(min(LONG, max(2, room - 8)))
    queries = [Query((long + answer[:-1])[-room:], answer) for answer in (words(5), words(3))]
    opening = words(20)
    for _ in range(3):
        document = opening + words(PROOF_ROW)
        for length in (7, 4, 4):
            answer = words(length)
            queries.append(Query((document + answer[:-1])[-room:], answer))
    return queries
