"""Runs the demo: trains parents, runs a recipe with every stage, and measures the results.

Every stage is the one that users call. The parents are toys of a minute, or fine-tunes of a real model.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import yaml
from transformers import AutoModelForCausalLM

from frankenmoe.artifact.folder import Artifact
from frankenmoe.build.proof import Check, verify
from frankenmoe.demo.kits import TOY, Kit
from frankenmoe.demo.text import DOMAINS, generate, held_out, prompts
from frankenmoe.errors import PlanError
from frankenmoe.evaluate.perplexity import mean_loss
from frankenmoe.evaluate.prompts import BENCHMARKS, SIX
from frankenmoe.evaluate.quiz import quiz
from frankenmoe.gates.forcing import forced
from frankenmoe.moe.dense import quiet_transformers
from frankenmoe.moe.generate import Reply, reply
from frankenmoe.moe.load import MoE
from frankenmoe.pipeline import Done, run
from frankenmoe.planning import Plan
from frankenmoe.progress import SILENT, Progress
from frankenmoe.recipe import Recipe
from frankenmoe.subject import load, open_subject

# the rows of the loss table after the dense models
RANDOM, PROMPTED, FITTED, TRAINED = (f"MoE, {made} gates" for made in ("random", "prompt", "fitted", "trained"))
FORCED = "MoE, own expert forced"
TEXT_CHARACTERS = 40_000  # of each domain, for fitting and training; held-out text is separate
FIT_TOKENS = 4096
TEXT_SEED = 1
QUESTIONS = 8  # of each task, but one of each of MMLU's 57 subjects: they show that tasks run, and compare no models
# stage -> (the module that it needs, the extra that installs it)
NEEDS = {
    "train": ("accelerate", "train"),
    "audit": ("vl_convert", "audit"),
    "eval": ("lm_eval", "eval"),
    "export": ("xllamacpp", "gguf"),
}


@dataclass(frozen=True)
class Story:
    """The demo's results.

    `losses`: row name -> domain -> nats per token on held-out text. `quiz`: model -> domain -> share of right answers.
    `tasks`: task -> model -> its score, from 0 to 1, on the questions that were asked; empty without rows. `failed`
    says why one is missing.
    `lacking`: stages that were skipped -> the extra that installs what they need.
    """

    folder: Path
    parents: Path
    real: bool
    recipe: Path
    plan: Plan
    steps: tuple[Done, ...]
    lacking: Mapping[str, str]
    losses: Mapping[str, Mapping[str, float]]
    quiz: Mapping[str, Mapping[str, float]]
    tasks: Mapping[str, Mapping[str, float]]
    failed: tuple[str, ...]
    own_share: Mapping[str, float]
    prompt: str
    reply: Reply = field(repr=False)
    checks: tuple[Check, ...]
    stock_difference: float
    artifact: Artifact = field(repr=False)
    tokenizer: Any = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """The story as plain data."""
        return {
            "folder": str(self.folder),
            "recipe": str(self.recipe),
            "plan": self.plan.to_dict(),
            "stages": {step.name: step.summary for step in self.steps},
            "left_out": dict(self.lacking),
            "held_out_loss": {name: dict(row) | {"mean": mean(row.values())} for name, row in self.losses.items()},
            "quiz": {name: dict(row) for name, row in self.quiz.items()},
            "tasks": {name: dict(row) for name, row in self.tasks.items()},
            "tasks_failed": list(self.failed),
            "tokens_to_own_expert": dict(self.own_share),
            "prompt": self.prompt,
            "reply": self.reply.text,
            "checks": {check.what: check.found for check in self.checks},
            "largest_logit_difference_to_stock_transformers": self.stock_difference,
            "artifact": str(self.artifact.folder),
        }


def tell(out: Path, *, kit: Kit = TOY, progress: Progress = SILENT) -> Story:
    """Runs the whole demo in the folder `out`. Reuses parents and results that are already there.

    `kit` says with which parents. SourceError if they need a package that is absent.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(kit.threads or before)
    try:
        return _tell(out.absolute(), kit, progress)
    finally:
        torch.set_num_threads(before)


def _tell(out: Path, kit: Kit, progress: Progress) -> Story:
    lacking = {stage: extra for stage, (module, extra) in NEEDS.items() if find_spec(module) is None}
    if kit.rows is not None:
        _check_rows(kit.rows, lacking)
    with quiet_transformers():
        parents = kit.parents(out / "parents", progress)
    write_texts(out / "text")
    file = write_recipe(out / "recipe.yml", parents, kit=kit, without=tuple(lacking))
    recipe = Recipe.load(file)
    subject = open_subject(recipe)
    finished = run(subject, out / "run", progress=progress)
    built = finished.artifact
    moe = load(built)
    tasks, failed = _answers(kit.rows, {"base": parents["base"], "MoE": built.folder}, out / "answers", progress)
    losses = dict(_losses(subject.plan.recipe, parents, out / "run", moe, kit.random_seeds, progress))
    return Story(
        folder=out,
        parents=parents["base"].parent,
        real=kit.name != TOY.name,
        recipe=file,
        plan=subject.plan,
        steps=finished.steps,
        lacking=lacking,
        losses=losses,
        quiz=_quiz(parents, moe),
        tasks=tasks,
        failed=failed,
        own_share=_own_shares(moe),
        prompt=kit.prompts[0],
        reply=reply(
            moe, moe.tokenizer(), [{"role": "user", "content": kit.prompts[0]}], max_new_tokens=kit.reply_tokens
        ),
        checks=verify(built.folder),
        stock_difference=_stock_difference(built),
        artifact=built,
        tokenizer=moe.tokenizer(),
    )


def write_texts(folder: Path) -> None:
    """Writes two files per domain: one for fitting and training, one (held out) for measurements."""
    folder.mkdir(parents=True, exist_ok=True)
    for domain in DOMAINS:
        (folder / f"{domain}.txt").write_bytes(generate(domain, seed=TEXT_SEED, characters=TEXT_CHARACTERS).encode())
        (folder / f"{domain}.heldout.txt").write_bytes(held_out(domain).encode())


def write_recipe(file: Path, parents: Mapping[str, Path], *, kit: Kit = TOY, without: tuple[str, ...] = ()) -> Path:
    """Writes the demo's recipe: one expert per domain, and every stage except those in `without`."""
    sources = {name: _named(folder, file.parent) for name, folder in parents.items()}
    experts = [
        {
            "source_model": sources[domain],
            "name": domain,
            "positive_prompts": list(prompts(domain)),
            "data": f"text/{domain}.txt",
        }
        for domain in parents
        if domain in DOMAINS
    ]
    stages = {
        "fit": {"method": "logistic", "tokens": FIT_TOKENS},
        "train": {"what": ["routers"], "steps": kit.train_steps},
        "audit": {"tokens": 2048},
        "eval": {
            "texts": {domain: f"text/{domain}.heldout.txt" for domain in DOMAINS},
            "against_parents": True,
            **({"limit": kit.blocks} if kit.blocks else {}),
        },
        "export": {"types": ["q8_0"]},
        "card": {"prompts": list(kit.prompts), "max_new_tokens": kit.reply_tokens},
    }
    recipe = {
        "name": kit.name,
        "base_model": sources["base"],
        "gate_mode": "logistic",
        "experts_per_token": 2,
        "dtype": "bfloat16",
        "experts": experts,
    } | {stage: settings for stage, settings in stages.items() if stage not in without}
    file.write_bytes(yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, width=100).encode())
    return file


def _named(folder: Path, start: Path) -> str:
    """A parent's folder as a recipe in the folder `start` names it: relative where it is below."""
    return str(folder.relative_to(start) if folder.is_relative_to(start) else folder)


def _losses(
    recipe: Recipe, parents: Mapping[str, Path], folder: Path, moe: MoE, seeds: int, progress: Progress
) -> Iterator[tuple[str, Mapping[str, float]]]:
    """Yields (row name, loss per domain): the dense base and parents, then the MoE with different routers."""
    tokenizer = moe.tokenizer()
    fitted, trained = (folder / "work" / stage for stage in ("fit", "train"))
    progress.start("measuring", len(parents) + seeds + len(DOMAINS) + 2 + trained.is_dir(), "models")

    def row(model: Any, domains: tuple[str, ...] = DOMAINS) -> Mapping[str, float]:
        found = {domain: mean_loss(model, tokenizer, held_out(domain)) for domain in domains}
        progress.advance(1)
        return found

    for name, source in parents.items():
        with quiet_transformers():
            yield f"dense {name}", row(AutoModelForCausalLM.from_pretrained(source))
    plain = recipe.to_dict()
    drawn = [row(load(_changed(recipe, plain | {"gate_mode": "random", "seed": seed})).model) for seed in range(seeds)]
    yield RANDOM, {domain: mean(found[domain] for found in drawn) for domain in DOMAINS}
    yield PROMPTED, row(load(_changed(recipe, plain | {"gate_mode": "hidden_avg"})).model)
    model = load(fitted).model
    yield FITTED, row(model)
    if trained.is_dir():
        yield TRAINED, row(load(trained).model)
    own: dict[str, float] = {}
    for index, expert in enumerate(plain["experts"]):
        with forced(model, (index,)):
            own |= row(model, (expert["name"],))
    yield FORCED, own


def _quiz(parents: Mapping[str, Path], moe: MoE) -> Mapping[str, Mapping[str, float]]:
    """The dense base and the MoE on questions from the held-out text."""
    texts = {domain: held_out(domain) for domain in DOMAINS}
    with quiet_transformers():
        base = AutoModelForCausalLM.from_pretrained(parents["base"]).eval()
    return {name: quiz(model, moe.tokenizer(), texts) for name, model in (("dense base", base), ("MoE", moe.model))}


def _check_rows(rows: Path, lacking: Mapping[str, str]) -> None:
    """Raises PlanError or SourceError now for what `_answers` would find only after half an hour."""
    if "eval" in lacking:
        raise PlanError(
            f"the questions in {rows} need the library {NEEDS['eval'][0]!r}, which is not installed",
            hint=f"pip install 'frankenmoe[{lacking['eval']}]', or leave --data-dir out",
        )
    from frankenmoe.evaluate.score import load_suite

    load_suite(SIX, data_dir=rows, limit=None)


def _answers(
    rows: Path | None, models: Mapping[str, Path], store: Path, progress: Progress
) -> tuple[dict[str, dict[str, float]], tuple[str, ...]]:
    """(title of each of the six tasks -> model -> its score on a few questions, why others failed).

    Answers in `store` are used again.
    """
    if rows is None:
        return {}, ()
    from frankenmoe.evaluate.run import evaluate
    from frankenmoe.evaluate.score import Scoring

    found: dict[str, dict[str, float]] = {}
    failed: list[str] = []
    for by_subject, limit in ((False, QUESTIONS), (True, 1)):
        group = [benchmark for benchmark in (BENCHMARKS[name] for name in SIX) if benchmark.by_subject is by_subject]
        report = evaluate(
            list(models.values()),
            tasks=tuple(benchmark.name for benchmark in group),
            data_dir=str(rows),
            limit=limit,
            scoring=Scoring(store=store),
            progress=progress,
        )
        for benchmark in group:
            values = [result.outcomes[benchmark.name].value for result in report.results]
            named = zip(models, values, strict=True)
            found[benchmark.title] = {name: value for name, value in named if value is not None}
        failed += report.errors
    return {BENCHMARKS[name].title: found[BENCHMARKS[name].title] for name in SIX}, tuple(failed)


def _changed(recipe: Recipe, data: Mapping[str, Any]) -> Recipe:
    return Recipe.parse(json.dumps(data), folder=recipe.folder, origin=recipe.origin)


def _own_shares(moe: MoE) -> Mapping[str, float]:
    """Domain -> share of (token, layer) pairs whose first expert is the domain's own."""
    tokenizer = moe.tokenizer()
    shares = {}
    for domain in DOMAINS:
        ids = tokenizer(held_out(domain), return_tensors="pt")["input_ids"][:, :256]
        with torch.no_grad():
            _, trace = moe.forward_with_trace(ids)
        own = moe.experts.index(domain)
        shares[domain] = mean(float((layer.ids_TK[:, 0] == own).float().mean()) for layer in trace.layers)
    return shares


def _stock_difference(built: Artifact) -> float:
    """The largest difference between our logits of the built MoE and those of stock transformers, in fp32."""
    with quiet_transformers():
        stock = AutoModelForCausalLM.from_pretrained(built.folder, dtype=torch.float32).eval()
    ours = load(built, dtype="float32")
    ids = ours.tokenizer()(held_out(DOMAINS[0]), return_tensors="pt")["input_ids"][:, :128]
    with torch.no_grad():
        return float((stock(input_ids=ids).logits - ours.model(input_ids=ids).logits).abs().max())
