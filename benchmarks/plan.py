"""Planning Raiden's shape in a cold process, and what that imports; knows nothing of what the plan says."""

import statistics
import subprocess
import sys
from functools import partial

from common import ENVIRONMENT, REPOSITORY, Row, arguments, interleave, measure, publish, ratio, workspace

RECIPE = REPOSITORY / "recipes" / "raiden-16x3.43b.yml"
PLAN = ["-m", "frankenmoe.cli", "plan", str(RECIPE)]
OURS, FLOOR = "frankenmoe", "python"


def main() -> None:
    options = arguments("Plan 16 x 3.43B, each time in a new process.", name="plan")
    turns = {
        OURS: partial(measure, [sys.executable, *PLAN]),
        FLOOR: partial(measure, [sys.executable, "-c", "pass"]),
    }
    turns[OURS]()  # the first one may have to compile its modules
    runs = interleave(turns, rounds=options.rounds)
    seconds = {name: [run.seconds for run in found] for name, found in runs.items()}
    heavy = modules_of("torch")
    rows = [
        Row("plan of Raiden's shape, cold process", statistics.median(seconds[OURS]), "s", 1.0, seconds),
        Row("modules of torch that it imports", len(heavy), "", 0, {OURS: [len(heavy)]}),
        Row("its time against an empty Python", ratio(seconds, OURS, to=FLOOR), "x", None, seconds),
    ]
    with workspace(options.work) as work:
        publish("plan", rows, options=options, work=work)


def modules_of(package: str) -> list[str]:
    """The modules of `package` that planning imports, as the interpreter itself lists them."""
    command = [sys.executable, "-X", "importtime", *PLAN]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=ENVIRONMENT)
    names = [line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")]
    return [name for name in names if name.partition(".")[0] == package]


if __name__ == "__main__":
    main()
