"""Healing in two processes of a launcher: the matrices and the report of one process, one artifact, one voice."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import backbone_cases
import frankenmoe as fm
import launch
from frankenmoe.artifact.healing import HealReport

COMMAND = "from frankenmoe.cli import main; main()"
TEXT = ["--tokens", 96 * 64, "--block", 64]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("rank", [None, 24])
def test_two_processes_heal_as_one(rank: int | None, tmp_path: Path) -> None:
    """Also the routers, which are fitted afterwards. Three batches of blocks: the processes' shares differ."""
    base, parents = backbone_cases.truth_and_parents(tmp_path)
    file = backbone_cases.recipe(tmp_path, base, parents, backbone="base", gate_mode="centroid")
    more = ["--rank", rank] if rank else []
    for processes in (1, 2):
        done = launch.run_together(COMMAND, "heal", file, tmp_path / str(processes), *TEXT, *more, processes=processes)
        assert [each.returncode for each in done] == [0] * processes, done[0].stderr + done[-1].stderr
    assert "2 experts changed" in done[0].stdout
    assert (done[1].stdout, done[1].stderr) == ("", "")

    one, two = (HealReport.read(tmp_path / name / "heal.json") for name in "12")
    assert [part.step for part in one.experts] == [part.step for part in two.experts]
    for alone, together in zip(one.experts, two.experts, strict=True):
        assert together.ridges == alone.ridges
        assert together.left == pytest.approx(alone.left, rel=1e-6)
        assert (together.before, together.after) == pytest.approx((alone.before, alone.after), rel=1e-6)
    files = ["model-routers.safetensors"]
    files += [f"adapters/{name}/adapter_model.safetensors" for name in "ab"] if rank else ["model-trained.safetensors"]
    for name in files:
        wanted, found = (load_file(tmp_path / folder / name) for folder in "12")
        assert wanted.keys() == found.keys()
        for key, tensor in wanted.items():
            largest = float(tensor.abs().max())
            torch.testing.assert_close(found[key], tensor, rtol=0, atol=1e-6 * largest, msg=f"{name}: {key}")
    assert sorted(path.name for path in (tmp_path / "1").iterdir()) == sorted(
        path.name for path in (tmp_path / "2").iterdir()
    )
    fm.load(tmp_path / "2")


def test_a_backbone_that_cannot_be_cached_is_measured_once(tmp_path: Path) -> None:
    """As with data of the hub: without a cache, the first process tells the other what it found."""
    base, parents = backbone_cases.truth_and_parents(tmp_path)
    file = backbone_cases.recipe(tmp_path, base, parents, backbone="regmean", gate_mode="random")
    code = """
from pathlib import Path
from frankenmoe.backbone import choose
from frankenmoe.moe.processes import rank
from frankenmoe.subject import open_subject
from frankenmoe.backbone.run import heal

real = choose.choose
def counted(*words, **keys):
    Path(sys.argv[2], f"measured-{rank()}").touch()
    return real(*words, **keys)
choose.choose = counted
heal(open_subject(sys.argv[1], cache=False), Path(sys.argv[2], "out"), tokens=6144, block=64)
"""
    done = launch.run_together(code, file, tmp_path)

    assert [each.returncode for each in done] == [0, 0], done[0].stderr + done[1].stderr
    assert [path.name for path in tmp_path.glob("measured-*")] == ["measured-0"]
    stages = json.loads((tmp_path / "out" / "frankenmoe.json").read_text())["stages"]
    assert [stage["stage"] for stage in stages] == ["backbone", "heal", "routers"]


def test_an_error_ends_all_and_leaves_nothing(tmp_path: Path) -> None:
    base, parents = backbone_cases.truth_and_parents(tmp_path)
    file = backbone_cases.recipe(tmp_path, base, parents, backbone="base")
    (tmp_path / "short.txt").write_text("abc " * 50)

    done = launch.run_together(COMMAND, "heal", file, tmp_path / "out", "--data", f"a={tmp_path / 'short.txt'}", *TEXT)

    assert [each.returncode for each in done] == [2, 2]
    assert "the data of expert 'a' has 3 blocks of 64 tokens, expected at least 8" in done[0].stderr
    assert not list(tmp_path.glob("out*"))
