"""Compiled kernels are kept, loaded without numba, made again when they do not fit, and missed without harm."""

import ctypes
import faulthandler
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from frankenmoe.moe import linear

if linear.kernels() is None:
    pytest.skip("no kernels here: numba or OpenMP is missing", allow_module_level=True)

import numba
from numba import carray

from frankenmoe.moe import kernels, machinecode, numbers


def tiny(task: Any) -> None:
    """Doubles a number."""
    numbers = carray(task[0], 1, np.int64)
    numbers[0] *= 2


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing is compiled yet, and there is one more kernel, which is quick to compile."""
    monkeypatch.setattr(kernels, "tiny", tiny, raising=False)
    monkeypatch.setattr(machinecode, "_addresses", {})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    machinecode._key.cache_clear()
    yield
    machinecode._key.cache_clear()


def doubled(number: int) -> int:
    """What the kernel makes of it, loaded as in a new process."""
    machinecode._addresses.clear()
    numbers = (ctypes.c_int64 * 1)(number)
    task = (ctypes.c_void_p * 1)(ctypes.addressof(numbers))
    ctypes.CFUNCTYPE(None, ctypes.c_void_p)(machinecode.address("tiny"))(task)
    return numbers[0]


def compiles(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that are compiled from now on."""
    seen: list[str] = []
    made = machinecode._made
    monkeypatch.setattr(machinecode, "_made", lambda name: (seen.append(name), made(name))[1])
    return seen


def test_a_kernel_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = compiles(monkeypatch)
    assert [doubled(number) for number in (3, 4)] == [6, 8]
    assert seen == ["tiny"]
    assert len(list((tmp_path / "cache" / "frankenmoe" / "kernels").iterdir())) == 1


@pytest.mark.parametrize("harm", ["cut", "changed", "empty"])
def test_a_damaged_file_is_made_again(harm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    doubled(1)
    [file] = (tmp_path / "cache" / "frankenmoe" / "kernels").iterdir()
    whole = file.read_bytes()
    file.write_bytes({"cut": whole[:-1], "changed": whole[:-9] + b"x" + whole[-8:], "empty": b""}[harm])
    seen = compiles(monkeypatch)
    assert doubled(5) == 10
    assert seen == ["tiny"]
    assert machinecode._kept("tiny") is not None


def test_threads_do_not_compile_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = compiles(monkeypatch)
    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(machinecode.address, ["tiny"] * 4))) == 1
    assert seen == ["tiny"]


@pytest.mark.parametrize(
    ("what", "another"),
    [
        ("get_host_cpu_name", "another"),
        ("get_default_triple", "another"),
        ("get_host_cpu_features", SimpleNamespace(flatten=lambda: "+another")),
    ],
)
def test_another_cpu_has_kernels_of_its_own(what: str, another: object, monkeypatch: pytest.MonkeyPatch) -> None:
    here = machinecode._key()
    machinecode._key.cache_clear()
    monkeypatch.setattr(machinecode.llvm, what, lambda: another)
    assert machinecode._key() != here


@pytest.mark.parametrize("changed", ["kernels.py", "numbers.py", "machinecode.py"])
def test_another_source_has_kernels_of_its_own(changed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = machinecode._key()
    machinecode._key.cache_clear()
    for file in Path(machinecode.__file__).parent.glob("*.py"):
        (tmp_path / file.name).write_text(file.read_text() + "# more\n" * (file.name == changed))
    monkeypatch.setattr(machinecode, "__file__", str(tmp_path / "machinecode.py"))
    assert machinecode._key() != here


@pytest.mark.parametrize(
    ("setting", "same"), [("NUMBA_OPT", False), ("NUMBA_CPU_NAME", False), ("NUMBA_NUM_THREADS", True)]
)
def test_other_settings_of_numba_have_kernels_of_their_own(
    setting: str, same: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else slow code that was compiled to look for an error would be kept for good; threads shape no code."""
    here = machinecode._key()
    machinecode._key.cache_clear()
    monkeypatch.setenv(setting, "1")
    assert (machinecode._key() == here) == same


def test_another_numba_has_kernels_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    here = machinecode._key()
    machinecode._key.cache_clear()
    monkeypatch.setattr(machinecode, "version", lambda name: "0.0")
    assert machinecode._key() != here


def test_no_folder_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the home folder cannot be written, or there is none."""
    (tmp_path / "cache").touch()
    assert doubled(3) == 6
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert doubled(4) == 8


def test_a_relative_folder_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Code that lies where one happens to work is not run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", "here")
    assert doubled(3) == 6
    assert not (tmp_path / "here").exists()
    assert len(list((tmp_path / "home" / ".cache" / "frankenmoe" / "kernels").iterdir())) == 1


def test_what_only_numba_has_is_refused() -> None:
    def greedy(task: Any) -> None:
        carray(task[0], 1, np.int64)[0] = np.empty(carray(task[0], 1, np.int64)[0]).size

    with pytest.raises(ValueError, match="greedy calls NRT_"):
        machinecode.object_file(greedy, numbers.PLAIN)


def test_an_error_within_a_kernel_ends_the_process() -> None:
    """And does not go on with half a result, nor into code that is not there."""

    def failing(task: Any) -> None:
        if carray(task[0], 1, np.int64)[0] == 7:
            raise ValueError("seven")

    address = machinecode._load(machinecode.object_file(failing, numbers.PLAIN), "failing")
    call = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address)
    for number, dies in ((6, False), (7, True)):
        given = (ctypes.c_int64 * 1)(number)
        child = os.fork()
        if not child:
            faulthandler.disable()
            call((ctypes.c_void_p * 1)(ctypes.addressof(given)))
            os._exit(0)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1]) == dies


def test_the_exponential_is_the_real_one() -> None:
    def each(numbers_N: Any, found_N: Any) -> None:
        for n in range(len(numbers_N)):
            found_N[n] = numbers.exponential(numbers_N[n])

    numbers_N = np.linspace(-87, 88, 200_001, dtype=np.float32)
    found_N, exact_N = np.empty_like(numbers_N), np.exp(numbers_N.astype(np.float64))
    numba.njit(each)(numbers_N, found_N)
    assert np.abs(found_N / exact_N - 1).max() < 5e-6
    assert np.abs(found_N / exact_N - 1)[np.abs(numbers_N) < 1].max() < 2e-7
    odd_N = np.array([np.nan, np.inf, -np.inf, 0], dtype=np.float32)
    numba.njit(each)(odd_N, found_N)
    assert np.isnan(found_N[0])
    assert found_N[1] > 1e38
    assert 0 <= found_N[2] < 1e-37
    assert found_N[3] == 1


SCRIPT = """
import sys
sys.modules["numba"] = None
import torch
from frankenmoe.moe import linear
weight, hidden = torch.randn(512, 256).bfloat16(), torch.randn(1, 256).bfloat16()
linear.torch_is_fast = lambda shape, dtype: False
compiled = linear.kernels()
print(compiled is not None)
if compiled is not None:
    found = linear.linear(hidden, weight)
    print(torch.allclose(found.float(), hidden.float() @ weight.float().T, rtol=2e-2, atol=2e-1))
"""


@pytest.mark.parametrize("kept", [True, False])
def test_numba_is_not_imported_where_it_has_compiled(kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if kept:  # where all tests keep theirs
        monkeypatch.undo()
        machinecode.address("few")
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=100, check=True)
    assert done.stdout.split() == (["True", "True"] if kept else ["False"])


@pytest.fixture
def forgotten(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The next question for the kernels is the first."""
    monkeypatch.delitem(sys.modules, "frankenmoe.moe.compiled")
    monkeypatch.delattr("frankenmoe.moe.compiled", raising=False)
    linear.kernels.cache_clear()
    yield
    linear.kernels.cache_clear()


def test_without_numba_there_are_none(forgotten: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numba", None)
    assert linear.kernels() is None


def test_with_a_numba_that_may_not_there_are_none(forgotten: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """And torch computes, instead of an error in the middle of a model."""
    monkeypatch.setattr(numba.config, "DISABLE_JIT", 1)
    assert linear.kernels() is None


def test_without_a_library_of_the_process_there_are_none(forgotten: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows has none, and says so with a TypeError."""

    def refuse(name: object) -> None:
        raise TypeError("argument of type 'NoneType' is not iterable")

    monkeypatch.setattr(ctypes, "CDLL", refuse)
    assert linear.kernels() is None
