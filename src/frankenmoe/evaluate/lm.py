"""lm-eval's LM interface over the scorer: tokenizes, reads and keeps stored answers, reports progress."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from frankenmoe.errors import NumericsError, SourceError
from frankenmoe.evaluate.generation import Prompt, cut, generate, generate_plainly
from frankenmoe.evaluate.identity import model_digest, tokenizer_digest
from frankenmoe.evaluate.memory import budget
from frankenmoe.evaluate.scorer import Answer, Query, Scorer
from frankenmoe.evaluate.sharing import sharing
from frankenmoe.evaluate.store import Store, request_key
from frankenmoe.moe.processes import from_main, is_main, share_out, world
from frankenmoe.progress import SILENT, Progress

LENGTHS = ("n_positions", "max_position_embeddings", "n_ctx")
DEFAULT_LENGTH = 2048  # lm-eval's, for a config without a length
ENCODED = 64  # texts tokenized at once


class PrefixLM(LM):  # type: ignore[misc]
    """A transformers causal model for lm-eval, without BOS, as the leaderboard ran it.

    Finished answers are kept in `folder`, if given. `rows` fixes the sequences in a pass. `memory` limits the bytes of
    a pass; the default is a share of the free memory.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        folder: Path | None = None,
        rows: int | None = None,
        memory: int | None = None,
        max_length: int | None = None,
        progress: Progress = SILENT,
    ) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.folder = folder
        self.progress = progress
        self.versions: dict[str | None, int] = {}
        self.counts: Counter[str] = Counter()
        self._device = model.device
        self.max_length = max_length or _length(model.config.get_text_config())
        self.budget = budget(model, bytes_at_most=memory, rows=rows)
        self.sharing = sharing(model, self.budget)
        self.scorer = Scorer(model, self.budget, self.sharing)
        self.digest = ""
        if folder is not None:
            self.digest = (
                f"{model_digest(model, progress=progress)[:40]}-{tokenizer_digest(tokenizer)[:16]}-{self.max_length}"
            )

    # ---- lm-eval's interface ----

    @property
    def eot_token_id(self) -> int:
        """The end-of-text token. Raises SourceError for a tokenizer without one."""
        if self.tokenizer.eos_token_id is None:
            raise SourceError(
                "the tokenizer has no EOS token, which ends generated texts and opens texts without a context",
                hint="set eos_token in its tokenizer_config.json to the token that the model was trained to end with",
            )
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        found = self.tokenizer.bos_token_id
        return int(found) if found is not None else self.eot_token_id

    def tok_encode(self, text: str) -> list[int]:
        """Token ids without special tokens."""
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, whether greedy) of each (context, continuation).

        Raises SourceError for a continuation longer than the model's context, NumericsError for NaN; both name the
        document.
        """
        self.counts["requests"] += len(requests)
        answers, stores, waiting = self._known(requests)
        queries = self._queries([requests[at] for at in waiting])
        for at, query in zip(waiting, queries, strict=True):
            if not query.targets:
                raise SourceError(
                    f"{_named(requests[at])}: the tokenizer makes no token of its answer {requests[at].args[1]!r}",
                    hint="mend that row, or leave the task out for this model",
                )
            if not len(query.targets) <= len(query.tokens) <= self.max_length:
                raise SourceError(
                    f"{_named(requests[at])}: its answer alone has {len(query.targets)} tokens, but the model sees "
                    f"{self.max_length} at most",
                    hint="this model cannot be asked this; leave the task out",
                )

        documents: dict[tuple[Any, Any], list[int]] = defaultdict(list)  # each is read by one process, prefix and all
        for number, at in enumerate(waiting):
            documents[requests[at].task_name, requests[at].doc_id].append(number)

        def work(own: Sequence[list[int]]) -> list[list[tuple[float, bool]]]:
            numbers = [number for document in own for number in document]
            found: dict[int, tuple[float, bool]] = {}

            def on_answer(place: int, answer: Answer) -> None:
                number = numbers[place]
                request = requests[waiting[number]]
                if answer.loglikelihood != answer.loglikelihood:
                    raise NumericsError(
                        f"{_named(request)}: the model computes NaN",
                        hint="check the model's weights; float16 may overflow",
                    )
                found[number] = (answer.loglikelihood, answer.greedy)
                self._keep(stores, request, [[answer.loglikelihood, answer.greedy], queries[number].cut])

            try:
                self.scorer.score([queries[number] for number in numbers], on_answer)
            finally:
                _flush(stores)
            return [[found[number] for number in document] for document in own]

        for document, answered in zip(documents.values(), share_out(list(documents.values()), work), strict=True):
            answers |= {waiting[number]: answer for number, answer in zip(document, answered, strict=True)}
        self.counts["cut"] += sum(query.cut for query in queries)
        return [answers[at] for at in range(len(requests))]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Greedy continuations, cut at the first stop string. Requests that differ only in their stops share one text.

        Raises SourceError without an EOS token, or if the new tokens do not fit the model's context.
        """
        self.counts["requests"] += len(requests)
        end = self._end()
        answers, stores, waiting = self._known(requests)
        together: dict[tuple[str, int], list[int]] = defaultdict(list)
        for at in waiting:
            context, settings = requests[at].args
            if settings.get("do_sample"):
                raise SourceError(f"{_named(requests[at])} asks for sampling", hint="only greedy texts are made here")
            together[context, int(settings["max_gen_toks"])].append(at)
        for new_tokens in sorted({tokens for _, tokens in together}):
            contexts = [context for context, tokens in together if tokens == new_tokens]
            room = self.max_length - new_tokens
            if room <= 0:
                first = requests[together[contexts[0], new_tokens][0]]
                raise SourceError(
                    f"{_named(first)}: {new_tokens} tokens are to be made, but the model sees "
                    f"{self.max_length} at most, the question included",
                    hint="leave the task out for this model",
                )
            prompts = []
            for context in contexts:
                tokens = self.tok_encode(context)
                too_long = len(tokens) > room
                # a text ends at the stops that all its requests share; then each request cuts it at its own
                stops = [set(requests[at].args[1]["until"]) for at in together[context, new_tokens]]
                shared_stops = tuple(sorted(set.intersection(*stops)))
                name = _named(requests[together[context, new_tokens][0]])
                prompts.append(Prompt(tuple(tokens[-room:]), shared_stops, cut=too_long, name=name))

            asked = [together[context, new_tokens] for context in contexts]
            make = partial(self._texts, prompts, asked, requests, stores, new_tokens=new_tokens, end=end)
            for text, prompt, numbers in zip(share_out(range(len(prompts)), make), prompts, asked, strict=True):
                self.counts["cut"] += len(numbers) * prompt.cut
                answers |= {at: cut(text, requests[at].args[1]["until"]) for at in numbers}
        return [answers[at] for at in range(len(requests))]

    def _texts(
        self,
        prompts: Sequence[Prompt],
        asked: Sequence[Sequence[int]],
        requests: Sequence[Instance],
        stores: Mapping[str | None, Store],
        own: Sequence[int],
        *,
        new_tokens: int,
        end: frozenset[int],
    ) -> list[str]:
        """The texts of the prompts with the numbers `own`; `asked` are the requests of each prompt, which are kept."""
        texts: dict[int, str] = {}

        def on_text(place: int, text: str) -> None:
            number = own[place]
            texts[number] = text
            for at in asked[number]:
                self._keep(stores, requests[at], [cut(text, requests[at].args[1]["until"]), prompts[number].cut])

        mine = [prompts[number] for number in own]
        longest = max(len(prompt.tokens) for prompt in prompts)  # of all, so that all processes choose alike
        try:
            if self.sharing.up_to > longest + new_tokens:
                generate(
                    self.model,
                    self.tokenizer,
                    mine,
                    new_tokens=new_tokens,
                    end=end,
                    budget=self.budget,
                    plain_head=self.sharing.plain_head,
                    on_text=on_text,
                )
            else:
                generate_plainly(self.model, self.tokenizer, mine, new_tokens=new_tokens, end=end, on_text=on_text)
        finally:
            _flush(stores)
        return [texts[number] for number in own]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each whole text, in lm-eval's windows. Every token is predicted once."""
        owners: list[int] = []
        queries: list[Query] = []
        for at, request in enumerate(requests):
            windows = utils.get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for context, continuation in map(utils.make_disjoint_window, windows):
                owners.append(at)
                queries.append(self._query(context, continuation))
        sums = [0.0] * len(requests)

        def on_answer(number: int, answer: Answer) -> None:
            sums[owners[number]] += answer.loglikelihood

        self.scorer.score(queries, on_answer)
        return sums

    # ---- tokens ----

    def _queries(self, requests: Sequence[Instance]) -> list[Query]:
        """Tokenizes requests, each distinct text once. Context and continuation are split as in lm-eval."""
        pairs = []
        for request in requests:
            context, continuation = request.args
            bare = context.rstrip()
            pairs.append((bare, context[len(bare) :] + continuation))
        texts = list(dict.fromkeys(text for bare, rest in pairs for text in ((bare, bare + rest) if bare else (rest,))))
        ids = dict(zip(texts, self._encode(texts), strict=True))
        queries = []
        for bare, rest in pairs:
            if bare:
                known = len(ids[bare])
                queries.append(self._query(ids[bare + rest][:known], ids[bare + rest][known:]))
            else:  # an empty context is the token that begins a text
                queries.append(self._query([self.prefix_token_id], ids[rest]))
        return queries

    def _query(self, context: Sequence[int], continuation: Sequence[int]) -> Query:
        whole = [*context, *continuation]
        kept = whole[-(self.max_length + 1) :]
        return Query(tuple(kept[:-1]), tuple(continuation), cut=len(kept) < len(whole))

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of all texts, some at a time: a fast tokenizer's other results take twenty times their memory."""
        found: list[list[int]] = []
        same: dict[int, int] = {}  # one int object per token of the vocabulary, not per token of the texts
        for start in range(0, len(texts), ENCODED):
            some = list(texts[start : start + ENCODED])
            if self.tokenizer.is_fast:
                encoded = self.tokenizer(some, add_special_tokens=False, verbose=False)["input_ids"]
            else:
                encoded = [self.tok_encode(text) for text in some]
            found += ([same.setdefault(token, token) for token in ids] for ids in encoded)
        return found

    def _end(self) -> frozenset[int]:
        """Tokens that end a text: those of the tokenizer and of the model's generation config."""
        said = getattr(self.model.generation_config, "eos_token_id", None)
        more = said if isinstance(said, list) else [said]
        return frozenset({self.eot_token_id, *(token for token in more if token is not None)})

    # ---- stored answers ----

    def _known(self, requests: Sequence[Instance]) -> tuple[dict[int, Any], dict[str | None, Store], list[int]]:
        """Stored answers by request number, the stores by task, and the numbers of unanswered requests."""
        stores = {}
        if self.folder is not None:
            for name in {request.task_name for request in requests}:
                version = self.versions.get(name, 0)
                stores[name] = Store(self.folder, model=self.digest, task=str(name), version=version)
        known: dict[int, Any] = {}
        for at, request in enumerate(requests if is_main() else ()):
            store = stores.get(request.task_name)
            found = store.found.get(request_key(request.request_type, request.args)) if store else None
            if found is not None:
                known[at] = found
        known = from_main(known)  # another process may see answers that were written in between
        answers = {at: tuple(answer) if isinstance(answer, list) else answer for at, (answer, _) in known.items()}
        self.counts["cut"] += sum(was_cut for _, was_cut in known.values())
        self.counts["known"] += len(answers)
        self.progress.advance(len(answers))
        return answers, stores, [at for at in range(len(requests)) if at not in answers]

    def _keep(self, stores: Mapping[str | None, Store], request: Instance, answer: Any) -> None:
        self.progress.advance(world())  # the others answer as fast
        if request.task_name in stores:
            stores[request.task_name].keep(request_key(request.request_type, request.args), answer)


def _flush(stores: Mapping[str | None, Store]) -> None:
    for store in stores.values():
        store.flush()


def _named(request: Instance) -> str:
    return f"document {request.doc_id} of {request.task_name}"


def _length(config: Any) -> int:
    return next((int(value) for name in LENGTHS if (value := getattr(config, name, None))), DEFAULT_LENGTH)
