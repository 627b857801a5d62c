"""A run of training in processes of its own, which kill themselves at a given step; asserts nothing.

Run as a script it is one such process: its one argument is the run as JSON.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from frankenmoe.progress import Progress
from frankenmoe.recipe.train import TrainSettings
from frankenmoe.train.run import train

CODE = """
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
    import launch  # not at the top, where torchrun's processes would not find it

    if torchrun:
        done = [launch.torchrun([__file__, words], processes=processes)]
    else:
        done = launch.run_together(CODE, words, processes=processes)
    sys.stderr.write("".join(each.stderr for each in done)[-2500:])
    return next((each.returncode for each in done if each.returncode), 0)


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
