"""A frankenMoE of real parents beside every dense merge of them: what is kept of what each fine-tune learnt.

Makes its parents first (benchmarks/real_parents.py). Every group of rows is kept as a file under --runs, so that a
killed run goes on where it stopped. Sets of parents are measured side by side, in processes that share the cores.
Models run in bf16, as the parents are stored; losses are of float32 logits. The parents that the project ships as toys
are measured in float32.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from common import RESULTS, Row, log, publish, workspace
from real_bed import SCALES, SHARED, Bed, Parents
from real_costs import COSTS
from real_parents import DOMAINS, Wanted, far_domains, make
from real_peers import PEERS
from real_rows import ROWS
from real_text import texts

from frankenmoe.demo.real import real_folder

GROUPS = {**ROWS, **COSTS, **PEERS}
# set of parents -> the groups of rows that are measured on it
QUICK = {"near": ("dense", "backbones", "healed", "fitted")}
WHOLE = {
    "near": ("dense", "backbones", "healed", "routers", "product", "extracted", "fit-cost", "memory", "mergekit"),
    "far": ("dense", "backbones", "healed", "product"),
    "near-lora": ("lora",),
    "near-8": ("eight",),
    "toys": ("dense", "backbones", "healed", "product"),
    "near-1": ("dense", "backbones", "healed", "product"),
    "near-2": ("dense", "backbones", "healed", "product"),
}
TOYS = ("french", "math", "python", "shakespeare")


def main() -> None:
    options = _options()
    wanted = QUICK if options.quick else WHOLE
    if options.parents:
        wanted = {name: WHOLE[name] for name in options.parents.split(",")}
    if options.only:
        wanted = dict.fromkeys(wanted, tuple(options.only.split(",")))
    with workspace(options.work) as work:
        if options.part:
            for name, groups in wanted.items():
                measured(name, groups, options, work)
            return
        if not options.kept:
            side_by_side(wanted, options)
        files = [
            (name, options.runs / f"{options.scale}-{name}-{group}.json") for name in wanted for group in wanted[name]
        ]
        table = [
            row for name, kept in files if kept.exists() for row in named(name, json.loads(kept.read_text())["rows"])
        ]
        table += medians(table)
        publish("real", table, options=options, work=work)
    for row in table:
        if row.value is None:
            print(f"{row.what}: {row.note}")


def measured(name: str, groups: Sequence[str], options: argparse.Namespace, work: Path) -> None:
    """Measures the groups of one set of parents that are not kept yet."""
    bed: Bed | None = None
    for group in groups:
        kept = options.runs / f"{options.scale}-{name}-{group}.json"
        if complete(kept):
            continue
        bed = bed or Bed(
            parents(name, jobs=options.jobs),
            SCALES[options.scale],
            work,
            options.runs / f"{options.scale}-{name}",
            options.device,
        )
        log(f"  {name}: {group}")
        begun = time.perf_counter()
        rows = [asdict(row) for row in GROUPS[group](bed)]
        kept.parent.mkdir(parents=True, exist_ok=True)
        partial = kept.with_suffix(".partial")
        partial.write_text(json.dumps({"seconds": time.perf_counter() - begun, "rows": rows}, indent=2))
        partial.replace(kept)  # a killed run leaves a whole file, or none


def side_by_side(wanted: Mapping[str, Sequence[str]], options: argparse.Namespace) -> None:
    """Measures every set of parents in a process of its own, `--jobs` at a time; their parents are made before."""
    for name in wanted:
        parents(name, jobs=options.jobs)
    jobs = min(options.jobs, len(wanted))
    environment = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs)), **os.environ}

    def run(name: str) -> None:
        words = [sys.executable, __file__, *sys.argv[1:], "--part", "--parents", name, "--only", ",".join(wanted[name])]
        subprocess.run(words, check=True, env=environment)

    with ThreadPoolExecutor(jobs) as pool:
        for _ in pool.map(run, wanted):
            pass


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="ten minutes on 2 cores: near parents, less text")
    parser.add_argument("--smoke", action="store_true", help="almost no text: whether it runs at all")
    parser.add_argument("--only", help=f"these groups of rows, comma between: {', '.join(GROUPS)}")
    parser.add_argument("--parents", help=f"these sets of parents, comma between: {', '.join(WHOLE)}")
    parser.add_argument("--device", default="cpu", help="where models run, such as cuda (default: cpu)")
    parser.add_argument("--jobs", type=int, default=2, help="sets of parents at a time (default: 2)")
    parser.add_argument("--runs", type=Path, default=Path(tempfile.gettempdir()) / "frankenmoe-real")
    parser.add_argument("--kept", action="store_true", help="measure nothing: the rows that are kept")
    parser.add_argument("--part", action="store_true", help=argparse.SUPPRESS)  # a process of `side_by_side`
    parser.add_argument("--work", type=Path, help="folder for temporary models (default: the temporary folder)")
    parser.add_argument("--out", type=Path, help="JSON file (default: benchmarks/results/real-SCALE.json)")
    options = parser.parse_args()
    unknown = {*(options.only or "").split(",")} - {"", *GROUPS} | {*(options.parents or "").split(",")} - {"", *WHOLE}
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    options.scale = "smoke" if options.smoke else "quick" if options.quick else "whole"
    options.rounds = 1
    options.out = options.out or RESULTS / f"real-{'full' if options.scale == 'whole' else options.scale}.json"
    return options


def parents(name: str, *, jobs: int) -> Parents:
    """A set of parents by name; what is missing of it is made."""
    if name == "toys":
        models, folder = SHARED / "models", SHARED / "text"
        experts = {domain: models / f"expert-{domain}" for domain in TOYS}
        return Parents(name, models / "base", experts, dict.fromkeys(TOYS, folder), dtype="float32")
    root = real_folder()
    domains = list(texts(root / "texts"))
    strength, _, which = name.partition("-")
    if which == "lora":
        strength, which = name, ""
    seed = int(which) if which in ("1", "2") else 0
    count = int(which) if which == "8" else DOMAINS
    chosen = far_domains(domains) if strength.startswith("far") else domains[:count]
    wanted = [Wanted(strength, domain, seed) for domain in chosen]
    make(wanted, jobs)
    folders: Mapping[str, Path] = {each.domain: root / each.name for each in wanted}
    return Parents(name, root / "base", folders, dict.fromkeys(folders, root / "texts"))


def named(name: str, rows: list[dict[str, Any]]) -> list[Row]:
    """Rows of a set of parents. Only those of near parents have something to reach; the others are reported."""
    free = {} if name.startswith("near") else {"limit": None, "at_least": None}
    return [Row(**{**row, **free, "what": f"{name}: {row['what']}"}) for row in rows]


def complete(kept: Path) -> bool:
    """Whether a group's rows are kept and all have values; others are tried again, such as after an update."""
    return kept.is_file() and all(row["value"] is not None for row in json.loads(kept.read_text())["rows"])


def medians(table: list[Row]) -> list[Row]:
    """The median over the fine-tunes' seeds of every row that was measured for more than one."""
    seeds = ("near", "near-1", "near-2")
    by_row: dict[str, list[Row]] = {}
    for row in table:
        name, _, what = row.what.partition(": ")
        if name in seeds and row.value is not None:
            by_row.setdefault(what, []).append(row)
    found = []
    for what, rows in by_row.items():
        if len(rows) > 1:
            values = [row.value for row in rows if row.value is not None]
            first = rows[0]
            middle = statistics.median(values)
            found.append(
                Row(
                    f"median of {len(values)}: {what}",
                    middle,
                    first.unit,
                    first.limit,
                    {"seeds": values},
                    first.at_least,
                )
            )
    return found


if __name__ == "__main__":
    main()
