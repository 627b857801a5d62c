"""Models -> a report: scores, losses, memory and speed, and a comparison of an MoE with its parents.

Only one model is loaded at a time.
"""

import gc
import math
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from frankenmoe import system
from frankenmoe.artifact.reports import EvalReport
from frankenmoe.cache import cache_folder
from frankenmoe.checkpoint.hub import local_path
from frankenmoe.data.blocks import Block, Span
from frankenmoe.errors import FrankenMoEError, PlanError, SourceError
from frankenmoe.evaluate import bootstrap
from frankenmoe.evaluate.compare import BASE, MERGE, PARENT, Gains, best_of_parents, gains, kept
from frankenmoe.evaluate.contestants import Contestant, contestant, own_parents, rivals, with_unique_names
from frankenmoe.evaluate.domains import GENERAL, GENERAL_FILE, TRAINING, DomainText, read_domain
from frankenmoe.evaluate.identity import tokenizer_digest
from frankenmoe.evaluate.plot import Point, check_plot, plot
from frankenmoe.evaluate.prompts import SEED
from frankenmoe.evaluate.score import Result, Scoring, Suite, check_names, load_suite, run
from frankenmoe.evaluate.tasks import PERPLEXITY, task_names
from frankenmoe.evaluate.verdict import verdict
from frankenmoe.moe.bylayer import placed
from frankenmoe.moe.dense import load_tokenizer
from frankenmoe.moe.device import AUTO, CPU, check_room, resolve
from frankenmoe.moe.load import weights_of
from frankenmoe.moe.processes import main_first
from frankenmoe.planning.fitting import HELD_OUT_DATA
from frankenmoe.planning.sources import leaves
from frankenmoe.progress import SILENT, Progress
from frankenmoe.recipe.sections import EvalSettings
from frankenmoe.recipe.settings import settings_with
from frankenmoe.subject import Dense, Subject, open_model

HARNESS = "EleutherAI/lm-evaluation-harness at b281b0921b, as Open LLM Leaderboard v1 ran it"
PACKAGES = ("frankenmoe", "lm_eval", "torch", "transformers", "tokenizers", "numpy")


@dataclass(frozen=True)
class Report:
    """All results. `gains` are those of the MoE over each other model, in the order of `results`.

    `kept` is the share of the parents' advantage over the base that a model keeps, by model and domain.
    """

    results: tuple[Result, ...]
    gains: tuple[Gains, ...] = ()
    verdict: tuple[str, ...] = ()
    kept: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    skipped: Mapping[str, str] = field(default_factory=dict)
    conditions: Mapping[str, Any] = field(default_factory=dict)

    @property
    def errors(self) -> list[str]:
        """Error messages, each with the model's name."""
        return [f"{result.name}: {error}" for result in self.results for error in result.errors]

    def to_report(self, **about: Any) -> EvalReport:
        """The report to write to a file; `about` identifies the artifact."""
        found = {
            **about,
            **self.conditions,
            "models": [result.to_dict() for result in self.results],
            "skipped": dict(self.skipped),
            "gains": [gain.to_dict() for gain in self.gains],
            "kept": {name: dict(row) for name, row in self.kept.items()},
            "verdict": self.verdict,
        }
        return EvalReport.model_validate(found)


def evaluate(
    models: Sequence[Subject | Dense | str | Path],
    *,
    settings: EvalSettings | None = None,
    dtype: str | None = None,
    device: str = AUTO,
    scoring: Scoring | None = None,
    progress: Progress = SILENT,
    **changes: Any,
) -> Report:
    """Scores models on tasks and on texts (domain -> file), and compares an MoE with its parents.

    A model is a Subject, an artifact, a recipe, a folder or a hub id (with @revision). `changes` are settings by name.
    Paths start at the working directory. Without `tasks` and `texts`, the texts are the held-out parts of the experts'
    `data`. Models run on `device` in `dtype`, by default as stored. Several processes of torchrun share the documents;
    all of them get the report. Cached answers in `scoring.store` are reused. Raises subclasses of FrankenMoEError for
    invalid input before anything is scored; the report names tasks that fail later.
    """
    settings = settings_with(settings or EvalSettings(), changes)
    chosen = resolve(device)
    scoring = scoring or Scoring(store=cache_folder("scores"))
    names = task_names(",".join(settings.tasks)) if settings.tasks else (PERPLEXITY,)
    tasks = [name for name in names if name != PERPLEXITY]
    data_dir = Path(os.path.expanduser(settings.data_dir)) if settings.data_dir else None
    opened = [open_model(model) if isinstance(model, str | Path) else model for model in models]
    moes = [each for each in opened if isinstance(each, Subject)]
    with main_first():  # which downloads the rows
        suite = load_suite(tasks, data_dir=data_dir, limit=settings.limit)
    for each in moes:
        if not each.built:
            each.resolved(progress, device=device)
    for each in moes:
        check_room(weights_of(each.parts), CPU, dtype=getattr(torch, dtype) if dtype else None)
    if settings.against_parents and (len(opened) != 1 or not moes):
        raise PlanError(
            "--against-parents compares one MoE with its parents, found " + ", ".join(each.origin for each in opened),
            hint="give one artifact or recipe; several models are compared without this option",
        )
    contestants = with_unique_names([contestant(each, dtype, progress) for each in opened])
    skipped: dict[str, str] = {}
    if settings.against_parents:
        contestants = [*rivals(moes[0].plan, contestants[0], dtype, skipped), contestants[0]]
    check_names([each.name for each in contestants])
    wanted = PERPLEXITY in names or settings.texts or settings.against_parents
    sources = _texts(settings.texts, moes) if wanted else []
    if PERPLEXITY in names and not sources:
        raise SourceError(
            "there is no text to measure the loss on",
            hint="use --text NAME=FILE or --tasks, or add `data` to the recipe's experts",
        )
    if settings.against_parents:
        sources.append(_general(settings.general_text))
    results = _run_all(contestants, suite, sources, scoring, settings.limit, chosen, skipped, progress)
    conditions = _conditions(suite, sources, data_dir)
    if not settings.against_parents:
        return Report(tuple(results), skipped=skipped, conditions=conditions)
    return _compared(results, own_parents(moes[0].plan), skipped, conditions)


def _compared(
    results: Sequence[Result], own: Mapping[str, str], skipped: Mapping[str, str], conditions: Mapping[str, Any]
) -> Report:
    """The report on an MoE, the last of `results`, beside all others. `own` maps domains to parents."""
    *others, moe = results
    oracle = best_of_parents([each for each in others if each.kind in (BASE, PARENT)])
    if oracle is not None and any(each.kind == PARENT for each in others):
        others.append(oracle)
    found = [gains(moe, other) for other in others]
    shares = kept([*others, moe], own)
    return Report((*others, moe), tuple(found), tuple(verdict(moe, others, found, shares)), shares, skipped, conditions)


def _run_all(
    contestants: Sequence[Contestant],
    suite: Suite,
    sources: Sequence[DomainText],
    scoring: Scoring,
    limit: int | None,
    device: torch.device,
    skipped: dict[str, str],
    progress: Progress,
) -> list[Result]:
    blocks: dict[str, dict[str, list[Block]]] = {}
    results = []
    names = [each.name for each in contestants]
    folders = dict(zip(names, system.file_names(names, default="model"), strict=True))
    for each in contestants:
        tokenizer = load_tokenizer(each.tokenizer)
        digest = tokenizer_digest(tokenizer)
        if digest not in blocks:
            blocks[digest] = {source.name: read_domain(source, tokenizer, limit=limit) for source in sources}
        try:
            model = placed(each.load(), device)
        except FrankenMoEError as error:
            if each.kind not in (MERGE, PARENT):
                raise
            skipped[each.name] = error.message
            continue
        samples = scoring.samples
        own = replace(scoring, samples=samples / folders[each.name] if samples and len(contestants) > 1 else samples)
        result = run(
            each.name,
            model,
            tokenizer,
            suite=suite if each.forcing is None else replace(suite, tasks={}),
            domains=blocks[digest],
            forcing=each.forcing,
            settings=own,
            kind=each.kind,
            origin=each.origin,
            progress=progress,
        )
        facts = {"tokenizer_digest": digest, "experts_per_token": each.experts_per_token}
        results.append(replace(result, facts={**result.facts, **facts}))
        del model
        gc.collect()
    return results


def _texts(given: Mapping[str, str], moes: Sequence[Subject]) -> list[DomainText]:
    """The given files, completely; by default the held-out parts of the experts' data."""
    if given:
        return [
            DomainText(name, (str(local_path(file, folder=Path.cwd())),), Path.cwd(), held_out=False)
            for name, file in given.items()
        ]
    found: dict[str, DomainText] = {}
    fitted = [found for moe in moes for found in _fitted(moe)]
    for recipe in (moe.recipe for moe in moes):
        train = recipe.train or TRAINING  # the same cut as in training keeps trained text out
        for expert in leaves(recipe.experts):
            if expert.data and expert.name not in found:
                found[expert.name] = DomainText(
                    expert.name,
                    expert.data,
                    recipe.folder,
                    held_out=True,
                    block=train.block,
                    share=train.hold_out,
                    fitted=tuple(dict.fromkeys(span for name, span in fitted if name == expert.name)),
                )
    return list(found.values())


def _fitted(moe: Subject) -> Iterator[tuple[str, Span]]:
    """(expert, where in its text is what routers were fitted to or it was healed from), from an artifact's record."""
    for stage in moe.artifact.record["stages"] if moe.artifact else ():
        for name, text in (stage.get("text") or (stage.get("fit") or {}).get("text") or {}).items():
            for start, end in _spans(text) if isinstance(text, dict) else ():
                yield name.rpartition("/")[2], (start, end)


def _spans(text: Mapping[str, Any]) -> Sequence[Span]:
    """Of one text in a record. Older records hold none: then all that the fit can have read."""
    if "spans" not in text and "block" in text:
        return [(0, math.ceil(text["tokens"] / (1 - HELD_OUT_DATA)) + text["block"])]
    return [(start, end) for start, end in text.get("spans", ())]


def _general(given: str | None) -> DomainText:
    """The text that no parent was tuned on: a file of the user, or the one that comes with frankenmoe."""
    file = local_path(given, folder=Path.cwd()) if given else GENERAL_FILE
    if not file.is_file():
        raise SourceError(f"general text {file} does not exist", hint="name a text file, or leave it out")
    return DomainText(GENERAL, (str(file),), file.parent, held_out=False)


def _conditions(suite: Suite, sources: Sequence[DomainText], data_dir: Path | None) -> dict[str, Any]:
    return {
        "harness": HARNESS,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "threads": torch.get_num_threads(),
        "cores": system.cores(),
        "limit": suite.limit,
        "seeds": {"document_order_and_few_shot_draws": SEED, "bootstrap": bootstrap.SEED},
        "bootstrap": {"resamples": bootstrap.RESAMPLES, "level": bootstrap.LEVEL},
        "data": {
            "from": str(data_dir) if data_dir else "the hub",
            "sha256": dict(suite.data),
        },
        "texts": {
            source.name: {"files": list(source.files), "held_out_part": source.held_out, "block_tokens": source.block}
            for source in sources
        },
    }


def draw(report: Report, file: Path) -> None:
    """Plots quality against memory for each model. PlanError if no model was scored."""
    check_plot(file)
    points = []
    for result in report.results:
        if result.domains:
            groups = [
                (losses.nats, [float(count) for count in losses.targets], 1 / len(result.domains))
                for losses in result.domains.values()
            ]
            quality = "nats per token, mean over domains (lower is better)"
        elif result.average is not None or any(outcome.scores for outcome in result.outcomes.values()):
            scored = {
                name: outcome
                for name, outcome in result.outcomes.items()
                if outcome.scores and outcome.benchmark.counted
            }
            groups = [
                (rows, [1.0] * len(rows), 100 / len(scored) / len(outcome.scores))
                for outcome in scored.values()
                for rows in outcome.scores.values()
            ]
            quality = f"score in percent, mean of {', '.join(each.benchmark.title for each in scored.values())}"
        else:
            continue
        interval = bootstrap.weighted(groups)
        memory = result.facts["memory_bytes"]
        points.append(Point(result.name, result.kind, memory, interval.value, interval.low, interval.high))
    if not points:
        raise PlanError("no model was scored, so there is nothing to plot", hint="see the errors above")
    plot(points, file, quality=quality)
