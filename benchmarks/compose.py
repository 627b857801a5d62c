"""Composing alone against `cp` of the same bytes, and twice as many bytes; knows nothing of what is in the files."""

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

from common import MB, Row, arguments, discarded, interleave, measure, publish, ratio, workspace
from sources import SHAPES

from build import FLOOR, OURS, prepare, run_and_discard, synced

LONGER = 3  # times as many layers: 20 GB at full scale
COMPOSE = """
import sys
from pathlib import Path
from frankenmoe.build.body import compose
from frankenmoe.planning import plan
from frankenmoe.recipe import Recipe
out = Path(sys.argv[2])
out.mkdir()
compose(plan(Recipe.load(sys.argv[1]), weights=True), out, shard_size=4 * 10**9, on_bytes=lambda count: None)
assert not {"torch", "transformers"} & set(sys.modules)
"""


def main() -> None:
    options = arguments("Compose 16 experts of one shape, and cp the result.", name="compose")
    shape = SHAPES[options.scale]
    with workspace(options.work) as work:
        recipe = prepare(work / "one", shape, sources=1, dtype="bfloat16")
        reference, out = work / "reference", work / "out"
        measure(synced(command(recipe), reference))  # also the warm-up
        turns = {
            OURS: partial(run_and_discard, command(recipe), out),
            FLOOR: partial(run_and_discard, ["cp", "-r", str(reference)], out),
        }
        runs = interleave(turns, rounds=options.rounds)
        size = total(reference)
        seconds = {name: [run.seconds for run in found] for name, found in runs.items()}
        anon = {name: [run.anon / MB for run in found] for name, found in runs.items()}
        with discarded(reference):
            pass
        longer = prepare(work / "longer", replace(shape, layers=LONGER * shape.layers), sources=1, dtype="bfloat16")
        with discarded(out):
            run = measure(synced(command(longer), out))
            per_byte = run.seconds / total(out) / (min(seconds[OURS]) / size)
        rows = [
            Row("compose: time against cp", ratio(seconds, OURS, to=FLOOR), "x", 0.5, seconds),
            Row("compose: anonymous memory", max(anon[OURS]), "MB", 100, anon),
            Row(f"compose, {LONGER} x the layers: time a byte", per_byte, "x", 1.2, {OURS: [run.seconds]}),
            Row(f"compose, {LONGER} x the layers: anonymous memory", run.anon / MB, "MB", 100, {OURS: [run.anon / MB]}),
        ]
        publish("compose", rows, options=options, work=work)


def command(recipe: Path) -> list[str]:
    """A process that composes and does nothing else, the output folder still to be added; it imports no torch."""
    return [sys.executable, "-c", COMPOSE, str(recipe)]


def total(folder: Path) -> int:
    """Bytes of the files in a folder."""
    return sum(file.stat().st_size for file in folder.iterdir())


if __name__ == "__main__":
    main()
