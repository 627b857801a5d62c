"""Replaces several files of a folder, all or none of them. Does not import torch."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from frankenmoe.artifact.folder import whole_or_absent
from frankenmoe.checkpoint.writer import write_atomic

STAGED = "replacing"
ORDER = "order.json"


def replace_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Writes new files beside the old ones, then renames them in order.

    After a kill, the next call of this or of `finish_replacing` completes the replacement.
    """
    finish_replacing(folder)
    with whole_or_absent(folder / STAGED) as staged:
        for name, data in files.items():
            write_atomic(staged / name, data)
        write_atomic(staged / ORDER, json.dumps(list(files)).encode())
    finish_replacing(folder)


def finish_replacing(folder: Path) -> None:
    """Completes a replacement that a kill interrupted; does nothing if there is none."""
    staged = folder / STAGED
    if not staged.is_dir():
        return
    for name in json.loads((staged / ORDER).read_bytes()):
        if (staged / name).exists():
            (staged / name).replace(folder / name)
    shutil.rmtree(staged)
