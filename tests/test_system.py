"""What differs among operating systems: the memory limits of containers, and what the C library does with memory."""

import ctypes
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from frankenmoe import system

GIB = 2**30
V1 = {"limit": "memory.limit_in_bytes", "used": "memory.usage_in_bytes", "files": "total_{}_file"}
V2 = {"limit": "memory.max", "used": "memory.current", "files": "{}_file"}


def group(folder: Path, names: dict[str, str], limit: object, used: int, *, active: int = 0, inactive: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names["limit"]).write_text(f"{limit}\n")
    (folder / names["used"]).write_text(f"{used}\n")
    lines = (("anon", used), (names["files"].format("active"), active), (names["files"].format("inactive"), inactive))
    (folder / "memory.stat").write_text("".join(f"{name} {value}\n" for name, value in lines))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with 64 GiB free. `proc/self/cgroup` and `groups` are empty."""
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "groups").mkdir()
    monkeypatch.setattr(system, "PROC", tmp_path / "proc")
    monkeypatch.setattr(system, "GROUPS", tmp_path / "groups")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("", (), {"available": 64 * GIB}))
    return tmp_path


def in_group(place: Path, lines: str) -> None:
    (place / "proc" / "self" / "cgroup").write_text(lines)


def test_without_a_limit_it_is_what_the_machine_has_free(place: Path) -> None:
    assert system.free_memory() == 64 * GIB
    in_group(place, "0::/user.slice/shell\n")
    group(place / "groups" / "user.slice" / "shell", V2, "max", 8 * GIB)
    assert system.free_memory() == 64 * GIB


def test_pages_of_files_do_not_count_as_used(place: Path) -> None:
    in_group(place, "0::/job\n")
    group(place / "groups" / "job", V2, 16 * GIB, 13 * GIB, active=2 * GIB, inactive=3 * GIB)
    assert system.free_memory() == 8 * GIB


def test_the_tightest_limit_on_the_way_up_counts(place: Path) -> None:
    in_group(place, "1:name=systemd:/\n0::/a/b/c\n")
    group(place / "groups" / "a" / "b" / "c", V2, "max", GIB)
    group(place / "groups" / "a" / "b", V2, 8 * GIB, 5 * GIB)
    group(place / "groups" / "a", V2, 32 * GIB, 6 * GIB)
    assert system.free_memory() == 3 * GIB


def test_a_group_above_its_limit_has_nothing_free(place: Path) -> None:
    in_group(place, "0::/\n")
    group(place / "groups", V2, GIB, 2 * GIB)
    assert system.free_memory() == 0


@pytest.mark.parametrize("path", ["docker/1f", ""], ids=["path on the host", "own group at the root"])
def test_version_1_has_a_folder_of_its_own(path: str, place: Path) -> None:
    in_group(place, "5:cpu,cpuacct:/docker/1f\n4:memory:/docker/1f\n0::/\n")
    group(place / "groups" / "memory", V1, 2**63 - 4096, 40 * GIB)
    group(place / "groups" / "memory" / path, V1, 4 * GIB, 3 * GIB, inactive=GIB)
    assert system.free_memory() == 2 * GIB


@pytest.mark.parametrize("lines", ["", "nonsense\n", "0::/../other\n", "4:memory:/gone\n"])
def test_what_cannot_be_read_is_no_limit(lines: str, place: Path) -> None:
    in_group(place, lines)
    assert system.free_memory() == 64 * GIB


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc")
def test_freed_memory_is_kept_for_the_next_array() -> None:
    """In a new process: the options of the C library are of the whole process."""
    code = """
import resource
import numpy as np
from frankenmoe.system import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(50):
        several = [np.ones(2**20, np.float32) for _ in range(4)]
        del several
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
before = faults()
keep_freed_memory()
faults()
print(before, faults())
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, after = map(int, ran.stdout.split())
    assert after < before / 20
