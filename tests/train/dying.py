"""A run of training in processes of its own, which kill themselves at a given step; asserts nothing.

Run as a script it is one such process: its one argument is the run as JSON.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from frankenmoe.progress import Progress
from frankenmoe.recipe.train import TrainSettings
from frankenmoe.train.run import train

CODE = """
import json, os, sys
os.environ |= json.loads(sys.argv[2])
from dying import main
main(*json.loads(sys.argv[1]))
"""


def run_apart(
    what: Path,
    out: Path,
    *,
    data: dict[str, list[str]],
    settings: TrainSettings,
    die: int | None = None,
    processes: int = 1,
    shard: bool = False,
    torchrun: bool = False,
) -> int:
    """The exit code of a run in so many processes; all of them die in step `die` + 1."""
    words = json.dumps([str(what), str(out), data, settings.to_dict(), shard and processes > 1, die])
    if torchrun:
        launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        done = subprocess.run([sys.executable, "-m", *launcher, __file__, words], capture_output=True, text=True)
        sys.stderr.write(done.stderr[-2500:])
        return done.returncode

    import forks  # not at the top, where torchrun's processes would not find it

    with tempfile.TemporaryDirectory() as folder:
        ranks = [json.dumps(each) for each in _ranks(processes)]
        children = [forks.start(CODE, words, rank, out=Path(folder)) for rank in ranks]
        for child in children:
            child.join()
        sys.stderr.write((Path(folder) / "stderr").read_text()[-2500:])
    return next((child.exitcode for child in children if child.exitcode), 0)


def _ranks(processes: int) -> list[dict[str, str]]:
    """What a launcher tells each process."""
    if processes == 1:
        return [{}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(processes)}
    return [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


def main(what: str, out: str, data: dict[str, list[str]], table: dict[str, Any], shard: bool, die: int | None) -> None:
    settings = TrainSettings.model_validate(table)
    seen: list[int] = []

    def start(stage: str, total: int, unit: str) -> None:
        seen.clear()

    def advance(tokens: int) -> None:
        seen.append(tokens)
        if die is not None and sum(seen) > die * settings.tokens:
            os.kill(os.getpid(), signal.SIGKILL)

    train(
        what,
        out,
        data=data,
        settings=settings,
        shard=shard,
        keep_anyway=True,
        progress=Progress(start, advance=advance),
    )


if __name__ == "__main__":
    main(*json.loads(sys.argv[1]))
