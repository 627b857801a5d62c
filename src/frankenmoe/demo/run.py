"""The whole story on parents made here: plan, run without writing, measure, look at the routing, build, prove.

Every stage is the one that users call; knows nothing of terminals.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import yaml
from transformers import AutoModelForCausalLM

from frankenmoe.artifact import Artifact, open_artifact
from frankenmoe.building import build
from frankenmoe.demo.parents import make_parents
from frankenmoe.demo.text import DOMAINS, held_out, prompts
from frankenmoe.evaluate.perplexity import mean_loss
from frankenmoe.loading import load
from frankenmoe.moe.dense import quiet_transformers
from frankenmoe.moe.generate import Reply, reply
from frankenmoe.moe.load import MoE
from frankenmoe.planning import Plan, plan
from frankenmoe.progress import SILENT, Progress
from frankenmoe.prove import Check, verify
from frankenmoe.recipe import Recipe

RANDOM_SEEDS = 3
PROMPT = "def count_"
REPLY_TOKENS = 24


@dataclass(frozen=True)
class Story:
    """What the demo found. `losses` is row name -> domain -> nats per token on held-out text."""

    folder: Path
    recipe: Path
    plan: Plan
    losses: Mapping[str, Mapping[str, float]]
    own_share: Mapping[str, float]
    prompt: str
    reply: Reply = field(repr=False)
    checks: tuple[Check, ...]
    stock_difference: float
    artifacts: tuple[Artifact, ...] = field(repr=False)
    tokenizer: Any = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """The story as plain data."""
        return {
            "folder": str(self.folder),
            "recipe": str(self.recipe),
            "plan": self.plan.to_dict(),
            "held_out_loss": {name: dict(row) | {"mean": mean(row.values())} for name, row in self.losses.items()},
            "tokens_to_own_expert": dict(self.own_share),
            "prompt": self.prompt,
            "reply": self.reply.text,
            "checks": {check.what: check.found for check in self.checks},
            "largest_logit_difference_to_stock_transformers": self.stock_difference,
            "artifacts": {artifact.form: str(artifact.folder) for artifact in self.artifacts},
        }


def tell(out: Path, *, progress: Progress = SILENT) -> Story:
    """Runs the whole demo in the folder `out`; parents and artifacts that are there already are used again."""
    out = out.absolute()
    with quiet_transformers():
        parents = make_parents(out / "parents", on_progress=_parent_progress(progress))
    file = write_recipe(out / "recipe.yml", parents)
    recipe = Recipe.load(file)
    virtual = _artifact(recipe, out / "moe-virtual", virtual=True, progress=progress)
    moe = load(virtual)
    losses = dict(_losses(recipe, parents, moe, progress))
    built = _artifact(recipe, out / "moe", virtual=False, progress=progress)
    return Story(
        folder=out,
        recipe=file,
        plan=plan(recipe),
        losses=losses,
        own_share=_own_shares(moe),
        prompt=PROMPT,
        reply=reply(moe, moe.tokenizer(), [{"role": "user", "content": PROMPT}], max_new_tokens=REPLY_TOKENS),
        checks=verify(built.folder),
        stock_difference=_stock_difference(built, moe),
        artifacts=(virtual, built),
        tokenizer=moe.tokenizer(),
    )


def write_recipe(file: Path, parents: Mapping[str, Path]) -> Path:
    """The demo's recipe: one expert per domain, routers from eight short prompts each."""
    experts = [
        {"source_model": f"parents/{domain}", "name": domain, "positive_prompts": list(prompts(domain))}
        for domain in parents
        if domain in DOMAINS
    ]
    recipe = {
        "name": "demo",
        "base_model": "parents/base",
        "gate_mode": "hidden_avg",
        "experts_per_token": 2,
        "dtype": "bfloat16",
        "experts": experts,
    }
    file.write_text(yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, width=100))
    return file


def _parent_progress(progress: Progress) -> Any:
    def on_progress(parent: str, step: int, steps: int) -> None:
        if step == 1:
            progress.start(f"training {parent}", steps, "steps")
        progress.advance(1)

    return on_progress


def _artifact(recipe: Recipe, folder: Path, *, virtual: bool, progress: Progress) -> Artifact:
    """The artifact in `folder` if it was made from this recipe and these sources, else a new one."""
    if folder.is_dir():
        found = open_artifact(folder)
        if found.record["recipe"] == recipe.to_dict():
            return found
    return build(recipe, folder, virtual=virtual, progress=progress)


def _losses(
    recipe: Recipe, parents: Mapping[str, Path], moe: MoE, progress: Progress
) -> Iterator[tuple[str, Mapping[str, float]]]:
    """Row name -> loss per domain: the dense base and parents, then the MoE under different routers."""
    tokenizer = moe.tokenizer()
    progress.start("measuring", len(parents) + RANDOM_SEEDS + len(DOMAINS) + 1, "models")

    def row(model: Any, domains: tuple[str, ...] = DOMAINS) -> Mapping[str, float]:
        found = {domain: mean_loss(model, tokenizer, held_out(domain)) for domain in domains}
        progress.advance(1)
        return found

    for name, folder in parents.items():
        with quiet_transformers():
            yield f"dense {name}", row(AutoModelForCausalLM.from_pretrained(folder))
    plain = recipe.to_dict()
    drawn = [
        row(load(_changed(recipe, plain | {"gate_mode": "random", "seed": seed})).model) for seed in range(RANDOM_SEEDS)
    ]
    yield "MoE, random gates", {domain: mean(found[domain] for found in drawn) for domain in DOMAINS}
    yield "MoE, prompt gates", row(moe.model)
    forced: dict[str, float] = {}
    for expert in plain["experts"]:
        alone = plain | {"experts": [expert], "experts_per_token": 1, "gate_mode": "random"}
        forced |= row(load(_changed(recipe, alone)).model, (expert["name"],))
    yield "MoE, own expert forced", forced


def _changed(recipe: Recipe, data: Mapping[str, Any]) -> Recipe:
    return Recipe.parse(json.dumps(data), folder=recipe.folder, origin=recipe.origin)


def _own_shares(moe: MoE) -> Mapping[str, float]:
    """Per domain, the share of (token, layer) pairs whose first expert is the domain's own."""
    tokenizer = moe.tokenizer()
    shares = {}
    for domain in DOMAINS:
        ids = tokenizer(held_out(domain), return_tensors="pt")["input_ids"][:, :256]
        with torch.no_grad():
            _, trace = moe.forward_with_trace(ids)
        own = moe.experts.index(domain)
        shares[domain] = mean(float((layer.ids_TK[:, 0] == own).float().mean()) for layer in trace.layers)
    return shares


def _stock_difference(built: Artifact, moe: MoE) -> float:
    """Largest difference between the virtual MoE's logits and those of the built one in stock transformers, in fp32."""
    with quiet_transformers():
        stock = AutoModelForCausalLM.from_pretrained(built.folder, dtype=torch.float32).eval()
    tokenizer = moe.tokenizer()
    ids = tokenizer(held_out(DOMAINS[0]), return_tensors="pt")["input_ids"][:, :128]
    ours = load(built, dtype="float32").model
    with torch.no_grad():
        return float((stock(input_ids=ids).logits - ours(input_ids=ids).logits).abs().max())
