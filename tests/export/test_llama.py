"""llama.cpp says what transformers says, for everything it can say; and what it cannot is refused by name."""

from pathlib import Path
from typing import Any

import pytest

import frankenmoe as fm
import gguftools
import tiny
from frankenmoe.exporting import export

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
        ("llama", {}, {"shared": {}, "experts_per_token": 1}, "deepseek"),
    ],
)  # fmt: skip
def test_every_architecture_computes_what_the_source_computes(
    family: str, changes: dict[str, Any], keys: dict[str, Any], arch: str, tmp_path: Path
) -> None:
    path = recipe(tmp_path, gguftools.parents(tmp_path, family, count=4, **changes), **keys)
    (file,) = export(path, tmp_path / "out", types=["f32"], allow_random=True)
    assert gguftools.architecture(file.path) == arch
    assert gguftools.greatest_kl(file.path, fm.load(path)) < 1e-6
