"""Asks whether transformers agrees with a target, while weights are already being copied. Does not import torch.

An answer that agrees is kept in the user's cache, so that building again does not wait for imports.
"""

import base64
import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from frankenmoe import errors
from frankenmoe.artifact import store
from frankenmoe.build.target import Target
from frankenmoe.checkpoint.writer import write_atomic
from frankenmoe.child import program
from frankenmoe.errors import ArtifactError, FrankenMoEError

KIND = "proofs"
AGREED = "agreed.json"  # names of the tokenizer files in an entry
CHILD = "frankenmoe.build.answering"  # the module that it runs
Files = dict[str, bytes]


@contextmanager
def asked(target: Target, *, here: bool, cache: bool, name: str) -> Iterator[Future[Files]]:
    """A future of the tokenizer files that must differ from the base's, which raises what transformers disagrees with.

    The answer comes from the cache; `here`, in a thread of this process; or from a child, which imports torch and
    transformers on another core. `here` is for a caller who needs them anyway, and waits for the future before he
    imports them: transformers cannot be imported from two threads at once. They are also used here if they are there.
    """
    key = target.key() if cache else None
    known = _recalled(key) if key else None
    child = None if known is not None or here or "transformers" in sys.modules or not sys.executable else _child()
    with ThreadPoolExecutor(max_workers=1) as pool:
        try:
            yield pool.submit(_answer, target, child, known, key=key, name=name)
        finally:
            if child is not None:
                child.kill()


def _answer(
    target: Target, child: "subprocess.Popen[str] | None", known: Files | None, *, key: str | None, name: str
) -> Files:
    if known is not None:
        return known
    if child is None:
        from frankenmoe.build.agreement import agree

        files = agree(target)
    else:
        files = _heard(child, target)
    if key is not None and key == target.key():  # else a file changed meanwhile
        _kept(key, files, name=name)
    return files


def _child() -> "subprocess.Popen[str]":
    return subprocess.Popen(**program(CHILD), stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8")


def _heard(child: "subprocess.Popen[str]", target: Target) -> Files:
    """The child's answer. Raises its error again; ArtifactError if it ends without an answer."""
    said, _ = child.communicate(target.to_json())
    if child.returncode != 0:
        raise ArtifactError(
            f"the process that compares the plan with transformers ended without an answer, with code "
            f"{child.returncode}",
            hint="what it says is above; if it says nothing, it may have had too little memory",
        )
    found = json.loads(said)
    if "error" in found:
        kind: type[FrankenMoEError] = getattr(errors, found["error"])
        raise kind(found["message"], hint=found["hint"])
    return {name: base64.b64decode(raw) for name, raw in found["files"].items()}


def _recalled(key: str) -> Files | None:
    folder = store.find(KIND, key, needs=AGREED)
    if folder is None:
        return None
    try:
        return {name: (folder / name).read_bytes() for name in json.loads((folder / AGREED).read_bytes())}
    except OSError:  # another process has just removed it
        return None


def _kept(key: str, files: Files, *, name: str) -> None:
    def fill(folder: Path) -> None:
        for file, raw in files.items():
            write_atomic(folder / file, raw)
        write_atomic(folder / AGREED, json.dumps(list(files)).encode())

    store.keep(KIND, key, fill, name=name)
