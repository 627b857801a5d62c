"""How far routers come that nobody trained: from random gates (0 %) to every text's own expert forced (100 %).

On the four parents of real text beside the checkout, held-out loss of the whole held-out files, top-2. A round is a
seed: of the random gates, of the prompts (8 of 48 tokens per expert), of where the 32k tokens of data begin.
"""

import json
import random
import shutil
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from common import REPOSITORY, Row, arguments, installed, log, publish, workspace
from transformers import AutoModelForCausalLM, AutoTokenizer

import frankenmoe as fm
from frankenmoe.evaluate.perplexity import mean_loss
from frankenmoe.gates.forcing import forced, set_gates
from frankenmoe.moe.dense import quiet_transformers

SHARED = REPOSITORY.parent / "shared"
DOMAINS = ("shakespeare", "math", "french", "python")
# tokens of context the loss is measured in: dense losses are then near those that were known before; see docs/log.md,
# since routers close less of the gap at 128
BLOCK = 256
PROMPTS, PROMPT_TOKENS, DATA_TOKENS = 8, 48, 32_768
FROM_PROMPTS = ("centroid", "lda", "ridge", "logistic")
FROM_DATA = ("ridge", "logistic", "regret")
PEER = ("hidden", "hidden_avg")
CHARACTERS = {"smoke": 1500, "small": 15_000, "full": None}  # of each held-out file
Losses = dict[str, float]


def main() -> None:
    options = arguments(
        "Fit routers in closed form, a seed a round.",
        name="routers-fit",
        more=lambda parser: parser.add_argument(
            "--only", help="this contestant alone; the others' losses stay as they are kept in the JSON file"
        ),
    )
    before = kept_rounds(options.out) if options.only else [{} for _ in range(options.rounds)]
    lab = Lab(characters=CHARACTERS[options.scale])
    fixed = {"dense base": lab.dense("base"), "parents, own text": lab.parents(), "own expert forced": lab.own_expert()}
    wanted, rounds = options.rounds, list[Losses]()
    with workspace(options.work) as work:
        for seed in range(wanted):
            tokens = DATA_TOKENS if options.scale == "full" else 2048
            rounds.append(before[seed] | dict(lab.seed(seed, work, tokens=tokens, only=options.only)))
            log(f"seed {seed}: {rounds[-1]}")
            options.rounds = len(rounds)  # what is kept says how many seeds it is of, also if the run is cut short
            if options.only and seed + 1 < wanted:
                continue  # the others' later seeds would be lost
            publish("routers-fit", rows(fixed, rounds), options=options, work=work)


def kept_rounds(file: Path) -> list[Losses]:
    """Every contestant's losses, seed by seed, from the JSON of an earlier run."""
    prefix = "held-out loss: "
    found = {row["what"].removeprefix(prefix): row for row in json.loads(file.read_text())["rows"]}
    losses = {
        name: next(iter(row["samples"].values())) for name, row in found.items() if row["what"].startswith(prefix)
    }
    seeds = max(map(len, losses.values()))
    return [{name: each[seed] for name, each in losses.items() if len(each) == seeds} for seed in range(seeds)]


def rows(fixed: Losses, rounds: Sequence[Losses]) -> list[Row]:
    """Losses, then what each method leaves of the gap, then the share of the parents' advantage that it recovers."""
    found = [Row(f"held-out loss: {name}", loss, "nats", None, {name: [loss]}) for name, loss in fixed.items()]
    samples = {name: [each[name] for each in rounds] for name in rounds[0]}
    found += [
        Row(f"held-out loss: {name}", statistics.mean(losses), "nats", None, {name: losses})
        for name, losses in samples.items()
    ]
    chance, own = statistics.mean(samples["random gates"]), fixed["own expert forced"]
    limits = {f"prompts, {FROM_PROMPTS[-1]}": 20.0, f"data, {FROM_DATA[-1]}": 10.0}
    for name, losses in samples.items():
        left = [100 * (loss - own) / (chance - own) for loss in losses]
        if name != "random gates":
            found.append(Row(f"gap left open: {name}", statistics.mean(left), "%", limits.get(name), {name: left}))
    base, parents = fixed["dense base"], fixed["parents, own text"]
    for name, losses in {**samples, "own expert forced": [own]}.items():
        kept = [100 * (base - loss) / (base - parents) for loss in losses]
        found.append(Row(f"parents' advantage kept: {name}", statistics.mean(kept), "%", None, {name: kept}))
    return found


class Lab:
    """The parents, their text, and an MoE of them whose gates can be exchanged."""

    def __init__(self, *, characters: int | None) -> None:
        self.models = SHARED / "models"
        if not self.models.is_dir():
            raise SystemExit(f"{self.models} is not there: this benchmark needs the parents trained on real text")
        self.tokenizer = AutoTokenizer.from_pretrained(self.models / "base")
        self.held_out = {domain: self.text(domain, "heldout")[:characters] for domain in DOMAINS}
        self.train = {
            domain: self.tokenizer(self.text(domain, "train"), add_special_tokens=False, verbose=False)["input_ids"]
            for domain in DOMAINS
        }

    def text(self, domain: str, part: str) -> str:
        return (SHARED / "text" / f"{domain}.{part}.txt").read_text(encoding="utf-8")

    def loss(self, model: Any, domains: Sequence[str] = DOMAINS) -> float:
        return statistics.mean(
            mean_loss(model, self.tokenizer, self.held_out[domain], block=BLOCK) for domain in domains
        )

    def dense(self, name: str, domains: Sequence[str] = DOMAINS) -> float:
        with quiet_transformers():
            model = AutoModelForCausalLM.from_pretrained(self.models / name, dtype=torch.float32).eval()
        return self.loss(model, domains)

    def parents(self) -> float:
        return statistics.mean(self.dense(f"expert-{domain}", (domain,)) for domain in DOMAINS)

    def recipe(self, texts: Mapping[str, Mapping[str, Any]], **keys: Any) -> fm.Recipe:
        experts = [
            {"source_model": str(self.models / f"expert-{domain}"), "name": domain, **texts.get(domain, {})}
            for domain in DOMAINS
        ]
        plain = {"base_model": str(self.models / "base"), "experts_per_token": 2, "experts": experts, **keys}
        return fm.Recipe.parse(yaml.safe_dump(plain), folder=self.models, origin="routers.py")

    def own_expert(self) -> float:
        moe = fm.load(self.recipe({}, gate_mode="random"), dtype="float32")
        found = []
        for index, domain in enumerate(DOMAINS):
            with forced(moe.model, (index,)):
                found.append(self.loss(moe.model, (domain,)))
        return statistics.mean(found)

    def seed(self, seed: int, work: Path, *, tokens: int, only: str | None) -> Iterator[tuple[str, float]]:
        """Every contestant's name and held-out loss for one seed."""
        if only is None:
            yield from self.unfitted(seed)
        prompts = self.all_prompts(seed)
        data = {domain: {"data": [str(self.data(domain, seed, work, tokens))]} for domain in DOMAINS}
        for title, texts, modes in (("prompts", prompts, FROM_PROMPTS), ("data", data, FROM_DATA)):
            for mode in modes:
                if only in (None, f"{title}, {mode}"):
                    yield f"{title}, {mode}", self.fitted(self.recipe(texts, gate_mode=mode), work / "moe")

    def unfitted(self, seed: int) -> Iterator[tuple[str, float]]:
        """Random gates, and mergekit's own."""
        chance = fm.load(self.recipe({}, gate_mode="random", seed=seed), dtype="float32")
        yield "random gates", self.loss(chance.model)
        for mode in PEER if installed("mergekit") else ():
            set_gates(chance.model, {(): peer_gates(self.models / "base", self.all_prompts(seed), mode)})
            yield f"mergekit {mode}", self.loss(chance.model)

    def all_prompts(self, seed: int) -> dict[str, dict[str, list[str]]]:
        return {domain: {"positive_prompts": self.prompts(domain, seed)} for domain in DOMAINS}

    def fitted(self, recipe: fm.Recipe, folder: Path) -> float:
        """The held-out loss of what `frankenmoe fit` makes of a recipe, gates rounded as they are on disk."""
        try:
            return self.loss(fm.load(fm.fit(recipe, folder).artifact, dtype="float32").model)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def prompts(self, domain: str, seed: int) -> list[str]:
        ids, draw = self.train[domain], random.Random(f"prompts {seed} {domain}")
        starts = [draw.randrange(len(ids) - PROMPT_TOKENS) for _ in range(PROMPTS)]
        return [self.tokenizer.decode(ids[start : start + PROMPT_TOKENS]) for start in starts]

    def data(self, domain: str, seed: int, work: Path, tokens: int) -> Path:
        ids, draw = self.train[domain], random.Random(f"data {seed} {domain}")
        start = draw.randrange(len(ids) - tokens)
        file = work / f"{domain}-{seed}.txt"
        file.write_text(self.tokenizer.decode(ids[start : start + tokens]), encoding="utf-8")
        return file


def peer_gates(base: Path, prompts: Mapping[str, Mapping[str, Any]], mode: str) -> list[torch.Tensor]:
    """The gates that mergekit-moe itself computes, [E, D] per layer, set up as its command does it."""
    from mergekit.common import ModelReference
    from mergekit.moe.config import Expert
    from mergekit.moe.router import get_gate_params

    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.padding_side, tokenizer.pad_token_id = "left", tokenizer.bos_token_id
    reference = ModelReference.parse(str(base))
    experts = [Expert(source_model=reference, positive_prompts=text["positive_prompts"]) for text in prompts.values()]
    with quiet_transformers():
        return list(get_gate_params(reference, tokenizer, experts, mode=mode, device="cpu").float())


if __name__ == "__main__":
    main()
