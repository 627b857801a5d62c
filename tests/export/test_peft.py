"""LoRAs that PEFT loads: each is its expert, Arrow's distance is measured, and any other MoE is refused."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import frankenmoe as fm
import tiny
from frankenmoe.artifact.folder import ROUTERS
from frankenmoe.errors import ArtifactError, PlanError, SourceError
from frankenmoe.export.run import export_adapters
from frankenmoe.recipe.sections import ExportSettings
from refusals import cli
from test_adapters import FFN, logits, tune

Row = dict[str, Any]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with three adapters on its FFNs, of two ranks, and one on its attention."""
    folder = tmp_path_factory.mktemp("peft")
    tiny.make_parent(folder / "base", "llama", seed=1)
    tune(folder / "base", folder / "wide", targets=FFN)
    tune(folder / "base", folder / "down", targets=["down_proj"], use_rslora=True)
    tune(folder / "base", folder / "attention", targets=["q_proj"])
    return folder


def written(folder: Path, name: str, experts: list[Row], **keys: Any) -> Path:
    file = folder / f"{name}.yml"
    file.write_text(json.dumps({"base_model": "base", "gate_mode": "random", "experts": experts} | keys))
    return file


def adapted(*names: str) -> list[Row]:
    return [{"source_model": "base", "adapter": name, "name": f"{at}-{name}"} for at, name in enumerate(names)]


def test_each_lora_is_its_expert_for_peft_and_the_gates_lie_beside(place: Path, tmp_path: Path) -> None:
    recipe = written(place, "two", [*adapted("wide", "down"), {"source_model": "base", "name": "plain"}])
    made, compared = export_adapters(fm.build(recipe, tmp_path / "built"), tmp_path / "out")
    assert made.plain == ("plain",)
    for name, expert in (("wide", "0-wide"), ("down", "1-down")):
        base = AutoModelForCausalLM.from_pretrained(place / "base")
        expected = logits(PeftModel.from_pretrained(base, place / name))
        found = logits(
            PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(place / "base"), tmp_path / "out" / expert)
        )
        assert torch.allclose(found, expected, atol=1e-5)
    assert (made.rank, made.arrow_top_k) == (4, 2)
    gates = load_file(tmp_path / "out" / ROUTERS)
    assert all(torch.equal(gates[name], value) for name, value in load_file(tmp_path / "built" / ROUTERS).items())
    assert [each.name for each in compared] == ["this MoE", "base", "0-wide", "1-down", "Arrow"]
    report = json.loads((tmp_path / "out" / "peft.json").read_text())
    assert [row["kl"] for row in report["compared"]] == [each.kl for each in compared]
    assert all(each.kl > 1e-6 for each in compared[1:])  # these gates are random, so no other model is this MoE


@pytest.mark.parametrize("keys", [{}, {"base_model": "base+attention"}], ids=str)
def test_equal_adapters_are_the_same_model_in_every_way(keys: Row, place: Path, tmp_path: Path) -> None:
    """A known answer: with one LoRA in every expert no router matters, neither ours nor Arrow's."""
    recipe = written(place, "same", adapted("wide", "wide"), **keys)
    made, compared = export_adapters(fm.open(recipe), tmp_path / "out")
    kl = {each.name: each.kl for each in compared}
    assert all(abs(kl[name]) < 1e-8 for name in ("0-wide", "1-wide", "Arrow"))
    assert kl["base"] > 1e-5
    assert (made.backbone is not None) == bool(keys)


@pytest.mark.parametrize(
    ("experts", "keys", "words"),
    [
        ([*adapted("wide"), {"source_model": "other"}], {}, "expert other is not the base's FFN with an adapter"),
        ([{**row, "noise_scale": 0.1} for row in adapted("wide", "down")], {}, "and 1 more such reasons"),
        ([{**row, "residual_scale": 0.5} for row in adapted("wide")], {"experts_per_token": 1}, "expert 0-wide is not"),
        ([{"source_model": "base", "name": name} for name in "ab"], {}, "no expert has an adapter"),
        (adapted("wide"), {"experts_per_token": 1, "shared_experts": adapted("down")}, "it has a shared expert"),
        (
            [*adapted("wide"), {"source_model": "other", "adapter": "down", "name": "o"}],
            {"backbone": "average"},
            "and 1 more such reasons",
        ),
    ],
)
def test_what_would_be_another_model_is_refused(
    experts: list[Row], keys: Row, words: str, place: Path, tmp_path: Path
) -> None:
    if not (place / "other").exists():
        tiny.make_parent(place / "other", "llama", seed=2)
    recipe = written(place, "no", experts, **keys)
    with pytest.raises(PlanError, match="this MoE would be another model") as caught:
        export_adapters(fm.open(recipe), tmp_path / "out")
    assert words in caught.value.message
    assert list(tmp_path.iterdir()) == []


def test_a_comparison_that_fails_leaves_nothing(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = written(place, "two", adapted("wide", "down"))
    with pytest.raises(SourceError, match="does not exist"):
        export_adapters(fm.open(recipe), tmp_path / "out", settings=ExportSettings(texts=(str(tmp_path / "none.txt"),)))
    monkeypatch.setitem(sys.modules, "peft.tuners.lora.arrow", None)
    with pytest.raises(PlanError, match=r"needs peft 0\.18 or later, which is not installed"):
        export_adapters(fm.open(recipe), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_expert_may_have_the_name_of_a_file_beside_it(place: Path, tmp_path: Path) -> None:
    names = ("peft.json", ROUTERS, "backbone")
    experts = [{"source_model": "base", "adapter": "wide", "name": name} for name in names]
    recipe = written(place, "odd", experts, base_model="base+attention")
    made, _ = export_adapters(fm.open(recipe), tmp_path / "out", settings=ExportSettings(check=False))
    assert (tmp_path / "out" / "peft.json").is_file()
    assert load_file(tmp_path / "out" / ROUTERS)
    assert made.backbone is not None
    assert len({*made.experts.values(), made.backbone}) == 4


def test_the_command_prints_how_far_arrow_is(place: Path, tmp_path: Path) -> None:
    recipe = written(place, "two", adapted("wide", "down"))
    said = cli("export", str(recipe), str(tmp_path / "out"), "--peft")
    assert said.code == 0, said.stderr
    assert "KL from the MoE" in said.stdout
    assert f"create_arrow_model(base, ['{tmp_path / 'out' / '0-wide'}'" in said.stdout
    code = said.stdout.partition("with PEFT's Arrow:\n")[2]
    known: Row = {}
    exec(code, known)
    assert logits(known["model"]).isfinite().all()
    assert (
        "--types is for GGUF files"
        in cli("export", str(recipe), str(tmp_path / "o"), "--peft", "--types", "f16").stderr
    )
    with pytest.raises(ArtifactError, match="exists and is not empty"):
        export_adapters(fm.open(recipe), tmp_path / "out", settings=ExportSettings(check=False))
