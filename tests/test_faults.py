"""Builds that fail late: finished shards are kept after a fault of the machine, and removed for invalid input."""

import errno
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import frankenmoe as fm
import tiny
from frankenmoe.artifact import folder as artifact
from frankenmoe.artifact.folder import partial_folder
from frankenmoe.artifact.record import Record
from frankenmoe.build import body as compose
from frankenmoe.build import run as building
from frankenmoe.errors import ArtifactError, FrankenMoEError, SourceError
from refusals import cli, copy_of, refused, spoil
from test_build import hashes

Parents = dict[str, list[Path]]
SHARD = 20_000
LAST = 5  # the shard that fails


@pytest.fixture
def recipe(parents: Parents, tmp_path: Path) -> Path:
    base, one, two = parents["llama"]
    return tiny.write_recipe(tmp_path / "r.yml", base, [base, one, two])


def fail_at_last_shard(monkeypatch: pytest.MonkeyPatch, error: Callable[[], Exception]) -> None:
    real = compose.write_shard

    def write(path: Path, *args: Any, **keys: Any) -> None:
        if path.name.startswith(f"model-{LAST:05d}"):
            raise error()
        real(path, *args, **keys)

    monkeypatch.setattr(compose, "write_shard", write)


def full_disk() -> Exception:
    try:
        raise OSError(errno.ENOSPC, "No space left on device")
    except OSError as error:
        full = ArtifactError("x does not fit", hint="free some space")
        full.__cause__ = error
        return full


@pytest.mark.parametrize(
    "error", [full_disk, MemoryError, lambda: OSError(errno.EIO, "Input/output error")], ids=["full", "memory", "disk"]
)
def test_the_machines_fault_in_a_first_run_keeps_finished_shards(
    error: Callable[[], Exception], recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fm.build(recipe, tmp_path / "whole", shard_size=SHARD)
    with monkeypatch.context() as patched:
        fail_at_last_shard(patched, error)
        with pytest.raises(type(error())) as caught:
            fm.build(recipe, tmp_path / "out", shard_size=SHARD)
    partial = partial_folder(tmp_path / "out")
    finished = {file.name: file.stat().st_mtime_ns for file in partial.glob("model-0*")}
    assert finished
    assert f"model-{LAST:05d}" not in "".join(finished)
    if isinstance(caught.value, FrankenMoEError):
        assert f"the same command then continues from {len(finished)} finished shards in {partial}" in str(
            caught.value.hint
        )
    out = fm.build(recipe, tmp_path / "out", shard_size=SHARD).folder
    assert {name: (out / name).stat().st_mtime_ns for name in finished} == finished
    assert hashes(out) == hashes(tmp_path / "whole")


def fill(file: Path) -> None:
    """Writes until the disk is full."""
    with suppress(OSError), file.open("wb", buffering=0) as target:
        while target.write(bytes(2**12)):
            pass


def test_a_real_full_disk_keeps_finished_shards(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from test_bad_input import small_disk

    with small_disk(tmp_path / "disk", size="600k") as disk:
        real = compose.write_shard

        def write(path: Path, *args: Any, **keys: Any) -> None:
            if path.name.startswith(f"model-{LAST:05d}"):  # another program fills the disk
                fill(disk / "else")
            real(path, *args, **keys)

        with monkeypatch.context() as patched:
            patched.setattr(compose, "write_shard", write)
            outcome = cli("build", recipe, disk / "out", "--shard-size", "20K")
        assert outcome.code == 2
        assert "does not fit" in outcome.stderr
        assert "the same command then continues from" in outcome.stderr
        finished = list((disk / "out.partial").glob("model-0*"))
        assert finished
        (disk / "else").unlink()
        assert cli("build", recipe, disk / "out", "--shard-size", "20K").code == 0
        assert cli("verify", disk / "out").code == 0


def test_the_inputs_fault_leaves_nothing_of_many_shards(parents: Parents, recipe: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.down_proj.weight"  # the last one written
    bad = spoil(copy_of(parents["llama"][2], tmp_path / "bad"), lambda tensors: tensors[name].fill_(float("nan")))
    tiny.write_recipe(recipe, parents["llama"][0], [parents["llama"][1], bad])
    refused("build", recipe, tmp_path / "out", "--shard-size", "20K", inside=tmp_path, facts=(name, "NaN"))


def test_a_proof_that_fails_leaves_nothing_of_a_first_run(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = building.compose

    def compose_and_damage(made: Any, partial: Path, **keys: Any) -> None:
        real(made, partial, **keys)
        file = next(partial.glob("model-0*"))
        file.write_bytes(file.read_bytes()[:-4] + b"\1\1\1\1")
        (partial / "config.json").write_text(
            json.dumps(json.loads((partial / "config.json").read_text()) | {"hidden_size": 64})
        )

    monkeypatch.setattr(building, "compose", compose_and_damage)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ArtifactError) as caught:
        fm.build(recipe, tmp_path / "out")
    assert "build again" in str(caught.value.hint)
    assert sorted(tmp_path.iterdir()) == before


# errors found before or during writing


@pytest.mark.parametrize("content", ["{", "[]", "\udcff"])
@pytest.mark.parametrize("gate_mode", ["random", "hidden"])
def test_a_broken_generation_config_is_told_by_the_plan(
    content: str, gate_mode: str, parents: Parents, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = copy_of(parents["llama"][0], tmp_path / "base")
    (base / "generation_config.json").write_bytes(content.encode(errors="surrogateescape"))
    recipe = tiny.write_recipe(tmp_path / "r.yml", base, parents["llama"][1:], prompts=True, gate_mode=gate_mode)
    facts = (str(base / "generation_config.json"), "JSON object")
    refused("plan", recipe, inside=tmp_path, facts=facts, hint="remove it")
    monkeypatch.setattr(building, "growing", None)  # the build must not start
    refused("build", recipe, tmp_path / "out", inside=tmp_path, facts=facts, hint="remove it")


def test_generation_settings_that_transformers_refuses(parents: Parents, tmp_path: Path) -> None:
    base = copy_of(parents["llama"][0], tmp_path / "base")
    (base / "generation_config.json").write_text('{"early_stopping": 4}')
    recipe = tiny.write_recipe(tmp_path / "r.yml", base, parents["llama"][1:])
    facts = (str(base / "generation_config.json"), "early_stopping")
    refused("build", recipe, tmp_path / "out", inside=tmp_path, facts=facts, hint="remove it")


def test_copying_stops_as_soon_as_a_source_is_known_to_be_no_use() -> None:
    ahead: Future[None] = Future()
    heard: list[int] = []
    listen = building._unless_failed(ahead, heard.append)
    listen(1)
    ahead.set_exception(SourceError("no model can be made of it"))
    with pytest.raises(SourceError, match="no model"):
        listen(2)
    assert heard == [1]


def test_a_build_listens_to_that(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_use(*_: Any, **__: Any) -> None:
        raise SourceError("no model can be made of it")

    def endless(*_: Any, on_bytes: Callable[[int], None], **__: Any) -> None:
        for _ in range(60_000):
            on_bytes(0)
            time.sleep(0.001)
        raise AssertionError("nobody stopped the copying")

    monkeypatch.setattr("frankenmoe.build.asking._recalled", lambda key: None)  # another test may have asked
    monkeypatch.setattr("frankenmoe.build.agreement.agree", no_use)
    monkeypatch.setattr(building, "compose", endless)
    with pytest.raises(SourceError, match="no model"):
        fm.build(recipe, tmp_path / "out")


@pytest.mark.parametrize("virtual", [True, False])
def test_a_file_put_into_the_output_folder_meanwhile(
    virtual: bool, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    real = building.finish

    def finish(*args: Any, **keys: Any) -> Any:
        out.mkdir()
        (out / "notes.txt").write_text("mine")
        return real(*args, **keys)

    with monkeypatch.context() as patched:
        patched.setattr(building, "finish", finish)
        with pytest.raises(ArtifactError, match=r"cannot become .*not empty") as caught:
            fm.build(recipe, out, virtual=virtual)
    assert "to another folder" in str(caught.value.hint)
    assert (out / "notes.txt").read_text() == "mine"
    (out / "notes.txt").unlink()
    assert fm.verify(fm.build(recipe, out, virtual=virtual).folder)


# records


@pytest.fixture
def record(recipe: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    return fm.build(recipe, tmp_path / "out", virtual=request.param).folder / artifact.RECORD


@pytest.mark.parametrize("record", [True, False], ids=["virtual", "built"], indirect=True)
def test_a_record_edited_by_hand(record: Path, tmp_path: Path) -> None:
    good = json.loads(record.read_text())
    required = [name for name, field in Record.model_fields.items() if field.is_required() and name != "form"]
    wanted = [*required, *(["format"] if good["form"] == "built" else [])]
    spoilt = [{key: value for key, value in good.items() if key != gone} for gone in wanted]
    spoilt += [good | {key: None} for key in wanted]
    spoilt += [good | {"sources": [{}]}, good | {"configs": ["x"]}, good | {"form": "baked"}, good | {"version": 99}]
    if good["form"] == "built":
        spoilt += [
            good | {"format": "gpt5"},
            good | {"base_config": {}},
            good | {"base_config": good["base_config"] | {"hidden_size": "x"}},
        ]
    for edited in spoilt:
        record.write_text(json.dumps(edited))
        refused("chat", record.parent, "--prompt", "x", inside=tmp_path, facts=(str(record.parent),), hint="")
        if edited.get("format") == good["format"] and edited.get("base_config") == good["base_config"]:
            refused("verify", record.parent, inside=tmp_path, facts=(str(record.parent),))
    for content in ("", "[]", "{", "[" * 100_000):
        record.write_text(content)
        refused("verify", record.parent, inside=tmp_path, facts=(str(record),), hint="build the artifact again")


def edit_record(out: Path, **changes: Any) -> None:
    file = out / artifact.RECORD
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("record", [True, False], ids=["virtual", "built"], indirect=True)
@pytest.mark.parametrize(
    "changes",
    [{"experts_per_token": 1}, {"experts_per_token": 0}, {"experts": ["e0", "e1"]}, {"experts": ["a", "b", "c"]},
     {"shared_experts": ["x"]}, {"base_config": {}}, {"format": "qwen2_moe"},
     {"recipe": {"base_model": 3}}],
    ids=str,
)  # fmt: skip
def test_a_record_that_says_something_else_than_its_recipe(
    record: Path, changes: dict[str, Any], tmp_path: Path
) -> None:
    edit_record(record.parent, **changes)
    refused("verify", record.parent, inside=tmp_path, facts=(str(record.parent),))


@pytest.mark.parametrize("record", [True, False], ids=["virtual", "built"], indirect=True)
@pytest.mark.parametrize(
    "changes",
    [
        {"experts": []},
        {"experts_per_token": True},
        {"experts": [1, {}]},
        {"recipe_folder": "\0"},
        {"configs": [{"file": 1, "sha256": None}]},
    ],
    ids=str,
)
def test_a_record_of_another_kind(record: Path, changes: dict[str, Any], tmp_path: Path) -> None:
    edit_record(record.parent, **changes)
    for command in (("verify",), ("chat", "--prompt", "x")):
        refused(command[0], record.parent, *command[1:], inside=tmp_path, facts=(str(record),), hint="build")


@pytest.mark.parametrize("record", [True, False], ids=["virtual", "built"], indirect=True)
@pytest.mark.parametrize(
    ("gate", "words"),
    [
        (None, "model.layers.0.block_sparse_moe.gate.weight"),
        (torch.ones(3, 31), "[3, 31]"),
        (torch.ones(96), "[96]"),
        (torch.ones(4, 32), "4 experts"),
        (torch.ones(3, 32, dtype=torch.int32), "torch.int32"),
        (torch.full((3, 32), torch.nan), "not finite"),
    ],
    ids=["gone", "narrow", "flat", "tall", "integers", "nan"],
)
def test_routers_that_were_spoilt(record: Path, gate: torch.Tensor | None, words: str, tmp_path: Path) -> None:
    file = record.with_name(artifact.ROUTERS)
    tensors = load_file(file)
    name = "model.layers.0.block_sparse_moe.gate.weight"
    tensors.pop(name)
    save_file(tensors | ({} if gate is None else {name: gate}), file)
    for command, facts in ((("verify",), ()), (("chat", "--prompt", "x"), (words,))):
        refused(command[0], record.parent, *command[1:], inside=tmp_path, facts=facts)


@pytest.mark.parametrize("temperature", ["nan", "inf", "1e-320", "-1", "1e300", "warm"])
def test_a_temperature_that_no_logits_can_be_divided_by(temperature: str, recipe: Path) -> None:
    outcome = cli("chat", recipe, "--prompt", "x", "--temperature", temperature)
    assert outcome.code == 2
    assert "'--temperature': must be" in outcome.stderr


def test_a_reply_ends_where_the_model_sees_no_further(recipe: Path, tmp_path: Path) -> None:
    outcome = cli("chat", recipe, "--prompt", "hello", "--max-new-tokens", 10**9, "--json")
    assert outcome.code == 0, outcome.stderr
    assert len(json.loads(outcome.stdout)["trace"]) < tiny.SIZES["max_position_embeddings"]


@pytest.mark.parametrize("template", ["{{ raise_exception('roles must alternate') }}", "{% for", "{{ 1 / 0 }}"])
def test_a_chat_template_that_fails(template: str, parents: Parents, tmp_path: Path) -> None:
    base = copy_of(parents["llama"][0], tmp_path / "base")
    (base / "chat_template.jinja").write_text(template)
    recipe = tiny.write_recipe(tmp_path / "r.yml", base, parents["llama"][1:])
    refused("chat", recipe, "--prompt", "x", inside=tmp_path, facts=("chat template",), hint="chat_template.jinja")


@pytest.mark.parametrize("locale", ["C.UTF-8", "C"])
def test_bytes_that_are_no_text(locale: str, recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = os.environ | {"LC_ALL": locale, "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    chat = [sys.executable, "-m", "frankenmoe.cli", "chat", str(recipe), "--prompt", b"\xff"]
    done = subprocess.run(chat, capture_output=True, env=environment)
    assert done.returncode == 2
    assert b"UTF-8 text" in done.stderr
    assert b"Traceback" not in done.stderr
    # a subprocess shows how Python decodes a pipe here; chat then runs in this process with that text
    code = "import sys; print(sys.stdin.encoding, sys.stdin.errors)"
    encoding, errors = subprocess.check_output([sys.executable, "-c", code], env=environment, text=True).split()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff\n"), encoding=encoding, errors=errors))
    outcome = cli("chat", recipe, "--max-new-tokens", 2)
    assert outcome.code == 2
    assert "UTF-8 text" in outcome.stderr
    assert "Traceback" not in outcome.stderr


@pytest.mark.parametrize("seed", [2**64, -1, 2**63])
def test_a_seed_that_no_generator_takes(seed: int, recipe: Path) -> None:
    outcome = cli("chat", recipe, "--prompt", "x", "--seed", seed)
    assert outcome.code == 2
    assert "--seed" in outcome.stderr
    assert "Traceback" not in outcome.stderr
