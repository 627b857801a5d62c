"""Child processes for work that may crash or never end: a module of this package, started as a program."""

import atexit
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from threading import Lock, Timer
from typing import Any

START = 120  # seconds for the imports of a child process
Data = Mapping[str, Any]


def program(module: str, **environment: str) -> Mapping[str, Any]:
    """Arguments of `subprocess.run` and `Popen` for a module, such as frankenmoe.charts, with this process's paths."""
    ours, paths = str(Path(__file__).parents[1]), [os.path.abspath(path) for path in sys.path if path]
    if ours not in paths:  # this process found the package in its current folder, which is '' on the path
        paths.insert(0, ours)
    return {
        # -P: no module of the current folder, which may be a downloaded model
        "args": [sys.executable, "-P", "-m", module],
        "cwd": Path(__file__).parent,  # the user's may be gone
        "env": os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | environment,
    }


def limit(limits: Mapping[str, int]) -> None:
    """Limits this process: names are those of `resource`, such as RLIMIT_CORE.

    Limits that the system does not have are left out, as on Windows, and none is raised.
    """
    try:
        import resource
    except ImportError:
        return
    for name, most in limits.items():
        with suppress(ValueError, OSError, AttributeError):
            kind = getattr(resource, name)
            _, hard = resource.getrlimit(kind)
            resource.setrlimit(kind, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


class Worker:
    """A child process that answers one request after the other. The first request starts it, and so does the one after
    a request that ended it."""

    def __init__(self, module: str) -> None:
        """`module` calls `serve` when it runs as a program."""
        self._module = module
        self._lock = Lock()
        self._process: subprocess.Popen[bytes] | None = None
        atexit.register(self.end)

    def ask(self, request: Data, *, seconds: float) -> Data | None:
        """The answer to a request; None if the child does not answer in time, ends or cannot be started."""
        with self._lock:
            try:
                if not self._runs() and not self._started():
                    return None
                assert self._process is not None
                assert self._process.stdin is not None
                self._process.stdin.write(json.dumps(request).encode() + b"\n")
                self._process.stdin.flush()
            except OSError:  # it cannot be started, or has just ended
                self.end()
                return None
            line = self._line(seconds)
            answer: Data | None = json.loads(line) if line else None
            return answer

    def _runs(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def _started(self) -> bool:
        self._process = subprocess.Popen(
            **program(self._module, OMP_NUM_THREADS="1"),  # threads need address space
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        return bool(self._line(START))

    def _line(self, seconds: float) -> bytes:
        """The next line of the child; nothing if it ends or does not answer in time, and it is gone then."""
        process, line = self._process, b""
        assert process is not None
        assert process.stdout is not None
        timer = Timer(seconds, process.kill)
        timer.start()
        try:
            line = process.stdout.readline()
        finally:
            timer.cancel()
            if not line.endswith(b"\n"):  # it was ended within a line; Ctrl-C, too
                self.end()
        return line if line.endswith(b"\n") else b""

    def end(self) -> None:
        """Ends the child process."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            with suppress(OSError):  # what was not sent to it
                process.communicate()


def serve(answer: Callable[[Data], Data], *, seconds: float, memory: int) -> None:
    """The child's side of a Worker: a request per line on stdin, an answer per line on stdout.

    `memory` limits its address space in bytes. `seconds` limit the time of a request if the parent is gone.
    """
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no answer
    limit({"RLIMIT_CORE": 0, "RLIMIT_AS": memory})
    out.write("{}\n")  # it is ready
    out.flush()
    for line in sys.stdin:
        limit({"RLIMIT_CPU": int(time.process_time() + seconds) + 2})
        out.write(json.dumps(answer(json.loads(line))) + "\n")
        out.flush()
