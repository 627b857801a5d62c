"""Exports are whole or absent, mistakes are told before anything is written, and what is written is accounted for."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import frankenmoe as fm
import gguftools
import tiny
from frankenmoe.artifact.folder import open_artifact
from frankenmoe.checkpoint import writer
from frankenmoe.cli.app import app
from frankenmoe.errors import ArtifactError, FrankenMoEError, NumericsError, PlanError
from frankenmoe.export import run as exporting
from frankenmoe.export.importance import ENOUGH, measure
from frankenmoe.export.llama import Engine, check_loadable
from frankenmoe.export.run import check_files, export_gguf
from frankenmoe.export.samples import PROMPTS
from frankenmoe.planning.gguf import layout
from frankenmoe.publish.card import make_card
from frankenmoe.subject import open_subject

gguf = pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe whose gates come from prompts, and both artifacts of it."""
    folder = tmp_path_factory.mktemp("export")
    base, *others = gguftools.parents(folder, "llama")
    recipe = tiny.write_recipe(folder / "recipe.yml", base, others, prompts=True, gate_mode="hidden", name="tiny moe")
    fm.build(recipe, folder / "built")
    fm.build(recipe, folder / "virtual", virtual=True)
    return folder


@pytest.fixture(scope="module")
def f16(place: Path) -> Path:
    """The virtual artifact as an f16 file; only read."""
    (file,) = export_gguf(place / "virtual", place / "gguf", types=["f16"])
    return file.path


def refused(folder: Path, error: type[FrankenMoEError], word: str, **options: object) -> None:
    """Export refuses, in one sentence that has this word, and leaves nothing."""
    what = options.pop("what", folder / "virtual")
    out = folder / "refused"
    with pytest.raises(error, match=word):
        export_gguf(what, out, **options)  # type: ignore[arg-type]
    assert not out.exists() or list(out.iterdir()) == []


def test_a_type_nobody_knows_gets_the_nearest(place: Path) -> None:
    with pytest.raises(PlanError) as caught:
        export_gguf(place / "virtual", place / "refused", types=["q4_km"])
    assert "q4_k_m" in str(caught.value.hint)
    assert not (place / "refused").exists()


def test_files_are_named_after_the_moe_and_never_overwritten(place: Path, tmp_path: Path) -> None:
    (file,) = export_gguf(place / "virtual", tmp_path, types=["q8_0"])
    assert file.path == tmp_path / "tiny-moe-Q8_0.gguf"
    assert file.bytes == file.path.stat().st_size
    before = file.path.read_bytes()
    with pytest.raises(ArtifactError, match="exists already"):
        export_gguf(place / "virtual", tmp_path, types=["q8_0"])
    assert file.path.read_bytes() == before
    with pytest.raises(ArtifactError, match="2 types"):
        export_gguf(place / "virtual", tmp_path / "one.gguf", types=["q8_0", "f16"])


def test_a_small_disk_is_told_before_the_first_byte(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("frankenmoe.artifact.folder.free_bytes", lambda folder: 1000)
    refused(place, ArtifactError, "GiB are still to be written")


def test_what_a_killed_export_left_is_room_for_the_next(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (file,) = export_gguf(place / "virtual", tmp_path / "whole", types=["q8_0"])
    (tmp_path / "tiny-moe-Q8_0.gguf.partial").write_bytes(b"x" * file.bytes)
    monkeypatch.setattr("frankenmoe.artifact.folder.free_bytes", lambda folder: 5000)
    (again,) = export_gguf(place / "virtual", tmp_path, types=["q8_0"])
    assert again.path.read_bytes() == file.path.read_bytes()


def test_a_disk_that_fills_up_leaves_nothing(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer.os, "posix_fallocate", full)
    refused(place, ArtifactError, "does not fit")


def test_routers_left_to_chance_are_refused_unless_meant(place: Path, tmp_path: Path) -> None:
    base, *others = sorted(place.glob("llama?"))
    recipe = tiny.write_recipe(tmp_path / "r.yml", base, others)
    built = fm.build(recipe, tmp_path / "built")
    refused(tmp_path, ArtifactError, "are random", what=recipe)
    refused(tmp_path, ArtifactError, "are random", what=built)
    assert export_gguf(built, tmp_path / "out", types=["f16"], allow_random=True)


def test_a_value_that_f16_cannot_hold_is_named(tmp_path: Path) -> None:
    folders = gguftools.parents(tmp_path, "llama", dtype=torch.bfloat16)
    from safetensors.torch import load_file, save_file

    file = folders[1] / "model.safetensors"
    weights = load_file(file)
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = 1e6
    save_file(weights, file, metadata={"format": "pt"})
    recipe = tiny.write_recipe(tmp_path / "r.yml", folders[0], folders[1:])
    refused(tmp_path, NumericsError, r"layers\.1\.mlp\.up_proj.*65504", what=recipe, types=["f16"], allow_random=True)
    assert export_gguf(recipe, tmp_path / "out", types=["bf16", "q8_0"], allow_random=True)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_export_leaves_only_a_partial(how: signal.Signals, place: Path, tmp_path: Path) -> None:
    slow = (
        "import sys, time\nfrom frankenmoe.export import write\nfrom frankenmoe.export.run import export_gguf\n"
        "real = write._write_tensor\ndef late(*a):\n    print('x', flush=True)\n    time.sleep(0.2)\n    real(*a)\n"
        "write._write_tensor = late\nexport_gguf(sys.argv[1], sys.argv[2], types=['f16', 'q8_0'])"
    )
    command = [sys.executable, "-c", slow, str(place / "virtual"), str(tmp_path)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, preexec_fn=tiny.hears_ctrl_c
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.readline()
        process.send_signal(how)
    assert process.returncode
    left = {file.name for file in tmp_path.iterdir()}
    partial = {"tiny-moe-F16.gguf.partial", "tiny-moe-Q8_0.gguf.partial"}
    assert left == (partial if how is signal.SIGKILL else set())
    assert len(export_gguf(place / "virtual", tmp_path, types=["f16", "q8_0"])) == 2
    assert not list(tmp_path.glob("*.partial"))


def test_a_file_says_only_the_licence_that_all_sources_share(tmp_path: Path) -> None:
    folders = gguftools.parents(tmp_path, "llama")
    recipe = tiny.write_recipe(tmp_path / "r.yml", folders[0], folders[1:])

    def said(out: str) -> str | None:
        (file,) = export_gguf(recipe, tmp_path / out, types=["f16"], allow_random=True)
        return check_loadable(file.path).get("general.license")

    for folder in folders:
        (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    assert said("shared") == "apache-2.0"
    (folders[2] / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    assert said("mixed") is None


def test_a_copied_tensor_is_the_sources_bytes(place: Path, tmp_path: Path) -> None:
    (file,) = export_gguf(place / "built", tmp_path, types=["f32"])
    from safetensors.numpy import load_file

    source = load_file(place / "llama1" / "model.safetensors")
    found = gguftools.tensors(file.path)
    up = found["blk.1.ffn_up_exps.weight"][1]
    assert np.array_equal(up[0], source["model.layers.1.mlp.up_proj.weight"])
    head = load_file(place / "llama0" / "model.safetensors")["lm_head.weight"]
    assert np.array_equal(found["output.weight"][1], head)


def test_experts_of_one_source_are_quantized_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from frankenmoe.export import write

    base, other, _ = gguftools.parents(tmp_path, "llama")
    recipe = tiny.write_recipe(tmp_path / "r.yml", base, [other] * 4)
    quantized: list[int] = []
    real = write.quantize
    monkeypatch.setattr(write, "quantize", lambda rows, *rest: quantized.append(rows.size) or real(rows, *rest))
    (file,) = export_gguf(recipe, tmp_path / "out", types=["q8_0"])
    experts = 2 * 3 * 32 * 48
    assert sum(quantized) < sum(file.holds.values()) - 3 * experts + 4 * 32 * 2 + 1
    up = gguftools.tensors(file.path)["blk.0.ffn_up_exps.weight"][1]
    assert all(np.array_equal(up[0], each) for each in up)


def test_checking_tells_a_good_file_from_a_bad_one(place: Path, tmp_path: Path) -> None:
    files = export_gguf(place / "virtual", tmp_path, types=["f32", "q4_0"])
    good, bad = check_files(place / "virtual", files)
    assert good.kl < 1e-6
    assert (good.top1, good.same_replies, good.same_prompts) == (1, good.prompts, good.prompts)
    assert good.perplexity_ratio == pytest.approx(1, abs=1e-3)
    assert bad.kl > 100 * max(good.kl, 1e-9)
    assert bad.top1 < 1


def test_starved_experts_are_named_and_weighed_all_the_same(place: Path) -> None:
    moe = fm.load(place / "virtual")
    with torch.no_grad():
        for block in (layer.mlp for layer in moe.model.model.layers):
            block.router.top_k = 1
            block.router.weight.data = block.router.weight.clone()  # the pages of the file serve later tests too
            block.router.weight[0] = 0
            block.router.weight[1] = 0
    found = measure(moe, layout(open_subject(place / "virtual").parts), [tiny.ids(64, batch=1)[0].tolist()])
    assert {(layer, expert) for layer, expert, _ in found.starved} >= {(0, 1), (1, 1)}
    assert all(tokens < ENOUGH for _, _, tokens in found.starved)
    for name, rows in found.importance.items():
        assert np.isfinite(rows).all(), name
        assert (rows > 0).any(axis=1).all(), name


def test_importance_is_what_flows_into_each_matrix(place: Path) -> None:
    moe = fm.load(place / "virtual")
    ids = tiny.ids(48, batch=1)
    found = measure(moe, layout(open_subject(place / "virtual").parts), [ids[0].tolist()])
    seen: dict[str, torch.Tensor] = {}
    layer = moe.model.model.layers[1]
    layer.mlp.register_forward_pre_hook(lambda _, args: seen.__setitem__("mlp", args[0][0]))
    layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args: seen.__setitem__("o", args[0][0]))
    with torch.no_grad():
        moe.model(input_ids=ids)
    expected = seen["o"].square().mean(0).numpy()
    assert np.allclose(found.importance["blk.1.attn_output.weight"][0], expected, rtol=1e-4)
    # two experts, two of them per token: each reads everything
    expected = seen["mlp"].square().mean(0).numpy()
    assert np.allclose(found.importance["blk.1.ffn_up_exps.weight"], expected, rtol=1e-4)
    assert "output.weight" not in found.importance


@pytest.mark.parametrize("context", [16, 40])
def test_texts_and_replies_of_the_check_fit_into_a_short_context(context: int, tmp_path: Path) -> None:
    parents = gguftools.parents(tmp_path, "llama", count=2, max_position_embeddings=context)
    recipe = tiny.write_recipe(tmp_path / "r.yml", parents[0], parents, gate_mode="random")
    files = export_gguf(recipe, tmp_path / "out", types=["f32"], allow_random=True)
    (found,) = check_files(recipe, files)
    tokens = [len(gguftools.bpe("gpt-2")(prompt)["input_ids"]) for prompt in PROMPTS]
    assert context - 1 in tokens or max(tokens) < context < max(tokens) + 24  # room for one token, or for a few
    assert found.prompts == sum(each < context for each in tokens)
    assert (found.same_replies, found.same_prompts) == (found.prompts, found.prompts)
    assert found.kl < 1e-6


def test_the_command_exports_checks_reports_and_chats(place: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(gguftools.WORDS)
    arguments = ["export", str(place / "built"), str(tmp_path / "gguf"), "--imatrix", str(text), "--text", str(text)]
    answer = CliRunner().invoke(app, [*arguments, "--types", "q4_0,q8_0", "--json"])
    assert answer.exit_code == 0, answer.output
    rows = json.loads(answer.stdout)
    assert [row["type"] for row in rows] == ["q4_0", "q8_0"]
    assert rows[1]["check"]["kl"] < rows[0]["check"]["kl"]
    kept = json.loads((tmp_path / "gguf" / "export.json").read_text())["files"]
    assert [entry["path"] for entry in kept] == [Path(row["path"]).name for row in rows]
    assert kept[0]["check"]["kl"] == rows[0]["check"]["kl"]
    more = CliRunner().invoke(app, ["export", str(place / "built"), str(tmp_path / "gguf"), "--types", "f16"])
    assert more.exit_code == 0
    assert max(map(len, more.output.splitlines()[:2])) <= 80
    assert len(json.loads((tmp_path / "gguf" / "export.json").read_text())["files"]) == 3
    said = CliRunner().invoke(
        app, ["chat", rows[1]["path"], "--prompt", "The quick", "--max-new-tokens", "4", "--json"]
    )
    assert said.exit_code == 0, said.output
    assert json.loads(said.stdout)["reply"]


@pytest.mark.parametrize("what", ["recipe.yml", "virtual", "built"])
def test_another_number_of_experts_is_in_the_file_and_said(what: str, place: Path, tmp_path: Path) -> None:
    subject = open_subject(place / what, experts_per_token=1)
    (file,) = export_gguf(subject, tmp_path, types=["f16"], check=True)
    assert check_loadable(file.path)["llama.expert_used_count"] == 1
    assert file.notes[-1] == "experts per token: 1 in this file, 2 in the model itself"
    (checked,) = check_files(subject, [file])
    (other,) = check_files(place / what, [file])
    assert checked.kl < 1e-3 < other.kl


def test_files_that_would_abort_llama_cpp_are_refused(f16: Path, tmp_path: Path) -> None:
    whole = f16.read_bytes()
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(whole[:-100])
    with pytest.raises(ArtifactError, match=r"is (truncated|not a whole)"):
        check_loadable(cut)
    other = tmp_path / "other.gguf"
    other.write_bytes(b"not a model at all, but long enough to look at" * 10)
    with pytest.raises(ArtifactError, match="not a whole GGUF"):
        Engine(other, context=64)
    key = b"llama.expert_used_count"
    at = whole.index(key) + len(key) + 4  # past the name and the type
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(whole[:at] + (9).to_bytes(4, "little") + whole[at + 4 :])
    with pytest.raises(ArtifactError, match="a token uses 9"):
        Engine(broken, context=64)


def test_a_template_that_llama_cpp_cannot_read_costs_the_template_only(tmp_path: Path) -> None:
    tokenizer = gguftools.bpe("gpt-2")
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] | made_up_filter }}{% endfor %}"
    base, *others = gguftools.parents(tmp_path, "llama", tokenizer=tokenizer)
    recipe = tiny.write_recipe(tmp_path / "r.yml", base, others)
    answer = CliRunner().invoke(app, ["export", str(recipe), str(tmp_path / "out"), "--types", "f16", "--allow-random"])
    assert answer.exit_code == 0, answer.output
    assert "cannot read the chat template in r-F16.gguf" in " ".join(answer.stderr.split())
    said = CliRunner().invoke(
        app, ["chat", str(tmp_path / "out" / "r-F16.gguf"), "--max-new-tokens", "2"], input=b"a\n"
    )
    assert said.exit_code == 0, said.output
    assert "cannot read the file's chat template" in said.stderr


LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{{ i }}{% endfor %}{% endfor %}"


@pytest.mark.parametrize("when", ["true", "messages|length > 2", "'zz' in messages[-1].content"])
def test_a_template_without_end_does_not_hang_llama_cpp(
    when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("frankenmoe.export.trial.SECONDS", 4)
    tokenizer = gguftools.bpe("gpt-2")
    plain = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer.chat_template = f"{{% if {when} %}}{LOOP}{{% endif %}}{plain}"
    base, *others = gguftools.parents(tmp_path, "llama", tokenizer=tokenizer)
    recipe = tiny.write_recipe(tmp_path / "r.yml", base, others)
    (file,) = export_gguf(recipe, tmp_path / "out", types=["f16"], allow_random=True)
    said = CliRunner().invoke(app, ["chat", str(file.path), "--max-new-tokens", "2"], input=b"a\nzz\n")
    if "zz" in when:
        assert isinstance(said.exception, FrankenMoEError)
        assert "chat template takes more than 4 seconds" in said.exception.message
        assert len(said.stdout.splitlines()) == 1  # the answer to the first message
    else:
        assert said.exit_code == 0, said.output
        assert "cannot read the file's chat template" in said.stderr


def test_bytes_that_are_no_text_are_told_to_whoever_chats_with_a_file(f16: Path) -> None:
    said = CliRunner().invoke(app, ["chat", str(f16)], input=b"\xff\n")
    assert said.exit_code == 2
    assert "must be UTF-8" in said.stderr


def test_an_engine_can_be_dropped_as_soon_as_it_is_loaded(f16: Path) -> None:
    drop = "for _ in range(60): Engine(Path(sys.argv[1]), context=64)"
    code = f"import sys; from pathlib import Path; from frankenmoe.export.llama import Engine\n{drop}"
    subprocess.run([sys.executable, "-c", code, str(f16)], check=True, timeout=300)  # a hang, not a slow machine


def test_a_file_with_one_token_twice_is_refused_before_llama_cpp_aborts(f16: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(f16.read_bytes().replace(b"</s>", "Ġqu".encode(), 1))  # as long, and there already
    with pytest.raises(ArtifactError, match="one token with two ids"):
        Engine(broken, context=64)


def test_without_the_extra_plain_types_still_work(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from frankenmoe.checkpoint import quantize

    (with_it,) = export_gguf(place / "virtual", tmp_path / "a", types=["q5_0"])
    monkeypatch.setattr(quantize, "native", lambda: None)
    (without,) = export_gguf(place / "virtual", tmp_path / "b", types=["q5_0"])
    assert with_it.path.read_bytes() == without.path.read_bytes()
    base, *others = gguftools.parents(tmp_path, "llama", hidden_size=256, num_attention_heads=4, head_dim=64)
    wide = tiny.write_recipe(tmp_path / "r.yml", base, others)
    refused(tmp_path, PlanError, "needs llama.cpp's quantizer", what=wide, types=["q4_k_m"], allow_random=True)


def test_exporting_an_artifact_does_not_import_torch(place: Path, tmp_path: Path) -> None:
    code = (
        "import sys\nfrom frankenmoe.export.run import export_gguf\n"
        "export_gguf(sys.argv[1], sys.argv[2], types=['q8_0'])\n"
        "sys.exit(3 if {'torch', 'transformers'} & set(sys.modules) else 0)"
    )
    command = [sys.executable, "-c", code, str(place / "virtual"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr


def test_the_report_says_what_was_measured(place: Path, tmp_path: Path) -> None:
    files = export_gguf(place / "virtual", tmp_path, types=["f16"])
    report = exporting.write_report(files, [], what=place / "virtual")
    (entry,) = json.loads(report.read_text())["files"]
    assert entry["check"] is None
    assert entry["bytes"] == files[0].bytes


def test_a_card_quotes_what_was_exported_beside_it_and_nothing_stale(place: Path, tmp_path: Path) -> None:
    artifact = shutil.copytree(place / "built", tmp_path / "moe")
    text = tmp_path / "text.txt"
    text.write_text(gguftools.WORDS)
    export = ["export", str(artifact), str(artifact / "gguf"), "--text", str(text), "--types"]
    for types in ("q8_0", "q4_0"):
        answer = CliRunner().invoke(app, [*export, types])
        assert answer.exit_code == 0, answer.output
    card = make_card(open_artifact(artifact)).text
    assert "| `tiny-moe-Q8_0.gguf` | q8_0 |" in card
    assert "| `tiny-moe-Q4_0.gguf` | q4_0 |" in card
    assert "Not compared with their source" not in card

    routers = artifact / "model-routers.safetensors"
    routers.write_bytes(routers.read_bytes()[:-1] + b"\1")
    stale = make_card(open_artifact(artifact))
    assert "Files for llama.cpp" in stale.missing
    assert "gguf/export.json was made before the routers were changed" in stale.text
    assert CliRunner().invoke(app, [*export, "f16", "--no-check"]).exit_code == 0
    files = json.loads((artifact / "gguf" / "export.json").read_text())["files"]
    assert [file["path"] for file in files] == ["tiny-moe-F16.gguf"]


def interrupted(place: Path, out: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> None:
    """An export that is stopped while it compares its files."""

    def stop(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(exporting, "check_files", stop)
        answer = CliRunner().invoke(app, ["export", str(place / "virtual"), str(out), *options])
    assert answer.exit_code
    assert not (out / "export.json").exists()


@pytest.mark.parametrize("types", ["q8_0", "q8_0,f16"])
def test_an_interrupted_comparison_goes_on(
    types: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(place, tmp_path, monkeypatch, "--types", "q8_0")
    (file,) = tmp_path.glob("*.gguf")
    before = file.stat()
    answer = CliRunner().invoke(app, ["export", str(place / "virtual"), str(tmp_path), "--types", types])
    assert answer.exit_code == 0, answer.output
    assert file.stat().st_mtime_ns == before.st_mtime_ns
    files = json.loads((tmp_path / "export.json").read_text())["files"]
    assert len(files) == len(types.split(","))
    assert all(entry["check"] for entry in files)
    assert {path.name for path in tmp_path.iterdir()} == {entry["path"] for entry in files} | {"export.json"}
    again = CliRunner().invoke(app, ["export", str(place / "virtual"), str(tmp_path), "--types", "q8_0"])
    assert isinstance(again.exception, ArtifactError)
    assert "exists already" in str(again.exception)


def test_files_of_another_export_are_not_taken_for_its_own(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(place, tmp_path, monkeypatch, "--types", "q8_0")
    for other in (["--pad256"], []):
        if not other:
            (file,) = tmp_path.glob("*.gguf")
            file.write_bytes(file.read_bytes()[:-32])
        arguments = ["export", str(place / "virtual"), str(tmp_path), "--types", "q8_0", *other]
        answer = CliRunner().invoke(app, arguments)
        assert isinstance(answer.exception, ArtifactError), answer.output
        assert "exists already" in str(answer.exception)


def test_an_interrupted_export_is_known_by_any_path_and_beside_other_files(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(place, tmp_path / "out", monkeypatch, "--types", "q8_0")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(place / "virtual")
    runs = [("link", "out/", "f16"), (os.path.relpath(place / "virtual"), "./out", "q8_0")]
    for what, out, kind in runs:
        answer = CliRunner().invoke(app, ["export", what, out, "--types", kind, "--no-check"])
        assert answer.exit_code == 0, answer.output
    names = {"tiny-moe-F16.gguf", "tiny-moe-Q8_0.gguf"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names | {"export.json"}
    assert {file["path"] for file in json.loads((tmp_path / "out" / "export.json").read_text())["files"]} == names


def test_a_changed_calibration_text_is_another_export(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(gguftools.WORDS)
    command = ["--types", "q8_0", "--imatrix", str(text)]
    interrupted(place, tmp_path / "out", monkeypatch, *command)
    text.write_text(gguftools.WORDS * 2)
    answer = CliRunner().invoke(app, ["export", str(place / "virtual"), str(tmp_path / "out"), *command, "--no-check"])
    assert "exists already" in str(answer.exception)
