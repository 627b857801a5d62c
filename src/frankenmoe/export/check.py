"""Compares a GGUF file with its source: greedy tokens, next-token distributions, perplexity, speed.

Shape suffixes: T tokens, V vocabulary.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import GenerationConfig

from frankenmoe.export.llama import Distribution, Engine
from frankenmoe.export.samples import PROMPTS
from frankenmoe.moe.generate import room
from frankenmoe.moe.generation import end_tokens
from frankenmoe.moe.load import MoE

TOP = 1000  # tokens of a distribution that are compared; the rest counts as one token


@dataclass(frozen=True)
class Expected:
    """What the source computes for a text: its ids, the positions compared, and log-probabilities [positions, V]."""

    ids: tuple[int, ...]
    positions: tuple[int, ...]
    logprobs: NDArray[np.float32]


@dataclass(frozen=True)
class Reference:
    """What the source computes for passages and prompts; `ids` and `replies` belong to the prompts.

    `ends` are the tokens at which its replies end, `front` is the text that llama.cpp's prompts need in front.
    """

    passages: tuple[Expected, ...]
    prompts: tuple[str, ...]
    ids: tuple[tuple[int, ...], ...]
    replies: tuple[tuple[int, ...], ...]
    perplexity: float
    ends: tuple[int, ...] = ()
    front: str = ""


@dataclass(frozen=True)
class Checked:
    """How a file compares with its source.

    `kl` is the mean KL divergence from the source in nats, `top1` the share of positions with the same most likely
    token. `same_replies` and `same_prompts` count prompts with the same greedy tokens, and with the same tokenization.
    `reads_template` is false for a chat template that llama.cpp cannot read. `runs_past` are end tokens of the
    source at which llama.cpp goes on.
    """

    path: Path
    kl: float
    top1: float
    perplexity_ratio: float
    same_replies: int
    same_prompts: int
    prompts: int
    positions: int
    tokens_per_second: float
    reads_template: bool
    runs_past: tuple[int, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"path": str(self.path)}


def reference(
    moe: MoE,
    tokenizer: Any,
    *,
    texts: Sequence[Sequence[int]],
    prompts: Sequence[str] = PROMPTS,
    front: str = "",
    tokens: int = 24,
    positions: int = 32,
    on_step: Callable[[int], None] = lambda amount: None,
) -> Reference:
    """Runs the source, in the type it was loaded in: `positions` places of every text, and for every prompt a greedy
    reply of at most `tokens` tokens.

    Prompt and reply fit into the source's context, which llama.cpp does not exceed. Prompts without room for a token of
    a reply are left out.
    """
    passages = []
    for ids in texts:
        places = _places(len(ids), positions)
        with torch.no_grad():
            logits_TV = moe.model(input_ids=torch.tensor([list(ids)])).logits[0].float()
        passages.append(Expected(tuple(ids), places, logits_TV[list(places)].log_softmax(-1).numpy()))
        on_step(1)
    ends = end_tokens(moe.model.generation_config, tokenizer)
    asked: dict[str, tuple[int, ...]] = {}
    replies = []
    for prompt in prompts:
        prompt_ids = tokenizer(prompt)["input_ids"]
        left = min(tokens, room(moe.model.config, prompt_ids))
        if left > 0:
            asked[prompt] = tuple(prompt_ids)
            replies.append(_greedy(moe, prompt_ids, left, ends=ends))
        on_step(1)
    losses = [
        -row_V[passage.ids[place + 1]]
        for passage in passages
        for place, row_V in zip(passage.positions, passage.logprobs, strict=True)
    ]
    perplexity = math.exp(float(np.mean(losses))) if losses else math.nan
    return Reference(tuple(passages), tuple(asked), tuple(asked.values()), tuple(replies), perplexity, ends, front)


def steps(texts: Sequence[Sequence[int]], *, positions: int, prompts: int) -> int:
    """The number of steps that `check` reports."""
    return sum(len(_places(len(ids), positions)) for ids in texts) + prompts


def check(
    file: Path,
    source: Reference,
    *,
    threads: int | None = None,
    top: int = TOP,
    on_step: Callable[[int], None] = lambda amount: None,
) -> Checked:
    """Loads the file in llama.cpp and compares the `top` tokens of each distribution with the source."""
    longest = max((len(ids) for ids in (*(passage.ids for passage in source.passages), *source.ids)), default=0)
    most = max((len(reply) for reply in source.replies), default=0)
    engine = Engine(file, context=max(256, longest + most + 8), threads=threads)
    divergences, best, losses = [], [], []
    for passage in source.passages:
        for place, row_V in zip(passage.positions, passage.logprobs, strict=True):
            found = engine.next_token(passage.ids[: place + 1], top=min(top, len(row_V)))
            divergences.append(kl(row_V, found))
            best.append(int(row_V.argmax()) == int(found.ids[0]))
            target = passage.ids[place + 1]
            at = np.flatnonzero(found.ids == target)
            if at.size:
                losses.append(float(row_V[target]) - float(found.logprobs[at[0]]))
            on_step(1)
    same_replies = same_prompts = 0
    speeds = []
    for prompt, prompt_ids, reply in zip(source.prompts, source.ids, source.replies, strict=True):
        same_replies += engine.greedy(prompt_ids, tokens=len(reply)) == reply
        same_prompts += same_tokens(engine, source.front + prompt, prompt_ids)
        speeds.append(engine.tokens_per_second(prompt_ids, tokens=most))
        on_step(1)
    return Checked(
        path=file,
        kl=float(np.mean(divergences)) if divergences else math.nan,
        top1=float(np.mean(best)) if best else math.nan,
        perplexity_ratio=math.exp(float(np.mean(losses))) if losses else math.nan,
        same_replies=same_replies,
        same_prompts=same_prompts,
        prompts=len(source.prompts),
        positions=len(divergences),
        tokens_per_second=float(np.median(speeds)) if speeds else math.nan,
        reads_template=engine.reads_template,
        runs_past=tuple(end for end in source.ends if not engine.ends_at(end)),
    )


def kl(source_V: NDArray[np.float32], found: Distribution) -> float:
    """KL(source || file) in nats over the tokens that the file names, with all others as one token.

    llama.cpp sums probabilities in float32. If all tokens are named, the sums are normalized again.
    """
    log_p, log_q = source_V[found.ids].astype(np.float64), found.logprobs
    p, q = np.exp(log_p), np.exp(log_q)
    if len(found.ids) == len(source_V):
        total_p, total_q = float(p.sum()), float(q.sum())
        return float(np.sum(p * (log_p - log_q))) / total_p + math.log(total_q / total_p)
    rest_p, rest_q = max(1 - float(p.sum()), 1e-12), max(1 - float(q.sum()), 1e-12)
    return float(np.sum(p * (log_p - log_q))) + rest_p * math.log(rest_p / rest_q)


def same_tokens(engine: Engine, prompt: str, ids: Sequence[int]) -> bool:
    """Whether llama.cpp splits a prompt into these ids: as many tokens, and the same likely next tokens."""
    by_text, by_ids = engine.next_token(prompt, top=5), engine.next_token(ids, top=5)
    return by_text.after == len(ids) and bool(np.array_equal(by_text.ids, by_ids.ids))


def _places(length: int, positions: int) -> tuple[int, ...]:
    """Up to `positions` evenly spread places of a text, each with a next token."""
    last = length - 1
    return tuple(sorted({round(place) for place in np.linspace(0, last - 1, min(positions, last))}))


def _greedy(moe: MoE, ids: Sequence[int], tokens: int, *, ends: Sequence[int]) -> tuple[int, ...]:
    """Greedy tokens, without the generation settings of the checkpoint."""
    own = moe.model.generation_config
    moe.model.generation_config = GenerationConfig(
        eos_token_id=list(ends) or None, pad_token_id=ends[0] if ends else None
    )
    try:
        out = moe.model.generate(
            input_ids=torch.tensor([list(ids)]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            max_new_tokens=tokens,
            do_sample=False,
        )
    finally:
        moe.model.generation_config = own
    return tuple(out[0, len(ids) :].tolist())
