"""Makes the parents of benchmarks/real.py in the user's cache: a base and its fine-tunes, each once.

A run goes on where a killed one stopped. Two processes of one thread each are faster than one of two.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from common import log

DOMAINS = 4  # whose parents most rows use; the others serve the row with eight
# domains on which as much training as far ones get still helps: on Python and Shakespeare it ends above the base's loss
FAR = ("french", "math")


@dataclass(frozen=True)
class Wanted:
    """A fine-tune: its strength (a key of TUNINGS), domain and seed."""

    strength: str
    domain: str
    seed: int = 0

    @property
    def name(self) -> str:
        """Its folder below the cache's: `near/french`, of another seed `near-1/french`."""
        return f"{self.strength}-{self.seed}/{self.domain}" if self.seed else f"{self.strength}/{self.domain}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", help="strengths, comma between (default: all)")
    parser.add_argument("--seeds", type=int, default=1, help="seeds of the near fine-tunes (default: 1)")
    parser.add_argument("--jobs", type=int, default=2, help="processes of one thread (default: 2)")
    parser.add_argument("--log", type=Path, help="also append a line to this file for each parent that is finished")
    parser.add_argument("--one", nargs=3, metavar=("STRENGTH", "DOMAIN", "SEED"), help="make one parent, here")
    options = parser.parse_args()
    if options.one:
        strength, domain, seed = options.one
        make_one(Wanted(strength, domain, int(seed)), options.log)
    else:
        make(plan(options.only.split(",") if options.only else None, seeds=options.seeds), options.jobs, options.log)


def plan(only: Sequence[str] | None = None, *, seeds: int = 1) -> list[Wanted]:
    """Every parent, those first that most rows need."""
    from real_text import texts

    from frankenmoe.demo.real import real_folder

    domains = list(texts(real_folder() / "texts"))
    first, more = domains[:DOMAINS], domains[DOMAINS:]
    far = far_domains(domains)
    wanted = [Wanted(strength, domain) for strength in ("near", "near-lora") for domain in first]
    wanted += [Wanted("far", domain) for domain in far] + [Wanted("near", domain) for domain in more]
    wanted += [Wanted("far-lora", domain) for domain in far]
    wanted += [Wanted("near", domain, seed) for seed in range(1, seeds) for domain in first]
    return [each for each in wanted if only is None or each.strength in only]


def far_domains(domains: Sequence[str]) -> list[str]:
    """The domains of far fine-tunes; of generated text, all of the first."""
    return [domain for domain in FAR if domain in domains] or [*domains[:DOMAINS]]


def make(wanted: Sequence[Wanted], jobs: int = 2, logfile: Path | None = None) -> None:
    """Makes those of `wanted` that are not there, `jobs` at a time; says how many are left and for how long."""
    from real_text import texts

    from frankenmoe.demo.real import TUNINGS, is_made, make_base, real_folder

    root = real_folder()
    base, known = make_base(root / "base"), texts(root / "texts")
    wanted = [
        each
        for each in wanted
        if not is_made(
            root / each.name, base=base, text=known[each.domain], tuning=TUNINGS[each.strength], seed=each.seed
        )
    ]
    begun, done = time.monotonic(), 0

    def run(each: Wanted) -> None:
        nonlocal done
        arguments = ["--one", each.strength, each.domain, str(each.seed)] + (["--log", str(logfile)] if logfile else [])
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        subprocess.run([sys.executable, __file__, *arguments], check=True, env=environment)
        done += 1
        spent = time.monotonic() - begun
        left = spent / done * (len(wanted) - done)
        log(f"{done} of {len(wanted)}: {each.name}; {spent / done:.0f} s each, {left:.0f} s left")

    with ThreadPoolExecutor(jobs) as pool:
        for _ in pool.map(run, wanted):
            pass


def make_one(each: Wanted, logfile: Path | None) -> None:
    """Makes one parent in this process; a line a step where stderr is a terminal."""
    import torch
    from real_text import texts

    from frankenmoe.cli.progress import bars
    from frankenmoe.demo.real import TUNINGS, make_tuned, real_folder

    torch.set_num_threads(1)
    root = real_folder()
    with bars() as progress:
        made = make_tuned(
            root / each.name,
            base=root / "base",
            text=texts(root / "texts")[each.domain],
            tuning=TUNINGS[each.strength],
            seed=each.seed,
            progress=progress,
        )
    apart = ", ".join(f"{group} {distance:.2%}" for group, distance in made.distances.items())
    line = f"{each.name}: base {made.base_loss:.3f}, parent {made.loss:.3f}; apart {apart}; {made.seconds:.0f} s"
    log(line)
    if logfile:
        with logfile.open("a") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    main()
