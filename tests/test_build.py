"""Builds that are killed and resumed, change during the build, or are verified; random recipes (oracle 12)."""

import hashlib
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import forks
import frankenmoe as fm
import tiny
from frankenmoe.artifact.folder import partial_folder
from frankenmoe.build import run as building
from frankenmoe.checkpoint import writer
from frankenmoe.errors import ArtifactError, SourceError

Parents = dict[str, list[Path]]


def hashes(folder: Path) -> dict[str, str]:
    """File name -> SHA-256 for all files except the record."""
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.iterdir())
        if file.name != "frankenmoe.json"
    }


@pytest.fixture
def recipe(parents: Parents, tmp_path: Path) -> Path:
    base, one, two = parents["llama"]
    return tiny.write_recipe(tmp_path / "r.yml", base, [base, one, two])


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_build_goes_on_and_ends_byte_identical(end: signal.Signals, recipe: Path, tmp_path: Path) -> None:
    fm.build(recipe, tmp_path / "whole", shard_size=20_000)
    out = tmp_path / "out"
    # the child stops itself, from inside the copying of its third shard, as a kill from outside would
    code = (
        "import os, sys, frankenmoe as fm\n"
        "from frankenmoe.build import body as compose\n"
        "real, count = compose.write_shard, []\n"
        "def shard(path, *args, **kw):\n"
        "    count.append(1)\n"
        "    if len(count) == 3:\n"
        "        kw['on_bytes'] = lambda amount: os.kill(os.getpid(), int(sys.argv[3]))\n"
        "    return real(path, *args, **kw)\n"
        "compose.write_shard = shard\n"
        "fm.build(sys.argv[1], sys.argv[2], shard_size=20_000)\n"
    )
    assert forks.run(code, recipe, out, int(end)).returncode != 0
    partial = partial_folder(out)
    assert not out.exists()
    finished = {file.name: file.stat().st_mtime_ns for file in partial.glob("model-0*.safetensors")}
    assert 1 <= len(finished) < len(list((tmp_path / "whole").glob("model-0*.safetensors")))
    with pytest.raises(ArtifactError, match="not a folder"):
        fm.load(out)
    fm.build(recipe, out, shard_size=20_000)
    assert hashes(out) == hashes(tmp_path / "whole")
    assert {name: (out / name).stat().st_mtime_ns for name in finished} == finished
    assert not partial.exists()
    fm.verify(out)


@pytest.mark.parametrize("share", [3, 2, 1, 0.7, 0.5])
def test_borders_of_shards_cut_no_layers_experts_that_fit(share: float, recipe: Path, tmp_path: Path) -> None:
    """If a layer does not fit into a shard, its gate and up (packed together) and its down stay whole if they fit."""
    experts = [write for write in fm.plan(fm.Recipe.load(recipe)).writes if ".experts." in write.name]
    layers = {write.name.partition(".experts.")[0] for write in experts}
    layer = sum(write.nbytes for write in experts) // len(layers)
    moe = fm.build(recipe, tmp_path / "out", shard_size=int(share * layer))
    files = json.loads((moe.folder / "model.safetensors.index.json").read_text())["weight_map"]
    halves = ("w1.weight", "w3.weight"), ("w2.weight",)
    pieces = [halves[0] + halves[1]] if share >= 1 else [halves[0]] if share == 0.7 else []
    for start in layers:
        for ends in [*pieces, halves[1]]:
            assert len({file for name, file in files.items() if name.startswith(start) and name.endswith(ends)}) == 1


def interrupted(recipe: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves a partial folder behind, as Ctrl-C in the first shard does."""

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(writer, "appending", stop)
        with pytest.raises(KeyboardInterrupt):
            fm.build(recipe, out)
    assert partial_folder(out).is_dir()


@pytest.mark.parametrize("change", ["recipe", "source", "dtype", "shard size"])
def test_a_changed_input_is_noticed_on_resuming(change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = [tiny.make_parent(tmp_path / str(seed), seed=seed) for seed in range(2)]
    recipe = tiny.write_recipe(tmp_path / "r.yml", own[0], own)
    interrupted(recipe, tmp_path / "out", monkeypatch)
    keys: dict[str, Any] = {}
    if change == "recipe":
        tiny.write_recipe(recipe, own[0], own, seed=3)
    elif change == "source":
        time.sleep(0.01)
        tiny.make_parent(own[1], seed=9)
    elif change == "dtype":
        keys = {"dtype": "bfloat16"}
    else:
        keys = {"shard_size": 10_000}
    with pytest.raises(ArtifactError, match="begun from another recipe") as caught:
        fm.build(recipe, tmp_path / "out", **keys)
    assert "remove" in str(caught.value.hint)
    assert partial_folder(tmp_path / "out").is_dir()


def test_a_source_that_changes_meanwhile_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = [tiny.make_parent(tmp_path / str(seed), seed=seed) for seed in range(2)]
    recipe = tiny.write_recipe(tmp_path / "r.yml", own[0], own)
    real = building.compose

    def compose(*args: Any, **keys: Any) -> None:
        real(*args, **keys)
        os.utime(own[1] / "model.safetensors", ns=(1, 1))

    monkeypatch.setattr(building, "compose", compose)
    with pytest.raises(SourceError, match="changed while it was read"):
        fm.build(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not partial_folder(tmp_path / "out").exists()


def test_an_error_in_the_input_leaves_nothing_behind(parents: Parents, tmp_path: Path) -> None:
    broken = tiny.make_parent(tmp_path / "broken", seed=4)
    state = load_file(broken / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan
    from safetensors.torch import save_file

    save_file(state, broken / "model.safetensors", metadata={"format": "pt"})
    recipe = tiny.write_recipe(tmp_path / "r.yml", parents["llama"][0], [parents["llama"][1], broken])
    before = sorted(tmp_path.iterdir())
    with pytest.raises(fm.FrankenMoEError, match=r"NaN at \[3, 4\]"):
        fm.build(recipe, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


def test_two_builds_of_one_folder_do_not_meet(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(recipe, tmp_path / "out", monkeypatch)
    import fcntl

    with (partial_folder(tmp_path / "out") / "build.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ArtifactError, match="another process"):
            fm.build(recipe, tmp_path / "out")


@pytest.mark.parametrize("virtual", [True, False])
def test_verify_finds_one_flipped_bit(virtual: bool, tmp_path: Path) -> None:
    own = [tiny.make_parent(tmp_path / str(seed), seed=seed) for seed in range(2)]
    recipe = tiny.write_recipe(tmp_path / "r.yml", own[0], own)
    artifact = fm.build(recipe, tmp_path / "out", virtual=virtual)
    assert {check.what for check in fm.verify(artifact.folder)} >= {"sources", "routers", "values"}
    target = own[1] / "model.safetensors" if virtual else artifact.folder / "model-00001-of-00001.safetensors"
    raw = bytearray(target.read_bytes())
    raw[-7] ^= 1
    target.write_bytes(raw)
    with pytest.raises(ArtifactError):
        fm.verify(artifact.folder)


def test_a_virtual_artifact_and_its_sources_may_move_together(tmp_path: Path) -> None:
    home = tmp_path / "home"
    own = [tiny.make_parent(home / str(seed), seed=seed) for seed in range(2)]
    recipe = tiny.write_recipe(home / "r.yml", Path("0"), [Path(folder.name) for folder in own])
    fm.build(recipe, home / "virtual", virtual=True)
    home.rename(tmp_path / "elsewhere")
    assert fm.verify(tmp_path / "elsewhere" / "virtual")


def test_tokenizer_and_generation_settings_come_along_byte_for_byte(
    recipe: Path, parents: Parents, tmp_path: Path
) -> None:
    out = fm.build(recipe, tmp_path / "out").folder
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (out / name).read_bytes() == (parents["llama"][0] / name).read_bytes()


def test_config_fields_are_the_bases_not_the_formats_defaults(recipe: Path, tmp_path: Path) -> None:
    config = json.loads((fm.build(recipe, tmp_path / "out").folder / "config.json").read_text())
    assert config["rms_norm_eps"] == tiny.SIZES["rms_norm_eps"]
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 5000.0
    assert config["num_local_experts"] == 3
    assert config["sliding_window"] is None


MANY_EXPERTS = 33


@given(
    family=st.sampled_from(tiny.FAMILIES),
    experts=st.sampled_from([1, 2, 3, 5, 8, 16, MANY_EXPERTS]),
    data=st.data(),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
    shard_size=st.sampled_from([1, 10_000, 60_000, 10**9]),
)
@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
def test_random_recipes_build_verify_and_load_back(
    family: str, experts: int, data: st.DataObject, dtype: str, shard_size: int, parents: Parents, tmp_path: Path
) -> None:
    folders = parents[family]
    chosen = data.draw(st.lists(st.sampled_from(folders), min_size=experts, max_size=experts))
    top_k = data.draw(st.integers(1, experts))
    folder = tmp_path / os.urandom(6).hex()
    folder.mkdir()
    recipe = tiny.write_recipe(folder / "r.yml", folders[0], chosen, experts_per_token=top_k, dtype=dtype)
    artifact = fm.build(recipe, folder / "out", shard_size=shard_size, allow_identical=True)
    fm.verify(artifact.folder)
    plan = fm.plan(fm.Recipe.load(recipe))
    size = sum(file.stat().st_size for file in artifact.folder.glob("*.safetensors"))
    assert abs(size - plan.bill.memory_built) <= 4096 * (
        1 + len(list(artifact.folder.glob("model-*"))) * 2 + len(plan.writes) // 8
    )
    stock, report = AutoModelForCausalLM.from_pretrained(artifact.folder, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert plan.bill.total == sum(parameter.numel() for parameter in stock.parameters())
    ids = tiny.ids(6, batch=1)
    ours = fm.load(artifact, dtype="float32").model
    with torch.no_grad():
        assert torch.allclose(stock(ids).logits, ours(ids).logits, atol=1e-4)
