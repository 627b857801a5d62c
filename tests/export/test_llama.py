"""llama.cpp says what transformers says, for everything it can say; and what it cannot is refused by name."""

from pathlib import Path
from typing import Any

import pytest

import frankenmoe as fm
import gguftools
import tiny
from family_cases import MULTIPLIERS
from frankenmoe import system
from frankenmoe.errors import PlanError
from frankenmoe.export import llama
from frankenmoe.export.run import export_gguf

pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 5000.0, "factor": 4.0, "original_max_position_embeddings": 16}


def recipe(tmp_path: Path, folders: list[Path], *, shared: dict[str, Any] | None = None, **keys: Any) -> Path:
    base, *experts = folders
    extra = {"shared_experts": [{"source_model": str(base)} | shared]} if shared is not None else {}
    return tiny.write_recipe(tmp_path / "recipe.yml", base, experts, **extra, **keys)


@pytest.mark.parametrize(
    ("family", "changes", "keys", "arch"),
    [
        ("llama", {}, {}, "llama"),
        ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}, {"experts_per_token": 1}, "llama"),
        ("llama", {"rope_parameters": LLAMA3}, {}, "llama"),
        ("llama", {"rope_parameters": LINEAR}, {}, "llama"),
        ("llama", {"rope_parameters": YARN}, {}, "llama"),
        ("mistral", {"head_dim": 16, "sliding_window": None}, {"experts_per_token": 3}, "llama"),
        ("qwen2", {}, {}, "llama"),
        ("qwen3", {}, {}, "qwen3moe"),
        ("llama", {}, {"shared": {"residual_scale": 0.5}}, "granitemoe"),
        ("qwen2", {}, {"shared": {}, "gate_mode": "random", "experts_per_token": 3}, "qwen2moe"),
        ("llama", {}, {"shared": {}, "experts_per_token": 1, "architecture": "deepseek"}, "deepseek"),
        ("llama", {}, {"shared": {}, "experts_per_token": 1}, "granitemoe"),
        ("llama", {"attention_bias": True}, {}, "granitemoe"),
        ("granite", MULTIPLIERS, {}, "granitemoe"),
        ("granite", MULTIPLIERS | {"attention_bias": True}, {"shared": {}}, "granitemoe"),
        ("seed_oss", {"attention_bias": True}, {}, "llama"),
        ("phi3", {"sliding_window": None}, {}, "llama"),
        ("helium", {}, {}, "llama"),
        ("hyperclovax", MULTIPLIERS | {"logits_scaling": 0.125, "use_post_norm": False}, {}, "granitemoe"),
    ],
)  # fmt: skip
def test_every_architecture_computes_what_the_source_computes(
    family: str, changes: dict[str, Any], keys: dict[str, Any], arch: str, tmp_path: Path
) -> None:
    path = recipe(tmp_path, gguftools.parents(tmp_path, family, count=4, **changes), **keys)
    (file,) = export_gguf(path, tmp_path / "out", types=["f32"], allow_random=True)
    assert gguftools.architecture(file.path) == arch
    assert gguftools.greatest_kl(file.path, fm.load(path)) < 1e-6


def test_built_and_virtual_become_the_same_file(tmp_path: Path) -> None:
    folders = gguftools.parents(tmp_path, "qwen2", count=4)
    path = recipe(tmp_path, folders, shared={}, gate_mode="random", experts_per_token=3, dtype="bfloat16")
    built, virtual = fm.build(path, tmp_path / "built"), fm.build(path, tmp_path / "virtual", virtual=True)
    files = [
        export_gguf(artifact, tmp_path / f"{artifact.form}.gguf", types=["q8_0"], allow_random=True)[0].path
        for artifact in (built, virtual)
    ]
    ours, theirs = map(gguftools.tensors, files)
    assert ours.keys() == theirs.keys()
    assert all((ours[name][1] == theirs[name][1]).all() for name in ours)


@pytest.mark.parametrize("architecture", ["qwen", "deepseek"])
def test_an_ungated_shared_expert_is_not_doubled(architecture: str, tmp_path: Path) -> None:
    path = recipe(tmp_path, gguftools.parents(tmp_path, "llama", count=4), shared={"residual_scale": 0.5},
                  architecture=architecture, gate_mode="uniform_random" if architecture == "deepseek" else "hidden",
                  prompts=architecture == "qwen")  # fmt: skip
    if architecture == "qwen":  # without prompts of its own the shared expert has no gate
        (file,) = export_gguf(fm.build(path, tmp_path / "built"), tmp_path / "out", types=["f32"])
    else:
        (file,) = export_gguf(fm.build(path, tmp_path / "built"), tmp_path / "out", types=["f32"], allow_random=True)
    assert gguftools.architecture(file.path) == "granitemoe"
    assert gguftools.greatest_kl(file.path, fm.load(tmp_path / "built")) < 1e-6


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_padding_changes_no_reply(family: str, tmp_path: Path) -> None:
    folders = gguftools.parents(tmp_path, family, count=3, hidden_size=96, num_attention_heads=4, head_dim=24)
    path = recipe(tmp_path, folders)
    (file,) = export_gguf(path, tmp_path / "out", types=["f32"], pad256=True, allow_random=True)
    assert gguftools.tensors(file.path)["blk.0.ffn_down_exps.weight"][1].shape == (2, 256, 256)
    assert gguftools.greatest_kl(file.path, fm.load(path)) < 1e-6


def test_adapters_and_noise_are_folded_in(tmp_path: Path) -> None:
    base, *others = gguftools.parents(tmp_path, "llama")
    entries = [
        {"source_model": str(parent), "name": f"e{index}", "noise_relative": 0.1, "residual_scale": 0.7}
        for index, parent in enumerate(others)
    ]
    path = tiny.write_recipe(tmp_path / "r.yml", base, others, experts=entries)
    (file,) = export_gguf(path, tmp_path / "out", types=["f32"], allow_random=True)
    assert gguftools.greatest_kl(file.path, fm.load(path)) < 1e-6


@pytest.mark.parametrize(("free", "copied"), [(10**12, True), (10_000, False)])
def test_weights_are_copied_only_where_memory_is_left(
    free: int, copied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import xllamacpp

    path = recipe(tmp_path, gguftools.parents(tmp_path, "llama", count=3))
    (file,) = export_gguf(path, tmp_path / "out", types=["q4_0"], allow_random=True)
    monkeypatch.setattr(system, "free_memory", lambda: free)
    seen, server = [], xllamacpp.Server
    monkeypatch.setattr(xllamacpp, "Server", lambda params: seen.append(params.no_extra_bufts) or server(params))
    assert len(llama.Engine(file.path).greedy([1, 2, 3], tokens=3)) == 3
    assert seen == [not copied]


REFUSED = [
    ("olmo2", {}, {}, "FlexOlmo"),
    ("llama", {"hidden_act": "gelu"}, {}, "silu"),
    ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, {}, "dynamic"),
    ("llama", {"rope_parameters": YARN | {"attention_factor": 1.5}}, {}, "yarn has no attention_factor 1.5"),
    ("llama", {"rope_parameters": YARN | {"truncate": False}}, {}, "truncate"),
    ("qwen3", {"rope_parameters": LLAMA3}, {}, "qwen3moe has no rope scaling 'llama3'"),
    ("qwen2", {}, {"shared": {}, "gate_mode": "random"}, "gated shared expert"),
    ("qwen3", {}, {"experts": "nested"}, "no stock MoE format has nested experts"),
]


@pytest.mark.parametrize(("family", "changes", "keys", "word"), REFUSED)
def test_what_llama_cpp_cannot_say_is_refused_by_name(
    family: str, changes: dict[str, Any], keys: dict[str, Any], word: str, tmp_path: Path
) -> None:
    folders = gguftools.parents(tmp_path, family, count=4, **changes)
    if keys.get("experts") == "nested":
        inner = [{"source_model": str(folder)} for folder in folders[1:3]]
        keys = {"experts": [{"name": "both", "experts": inner}, {"source_model": str(folders[3])}]}
    path = recipe(tmp_path, folders, **keys)
    with pytest.raises(PlanError, match=word):
        export_gguf(path, tmp_path / "out", types=["f16"], allow_random=True)
    assert not (tmp_path / "out").exists()
