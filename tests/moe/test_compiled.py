"""Compiled kernels are cached, compiled again if a file is damaged, and not required."""

import ctypes
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from frankenmoe.moe import linear

if linear.kernels() is None:
    pytest.skip("no kernels here: numba or OpenMP is missing", allow_module_level=True)

import numba
from numba import carray

from frankenmoe.moe.cpu import compiled, kernels


def tiny(task: Any) -> None:
    """Doubles a number."""
    numbers = carray(task[0], 1, np.int64)
    numbers[0] *= 2


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache, and one more kernel, which compiles quickly."""
    monkeypatch.setitem(compiled.KERNELS, "tiny", tiny)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def doubled(number: int) -> int:
    """The kernel's result, loaded as in a new process."""
    compiled.address.cache_clear()
    numbers = (ctypes.c_int64 * 1)(number)
    task = (ctypes.c_void_p * 1)(ctypes.addressof(numbers))
    ctypes.CFUNCTYPE(None, ctypes.c_void_p)(compiled.address("tiny"))(task)
    return numbers[0]


def kept(folder: Path) -> dict[Path, int]:
    """The kernels' files in a cache folder, and when each was written."""
    return {file: file.stat().st_mtime_ns for file in folder.rglob("*.nbc")}


@pytest.mark.usefixtures("fresh")
def test_a_kernel_is_compiled_once(tmp_path: Path) -> None:
    before = numba.config.CACHE_DIR
    assert doubled(3) == 6
    first = kept(tmp_path / "cache" / "frankenmoe" / "kernels")
    assert len(first) == 1
    assert doubled(4) == 8
    assert kept(tmp_path / "cache") == first
    assert before == numba.config.CACHE_DIR


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize(("harm", "suffix"), [("empty", "nbi"), ("cut", "nbc")])
def test_a_damaged_file_is_made_again(harm: str, suffix: str, tmp_path: Path) -> None:
    doubled(1)
    [file] = (tmp_path / "cache").rglob(f"*.{suffix}")
    whole = file.read_bytes()
    file.write_bytes({"cut": whole[: len(whole) // 2], "empty": b""}[harm])
    assert [doubled(5), doubled(6)] == [10, 12]
    assert len(kept(tmp_path / "cache")) == 1


@pytest.mark.usefixtures("fresh")
def test_threads_load_the_same() -> None:
    doubled(1)
    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(compiled.address, ["tiny"] * 4))) == 1


@pytest.mark.usefixtures("fresh")
def test_no_folder_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the home folder cannot be written, or there is none."""
    (tmp_path / "cache").touch()
    assert doubled(3) == 6
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert doubled(4) == 8


@pytest.mark.usefixtures("fresh")
def test_a_relative_folder_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Code from the working folder is not run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", "here")
    assert doubled(3) == 6
    assert not (tmp_path / "here").exists()
    assert len(kept(tmp_path / "home" / ".cache" / "frankenmoe" / "kernels")) == 1


def test_the_exponential_is_the_real_one() -> None:
    @numba.njit
    def each(numbers_N: Any, found_N: Any) -> None:
        for n in range(len(numbers_N)):
            found_N[n] = kernels.exponential(numbers_N[n])

    numbers_N = np.linspace(-87, 88, 200_001, dtype=np.float32)
    found_N, exact_N = np.empty_like(numbers_N), np.exp(numbers_N.astype(np.float64))
    each(numbers_N, found_N)
    assert np.abs(found_N / exact_N - 1).max() < 5e-6
    assert np.abs(found_N / exact_N - 1)[np.abs(numbers_N) < 1].max() < 2e-7
    odd_N = np.array([np.nan, np.inf, -np.inf, 0], dtype=np.float32)
    each(odd_N, found_N)
    assert np.isnan(found_N[0])
    assert found_N[1] > 1e38
    assert 0 <= found_N[2] < 1e-37
    assert found_N[3] == 1


@pytest.fixture
def forgotten(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The next question for the kernels is the first."""
    monkeypatch.delitem(sys.modules, "frankenmoe.moe.cpu.compiled")
    monkeypatch.delattr("frankenmoe.moe.cpu.compiled", raising=False)
    linear.kernels.cache_clear()
    yield
    linear.kernels.cache_clear()


def refuse(name: object) -> None:
    """Windows has no library of the process, and says so with a TypeError."""
    raise TypeError("argument of type 'NoneType' is not iterable")


@pytest.mark.usefixtures("forgotten")
@pytest.mark.parametrize("missing", ["numba", "permission to compile", "OpenMP"])
def test_without_kernels_torch_computes(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if missing == "numba":
        monkeypatch.setitem(sys.modules, "numba", None)
    elif missing == "OpenMP":
        monkeypatch.setattr(ctypes, "CDLL", refuse)
    else:
        monkeypatch.setattr(numba.config, "DISABLE_JIT", 1)
    assert linear.kernels() is None
    hidden_TI, weight_OI = torch.randn(1, 256).bfloat16(), torch.randn(512, 256).bfloat16()
    found = linear.linear(hidden_TI, weight_OI)
    torch.testing.assert_close(found.float(), hidden_TI.float() @ weight_OI.float().T, rtol=2e-2, atol=2e-1)
