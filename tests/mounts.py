"""Mounts for tests: disks that are small, or that even root cannot write to."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def mounted(folder: Path, *options: str) -> Iterator[Path]:
    """What `mount` with these options makes of a folder, for the time of a test; skips where nothing can be mounted."""
    folder.mkdir(exist_ok=True)
    done = subprocess.run(["mount", *options, folder], capture_output=True)
    if done.returncode:
        pytest.skip(f"nothing can be mounted here: {done.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        # lazily, since weights that were mapped from it keep it busy until this process ends
        subprocess.run(["umount", "--lazy", folder], check=True)
