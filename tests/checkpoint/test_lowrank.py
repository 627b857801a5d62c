"""Low-rank approximation of a streamed difference: as good as numpy's own decomposition, in little memory."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from frankenmoe.checkpoint import lowrank
from frankenmoe.checkpoint.lowrank import Difference, energies, low_rank
from frankenmoe.checkpoint.tensors import TensorRef

SHAPES = ((96, 40), (40, 96), (700, 900), (900, 700))


def stored(folder: Path, name: str, values: Any) -> TensorRef:
    """A float32 matrix as a file."""
    file, numbers = folder / name, np.ascontiguousarray(values, np.float32)
    file.write_bytes(numbers.tobytes())
    return TensorRef(name, "F32", numbers.shape, file, 0, numbers.nbytes)


def pair(folder: Path, shape: tuple[int, int], *, decay: float, seed: int = 0) -> tuple[Difference, Any]:
    """A stored difference whose singular values fall like i ** -decay, and its values."""
    random, short = np.random.default_rng(seed), min(shape)
    left, right = (np.linalg.qr(random.standard_normal((side, short)))[0] for side in shape)
    delta = left * np.arange(1, short + 1) ** -decay @ right.T
    base = random.standard_normal(shape).astype(np.float32)
    model = (base + delta).astype(np.float32)
    return Difference(stored(folder, "model", model), stored(folder, "base", base)), model - base


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("decay", [0.1, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_error_is_that_of_the_best_approximation(
    shape: tuple[int, int], decay: float, exact: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lowrank, "EXACT", 2048 if exact else 0)
    monkeypatch.setattr(lowrank, "CHEAP", 1000)
    difference, delta = pair(tmp_path, shape, decay=decay)
    squares = np.linalg.svd(delta.astype(np.float64), compute_uv=False) ** 2
    total, _ = energies(difference.model, difference.base)
    assert total == pytest.approx(squares.sum(), rel=1e-6)
    for rank in (1, 8, 40):
        found = low_rank(difference, total=total, rank=rank)
        assert found is not None
        error = np.square(delta - found.b_OR @ found.a_RI, dtype=np.float64).sum()
        assert found.rank == rank
        assert error <= squares[rank:].sum() * (1.000001 if exact else 1.002) + 1e-6 * squares.sum()
        assert found.kept == pytest.approx(total - error, rel=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_blocks_from_the_disk_give_what_memory_gives(
    shape: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    difference, _ = pair(tmp_path, shape, decay=0.5)
    total, _ = energies(difference.model, difference.base)
    whole = low_rank(difference, total=total, rank=4)
    monkeypatch.setattr(lowrank, "KEPT", 0)
    monkeypatch.setattr(lowrank, "BLOCK", 1000)
    streamed = low_rank(difference, total=total, rank=4)
    assert whole is not None
    assert streamed is not None
    assert streamed.kept == pytest.approx(whole.kept, rel=1e-3)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("share", [0.5, 0.9, 1.0])
def test_an_energy_takes_the_smallest_rank_that_keeps_it(
    share: float, exact: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lowrank, "EXACT", 2048 if exact else 0)
    difference, delta = pair(tmp_path, (300, 200), decay=0.7)
    squares = np.linalg.svd(delta.astype(np.float64), compute_uv=False) ** 2
    total, _ = energies(difference.model, difference.base)
    found = low_rank(difference, total=total, energy=share)
    assert found is not None
    best = int((np.cumsum(squares) < share * squares.sum() * (1 - 1e-9)).sum()) + 1
    assert abs(found.rank - best) <= (1 if share < 1 else 3)
    assert found.kept >= share * total * 0.9999


def test_a_rank_above_the_true_one_is_cut_and_equal_models_give_nothing(tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    base = np.zeros((50, 30))
    model = random.standard_normal((50, 3)) @ random.standard_normal((3, 30))
    difference = Difference(stored(tmp_path, "model", model), stored(tmp_path, "base", base))
    total, reference = energies(difference.model, difference.base)
    found = low_rank(difference, total=total, rank=20)
    assert found is not None
    assert reference == 0
    assert np.allclose(found.b_OR @ found.a_RI, model, atol=1e-4)
    assert low_rank(Difference(difference.base, difference.base), total=0.0, rank=4) is None


@pytest.mark.parametrize("rank", [4, 8, 30])
@pytest.mark.parametrize("shape", [(40, 96), (96, 40)])
def test_a_rank_above_the_true_one_adds_no_error(shape: tuple[int, int], rank: int, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    delta = random.standard_normal((shape[0], 4)) @ random.standard_normal((4, shape[1])) / 1000
    base = random.standard_normal(shape).astype(np.float32) / 50  # so rounding leaves small further directions
    model = (base + delta).astype(np.float32)
    difference = Difference(stored(tmp_path, "model", model), stored(tmp_path, "base", base))
    found = low_rank(difference, total=energies(difference.model, difference.base)[0], rank=rank)
    assert found is not None
    assert np.linalg.norm(found.b_OR @ found.a_RI - (model - base)) <= 1e-5 * np.linalg.norm(model - base)


MEMORY = """
import re, sys, threading, time
from pathlib import Path
from frankenmoe.checkpoint import lowrank
from frankenmoe.checkpoint.lowrank import Difference, energies, low_rank
from frankenmoe.checkpoint.tensors import TensorRef
folder, rows, columns, what = Path(sys.argv[1]), *map(int, sys.argv[2:4]), sys.argv[4]
size = rows * columns * 2
refs = [TensorRef(name, "BF16", (rows, columns), folder / name, 0, size) for name in ("model", "base")]
peak = 0
def watch():
    global peak
    while True:
        status = Path("/proc/self/status").read_text()
        peak = max(peak, int(re.search(r"RssAnon:\\s+(\\d+)", status)[1]))
        time.sleep(0.01)
threading.Thread(target=watch, daemon=True).start()
lowrank.PASSES = 2  # more of them take as much memory
total, _ = energies(*refs)
found = low_rank(Difference(*refs), total=total, **{what: float(sys.argv[5]) if what == "energy" else int(sys.argv[5])})
print(peak * 1024, found.rank, found.kept / total)
"""


@pytest.mark.parametrize(
    ("rows", "columns", "what", "amount", "kept"),
    [
        (12288, 8192, "rank", 32, None),  # 192 MiB of bf16 on either side, 384 MiB as float32
        pytest.param(2048, 8192, "energy", 0.9, 0.9, marks=pytest.mark.slow),  # exact: a rank of 1559
        pytest.param(4096, 8192, "energy", 0.9, 0.5, marks=pytest.mark.slow),  # the widest sketch, which is not enough
    ],
)
def test_a_matrix_of_any_size_takes_little_memory(
    rows: int, columns: int, what: str, amount: float, kept: float | None, tmp_path: Path
) -> None:
    """Anonymous memory stays under 400 MB, whether a rank or a share of the energy is asked for."""
    random = np.random.default_rng(0)
    for name, letters in (("model", b"\x01\x3c"), ("base", b"\x00\x3c")):
        with (tmp_path / name).open("wb") as file:
            for start in range(0, rows, 256):
                count = min(256, rows - start) * columns
                noise = random.standard_normal(count, np.float32).view(np.uint32) >> 16
                # a rank of one, or a flat spectrum
                file.write(letters * count if kept is None else noise.astype(np.uint16).tobytes())
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path), str(rows), str(columns), what, str(amount)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    peak, rank, share = map(float, done.stdout.split())
    assert share > (kept or 0.999)
    assert rank >= (1000 if kept else 1)
    assert peak <= 400e6
