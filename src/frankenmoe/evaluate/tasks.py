"""The leaderboard's benchmarks as tasks of lm-eval, and their names.

lm-eval 0.4.13 draws other few-shot examples (another seed, another order), so every document has its own prefix here.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.metrics import mean
from lm_eval.api.task import Task
from lm_eval.config.task import TaskConfig
from lm_eval.filters import build_filter_ensemble

from frankenmoe.errors import SourceError
from frankenmoe.evaluate.prompts import BENCHMARKS, GSM8K_TOKENS, SEED, SUITES, Benchmark, Scores, draw, prefix
from frankenmoe.evaluate.rows import LAYOUT, TaskRow, digest, read_rows
from frankenmoe.suggest import did_you_mean

PERPLEXITY = "ppl"


class LeaderboardTask(Task):  # type: ignore[misc]
    """One benchmark, or one subject of MMLU, over rows in memory. Documents have the original's order.

    The parent's constructor fetches data, so it is not called. `shots` are the few-shot examples of each document, in
    document order. A document's id is its index in the data set.
    """

    def __init__(
        self,
        benchmark: Benchmark,
        rows: Sequence[TaskRow],
        *,
        order: Sequence[int],
        shots: Sequence[Sequence[TaskRow]],
        name: str,
    ) -> None:
        self.benchmark = benchmark
        self.documents = [
            (index, rows[index], prefix(benchmark, rows[index], shots[at])) for at, index in enumerate(order)
        ]
        self.OUTPUT_TYPE = "generate_until" if benchmark.stops else "multiple_choice"
        self.VERSION = benchmark.version
        facts = {"version": benchmark.version, "draw_seed": SEED, "documents": len(rows)}
        settings = {"generation_kwargs": _generation_settings(benchmark)} if benchmark.stops else {}
        self._config = TaskConfig(
            task=name,
            num_fewshot=benchmark.shots,
            output_type=self.OUTPUT_TYPE,
            repeats=1,
            metadata=facts,
            **settings,
        )
        self._filters = [build_filter_ensemble("none", [("take_first", None)])]
        self._instances: list[Instance] = []

    def has_training_docs(self) -> bool:
        return False

    def has_validation_docs(self) -> bool:
        return False

    def has_test_docs(self) -> bool:
        return True

    def test_docs(self) -> list[TaskRow]:
        return [row for _, row, _ in self.documents]

    def doc_iterator(self, *, limit: int | None = None, **_: Any) -> Iterator[tuple[int, TaskRow]]:
        """(index in the data set, row) of the first `limit` documents."""
        return iter([(index, row) for index, row, _ in self.documents[: limit or None]])

    def doc_to_text(self, doc: TaskRow) -> str:
        return self.benchmark.text(doc)

    def doc_to_target(self, doc: TaskRow) -> str:
        return self.benchmark.answer(doc)

    def build_all_requests(self, *, limit: int | None = None, **_: Any) -> None:
        """Like lm-eval's, without its progress bar and its sampler."""
        self._instances = [
            instance
            for index, row, before in self.documents[: limit or None]
            for instance in self.construct_requests(row, before, metadata=(self.config.task, index, 1))
        ]

    def construct_requests(self, doc: TaskRow, ctx: str, **kwargs: Any) -> list[Instance]:
        """A document's requests, with the prefix `ctx`."""
        pairs = self.benchmark.requests(ctx, doc)
        if not self.benchmark.stops:
            return [
                Instance(request_type="loglikelihood", doc=doc, arguments=pair, idx=at, **kwargs)
                for at, pair in enumerate(pairs)
            ]
        return [
            Instance(
                request_type="generate_until",
                doc=doc,
                arguments=(context, _generation_settings(self.benchmark)),
                idx=at,
                **kwargs,
            )
            for at, (context, _) in enumerate(pairs)
        ]

    def process_results(self, doc: TaskRow, results: Sequence[Any]) -> Scores:
        """Metric -> score of one document, from the answers to its requests."""
        answers = results if self.benchmark.stops else [ll for ll, _ in results]
        return self.benchmark.score(doc, answers)

    def aggregation(self) -> dict[str, Callable[[Sequence[float]], float]]:
        return dict.fromkeys(self.benchmark.metrics, mean)

    def higher_is_better(self) -> dict[str, bool]:
        return dict.fromkeys(self.benchmark.metrics, True)


def _generation_settings(benchmark: Benchmark) -> dict[str, Any]:
    stops = list(benchmark.stops)
    return {"until": stops, "do_sample": False, "temperature": 0.0, "max_gen_toks": GSM8K_TOKENS}


def load_tasks(benchmark: Benchmark, *, data_dir: Path | None) -> tuple[dict[str, LeaderboardTask], str]:
    """The tasks of one benchmark by name (MMLU has one per subject), and the digest of their data.

    Raises SourceError for missing or wrong rows, or too few rows for the few-shot examples.
    """
    rows = read_rows(benchmark.data, benchmark.split, data_dir=data_dir)
    pool = read_rows(benchmark.data, benchmark.shots_split, data_dir=data_dir) if benchmark.shots_split else []
    version = digest(rows, pool)
    if not benchmark.by_subject:
        _enough(benchmark, pool)
        order, drawn = draw(len(rows), len(pool), benchmark.shots)
        shots = [[pool[at] for at in drawn[index]] for index in order]
        return {
            benchmark.name: LeaderboardTask(benchmark, rows, order=order, shots=shots, name=benchmark.name)
        }, version
    tasks = {}
    for subject, group in _by_subject(rows).items():
        examples = [row for row in pool if row["subject"] == subject]
        _enough(benchmark, examples, f" of subject {subject}")
        order, _ = draw(len(group), 0, 0)
        first = [examples[: benchmark.shots]] * len(order)
        name = f"{benchmark.name}_{subject}"
        tasks[name] = LeaderboardTask(benchmark, group, order=order, shots=first, name=name)
    return tasks, version


def _by_subject(rows: Sequence[TaskRow]) -> dict[str, list[TaskRow]]:
    ordered = sorted(rows, key=lambda row: str(row["subject"]))  # stable, so the rows of a subject keep their order
    return {subject: list(group) for subject, group in groupby(ordered, key=lambda row: str(row["subject"]))}


def _enough(benchmark: Benchmark, pool: Sequence[TaskRow], which: str = "") -> None:
    if len(pool) < benchmark.shots:
        raise SourceError(
            f"{benchmark.title} needs {benchmark.shots} examples from its split {benchmark.shots_split}{which}, "
            f"found {len(pool)}",
            hint=LAYOUT,
        )


def task_names(asked: str) -> tuple[str, ...]:
    """Task names of a comma-separated list, suites such as `leaderboard-v1` expanded, in the leaderboard's order.

    Raises SourceError with a suggestion for an unknown name.
    """
    known = [*BENCHMARKS, *SUITES, PERPLEXITY]
    names: list[str] = []
    for name in (part.strip() for part in asked.split(",") if part.strip()):
        if name not in known:
            raise SourceError(f"there is no task {name!r}", hint=did_you_mean(name, known))
        names += SUITES.get(name, (name,))
    if not names:
        raise SourceError("no task was named", hint=f"choose from {', '.join(known)}")
    return tuple(name for name in (*BENCHMARKS, PERPLEXITY) if name in names)
