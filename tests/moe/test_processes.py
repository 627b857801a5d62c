"""Two CPU processes over gloo share work and add up results; without a launcher there is one."""

import json

import pytest
import torch

from frankenmoe.moe import processes
from launch import run_together

SHARED = """
import torch
from frankenmoe.moe import processes as p

own = p.split(list(range(7)))
total = p.all_reduce(torch.tensor([float(sum(own)), 1.0], dtype=torch.float64))
order = []
with p.main_first():
    order.append(p.rank())
found = {
    "rank": p.rank(), "world": p.world(), "main": p.is_main(), "own": own, "total": total.tolist(),
    "squares": p.gather([item ** 2 for item in own]), "less": p.gather(p.split(["only"])),
    "from_main": p.from_main(f"of {p.rank()}"),
}
p.wait()
print(json.dumps(found))
"""


def test_two_processes_share_the_work_and_know_all_results() -> None:
    done = run_together(SHARED)

    assert [each.returncode for each in done] == [0, 0], done[0].stderr
    first, second = (json.loads(each.stdout) for each in done)
    assert (first["own"], second["own"]) == ([0, 2, 4, 6], [1, 3, 5])
    assert (first["main"], second["main"]) == (True, False)
    for rank, found in enumerate((first, second)):
        assert (found["rank"], found["world"]) == (rank, 2)
        assert found["total"] == [21.0, 2.0]
        assert found["squares"] == [0, 1, 4, 9, 16, 25, 36]
        assert found["less"] == ["only"]
        assert found["from_main"] == "of 0"


FIRST = """
import time
from pathlib import Path
from frankenmoe.moe import processes as p

file = Path(sys.argv[1])
with p.main_first():
    if p.is_main():
        time.sleep(0.3)
        file.write_text("written")
    print(file.read_text())
"""


def test_the_main_process_goes_first(tmp_path: object) -> None:
    done = run_together(FIRST, f"{tmp_path}/cached")

    assert [each.stdout for each in done] == ["written\n", "written\n"]


FAILING = """
from frankenmoe.errors import FrankenMoEError, NumericsError
from frankenmoe.moe import processes as p

def work(own):
    if p.rank() == 1:
        raise NumericsError("item 1 is bad", hint="mend it")
    return own

try:
    p.share_out([10, 11, 12], work)
except NumericsError as error:
    print("shared:", error.message, error.hint)
print(p.share_out([10, 11, 12], lambda own: [item + 1 for item in own]))
if p.rank() == 1:
    sys.exit(5)
try:
    p.wait()
    p.wait()
except FrankenMoEError as error:
    print("ended:", error.message)
"""


def test_an_error_reaches_all_processes() -> None:
    first, second = run_together(FAILING)

    said = "shared: item 1 is bad mend it\n[11, 12, 13]\n"
    assert first.stdout == f"{said}ended: another of the launcher's 2 processes ended, so this one cannot go on\n"
    assert (second.stdout, second.returncode) == (said, 5)


def test_one_process_needs_no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")  # a cluster's variable alone is no launcher
    monkeypatch.delenv("RANK", raising=False)

    assert (processes.world(), processes.rank(), processes.is_main()) == (1, 0, True)
    assert processes.split("abc") == ["a", "b", "c"]
    assert processes.gather([1, 2]) == [1, 2]
    assert processes.all_reduce(torch.ones(2)).tolist() == [1.0, 1.0]
    assert processes.from_main("mine") == "mine"
    assert not torch.distributed.is_initialized()
