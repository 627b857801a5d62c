"""Log-likelihoods of token sequences under a causal model. Each shared stretch is read once.

Shape suffixes: B rows, T tokens of a row, P shared tokens before it, N scored places, D hidden, V vocabulary.
"""

import inspect
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from transformers.cache_utils import Cache

from frankenmoe.errors import SourceError
from frankenmoe.evaluate.memory import Budget
from frankenmoe.evaluate.prefixcache import shared_cache
from frankenmoe.evaluate.tree import Forest, Trunk, plan

ROW_TOKENS = 384  # of a forest: longer rows waste attention on other branches, shorter ones need more rows
HEAD_BYTES = 16 * 2**20  # of logits in memory at once


@dataclass(frozen=True)
class Query:
    """Asks how likely `targets` are, each behind one of the last `len(targets)` of `tokens`.

    `tokens` is context and continuation without the last token of the continuation. `cut`: the left end is missing.
    """

    tokens: tuple[int, ...]
    targets: tuple[int, ...]
    cut: bool = False

    @property
    def first(self) -> int:
        """The first position whose output is scored."""
        return len(self.tokens) - len(self.targets)


@dataclass(frozen=True)
class Answer:
    """Sum of the targets' log-probabilities in nats, and whether each was the most likely token."""

    loglikelihood: float
    greedy: bool


OnAnswer = Callable[[int, Answer], None]
"""Called with a query's number and answer as soon as it is known."""
Place = tuple[int, int, int, int]
"""(column in the pass, target, number of the query, number of the target in it)."""


class _Answers:
    """Sums up the places of every query, which several passes may score."""

    def __init__(self, queries: Sequence[Query], on_answer: OnAnswer) -> None:
        self.on_answer = on_answer
        self.missing = [len(query.targets) for query in queries]
        self.sums = [0.0] * len(queries)
        self.greedy = [True] * len(queries)

    def add(self, places: Sequence[Place], logprobs: Sequence[float], greedy: Sequence[bool]) -> None:
        for (_, _, query, _), logprob, best in zip(places, logprobs, greedy, strict=True):
            self.sums[query] += logprob
            self.greedy[query] &= best
            self.missing[query] -= 1
            if not self.missing[query]:
                self.on_answer(query, Answer(self.sums[query], self.greedy[query]))


@dataclass(frozen=True)
class Sharing:
    """What a model allows (see sharing.py). Sequences longer than `up_to` are read without sharing, for `reason`.

    `plain_head`: the logits are the output embedding of the last hidden state. `alone`: one sequence per pass, as
    capacity limits demand.
    """

    up_to: int
    plain_head: bool
    reason: str | None = None
    alone: bool = False


class Scorer:
    """Scores queries with one model."""

    def __init__(self, model: Any, budget: Budget, sharing: Sharing, *, row_tokens: int = ROW_TOKENS) -> None:
        self.model, self.budget, self.sharing, self.row_tokens = model, budget, sharing, row_tokens
        self.tokens_read = 0

    def score(self, queries: Sequence[Query], on_answer: OnAnswer) -> None:
        """Answers all queries in any order. Raises PlanError if the memory is too small for one sequence."""
        check_ids(self.model, (query.tokens + query.targets for query in queries))
        answers = _Answers(queries, on_answer)
        by_tokens: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for number, query in enumerate(queries):
            by_tokens[query.tokens].append(number)
        shared = [tokens for tokens in by_tokens if len(tokens) <= self.sharing.up_to]
        alone = [tokens for tokens in by_tokens if len(tokens) > self.sharing.up_to]
        with torch.inference_mode():
            if shared:
                asked = [[(number, queries[number]) for number in by_tokens[tokens]] for tokens in shared]
                self._trunk(plan(shared, row_tokens=self.row_tokens), None, asked, answers)
            self._each(
                alone, [[(number, queries[number]) for number in by_tokens[tokens]] for tokens in alone], answers
            )

    # ---- shared reading ----

    def _trunk(
        self, trunk: Trunk, past: Cache | None, asked: Sequence[Sequence[tuple[int, Query]]], answers: _Answers
    ) -> None:
        length = trunk.start + len(trunk.tokens)
        if trunk.tokens:
            places = [
                place
                for sequence in trunk.through
                for place in _places(asked[sequence], trunk.start, range(len(trunk.tokens)))
            ]
            past = self._read_trunk(trunk, past, places, answers)
        rows = sorted(trunk.forests, key=lambda row: -len(row.tokens))
        while rows:
            longest = len(rows[0].tokens)
            count = self.budget.most(len(rows), longest, length)
            with self.budget.shrinking(count, longest):
                self._read_rows(rows[:count], past, length, asked, answers)
                rows = rows[count:]
        for below in trunk.trunks:
            self._trunk(below, past, asked, answers)

    def _read_trunk(self, trunk: Trunk, past: Cache | None, places: list[Place], answers: _Answers) -> Cache:
        self.budget.check(len(trunk.tokens), trunk.start)
        cache = shared_cache(past, keep=True)
        ids_BT = self._tensor([trunk.tokens])
        positions_BT = torch.arange(trunk.start, trunk.start + len(trunk.tokens), device=ids_BT.device)[None]
        with self.budget.shrinking(1, trunk.start + len(trunk.tokens)):
            self._pass(ids_BT, places, answers, position_ids=positions_BT, past_key_values=cache, use_cache=True)
        return cache

    def _read_rows(
        self,
        rows: Sequence[Forest],
        past: Cache | None,
        shared: int,
        asked: Sequence[Sequence[tuple[int, Query]]],
        answers: _Answers,
    ) -> None:
        width = len(rows[0].tokens)
        places = [
            place
            for line, row in enumerate(rows)
            for sequence, columns in row.where.items()
            for place in _places(asked[sequence], shared, [line * width + column for column in columns])
        ]
        ids_BT = self._tensor([row.tokens + (0,) * (width - len(row.tokens)) for row in rows])
        if past is None and all(row.single for row in rows):
            self._pass(ids_BT, places, answers, use_cache=False)  # causal attention ignores the padding behind
            return
        positions_BT = self._tensor([row.positions + (0,) * (width - len(row.tokens)) for row in rows])
        self._pass(
            ids_BT,
            places,
            answers,
            position_ids=positions_BT,
            attention_mask=self._mask(rows, width, shared),
            past_key_values=shared_cache(past, keep=False) if past is not None else None,
            use_cache=past is not None,
        )

    def _mask(self, rows: Sequence[Forest], width: int, shared: int) -> torch.Tensor:
        """[B, 1, T, P + T], added to the scores: 0 where a token sees another, the lowest number elsewhere."""
        seen_BTT = torch.eye(width, dtype=torch.bool).repeat(
            len(rows), 1, 1
        )  # padding sees itself: no softmax over nothing
        for line, row in enumerate(rows):
            size = len(row.tokens)
            seen_BTT[line, :size, :size] = torch.from_numpy(row.visible())
        dtype, device = self.model.dtype, self.model.device
        mask = torch.zeros(len(rows), 1, width, shared + width, dtype=dtype)
        mask[:, 0, :, shared:].masked_fill_(~seen_BTT, torch.finfo(dtype).min)
        return mask.to(device)

    # ---- plain reading ----

    def _each(
        self, sequences: Sequence[tuple[int, ...]], asked: Sequence[Sequence[tuple[int, Query]]], answers: _Answers
    ) -> None:
        """Reads every sequence from its beginning, in batches of equal lengths without padding."""
        order = sorted(range(len(sequences)), key=lambda at: -len(sequences[at]))
        for length, same in groupby(order, key=lambda at: len(sequences[at])):
            waiting = list(same)
            while waiting:
                count = self.budget.most(1 if self.sharing.alone else len(waiting), length)
                batch = waiting[:count]
                places = [
                    place
                    for line, at in enumerate(batch)
                    for place in _places(asked[at], 0, range(line * length, (line + 1) * length))
                ]
                with self.budget.shrinking(count, length):
                    self._pass(self._tensor([sequences[at] for at in batch]), places, answers, use_cache=False)
                    waiting = waiting[count:]

    # ---- one pass ----

    def _pass(self, ids_BT: torch.Tensor, places: Sequence[Place], answers: _Answers, **inputs: Any) -> None:
        """Reads tokens and scores the places. Columns are numbered through all rows of the batch."""
        self.tokens_read += ids_BT.numel()
        found = list(scored(self.model, ids_BT, places, plain_head=self.sharing.plain_head, **inputs))
        for some, logprobs, greedy in found:  # only after the pass: one that ran out of memory is repeated
            answers.add(some, logprobs, greedy)

    def _tensor(self, rows: Iterable[Sequence[int]]) -> torch.Tensor:
        return torch.tensor([list(row) for row in rows], dtype=torch.long, device=self.model.device)


def check_ids(model: Any, sequences: Iterable[Sequence[int]]) -> None:
    """Raises SourceError for a token without an embedding in the model."""
    vocabulary = model.config.get_text_config().vocab_size
    largest = max((max(tokens) for tokens in sequences if tokens), default=0)
    if largest >= vocabulary:
        raise SourceError(
            f"the tokenizer gives the id {largest}, but the model has {vocabulary} embeddings",
            hint="the tokenizer in the model's folder belongs to another model",
        )


def _places(asked: Sequence[tuple[int, Query]], start: int, columns: Sequence[int]) -> Iterator[Place]:
    """The scored places of a sequence's queries in the positions from `start` on, which are in `columns`."""
    for number, query in asked:
        for at in range(max(query.first, start), min(len(query.tokens), start + len(columns))):
            yield columns[at - start], query.targets[at - query.first], number, at - query.first


def scored(
    model: Any, ids_BT: torch.Tensor, places: Sequence[Place], *, plain_head: bool, **inputs: Any
) -> Iterator[tuple[Sequence[Place], list[float], list[bool]]]:
    """Log-probabilities of the places' targets, some at a time. The head runs only where something is scored.

    A head that is not plain runs inside the model, on all rows at each position where one of them is scored.
    """
    if plain_head:
        hidden_ND = model.base_model(input_ids=ids_BT, **inputs).last_hidden_state.flatten(0, 1)
        head = model.get_output_embeddings()
    else:
        width = ids_BT.shape[1]
        kept = sorted({place[0] % width for place in places}) or [width - 1]
        if "logits_to_keep" in inspect.signature(model.forward).parameters:
            inputs["logits_to_keep"] = torch.tensor(kept, device=ids_BT.device)
        logits_BTV = model(input_ids=ids_BT, **inputs).logits
        if "logits_to_keep" in inputs:
            column_of = {position: column for column, position in enumerate(kept)}
            places = [(place[0] // width * len(kept) + column_of[place[0] % width], *place[1:]) for place in places]
        hidden_ND, head = logits_BTV.flatten(0, 1), None
    if not places:
        return
    ordered = sorted(places)
    columns = sorted({place[0] for place in ordered})
    vocabulary = model.config.get_text_config().vocab_size
    step = max(16, HEAD_BYTES // (4 * vocabulary))
    at = 0
    for start in range(0, len(columns), step):
        some = columns[start : start + step]
        line_of = {column: line for line, column in enumerate(some)}
        end = at
        while end < len(ordered) and ordered[end][0] <= some[-1]:
            end += 1
        group = ordered[at:end]
        at = end
        picked_ND = hidden_ND[torch.tensor(some, device=hidden_ND.device)]
        logits_NV = (head(picked_ND) if head is not None else picked_ND).float()
        lines = torch.tensor([line_of[place[0]] for place in group], device=logits_NV.device)
        targets = torch.tensor([place[1] for place in group], device=logits_NV.device)
        logprobs = logits_NV[lines, targets] - logits_NV.logsumexp(dim=-1)[lines]
        greedy = logits_NV.argmax(dim=-1)[lines] == targets
        yield group, logprobs.tolist(), greedy.tolist()
