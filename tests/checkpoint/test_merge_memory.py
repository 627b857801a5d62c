"""Merges hold a few blocks of a tensor, however large it is."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from frankenmoe.checkpoint.header import header_bytes

GROWTH = """
import sys, threading
from pathlib import Path
from frankenmoe.checkpoint import merging, values
from frankenmoe.checkpoint.header import read_header
from frankenmoe.checkpoint.tensors import MERGES, Merge, TensorWrite

def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon"))

refs = read_header(Path(sys.argv[1]))
one, two = refs["one"], refs["two"]
if sys.argv[2] == "small blocks":
    values.BLOCK, merging._CHUNK = 2**15, 2**14
start = peak = anonymous()
done = threading.Event()

def watch():
    global peak
    while not done.wait(0.002):
        peak = max(peak, anonymous())

watcher = threading.Thread(target=watch)
watcher.start()
for method, needs_base in MERGES.items():
    inner = TensorWrite("inner", "BF16", one.shape, (two, one), (Merge("ties", (1.0,), density=0.5),))
    parents = (one, inner) if sys.argv[2] == "small blocks" else (one, two)
    inputs = (one, *parents) if needs_base else parents
    for _ in values.blocks(TensorWrite("out", "BF16", one.shape, inputs, (Merge(method, (1.0, 1.0), density=0.5),))):
        pass
done.set()
watcher.join()
print((peak - start) // 1024)
"""


@pytest.mark.parametrize(
    ("numel", "blocks", "most"),
    [(2**22, "small blocks", 12), pytest.param(2**28, "blocks", 150, marks=pytest.mark.slow)],
)
def test_memory_does_not_grow_with_the_tensor(tmp_path: Path, numel: int, blocks: str, most: int) -> None:
    """`most` MB that are not mapped from a file; the tensors have 16 MB and 1 GB as float32, and 2 and 4 are read."""
    file = tmp_path / "large.safetensors"
    header = header_bytes([("one", "BF16", (numel,)), ("two", "BF16", (numel,))], metadata={})
    some = np.random.default_rng(0).integers(0x3F00, 0x3F80, 2**20, dtype=np.uint16).tobytes()
    with file.open("wb") as sparse:
        sparse.write(header)
        sparse.seek(len(header) + 2 * numel)  # the first tensor is a hole, zeros
        for _ in range(numel // 2**20):
            sparse.write(some)
    done = subprocess.run([sys.executable, "-c", GROWTH, str(file), blocks], capture_output=True, text=True, check=True)
    assert int(done.stdout) < most
