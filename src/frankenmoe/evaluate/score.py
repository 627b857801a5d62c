"""Scores one model on tasks and texts. A task that fails is named in the report; the others continue."""

import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from lm_eval.evaluator import evaluate

from frankenmoe.data.blocks import Block
from frankenmoe.errors import FrankenMoEError, SourceError
from frankenmoe.evaluate.domains import GENERAL, Losses, domain_losses
from frankenmoe.evaluate.identity import memory_of, parameters_of
from frankenmoe.evaluate.lm import PrefixLM
from frankenmoe.evaluate.prompts import BENCHMARKS, GSM8K_TOKENS, SIX, Benchmark
from frankenmoe.evaluate.samples import write_samples
from frankenmoe.evaluate.store import Store
from frankenmoe.evaluate.tasks import LeaderboardTask, load_tasks
from frankenmoe.gates.forcing import forced
from frankenmoe.moe.processes import from_main, is_main
from frankenmoe.planning.layout import RouterPath
from frankenmoe.progress import SILENT, Progress

LOSS_VERSION = 1
SPEED_TOKENS = 256
SPEED_ROUNDS, SPEED_SECONDS = 3, 0.3  # at least so many passes, and more until so much time is over


@dataclass(frozen=True)
class Suite:
    """The tasks of every benchmark and the digests of their data. `limit`: documents per task."""

    tasks: Mapping[str, Mapping[str, LeaderboardTask]]
    data: Mapping[str, str]
    limit: int | None = None


def load_suite(names: Sequence[str], *, data_dir: Path | None, limit: int | None) -> Suite:
    """Reads and checks the rows of all benchmarks, before any model is loaded."""
    tasks, data = {}, {}
    for name in names:
        tasks[name], data[name] = load_tasks(BENCHMARKS[name], data_dir=data_dir)
    return Suite(tasks, data, limit)


@dataclass(frozen=True)
class Outcome:
    """One model's result on one benchmark. `scores`: group (subject) -> the leaderboard's metric of each document."""

    benchmark: Benchmark
    metrics: Mapping[str, float] = field(default_factory=dict)
    stderr: Mapping[str, float | None] = field(default_factory=dict)
    scores: Mapping[str, tuple[float, ...]] = field(default_factory=dict, repr=False)
    groups: Mapping[str, float] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    error: str | None = None

    @property
    def value(self) -> float | None:
        return self.metrics.get(self.benchmark.metric)

    def to_dict(self) -> dict[str, Any]:
        """The outcome as plain data, with scores from 0 to 1."""
        return {
            "title": self.benchmark.title,
            "version": self.benchmark.version,
            "shots": self.benchmark.shots,
            "metric": self.benchmark.metric,
            "value": self.value,
            "stderr": self.stderr.get(self.benchmark.metric),
            "metrics": dict(self.metrics),
            "metrics_stderr": dict(self.stderr),
            "subjects": dict(self.groups) if self.benchmark.by_subject else None,
            "documents": sum(map(len, self.scores.values())),
            "counted_in_average": self.benchmark.counted,
            "seconds": round(self.seconds, 3),
            "error": self.error,
            **self.counts,
        }


@dataclass(frozen=True)
class Result:
    """One model: its name, origin, cost and scores."""

    name: str
    kind: str
    origin: str
    facts: Mapping[str, Any]
    outcomes: Mapping[str, Outcome]
    losses: Mapping[str, Losses]
    errors: tuple[str, ...] = ()

    @property
    def average(self) -> float | None:
        """The mean of the six benchmarks, or None if one is missing."""
        values = [self.outcomes[name].value if name in self.outcomes else None for name in SIX]
        return mean(value for value in values if value is not None) if None not in values else None

    @property
    def mean_loss(self) -> float | None:
        """Nats per token, the mean over domains."""
        return mean(losses.mean for losses in self.domains.values()) if self.domains else None

    @property
    def domains(self) -> Mapping[str, Losses]:
        """The losses that count in the mean: all but that of general text."""
        return {name: losses for name, losses in self.losses.items() if name != GENERAL}

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "kind": self.kind,
            "origin": self.origin,
            **self.facts,
            "tasks": {name: outcome.to_dict() for name, outcome in self.outcomes.items()},
            "average": self.average,
            "domains": {
                name: {
                    "nats_per_token": losses.mean,
                    "interval": [losses.interval.low, losses.interval.high],
                    "bits_per_byte": losses.bits_per_byte,
                    "blocks": len(losses.nats),
                    "tokens": sum(losses.targets),
                }
                for name, losses in self.losses.items()
            },
            "mean_loss": self.mean_loss,
            "errors": list(self.errors),
        }


@dataclass(frozen=True)
class Scoring:
    """`rows` per pass (None: by memory), `memory` in bytes per pass, folders for finished answers and samples."""

    rows: int | None = None
    memory: int | None = None
    store: Path | None = None
    samples: Path | None = None


def run(
    name: str,
    model: Any,
    tokenizer: Any,
    *,
    suite: Suite,
    domains: Mapping[str, Sequence[Block]],
    settings: Scoring,
    kind: str = "model",
    origin: str = "",
    forcing: Mapping[str, RouterPath] | None = None,
    progress: Progress = SILENT,
) -> Result:
    """Scores a loaded model on the suite and the domains.

    With `forcing`, a domain -> the path of an expert, only these domains are read, each with its expert in every layer.
    """
    lm = PrefixLM(
        model, tokenizer, folder=settings.store, rows=settings.rows, memory=settings.memory, progress=progress
    )
    outcomes: dict[str, Outcome] = {}
    errors: list[str] = []
    for benchmarks in _together(suite.tasks):
        found = _benchmarks(lm, {benchmark: suite.tasks[benchmark] for benchmark in benchmarks}, name, suite, settings)
        outcomes |= found
        errors += [f"{each.benchmark.title}: {each.error}" for each in found.values() if each.error]
    losses: Mapping[str, Losses] = {}
    if domains:
        try:
            losses = _losses(lm, domains, forcing, tokenizer, settings, progress)
        except FrankenMoEError as error:
            errors.append(f"loss: {in_a_line(error)}")
    facts = {
        "digest": lm.digest or None,
        "parameters": parameters_of(model),
        "memory_bytes": memory_of(model),
        "tokens_per_second": from_main(speed(model) if is_main() else 0.0),  # the others wait meanwhile
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "max_length": lm.max_length,
        "shared_reading": {"up_to": min(lm.sharing.up_to, lm.max_length), "reason": lm.sharing.reason},
    }
    return Result(name, kind, origin, facts, outcomes, losses, tuple(errors))


def _losses(
    lm: PrefixLM,
    domains: Mapping[str, Sequence[Block]],
    forcing: Mapping[str, RouterPath] | None,
    tokenizer: Any,
    settings: Scoring,
    progress: Progress,
) -> dict[str, Losses]:
    found: dict[str, Losses] = {}
    for path, some in _readings(domains, forcing):
        task = "loss" if path is None else f"loss-{'.'.join(map(str, path))}"
        store = Store(settings.store, model=lm.digest, task=task, version=LOSS_VERSION) if settings.store else None
        with nullcontext() if path is None else forced(lm.model, path):
            found |= domain_losses(
                lm.model,
                tokenizer,
                some,
                plain_head=lm.sharing.plain_head,
                budget=lm.budget,
                store=store,
                progress=progress,
            )
    return found


def _readings(
    domains: Mapping[str, Sequence[Block]], forcing: Mapping[str, RouterPath] | None
) -> Iterator[tuple[RouterPath | None, Mapping[str, Sequence[Block]]]]:
    """(the expert to force, the domains to read with it)."""
    if forcing is None:
        yield None, domains
        return
    for name, path in forcing.items():
        if name in domains:
            yield path, {name: domains[name]}


def _together(names: Mapping[str, Any]) -> Iterator[list[str]]:
    """Groups of benchmarks with the same prompts, such as GSM8K with and without the stop at a colon."""
    by_data: dict[tuple[str, bool], list[str]] = {}
    for name in names:
        by_data.setdefault((BENCHMARKS[name].data, bool(BENCHMARKS[name].stops)), []).append(name)
    yield from by_data.values()


def _benchmarks(
    lm: PrefixLM,
    asked: Mapping[str, Mapping[str, LeaderboardTask]],
    model_name: str,
    suite: Suite,
    settings: Scoring,
) -> dict[str, Outcome]:
    tasks = {name: task for group in asked.values() for name, task in group.items()}
    lm.counts.clear()
    lm.versions = {name: task.benchmark.version for name, task in tasks.items()}
    first = BENCHMARKS[next(iter(asked))]
    began = time.perf_counter()
    try:
        lm.progress.start(f"{model_name}: {first.title}", _requests(tasks, suite.limit), "requests")
        with quiet():
            found = evaluate(lm, {"tasks": tasks, "groups": {}}, limit=suite.limit, bootstrap_iters=1, log_samples=True)
    except FrankenMoEError as error:
        return {name: Outcome(BENCHMARKS[name], error=in_a_line(error)) for name in asked}
    seconds = time.perf_counter() - began
    if settings.samples is not None and is_main():
        write_samples(settings.samples, found["samples"])
    counts = {
        "requests": lm.counts["requests"],
        "from_earlier_runs": lm.counts["known"],
        "cut_on_the_left": lm.counts["cut"],
        "question_cut": _questions_cut(lm, tasks, suite.limit) if lm.counts["cut"] else 0,
    }
    return {name: _outcome(BENCHMARKS[name], found, list(group), counts, seconds) for name, group in asked.items()}


def _requests(tasks: Mapping[str, LeaderboardTask], limit: int | None) -> int:
    total = 0
    for task in tasks.values():
        task.build_all_requests(limit=limit)
        total += len(task.instances)
    return total


def _questions_cut(lm: PrefixLM, tasks: Mapping[str, LeaderboardTask], limit: int | None) -> int:
    """The number of documents whose question and answer, without examples, are longer than the model's context."""
    cut = 0
    for task in tasks.values():
        room = lm.max_length - GSM8K_TOKENS if task.benchmark.stops else lm.max_length + 1
        for _, row in task.doc_iterator(limit=limit):
            longest = max(len(lm.tok_encode(context + rest)) for context, rest in task.benchmark.requests("", row))
            cut += longest > room
    return cut


def _outcome(
    benchmark: Benchmark, found: Mapping[str, Any], tasks: Sequence[str], counts: Mapping[str, int], seconds: float
) -> Outcome:
    """lm-eval's numbers. For several tasks (the subjects of MMLU) the unweighted mean and its standard error."""
    results, samples = found["results"], found["samples"]
    metrics = list(found["higher_is_better"][tasks[0]])
    errors = {metric: [results[task][f"{metric}_stderr,none"] for task in tasks] for metric in metrics}
    return Outcome(
        benchmark,
        metrics={metric: mean(float(results[task][f"{metric},none"]) for task in tasks) for metric in metrics},
        stderr={metric: _pooled(values) for metric, values in errors.items()},
        scores={task: tuple(float(row[benchmark.metric]) for row in samples[task]) for task in tasks},
        groups={
            task.removeprefix(f"{benchmark.name}_"): float(results[task][f"{benchmark.metric},none"]) for task in tasks
        },
        counts=counts,
        seconds=seconds,
    )


def _pooled(errors: Sequence[Any]) -> float | None:
    """The standard error of the mean of independent means; None if lm-eval had too few documents for one of them."""
    if any(not isinstance(error, int | float) for error in errors):
        return None
    return math.sqrt(sum(float(error) ** 2 for error in errors)) / len(errors)


def speed(model: Any) -> float:
    """Tokens per second of reading, from the fastest of a few passes over the same tokens.

    The fastest pass counts, because other work on the machine only makes passes slower: small models up to a hundred
    times.
    """
    length = min(SPEED_TOKENS, getattr(model.config.get_text_config(), "max_position_embeddings", None) or SPEED_TOKENS)
    vocabulary = model.config.get_text_config().vocab_size
    ids_BT = torch.randint(vocabulary, (1, length), generator=torch.Generator().manual_seed(0)).to(model.device)
    seconds: list[float] = []
    with torch.inference_mode():
        while len(seconds) <= SPEED_ROUNDS or sum(seconds) < SPEED_SECONDS:
            began = time.perf_counter()
            model(input_ids=ids_BT, use_cache=False).logits[0, -1, 0].item()  # waits for a GPU too
            seconds.append(time.perf_counter() - began)
    return length / min(seconds)


@contextmanager
def quiet() -> Iterator[None]:
    """Suppresses lm-eval's log messages below errors."""
    log = logging.getLogger("lm_eval")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


def in_a_line(error: FrankenMoEError) -> str:
    """Message and hint of an error in one line, for a report."""
    return f"{error.message} ({error.hint})" if error.hint else error.message


def check_names(names: Sequence[str]) -> None:
    """Raises SourceError if two models have the same name."""
    for name in names:
        if names.count(name) > 1:
            raise SourceError(f"two models are called {name!r}", hint="name each model once")
