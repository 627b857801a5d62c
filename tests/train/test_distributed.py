"""Two CPU processes over gloo, copied (DDP) and sharded (FSDP2): the losses and the files of one process.

Each is also killed and gone on with in the other number of processes.
"""

import json
import signal
from pathlib import Path

import corpus
import pytest
import torch
from dying import run_apart
from safetensors.torch import load_file

import frankenmoe as fm
from frankenmoe.train import checkpoint

Parents = dict[str, list[Path]]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("shard", [False, True])
def test_two_processes_are_one(shard: bool, parents: Parents, tmp_path: Path) -> None:
    text = corpus.write_texts(tmp_path)
    moe = fm.build(corpus.recipe(tmp_path, parents["llama"]), tmp_path / "moe", virtual=True).folder
    settings = corpus.settings(what="routers,adapters,norms,embeddings", balance=0.01, z=0.001, save_every=2)

    def run(out: str, processes: int, die: int | None = None) -> int:
        return run_apart(moe, tmp_path / out, data=text, settings=settings, die=die, processes=processes, shard=shard)

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
