"""A run of training in processes of its own, one of which kills itself at a given step; asserts nothing.

Run as a script it is that process: its one argument is the run as JSON.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from frankenmoe.recipetrain import Train
from frankenmoe.train.trainer import MoETrainer
from frankenmoe.training import train


def run_apart(
    what: Path,
    out: Path,
    *,
    data: dict[str, list[str]],
    settings: Train,
    die: int | None = None,
    processes: int = 1,
    shard: bool = False,
) -> int:
    """The exit code of a run in one process, or in several by torchrun; all of them die before step `die` + 1."""
    import forks  # not at the top, where torchrun's processes would not find it

    words = json.dumps([str(what), str(out), data, settings.to_dict(), shard and processes > 1, die])
    if processes == 1:
        done = forks.run("import json, sys\nfrom dying import main\nmain(*json.loads(sys.argv[1]))", words)
    else:
        launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        done = subprocess.run([sys.executable, "-m", *launcher, __file__, words], capture_output=True, text=True)
    sys.stderr.write(done.stderr[-2500:])
    return done.returncode


def main(what: str, out: str, data: dict[str, list[str]], settings: dict[str, Any], shard: bool, die: int) -> None:
    step = MoETrainer.training_step

    def dies(self: MoETrainer, *rest: Any, **more: Any) -> Any:
        if self.state.global_step == die:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, *rest, **more)

    MoETrainer.training_step = dies  # type: ignore[method-assign]
    train(what, out, data=data, settings=Train.model_validate(settings), shard=shard, keep_anyway=True)


if __name__ == "__main__":
    main(*json.loads(sys.argv[1]))
