"""Runs code in two processes that a launcher would have started; asserts nothing."""

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

LAUNCHED = """
import json, os, sys
os.environ |= json.loads(sys.argv.pop())
"""


def ranks(processes: int) -> list[dict[str, str]]:
    """What a launcher tells each process."""
    if processes == 1:
        return [{}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(processes)}
    return [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


def run_together(code: str, *arguments: object, processes: int = 2) -> "list[subprocess.CompletedProcess[str]]":
    """`code` in so many processes with these `sys.argv[1:]`, each with its exit code and output, in order of rank."""
    import forks  # not at the top, where torchrun's processes would not find it

    with tempfile.TemporaryDirectory() as folder:
        outs = [Path(folder) / str(rank) for rank in range(processes)]
        for out in outs:
            out.mkdir()
        children = [
            forks.start(LAUNCHED + code, *arguments, json.dumps(each), out=out)
            for each, out in zip(ranks(processes), outs, strict=True)
        ]
        for child in children:
            child.join()
        return [
            subprocess.CompletedProcess(code, child.exitcode or 0, *(_said(out, name) for name in ("stdout", "stderr")))
            for child, out in zip(children, outs, strict=True)
        ]


def torchrun(arguments: Sequence[object], *, processes: int = 2) -> "subprocess.CompletedProcess[str]":
    """`torchrun ARGUMENTS` to its end."""
    launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    words = [sys.executable, "-m", *launcher, *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, env=os.environ, check=False)


def _said(folder: Path, name: str) -> str:
    return (folder / name).read_text()
