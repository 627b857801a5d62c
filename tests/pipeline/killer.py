"""Runs a recipe, then kills such runs at one moment after another and lets each go on; started by tests, as a process.

It imports once and forks a run for every moment. A moment is a change of a folder, or a file opened to be written.
"""

import json
import os
import signal
import sys
from importlib.util import find_spec
from pathlib import Path

import forks
from frankenmoe.pipeline import run

EVENTS = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree")


def in_a_fork(recipe: str, out: Path, moment: int) -> int | None:
    """Runs into `out` and kills itself at the `moment`th change. Returns the number of changes, None if killed."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        count = 0

        def listen(event: str, arguments: tuple[object, ...]) -> None:
            nonlocal count
            opened = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
            if (opened or event in EVENTS) and str(out) in str(arguments[0]):
                count += 1
                if count == moment:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(listen)
        try:
            run(recipe, out)
            os.write(writer, str(count).encode())
        finally:
            os._exit(0)
    os.close(writer)
    said = os.read(reader, 100)
    os.close(reader)
    _, status = os.waitpid(pid, 0)
    assert said or os.WTERMSIG(status) == signal.SIGKILL, "the run failed"
    return int(said) if said else None


def main(recipe: str, folder: str, first: str, step: str) -> None:
    root = Path(folder)
    if find_spec("lm_eval"):  # imported once for all forks
        import frankenmoe.audit.run
        import frankenmoe.evaluate.run
        import frankenmoe.export.run
        import frankenmoe.gates.run
        import frankenmoe.train.run  # noqa: F401
    moments = in_a_fork(recipe, root / "whole", 0)
    assert moments
    killed = 0
    for moment in range(int(first), moments + 1, int(step)):
        out = root / f"killed-{moment}"
        assert in_a_fork(recipe, out, moment) is None, moment
        assert in_a_fork(recipe, out, 0) is not None, moment
        killed += 1
    print(json.dumps({"moments": moments, "killed": killed}))


def kill_at(recipe: Path, root: Path, first: int, step: int) -> int:
    """Calls `main` in a new process. Returns the number of runs that were killed and then finished in `root`."""
    done = forks.run("import sys\nfrom pipeline.killer import main\nmain(*sys.argv[1:])", recipe, root, first, step)
    assert done.returncode == 0, done.stderr
    return int(json.loads(done.stdout.splitlines()[-1])["killed"])
