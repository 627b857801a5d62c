"""Python in a process of its own that need not import torch first: each is a fork of one process that has.

It is a process in all but its interpreter's start: what that does, by the locale say, needs `subprocess`.
"""

import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from multiprocessing.context import ForkServerProcess
from pathlib import Path

COMMAND = "from frankenmoe.cli import main; main()"
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(
    [
        "frankenmoe.cli.chat",
        "frankenmoe.build.run",
        "transformers.models.auto.modeling_auto",
        "transformers.models.llama.modeling_llama",
        "transformers.models.mixtral.modeling_mixtral",
        "transformers.trainer",
        "frankenmoe.train.run",
        "frankenmoe.evaluate.run",
    ]
)


def start(
    code: str, *arguments: object, cwd: Path | None = None, out: Path, no_stdin: bool = False
) -> ForkServerProcess:
    """Begins to run `code` with these as `sys.argv[1:]`; it writes `stdout` and `stderr` into the folder `out`."""
    words = ["frankenmoe", *map(str, arguments)]
    process = _FORKS.Process(target=_become, args=(code, words, cwd or Path.cwd(), dict(os.environ), out, no_stdin))
    process.start()
    return process


def run(
    code: str, *arguments: object, cwd: Path | None = None, no_stdin: bool = False
) -> "subprocess.CompletedProcess[str]":
    """The same to its end, as `subprocess.run` reports it."""
    with tempfile.TemporaryDirectory() as folder:
        process = start(code, *arguments, cwd=cwd, out=Path(folder), no_stdin=no_stdin)
        process.join()
        said = [(Path(folder) / name).read_text() for name in ("stdout", "stderr")]
    assert process.exitcode is not None
    return subprocess.CompletedProcess([code, *map(str, arguments)], process.exitcode, *said)


def _become(code: str, words: list[str], cwd: Path, environment: Mapping[str, str], out: Path, no_stdin: bool) -> None:
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    for number, name in enumerate(("stdout", "stderr"), start=1):
        os.dup2(os.open(out / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        setattr(sys, name, open(number, "w", buffering=1, closefd=False))  # noqa: SIM115
    if no_stdin:
        sys.stdin = None  # as Python does where the shell has closed it
        os.close(0)
    # as for a shell's command in the foreground, whatever this process was started as
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = words
    exec(code, {"__name__": "__main__"})
