"""The child process of build/asking.py: a target on stdin, the answer of build/agreement.py on stdout."""

import base64
import gc
import json
import os
import sys
from typing import Any

from frankenmoe.build.target import Target
from frankenmoe.errors import FrankenMoEError


def main() -> None:
    """Writes files, or the error. What transformers prints to stdout goes to stderr."""
    gc.disable()  # the process ends before a collection would pay
    from frankenmoe.build.agreement import agree

    stdout = os.dup(1)
    os.dup2(2, 1)
    found: dict[str, Any]
    try:
        files = agree(Target.from_json(sys.stdin.read()))
        found = {"files": {name: base64.b64encode(raw).decode() for name, raw in files.items()}}
    except FrankenMoEError as error:
        found = {"error": type(error).__name__, "message": error.message, "hint": error.hint}
    with os.fdopen(stdout, "w", encoding="utf-8") as out:
        out.write(json.dumps(found))


if __name__ == "__main__":
    main()
