"""Building 16 experts against `cp` of the same bytes, time and memory; knows nothing of what is in the files."""

import argparse
import sys
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from common import MB, Row, Run, arguments, discarded, interleave, log, measure, publish, ratio, workspace
from sources import EXPERTS, SHAPES, Shape, make_source, write_recipe

OURS, FIRST, FLOOR, PEER = "frankenmoe", "frankenmoe, first build", "cp", "mergekit-moe"


@dataclass(frozen=True)
class Case:
    """What is built from what, and the most it may take: times `cp`, and MB of anonymous memory.

    `half` the layers: at the full scale 3.4 and not 6.9 GB.
    """

    name: str
    sources: int
    dtype: str
    times_cp: float
    anon_mb: float
    half: bool = False


CASES = (
    Case("bf16, one source", sources=1, dtype="bfloat16", times_cp=0.7, anon_mb=100),
    Case("bf16, half as large", sources=1, dtype="bfloat16", times_cp=1.0, anon_mb=100, half=True),
    Case("bf16, 16 sources", sources=EXPERTS, dtype="bfloat16", times_cp=0.7, anon_mb=100),
    Case("fp32 to bf16", sources=1, dtype="float32", times_cp=2.0, anon_mb=200),
)


def main() -> None:
    options = arguments("Build 16 experts of one shape, and cp the result.", name="build", more=_more)
    shape = SHAPES[options.scale]
    peer = not options.no_peer and find_spec("mergekit") is not None
    with workspace(options.work) as work:
        cases = [case for case in CASES if options.only in ("", case.name)]
        rows = [row for case in cases for row in race(case, shape, work=work, rounds=options.rounds, peer=peer)]
        if not options.only:
            rows += [four_times(shape, work=work), imports_alone()]
        publish("build", rows, options=options, work=work)


def _more(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", default="", choices=[case.name for case in CASES], help="one case")
    parser.add_argument("--no-peer", action="store_true", help="leave mergekit-moe out, which takes minutes a round")


def race(case: Case, shape: Shape, *, work: Path, rounds: int, peer: bool) -> list[Row]:
    """Ours, `cp` and, if `peer`, mergekit-moe in turns over the same sources; all leave synced bytes.

    The first build of a recipe has to ask transformers about it; a later one remembers the answer.
    """
    log(case.name)
    folder = work / "race"
    with discarded(folder):
        shape = replace(shape, layers=shape.layers // 2) if case.half else shape
        recipe = prepare(folder, shape, sources=case.sources, dtype=case.dtype)
        reference, out = folder / "reference", folder / "out"
        contestants = {
            OURS: build_command(recipe),
            FIRST: ["env", f"XDG_CACHE_HOME={out}-cache", *build_command(recipe)],
            FLOOR: ["cp", "-r", str(reference)],
        }
        if peer:
            contestants[PEER] = [sys.executable, "-m", "mergekit.scripts.moe", str(recipe)]
        measure(synced(contestants[OURS], reference))  # also the warm-up
        turns = {name: partial(run_and_discard, command, out) for name, command in contestants.items()}
        return rows_of(case, interleave(turns, rounds=rounds))


def four_times(shape: Shape, *, work: Path) -> Row:
    """The memory of one build, a first one, whose every weight matrix is four times as large."""
    log("four times as large")
    folder = work / "large"
    with discarded(folder):
        large = replace(shape, hidden=2 * shape.hidden, ffn=2 * shape.ffn)
        recipe = prepare(folder, large, sources=1, dtype="bfloat16")
        run = measure(synced(build_command(recipe), folder / "out"))
    return Row("4 x as large: first build's anonymous memory", run.anon / MB, "MB", 400, {FIRST: [run.anon / MB]})


def imports_alone() -> Row:
    """The anonymous memory of a process that could ask transformers and does not: the floor under a first build."""
    anon = measure([sys.executable, "-c", "import frankenmoe.build.agreement"]).anon / MB
    return Row("the imports alone: anonymous memory", anon, "MB", None, {OURS: [anon]})


def prepare(folder: Path, shape: Shape, *, sources: int, dtype: str) -> Path:
    """Writes the sources and the recipe over them; returns the recipe."""
    made = [make_source(folder / f"source-{seed}", shape, dtype=dtype, seed=seed) for seed in range(sources)]
    return write_recipe(folder / "recipe.yml", made)


def build_command(recipe: Path) -> list[str]:
    """Our build, the output folder still to be added: as a user starts it, Python and its imports included."""
    # 16 experts of one source are refused unless one says that one knows
    return [sys.executable, "-m", "frankenmoe.cli", "build", "--allow-identical", str(recipe)]


def synced(command: list[str], out: Path) -> list[str]:
    """`command OUT && sync -f OUT`: every contestant pays for its bytes to reach the disk."""
    return ["sh", "-c", 'out=$1; shift; "$@" "$out" && sync -f "$out"', "sh", str(out), *command]


def run_and_discard(command: list[str], out: Path) -> Run:
    """One turn, into a folder that does not exist before or after, nor does the cache beside it."""
    with discarded(out), discarded(out.with_name(f"{out.name}-cache")):
        return measure(synced(command, out))


def rows_of(case: Case, runs: dict[str, list[Run]]) -> list[Row]:
    """Time as a ratio of medians to `cp`; memory as the largest of all rounds."""
    seconds = {name: [run.seconds for run in found] for name, found in runs.items()}
    anon = {name: [run.anon / MB for run in found] for name, found in runs.items()}
    peer = ratio(seconds, PEER, to=FLOOR) if PEER in runs else None
    return [
        Row(f"{case.name}: time against cp", ratio(seconds, OURS, to=FLOOR), "x", case.times_cp, seconds),
        Row(f"{case.name}: first build against cp", ratio(seconds, FIRST, to=FLOOR), "x", None, {}),
        Row(f"{case.name}: anonymous memory", max(anon[OURS]), "MB", case.anon_mb, anon),
        Row(f"{case.name}: first build's anonymous memory", max(anon[FIRST]), "MB", case.anon_mb + 300, {}),
        Row(f"{case.name}: mergekit-moe's time against cp", peer, "x", None, {}),
        Row(f"{case.name}: mergekit-moe's memory", max(anon[PEER]) if PEER in runs else None, "MB", None, {}),
    ]


if __name__ == "__main__":
    main()
