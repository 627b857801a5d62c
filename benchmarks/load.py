"""Loading a virtual MoE of 16 equal experts against loading its dense source, time and memory, in fresh processes."""

import json
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from common import MB, Row, arguments, interleave, measure, publish, ratio, workspace
from sources import SHAPES, make_source, write_recipe

import frankenmoe as fm

ONCE = Path(__file__).parent / "load_once.py"
OURS, FLOOR = "virtual", "dense"
# what is compared: its words, its key in load_once.py's answer, the most it may be, and the unit of its samples
MEASURES = (
    ("time against the dense source", "seconds", 1.5, 1),
    ("peak memory of the process", "peak", 1.2, MB),
    ("peak memory since the imports", "grown", 1.2, MB),
)
Facts = Mapping[str, Mapping[str, float]]


def main() -> None:
    options = arguments("Load a virtual MoE, and its dense source with transformers.", name="load")
    with workspace(options.work) as work:
        source = make_source(work / "source", SHAPES[options.scale], dtype="bfloat16")
        recipe = write_recipe(work / "recipe.yml", [source])
        fm.build(recipe, work / "virtual", virtual=True, allow_identical=True)
        turns = {OURS: partial(load_once, OURS, work / "virtual"), FLOOR: partial(load_once, FLOOR, source)}
        for turn in turns.values():
            turn()  # the files are in the page cache from here on
        rows = rows_of(interleave(turns, rounds=options.rounds))
        publish("load", rows, options=options, work=work)


def load_once(form: str, folder: Path) -> Facts:
    """What load_once.py measured of itself in a fresh process."""
    facts: Facts = json.loads(measure([sys.executable, str(ONCE), form, str(folder)]).stdout)
    return facts


def rows_of(facts: Mapping[str, list[Facts]]) -> list[Row]:
    """Ratios of medians, up to where the model is loaded and up to its first logits."""
    return [
        Row(f"{stage}: {what}", ratio(samples, OURS, to=FLOOR), "x", limit, samples)
        for stage in ("loaded", "first logits")
        for what, key, limit, divisor in MEASURES
        for samples in [{form: [found[stage][key] / divisor for found in runs] for form, runs in facts.items()}]
    ]


if __name__ == "__main__":
    main()
