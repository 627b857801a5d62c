"""A file is what llama.cpp's own quantizer makes of the f32 one, byte for byte, and its size is known beforehand."""

from pathlib import Path

import numpy as np
import pytest

import gguftools
import tiny
from frankenmoe.checkpoint.quantize import quantize
from frankenmoe.export.run import export_gguf
from frankenmoe.families.llamacpp import FILE_TYPES, MixFacts, tensor_type
from frankenmoe.planning import plan
from frankenmoe.planning.forecast import forecast
from frankenmoe.recipe import Recipe

gguf = pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")

WIDE = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 4, "head_dim": 64}
ODD = {"hidden_size": 96, "intermediate_size": 160, "num_attention_heads": 4, "head_dim": 24}
NARROW = {"hidden_size": 40, "intermediate_size": 48, "num_attention_heads": 5, "num_key_value_heads": 5, "head_dim": 8}


@pytest.mark.parametrize(
    ("sizes", "experts", "layers", "tied"),
    [pytest.param(WIDE, 2, 8, False, marks=pytest.mark.slow), (WIDE, 8, 2, True), (ODD, 3, 9, False)],
)
def test_files_are_llama_cpps_own(sizes: dict[str, int], experts: int, layers: int, tied: bool, tmp_path: Path) -> None:
    cyllama = pytest.importorskip("cyllama.llama.llama_cpp")
    changes = sizes | {"num_hidden_layers": layers, "tie_word_embeddings": tied}
    base, *others = gguftools.parents(tmp_path, "llama", count=3, **changes)
    parents = [others[index % 2] for index in range(experts)]
    path = tiny.write_recipe(tmp_path / "r.yml", base, parents, dtype="float32")
    files = {file.type: file for file in export_gguf(path, tmp_path / "out", types=list(FILE_TYPES), allow_random=True)}
    reference = tmp_path / "reference.gguf"
    for kind in (kind for kind in FILE_TYPES.values() if kind.name != "f32"):
        options = cyllama.LlamaModelQuantizeParams()
        options.ftype, options.nthread = kind.number, 1
        cyllama.model_quantize(str(files["f32"].path), str(reference), options)
        theirs, ours = gguftools.tensors(reference), gguftools.tensors(files[kind.name].path)
        assert theirs.keys() == ours.keys()
        for name, (type_name, data) in theirs.items():
            assert (type_name, True) == (ours[name][0], np.array_equal(data, ours[name][1])), (kind.name, name)
        assert reference.stat().st_size == files[kind.name].path.stat().st_size
        reference.unlink()


@pytest.mark.parametrize(("family", "pad256"), [("llama", False), ("qwen3", True)])
def test_sizes_are_known_before_anything_is_written(family: str, pad256: bool, tmp_path: Path) -> None:
    base, *others = gguftools.parents(tmp_path, family, **ODD)
    path = tiny.write_recipe(tmp_path / "r.yml", base, others)
    outlook = forecast(plan(Recipe.load(path)))
    assert outlook.impossible is None
    said = {row.type: row.padded_bytes if pad256 else row.bytes for row in outlook.files}
    for file in export_gguf(path, tmp_path / "out", types=list(FILE_TYPES), pad256=pad256, allow_random=True):
        assert file.bytes == file.path.stat().st_size
        assert said[file.type] == pytest.approx(file.bytes, rel=0.01)


def test_rows_that_no_block_fits_stay_16_bit_and_load(tmp_path: Path) -> None:
    base, *others = gguftools.parents(tmp_path, "llama", **NARROW)
    path = tiny.write_recipe(tmp_path / "r.yml", base, others)
    (file,) = export_gguf(path, tmp_path / "out", types=["q4_k_m"], allow_random=True)
    assert set(file.holds) == {"F16", "F32"}
    assert "F16" in file.notes[-1]
    assert gguftools.Engine(file.path, context=64).greedy([3, 4], tokens=2)


def test_raidens_mix_is_the_one_measured() -> None:
    facts = MixFacts(layers=26, experts=16, tied=False)
    kind = FILE_TYPES["q4_k_m"]
    types = [tensor_type(f"blk.{layer}.attn_v.weight", (256, 256), kind, facts) for layer in range(26)]
    assert [layer for layer, found in enumerate(types) if found == "Q6_K"] == [
        0,
        1,
        2,
        5,
        8,
        11,
        14,
        17,
        20,
        22,
        23,
        24,
        25,
    ]
    assert tensor_type("blk.0.ffn_down_exps.weight", (16, 3200, 8640), kind, facts) == "Q8_0"
    assert tensor_type("blk.3.ffn_up_exps.weight", (16, 8640, 3200), kind, facts) == "Q5_0"


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K"])
def test_quantized_rows_come_back_within_half_a_step(kind: str) -> None:
    rows_RC = np.random.default_rng(0).standard_normal((4, 512), np.float32)
    raw = quantize(rows_RC, kind).reshape(4, -1)
    back_RC = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind])
    bits = {"Q8_0": 8, "Q6_K": 6}.get(kind, int(kind[1]))
    step = np.ptp(rows_RC.reshape(-1, 32), axis=1).max() / (2**bits - 1)
    assert np.abs(back_RC - rows_RC).max() < 1.2 * step


def test_importance_lowers_the_error_where_it_says_so() -> None:
    generator = np.random.default_rng(1)
    rows_RC = generator.standard_normal((32, 256), np.float32)
    weights_C = np.exp(2 * generator.standard_normal(256)).astype(np.float32)

    def error(importance: np.ndarray | None, kind: str) -> float:
        raw = quantize(rows_RC, kind, importance).reshape(32, -1)
        back_RC = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind])
        return float(((back_RC - rows_RC) ** 2 * weights_C).sum())

    for kind in ("Q4_K", "Q5_K", "Q4_0"):
        assert error(weights_C, kind) < 0.9 * error(None, kind)
