"""What the benchmarks share: processes measured from outside, rounds interleaved, results kept; knows none of them."""

import argparse
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

REPOSITORY = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
SCALES = ("smoke", "small", "full")
PACKAGES = (
    *("frankenmoe", "numpy", "safetensors", "torch", "transformers"),
    *("mergekit", "lm_eval", "gguf", "xllamacpp", "cyllama"),
)
MB = 10**6
INTERVAL = 0.02  # seconds between two looks at a process's memory
# Nothing here may wait for a network that a laptop has and a build machine has not.
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1"}
Result = TypeVar("Result")


@dataclass(frozen=True)
class Run:
    """One process and its children, seen from outside: wall time in seconds, peaks in bytes, and what it printed.

    The peaks are of /proc's RssAnon and RssFile, summed over the processes, each the largest of samples 20 ms apart.
    """

    seconds: float
    anon: int
    file: int
    stdout: str = field(repr=False)


@dataclass(frozen=True)
class Row:
    """A line of a result: `value` in `unit` against `limit`, the most it may be, or `at_least`; None: not measured, or
    nothing to reach. `note` says more, such as why it was not measured."""

    what: str
    value: float | None
    unit: str
    limit: float | None
    samples: Mapping[str, Sequence[float]]
    at_least: float | None = None
    note: str = ""

    @property
    def reached(self) -> bool | None:
        """Whether the value is within its limit; None where there is nothing to compare."""
        if self.value is None or (self.limit is None and self.at_least is None):
            return None
        return self.value <= self.limit if self.limit is not None else self.value >= (self.at_least or 0.0)


def arguments(
    description: str, *, name: str, more: Callable[[argparse.ArgumentParser], None] = lambda parser: None
) -> argparse.Namespace:
    """The options all benchmarks take: scale, rounds, work, out; `more` adds those of one of them."""
    parser = argparse.ArgumentParser(description=description)
    more(parser)
    parser.add_argument("--scale", choices=SCALES, default="small", help="only full counts (default: small)")
    parser.add_argument("--rounds", type=int, default=5, help="times each contestant runs (default: 5)")
    parser.add_argument("--work", type=Path, help="folder on the disk to measure (default: the temporary folder)")
    parser.add_argument("--out", type=Path, help=f"JSON file (default: benchmarks/results/{name}-SCALE.json)")
    options = parser.parse_args()
    options.out = options.out or RESULTS / f"{name}-{options.scale}.json"
    return options


@contextmanager
def workspace(parent: Path | None) -> Iterator[Path]:
    """An empty folder that is gone afterwards, also after an error, Ctrl-C or SIGTERM."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    try:
        with tempfile.TemporaryDirectory(prefix="frankenmoe-bench-", dir=parent) as folder:
            yield Path(folder)
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def discarded(folder: Path) -> Iterator[None]:
    """Removes `folder` afterwards and syncs, so that the next contestant does not pay for this one's disk traffic."""
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.sync()


def measure(command: Sequence[str]) -> Run:
    """Runs a command to its end; RuntimeError with its last words where it fails."""
    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
        begun = time.perf_counter()
        process = subprocess.Popen(command, stdout=stdout, stderr=stderr, env=ENVIRONMENT, start_new_session=True)
        try:
            with sampling(process.pid) as samples:
                process.wait()
                seconds = time.perf_counter() - begun
        finally:
            if process.poll() is None:  # we were interrupted: its children must not go on writing
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        stdout.seek(0)
        stderr.seek(0)
        if process.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{stderr.read()[-2000:]}")
        anon, file = (max(column) for column in zip(*samples, strict=True))
        return Run(seconds, anon, file, stdout.read())


@contextmanager
def sampling(pid: int) -> Iterator[list[tuple[int, int]]]:
    """Collects (RssAnon, RssFile) of a process and its children, in bytes, in a thread of its own."""
    samples, done = [resident(pid)], threading.Event()

    def watch() -> None:
        while not done.wait(INTERVAL):
            samples.append(resident(pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield samples
    finally:
        done.set()
        watcher.join()


def resident(pid: int) -> tuple[int, int]:
    """Bytes (RssAnon, RssFile) of a process and all its children; of one that has ended, none."""
    try:
        own = status(pid)
        children = [int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in _children(task)]
    except OSError:
        return 0, 0
    rows = [(own.get("RssAnon", 0), own.get("RssFile", 0)), *map(resident, children)]
    return sum(anon for anon, _ in rows), sum(file for _, file in rows)


def status(pid: int | str) -> dict[str, int]:
    """The memory lines of /proc/PID/status, in bytes."""
    lines = (line.split() for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if words[-1] == "kB"}


def _children(task: Path) -> list[str]:
    return (task / "children").read_text().split()


def interleave(contestants: Mapping[str, Callable[[], Result]], *, rounds: int) -> dict[str, list[Result]]:
    """Runs every contestant once a round, every other round in reverse, so that none always follows the same one."""
    found: dict[str, list[Result]] = {name: [] for name in contestants}
    for number in range(rounds):
        for name in list(contestants)[:: -1 if number % 2 else 1]:
            log(f"  round {number + 1} of {rounds}: {name}")
            found[name].append(contestants[name]())
    return found


def log(text: str) -> None:
    """Says on stderr what is going on; stdout is for results."""
    print(text, file=sys.stderr, flush=True)


def ratio(samples: Mapping[str, Sequence[float]], ours: str, *, to: str) -> float:
    """The median of one contestant's samples over the median of another's."""
    return statistics.median(samples[ours]) / statistics.median(samples[to])


def publish(name: str, rows: Sequence[Row], *, options: argparse.Namespace, work: Path) -> None:
    """Prints the rows in 80 columns; writes them, with all samples and the circumstances, to `options.out`."""
    result = {
        "benchmark": name,
        "scale": options.scale,
        "rounds": options.rounds,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "revision": revision(),
        "machine": machine(work),
        "versions": {"python": platform.python_version()} | {package: installed(package) for package in PACKAGES},
        "rows": [asdict(row) | {"reached": row.reached} for row in rows],
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    print(f"{name}, scale {options.scale}, {options.rounds} rounds")
    print(f"{'what':<52}{'value':>10}{'limit':>9}{'':>2}reached")
    for row in rows:
        value, least = spell(row.value, row.unit), goal(row.limit, row.at_least, row.unit)
        print(f"{row.what:<52}{value:>10}{least:>9}  {verdict(row.reached)}")
    print(f"kept in {options.out}")


def spell(value: float | None, unit: str) -> str:
    """A value as a table shows it: `1.07 x`, `244 MB`; without a unit it is a count."""
    if value is None:
        return "-"
    digits = {"x": 2, "s": 2, "ms": 2, "%": 2, "nats": 3}.get(unit, 0)
    if unit == "nats" and value < 0.001:  # differences of rounding
        return f"{value:.1e}"
    return f"{value:.{digits}f} {unit}".rstrip()


def goal(limit: float | None, at_least: float | None, unit: str) -> str:
    """What was to be reached: the most a value may be, or the least behind a `>`; a dash for nothing."""
    return spell(limit, unit) if at_least is None else f"> {spell(at_least, unit)}"


def verdict(reached: bool | None) -> str:
    """`yes`, `NO`, or a dash where nothing was to be reached."""
    return {True: "yes", False: "NO", None: "-"}[reached]


def installed(package: str) -> str | None:
    """The version of a package; None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def revision() -> str:
    """The commit of this checkout, with a mark if its code has been changed since."""
    commit = _git("rev-parse", "HEAD")
    return f"{commit} + changes" if _git("status", "--porcelain", "--", "src", "benchmarks/*.py") else commit


def _git(*words: str) -> str:
    done = subprocess.run(["git", *words], cwd=REPOSITORY, capture_output=True, text=True)
    return done.stdout.strip()


def machine(work: Path) -> dict[str, Any]:
    """What a reader must know of the computer, `work` being a folder on the disk that was written to."""
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "system": platform.platform(),
        "cpu": models[0].partition(":")[2].strip() if models else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "filesystem": subprocess.run(["stat", "-f", "-c", "%T", work], capture_output=True, text=True).stdout.strip(),
        "load_average": os.getloadavg(),
        "gpus": gpus(),
    }


def gpus() -> list[str]:
    """Name, memory, power limit and driver of every GPU, in the driver's own words."""
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=name,memory.total,power.limit,driver_version", "--format=csv,noheader"]
    return subprocess.run(query, capture_output=True, text=True).stdout.splitlines()
