"""What training wins back on four parents of real text: held-out loss of MoEs beside dense models trained alike.

Every run (a row and a seed) is kept as a file under --runs, so that a long benchmark can be split and goes on where it
stopped. Settings were chosen on a part of the training text; the held-out text is read here and nowhere else.
"""

import argparse
import json
import shutil
import statistics
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from common import REPOSITORY, Row, arguments, log, publish
from transformers import AutoModelForCausalLM, AutoTokenizer

import frankenmoe as fm
from frankenmoe.evaluate.perplexity import mean_loss
from frankenmoe.moe.dense import quiet_transformers
from frankenmoe.recipe.train import TrainSettings
from frankenmoe.train.run import train

SHARED = REPOSITORY.parent / "shared"
DOMAINS = ("french", "math", "python", "shakespeare")
COPIES = (*DOMAINS, "a", "b", "c", "d")
PROMPTS, PROMPT_TOKENS = 8, 48
CHARACTERS = {"smoke": 6000, "small": 20_000, "full": None}  # of each file of text
Losses = dict[str, float]


@dataclass(frozen=True)
class Run:
    """A recipe and how it is trained; `seeds` is how many runs make the row.

    `fitted` begins with gates fitted in closed form to the text that is trained on, in place of the recipe's.
    """

    recipe: Callable[[int], dict[str, Any]]
    settings: Mapping[str, Any] = field(default_factory=dict)
    seeds: int = 5
    fitted: bool = False


def main() -> None:
    options = _options()
    options.runs.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    names = list(RUNS) if options.only is None else options.only.split(",")
    found: dict[str, list[dict[str, Any]]] = {}
    for name in names:
        seeds = range(min(RUNS[name].seeds, options.rounds)) if options.seed is None else [options.seed]
        for seed in seeds:
            kept = options.runs / f"{name}-{seed}.json"
            if not kept.exists():
                if options.kept:
                    continue
                log(f"  {name}, seed {seed}")
                kept.write_text(json.dumps(measure(name, seed, scale=options.scale, work=options.work)))
            found.setdefault(name, []).append(json.loads(kept.read_text()))
            log(f"  {name}, seed {seed}: {statistics.fmean(found[name][-1]['loss'].values()):.4f}")
    if options.only is None:
        options.rounds = max(map(len, found.values()))  # seeds of the row that has most; `samples` has every one
        table = rows(found, scale=options.scale)
        if options.kept and options.out.exists():
            table = taken_over(json.loads(options.out.read_text())["rows"], table)
        publish("routers-train", table, options=options, work=options.runs)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--runs", type=Path, default=Path(tempfile.gettempdir()) / "frankenmoe-routers-train")
    parser.add_argument("--only", help="these runs, comma between, and no table")
    parser.add_argument("--seed", type=int, help="this seed alone")
    parser.add_argument(
        "--kept", action="store_true", help="run nothing: rows of the runs that are kept, others as they were"
    )
    own, rest = parser.parse_known_args()
    import sys

    sys.argv[1:] = rest
    options = arguments(__doc__ or "", name="routers-train")
    return argparse.Namespace(**vars(options), **vars(own))


def measure(name: str, seed: int, *, scale: str, work: Path | None) -> dict[str, Any]:
    """Trains (if the run says so) and measures on held-out text; everything but the numbers is thrown away."""
    run = RUNS[name]
    work = Path(tempfile.mkdtemp(prefix="frankenmoe-train-", dir=work))
    try:
        file, table = work / "recipe.yml", run.recipe(seed)
        data = {domain: [str(training_text(domain, scale=scale, folder=work))] for domain in DOMAINS}
        if run.fitted:
            table |= {"gate_mode": "logistic"}
            table["experts"] = [expert | {"data": data[expert["name"]]} for expert in table["experts"]]
        file.write_text(yaml.safe_dump(table, allow_unicode=True))
        if not run.settings:
            return {"loss": held_out(fm.load(file).model, scale=scale), "parameters": 0, "bytes": 0}
        settings: dict[str, Any] = {"guard_every": 100, "seed": seed, **run.settings}
        if scale != "full":
            settings |= {"steps": 2, "guard_blocks": 2}
        out, values = work / "out", TrainSettings.model_validate(settings)
        found = train(file, out, data=data, settings=values, keep_anyway=True)
        size = sum(each.stat().st_size for each in out.rglob("*.safetensors"))
        return {
            "loss": held_out(fm.load(found.artifact).model, scale=scale),
            "parameters": found.report["parameters"],
            "bytes": size,
            "validation": [[look["step"], look["mean"]] for look in found.report["looks"]],
            "largest_load": found.report["largest_load"],
        }
    finally:
        shutil.rmtree(work)


def training_text(domain: str, *, scale: str, folder: Path) -> Path:
    """The file to learn from; at other scales than full the beginning of it, in a file of its own."""
    whole = SHARED / "text" / f"{domain}.train.txt"
    if CHARACTERS[scale] is None:
        return whole
    part = folder / whole.name
    part.write_text(whole.read_text()[: CHARACTERS[scale]])
    return part


def held_out(model: Any, domains: tuple[str, ...] = DOMAINS, *, scale: str) -> Losses:
    """Nats per token of each domain's held-out text, in blocks of 128 tokens."""
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "models" / "base")
    texts = {domain: (SHARED / "text" / f"{domain}.heldout.txt").read_text() for domain in domains}
    return {domain: mean_loss(model, tokenizer, text[: CHARACTERS[scale]]) for domain, text in texts.items()}


def prompts(domain: str, seed: int) -> list[str]:
    """Eight prompts of 48 tokens from a domain's training text, others for every seed."""
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "models" / "base")
    text = (SHARED / "text" / f"{domain}.train.txt").read_text()
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    starts = torch.randint(len(ids) - PROMPT_TOKENS, (PROMPTS,), generator=torch.Generator().manual_seed(seed))
    return [tokenizer.decode(ids[start : start + PROMPT_TOKENS]) for start in starts.tolist()]


def moe(seed: int, gate_mode: str = "hidden_avg") -> dict[str, Any]:
    """The four parents' FFNs on the base's backbone, top-2."""
    experts = [
        {
            "source_model": str(SHARED / "models" / f"expert-{domain}"),
            "name": domain,
            "positive_prompts": prompts(domain, seed),
        }
        for domain in DOMAINS
    ]
    return _recipe(experts, gate_mode=gate_mode, seed=seed, experts_per_token=2)


def copies(seed: int) -> dict[str, Any]:
    """Eight experts that all are the base, top-2; four of them are called like the domains."""
    experts = [{"source_model": str(SHARED / "models" / "base"), "name": name} for name in COPIES]
    return _recipe(experts, gate_mode="uniform_random", seed=seed, experts_per_token=2)


def dense(_seed: int) -> dict[str, Any]:
    """The base alone, as an MoE of one expert."""
    return _recipe([{"source_model": str(SHARED / "models" / "base"), "name": "base"}], experts_per_token=1)


def forced(domain: str) -> dict[str, Any]:
    """The base with one parent's FFNs everywhere."""
    return _recipe([{"source_model": str(SHARED / "models" / f"expert-{domain}"), "name": domain}], experts_per_token=1)


def _recipe(experts: list[dict[str, Any]], *, gate_mode: str = "random", **keys: Any) -> dict[str, Any]:
    base = {"base_model": str(SHARED / "models" / "base"), "dtype": "float32", "gate_mode": gate_mode}
    return base | {"experts": experts} | keys


EVERYTHING = "routers,norms,attention,experts,embeddings"
RUNS: Mapping[str, Run] = {
    "random": Run(lambda seed: moe(seed, "random")),
    "hidden_avg": Run(moe),
    "routers": Run(
        moe,
        {"what": "routers", "steps": 200, "batch": 64, "accumulate": 4, "router_rate": 0.03},
        fitted=True,
    ),
    "backbone": Run(moe, {"what": "routers,attention,norms", "steps": 200, "rank": 16}),
    # one rank more than the MoE's, so that the dense base has at least as many numbers to learn
    "dense-backbone": Run(dense, {"what": "attention,norms", "steps": 200, "rank": 17}),
    "copies": Run(copies, {"what": "routers,adapters", "steps": 1000, "rank": 8, "domain": 0.1}),
    "dense-16": Run(dense, {"what": "adapters", "steps": 1000, "rank": 16}),
    "dense-64": Run(dense, {"what": "adapters", "steps": 1000, "rank": 64}),
    "everything": Run(
        moe,
        {
            "what": EVERYTHING,
            "steps": 2500,
            "batch": 16,
            "rank": 128,
            "distill": 1.0,
            "next_token": 0.0,
            "domain": 0.1,
        },
    ),
}


def references(*, scale: str) -> tuple[Losses, Losses, Losses]:
    """(base, every parent on its own text, own expert forced), domain by domain."""
    with quiet_transformers():
        parents = {
            name: AutoModelForCausalLM.from_pretrained(SHARED / "models" / name, dtype=torch.float32).eval()
            for name in ("base", *(f"expert-{domain}" for domain in DOMAINS))
        }
    own = {domain: held_out(parents[f"expert-{domain}"], (domain,), scale=scale)[domain] for domain in DOMAINS}
    oracle = {}
    for domain in DOMAINS:
        recipe = fm.Recipe.parse(json.dumps(forced(domain)), folder=Path.cwd(), origin="forced")
        oracle[domain] = held_out(fm.load(recipe).model, (domain,), scale=scale)[domain]
    return held_out(parents["base"], scale=scale), own, oracle


def rows(found: Mapping[str, list[dict[str, Any]]], *, scale: str) -> list[Row]:
    """The table. Losses are means over domains and seeds; a share of a gap or of an advantage is in percent."""
    base, own, oracle = (statistics.fmean(each.values()) for each in references(scale=scale))
    mean = {name: [statistics.fmean(run["loss"].values()) for run in runs] for name, runs in found.items()}
    random = statistics.fmean(mean["random"]) if "random" in mean else None
    table = [
        Row("held-out loss: dense base", base, "nats", None, {}),
        Row("held-out loss: parents, each on its own text", own, "nats", None, {}),
        Row("held-out loss: own expert forced", oracle, "nats", None, {}),
    ]
    for name, losses in mean.items():
        table.append(Row(f"{TITLES[name]}: loss", statistics.fmean(losses), "nats", None, {"loss": losses}))
        shares = [100 * (base - loss) / (base - own) for loss in losses]
        least = 60.0 if name == "everything" else None
        table.append(_at_least(f"{TITLES[name]}: of parents' advantage", shares, least))
        if random is not None and name in ("hidden_avg", "routers"):
            gaps = [100 * (random - loss) / (random - oracle) for loss in losses]
            table.append(_at_least(f"{TITLES[name]}: of the gap", gaps, 100.0 if name == "routers" else None))
    if "everything" not in found:
        what = f"{TITLES['everything']}: of parents' advantage"
        table.append(Row(what, None, "%", None, {}, at_least=60.0))
    table += _against(found, "backbone", "dense-backbone", every_domain=True)
    table += _against(found, "copies", "dense-16", every_domain=False)
    table += _against(found, "copies", "dense-64", every_domain=None)
    if "copies" in found:
        # float32 tensors of the adapters and the routers, and a little for the headers
        adapters = 4 * 8 * 8 * 4 * 3 * (192 + 512) + 4 * 4 * 8 * 192
        worth = [run["bytes"] / adapters for run in found["copies"]]
        table.append(Row("8 copies: virtual form against its adapters", max(worth), "x", 1.05, {"ratio": worth}))
    return table


def taken_over(before: list[dict[str, Any]], now: list[Row]) -> list[Row]:
    """The rows of an earlier result, those that are known anew replaced; rows of runs that there are no more go."""
    fresh = {row.what: row for row in now if row.value is not None}
    starts = ("held-out loss", *TITLES.values(), *(f"{name} below " for name in RUNS), "8 copies: virtual")
    earlier = {
        row["what"]: Row(**{key: value for key, value in row.items() if key != "reached"})
        for row in before
        if row["what"].startswith(starts)
    }
    return list((earlier | fresh).values())


TITLES = {
    "random": "random gates",
    "hidden_avg": "mergekit's hidden_avg",
    "routers": "routers, 200 steps",
    "backbone": "routers, attention, norms, 200",
    "dense-backbone": "dense: attention, norms, 200",
    "copies": "8 copies, adapters of rank 8",
    "dense-16": "dense, adapter of rank 16",
    "dense-64": "dense, adapter of rank 64",
    "everything": "everything, distilled, 2500",
}


def _at_least(what: str, values: list[float], least: float | None) -> Row:
    return Row(what, statistics.fmean(values), "%", None, {"percent": values}, at_least=least)


def _against(
    found: Mapping[str, list[dict[str, Any]]], ours: str, theirs: str, *, every_domain: bool | None
) -> list[Row]:
    """How much lower our loss is than that of the dense model trained alike: on the worst domain, or in the mean."""
    if not {ours, theirs} <= found.keys():
        return []
    gains = {
        domain: statistics.fmean(run["loss"][domain] for run in found[theirs])
        - statistics.fmean(run["loss"][domain] for run in found[ours])
        for domain in DOMAINS
    }
    value = min(gains.values()) if every_domain else statistics.fmean(gains.values())
    where = "worst domain" if every_domain else "mean"
    least = None if every_domain is None else 0.0
    return [
        Row(f"{ours} below {theirs}, {where}", value, "nats", None, {"by domain": list(gains.values())}, at_least=least)
    ]


if __name__ == "__main__":
    main()
