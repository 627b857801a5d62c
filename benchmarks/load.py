"""Loading a virtual MoE against its dense source and through transformers, and a built MoE against stock transformers.

Every load is in a fresh process.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from common import MB, Row, arguments, interleave, measure, publish, ratio, workspace
from sources import SHAPES, Shape, make_source, write_recipe

import frankenmoe as fm

ONCE = Path(__file__).parent / "load_once.py"
OURS, STOCK, AUTO = "ours", "stock", "auto"
# the MoE whose built form is loaded: 3.3 GB at full scale, nearly all of it experts
BUILT = {
    "smoke": SHAPES["smoke"],
    "small": Shape(hidden=512, ffn=1408, layers=3, vocab=4096),
    "full": Shape(hidden=2048, ffn=5504, layers=3, vocab=4096),
}
STAGES = ("loaded", "first logits", "32 tokens more")  # the first of one token, which touches few experts
# what is compared: its words, its key in load_once.py's answer, the most it may be, and the unit of its samples
MEASURES = (
    ("time against the dense source", "seconds", 1.5, 1),
    ("peak memory of the process", "peak", 1.2, MB),
    ("peak memory since the imports", "grown", 1.2, MB),
)
Facts = Mapping[str, Mapping[str, float]]


def main() -> None:
    options = arguments("Load MoEs, their dense source and stock transformers' MoE.", name="load")
    with workspace(options.work) as work:
        rows = [*virtual(options, work / "virtual"), *built(options, work / "built")]
        publish("load", rows, options=options, work=work)


def virtual(options: argparse.Namespace, work: Path) -> list[Row]:
    """A virtual MoE of 16 equal experts beside its dense source, and by AutoModelForCausalLM: ratios of medians."""
    source = make_source(work / "source", SHAPES[options.scale], dtype="bfloat16")
    recipe = write_recipe(work / "recipe.yml", [source])
    fm.build(recipe, work / "moe", virtual=True, allow_identical=True)
    facts = race({OURS: work / "moe", STOCK: source, AUTO: work / "moe"}, rounds=options.rounds)
    auto = [
        Row(f"{stage}: from_pretrained against frankenmoe.load", ratio(seconds, AUTO, to=OURS), "x", 1.1, seconds)
        for stage in STAGES
        for seconds in [_samples(facts, stage, "seconds", 1)]
    ]
    return auto + [
        Row(f"{stage}: {what}", ratio(samples, OURS, to=STOCK), "x", limit, samples)
        for stage in STAGES
        for what, key, limit, divisor in MEASURES
        for samples in [_samples(facts, stage, key, divisor)]
    ]


def built(options: argparse.Namespace, work: Path) -> list[Row]:
    """A built MoE of 16 experts, by us and by stock transformers: times, and memory in percent of the files."""
    sources = [
        make_source(work / f"source-{seed}", BUILT[options.scale], dtype="bfloat16", seed=seed) for seed in range(2)
    ]
    moe = fm.build(write_recipe(work / "recipe.yml", sources), work / "moe").folder
    percent = sum(file.stat().st_size for file in moe.glob("*.safetensors")) / 100
    facts = race({OURS: moe, STOCK: moe}, rounds=options.rounds)
    rows = []
    for stage in STAGES:
        seconds, anon = _samples(facts, stage, "seconds", 1), _samples(facts, stage, "anon", percent)
        limits = (1 / 10, 5) if stage == "first logits" else (None, None)
        rows += [
            Row(f"built, {stage}: time against stock", ratio(seconds, OURS, to=STOCK), "x", limits[0], seconds),
            Row(f"built, {stage}: anonymous memory, of the file", max(anon[OURS]), "%", limits[1], anon),
        ]
    return rows


def race(folders: Mapping[str, Path], *, rounds: int) -> dict[str, list[Facts]]:
    """Loader -> what every round took, the files in the page cache."""
    turns = {loader: partial(load_once, loader, folder) for loader, folder in folders.items()}
    for turn in turns.values():
        turn()
    return interleave(turns, rounds=rounds)


def load_once(loader: str, folder: Path) -> Facts:
    """What load_once.py measured of itself in a fresh process."""
    facts: Facts = json.loads(measure([sys.executable, str(ONCE), loader, str(folder)]).stdout)
    return facts


def _samples(facts: Mapping[str, list[Facts]], stage: str, key: str, divisor: float) -> dict[str, list[float]]:
    return {loader: [found[stage][key] / divisor for found in runs] for loader, runs in facts.items()}


if __name__ == "__main__":
    main()
