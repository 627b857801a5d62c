"""Two CPU processes over gloo, copied (DDP) and sharded (FSDP2): the losses and the files of one process.

Each is also killed and gone on with in the other number of processes.
"""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import corpus
import pytest
import torch
from safetensors.torch import load_file

import frankenmoe as fm
from frankenmoe.train import checkpoint

Parents = dict[str, list[Path]]
CHILD = """
import json, os, signal, sys
from frankenmoe.recipetrain import Train
from frankenmoe.train.trainer import MoETrainer
from frankenmoe.training import train
what, out, data, settings, shard, die = json.loads(sys.argv[1])
step = MoETrainer.training_step
def dies(self, *rest, **more):
    if self.state.global_step == die:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, *rest, **more)
MoETrainer.training_step = dies
train(what, out, data=data, settings=Train.model_validate(settings), shard=shard, keep_anyway=True)
"""


def launch(processes: int, words: list[Any], folder: Path) -> int:
    """Runs the child in one process, or in several by torchrun; its exit code."""
    file = folder / "child.py"
    file.write_text(CHILD)
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    done = subprocess.run([*launcher, str(file), json.dumps(words)], capture_output=True, text=True)
    sys.stderr.write(done.stderr[-2500:])
    return done.returncode


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("shard", [False, True])
def test_two_processes_are_one(shard: bool, parents: Parents, tmp_path: Path) -> None:
    text = corpus.write_texts(tmp_path)
    moe = fm.build(corpus.recipe(tmp_path, parents["llama"]), tmp_path / "moe", virtual=True).folder
    settings = corpus.settings(what="routers,adapters,norms", balance=0.01, z=0.001, save_every=2).to_dict()

    def run(out: str, processes: int, die: int | None = None) -> int:
        return launch(
            processes, [str(moe), str(tmp_path / out), text, settings, shard and processes > 1, die], tmp_path
        )

    assert run("one", 1) == 0
    assert run("two", 2) == 0
    assert run("mixed", 2, die=4) != 0
    assert checkpoint.last_checkpoint(tmp_path / "mixed.partial")[0] == 4
    assert run("mixed", 1) == 0
    assert run("back", 1, die=4) == -signal.SIGKILL
    assert run("back", 2) == 0
    one = json.loads((tmp_path / "one/training.json").read_text())
    for out in ("two", "mixed", "back"):
        other = json.loads((tmp_path / out / "training.json").read_text())
        assert other["losses"] == pytest.approx(one["losses"], abs=1e-4)
        assert {look["step"]: look["mean"] for look in other["looks"]} == pytest.approx(
            {look["step"]: look["mean"] for look in one["looks"]}, abs=1e-4
        )
        for name in ("model-routers.safetensors", "model-trained.safetensors", "adapters/e0/adapter_model.safetensors"):
            ours, theirs = (load_file(tmp_path / each / name) for each in ("one", out))
            assert ours.keys() == theirs.keys()
            assert all(torch.allclose(ours[key], theirs[key], atol=1e-4) for key in ours)
