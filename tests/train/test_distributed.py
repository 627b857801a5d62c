"""Two CPU processes over gloo, copied (DDP) and sharded (FSDP2): the losses and the files of one process.

Each is also killed, and resumed by the other number of processes.
"""

import json
from pathlib import Path
from typing import Any

import corpus
import pytest
import torch
from dying import run_apart
from safetensors.torch import load_file

import frankenmoe as fm
from frankenmoe.train import checkpoint
from frankenmoe.train.run import train

Parents = dict[str, list[Path]]
SETTINGS = corpus.settings(what="routers,adapters,norms,embeddings", balance=0.01, z=0.001, save_every=2)


@pytest.fixture(scope="module")
def whole(parents: Parents, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with text, the MoE in `moe`, and in `one` what one process makes of it."""
    folder = tmp_path_factory.mktemp("whole")
    text = corpus.write_texts(folder)
    fm.build(corpus.recipe(folder, parents["llama"]), folder / "moe", virtual=True)
    train(folder / "moe", folder / "one", data=text, settings=SETTINGS, keep_anyway=True)
    return folder


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("shard", [False, True])
def test_two_processes_are_one(shard: bool, whole: Path, tmp_path: Path) -> None:
    def run(out: str, processes: int, **options: Any) -> int:
        text = {name: [str(whole / f"{name}.txt")] for name in corpus.WORDS}
        target = tmp_path / out
        return run_apart(
            whole / "moe", target, data=text, settings=SETTINGS, processes=processes, shard=shard, **options
        )

    assert run("two", 2, torchrun=not shard) == 0
    assert run("mixed", 2, die=4) != 0
    assert checkpoint.last_checkpoint(tmp_path / "mixed.partial")[0] == 4
    assert run("mixed", 1) == 0
    assert run("back", 1, die=4) != 0
    assert run("back", 2) == 0
    one = json.loads((whole / "one/training.json").read_text())
    for out in ("two", "mixed", "back"):
        other = json.loads((tmp_path / out / "training.json").read_text())
        assert other["losses"] == pytest.approx(one["losses"], abs=1e-4)
        assert {look["step"]: look["mean"] for look in other["looks"]} == pytest.approx(
            {look["step"]: look["mean"] for look in one["looks"]}, abs=1e-4
        )
        for name in ("model-routers.safetensors", "model-trained.safetensors", "adapters/e0/adapter_model.safetensors"):
            ours, theirs = load_file(whole / "one" / name), load_file(tmp_path / out / name)
            assert ours.keys() == theirs.keys()
            assert all(torch.allclose(ours[key], theirs[key], atol=1e-4) for key in ours)


@pytest.mark.slow
def test_a_batch_that_does_not_divide_among_processes_is_refused(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = {name: [str(whole / f"{name}.txt")] for name in corpus.WORDS}
    settings = corpus.settings(batch=5)
    assert run_apart(whole / "moe", tmp_path / "out", data=text, settings=settings, processes=2) != 0
    said = capsys.readouterr().err
    assert "a batch of 5 blocks does not divide into 2 parts" in said
    assert "--batch 6" in said
