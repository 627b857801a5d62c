"""`verify --after`: planted faults are found, and what is right raises no alarm."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import quantizers
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import frankenmoe as fm
import gguftools
import tiny
from conftest import Place, Tensors
from family_cases import CASES, LONG, Case, apart, logits, make_parent, write_recipe
from frankenmoe.after.plain import write_plain
from frankenmoe.after.run import verify_after
from frankenmoe.export.run import export_gguf
from frankenmoe.families import FORMATS
from frankenmoe.families.mixtures import UNLIKE_DENSE
from frankenmoe.progress import SILENT
from gguf_cases import ALL
from refusals import cli, refused

FFN = ("w1", "w3", "w2")  # gate, up and down


def name(layer: int, expert: int, matrix: str = "w1") -> str:
    return f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{matrix}.weight"


def gate(layer: int) -> str:
    return f"model.layers.{layer}.block_sparse_moe.gate.weight"


def faults(artifact: Path, other: Path) -> dict[str, str]:
    """Kind -> sentence of everything that is not as it should be."""
    found = verify_after(artifact, other)
    assert found.ok == (not found.faults)
    return {each.kind: each.text for each in found.faults}


# what is right


@pytest.mark.parametrize("kind", ["f32", "bf16", "f16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_0", "q5_1"])
def test_a_gguf_file_of_ours_is_as_far_as_its_type_rounds(kind: str, place: Place, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    (file,) = export_gguf(place.virtual, tmp_path, types=[kind], allow_random=True)
    found = verify_after(place.built, file.path)
    assert found.ok, found.verdict
    (experts,) = (part for part in found.parts if part.part == "experts")
    assert experts.far == pytest.approx(experts.rounding, rel=0.02)  # measured on all numbers, and on some
    assert all(part.moved == 0 for part in found.parts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_transformers_saves_is_ours(dtype: torch.dtype, place: Place, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(place.built, dtype=dtype)
    model.save_pretrained(tmp_path / "saved")
    state = {key: tensor.contiguous() for key, tensor in model.state_dict().items()}
    assert any(key.endswith("experts.gate_up_proj") for key in state)
    model.config.save_pretrained(tmp_path / "packed")
    save_file(state, tmp_path / "packed" / "model.safetensors")
    for folder in (tmp_path / "saved", tmp_path / "packed"):
        found = verify_after(place.virtual, folder)
        assert found.ok, found.verdict
        assert ("bit for bit" in found.verdict) == (dtype == torch.float32)


def test_a_virtual_artifact_against_its_own_build_and_back(place: Place, tmp_path: Path) -> None:
    assert verify_after(place.virtual, place.built).verdict.endswith("bit for bit")
    refused("verify", place.built, "--after", place.virtual, inside=tmp_path, facts=("is a virtual artifact",))


@pytest.mark.parametrize(
    "write", [quantizers.nf4, quantizers.nested_nf4, quantizers.gptq, quantizers.compressed, quantizers.fp8]
)
def test_a_folder_that_is_quantized_rightly(
    write: Callable[[Tensors], dict[str, object]], place: Place, tmp_path: Path
) -> None:
    config: dict[str, object] = {}
    folder = place.folder(tmp_path / "other", lambda tensors: config.update(write(tensors)))
    tiny.edit_config(folder, quantization_config=config)
    found = verify_after(place.built, folder)
    assert found.ok, found.verdict
    (experts,) = (part for part in found.parts if part.part == "experts")
    assert 0.01 < experts.far == pytest.approx(experts.rounding, rel=0.05)


def test_experts_that_hardly_differ_are_told_apart_under_rounding(tmp_path: Path) -> None:
    """Fine-tunes of one model differ by 0.4 % of their norm, 4-bit rounding by 8 %."""
    pytest.importorskip("xllamacpp")
    base, *_ = gguftools.parents(tmp_path, "llama", count=1, hidden_size=256, intermediate_size=512, head_dim=64)
    experts = [{"source_model": str(base), "name": f"e{index}", "noise_relative": 0.003} for index in range(4)]
    virtual = fm.build(tiny.write_recipe(tmp_path / "r.yml", base, [], experts=experts), tmp_path / "v", virtual=True)
    (file,) = export_gguf(virtual, tmp_path / "g", types=["q4_0"], allow_random=True)
    assert faults(virtual.folder, file.path) == {}
    swap_in_gguf(file.path, layer=1, one=0, two=3)
    assert faults(virtual.folder, file.path) == {"swapped": "experts e0 and e3 are swapped in layer 1"}


def test_experts_that_are_equal_raise_no_alarm(tmp_path: Path) -> None:
    base = tiny.make_parent(tmp_path / "p")
    built = fm.build(tiny.write_recipe(tmp_path / "r.yml", base, [base] * 4), tmp_path / "b", allow_identical=True)
    assert verify_after(built, built.folder).ok


@pytest.mark.parametrize(
    "case",
    [
        "llama-shared",
        "qwen2-shared",
        "glm-shared",
        "qwen3_5-shared",
        "lfm2",
        "ernie4_5-shared",
        "phi3-short",
        "cohere2",
        "gemma4",
        "granite4-shared",
    ],
)
def test_other_formats_their_own_files_and_what_transformers_saves(case: str, tmp_path: Path) -> None:
    """With shared experts, stacked and added tensors, permuted rows, and norms that GGUF stores otherwise."""
    pytest.importorskip("gguf")
    it: Case = ALL[case]
    tokenizer = gguftools.bpe("qwen2" if it.family.startswith("qwen3_5") else "gpt-2")
    sizes = {"vocab_size": len(tokenizer), "bos_token_id": 1, "eos_token_id": 2}
    parents = [make_parent(tmp_path / str(seed), it, seed=seed, **sizes) for seed in range(3)]
    for parent in parents:
        tokenizer.save_pretrained(parent)
    recipe = write_recipe(tmp_path / "r.yml", it, parents[0], parents, dtype="float32")
    built = fm.build(recipe, tmp_path / "built").folder
    AutoModelForCausalLM.from_pretrained(built, **it.loading).save_pretrained(tmp_path / "saved")
    others = [tmp_path / "saved"]
    if FORMATS[it.fmt].no_gguf is None:
        others += [file.path for file in export_gguf(built, tmp_path / "gguf", types=["f32"], allow_random=True)]
    for other in others:
        found = verify_after(built, other)
        assert found.ok, found.verdict
        assert max(part.far for part in found.parts) < 1e-6
        if found.compared.other.plain is not None and it.fmt not in UNLIKE_DENSE:
            (tmp_path / f"plain-{other.stem}").mkdir()
            write_plain(tmp_path / f"plain-{other.stem}", found.compared.other, fm.open(built), SILENT)
            ours, theirs = (
                logits(fm.load(each).model, tiny.ids(LONG)) for each in (built, tmp_path / f"plain-{other.stem}")
            )
            assert apart(ours, theirs) <= it.close


def test_a_padded_file_is_compared_without_its_padding(tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    base, *others = gguftools.parents(tmp_path, "llama", hidden_size=96, intermediate_size=160, head_dim=24)
    built = fm.build(tiny.write_recipe(tmp_path / "r.yml", base, others), tmp_path / "built")
    (file,) = export_gguf(built, tmp_path / "g", types=["q4_k_m"], pad256=True, allow_random=True)
    found = verify_after(built, file.path)
    assert found.ok, found.verdict
    assert any("padded" in each.text for each in found.findings)


# what is trained


def test_a_fine_tune_is_said_to_have_moved_and_is_right(place: Place, tmp_path: Path) -> None:
    def train(tensors: Tensors) -> None:
        torch.manual_seed(0)
        for key, tensor in tensors.items():
            share = 0.02 if "experts" in key else 0.01
            tensors[key] = tensor + share * tensor.norm() / tensor.numel() ** 0.5 * torch.randn_like(tensor)

    found = verify_after(place.virtual, place.folder(tmp_path / "tuned", train))
    assert found.ok
    assert found.verdict.startswith("every expert is still itself; moved: experts by 2%, routers by ")
    assert {part.part: round(part.moved, 3) for part in found.parts} == {
        "experts": 0.02,
        **dict.fromkeys(("routers", "embeddings", "norms", "head", "attention"), 0.01),
    }


def test_an_expert_that_was_not_trained_is_named(place: Place, tmp_path: Path) -> None:
    def train(tensors: Tensors) -> None:
        for layer in range(2):
            for expert in range(3):
                tensors[name(layer, expert)] *= 1.01

    found = verify_after(place.virtual, place.folder(tmp_path / "tuned", train))
    assert found.ok
    assert [each.text for each in found.findings] == ["2 of 8 experts did not move (e3), in every layer"]


# faults


def swap(tensors: Tensors, one: str, two: str) -> None:
    tensors[one], tensors[two] = tensors[two], tensors[one]


def a_random_expert(tensors: Tensors) -> None:
    for matrix in FFN:
        tensors[name(1, 2, matrix)] = torch.randn_like(tensors[name(1, 2, matrix)]) * 0.2


def two_swapped(tensors: Tensors) -> None:
    for matrix in FFN:
        swap(tensors, name(0, 1, matrix), name(0, 3, matrix))


def three_turned(tensors: Tensors) -> None:
    for matrix in FFN:
        one, two, three = (tensors[name(0, expert, matrix)] for expert in (0, 1, 2))
        tensors |= zip((name(0, expert, matrix) for expert in (1, 2, 0)), (one, two, three), strict=True)


def a_copy(tensors: Tensors) -> None:
    for layer in range(2):
        for matrix in FFN:
            tensors[name(layer, 3, matrix)] = tensors[name(layer, 0, matrix)].clone()


def zeros(tensors: Tensors) -> None:
    for matrix in FFN:
        tensors[name(1, 0, matrix)].zero_()


def a_missing_expert(tensors: Tensors) -> None:
    for matrix in FFN:
        del tensors[name(1, 3, matrix)]


def a_nan(tensors: Tensors) -> None:
    tensors[name(0, 0, "w2")][-1, -1] = float("nan")


def a_random_down(tensors: Tensors) -> None:
    tensors[name(0, 2, "w2")] = torch.randn_like(tensors[name(0, 2, "w2")]) * 0.2


def gate_for_up(tensors: Tensors) -> None:
    for layer in range(2):
        swap(tensors, name(layer, 1, "w1"), name(layer, 1, "w3"))


def transposed_gates(tensors: Tensors) -> None:
    for layer in range(2):
        tensors[gate(layer)] = tensors[gate(layer)].T.contiguous()


def transposed_numbers(tensors: Tensors) -> None:
    tensors[gate(1)] = tensors[gate(1)].T.contiguous().reshape(tensors[gate(1)].shape)


def a_gate_with_more_rows(tensors: Tensors) -> None:
    tensors[gate(0)] = tensors[gate(0)].repeat(2, 1)


def other_rows(tensors: Tensors) -> None:
    tensors[gate(0)] = tensors[gate(0)][[1, 0, 2, 3]]


def a_random_gate(tensors: Tensors) -> None:
    tensors[gate(0)] = torch.randn_like(tensors[gate(0)]) * tensors[gate(0)].std()


def an_adapter_that_missed(tensors: Tensors) -> None:
    torch.manual_seed(0)
    for layer in range(2):
        weight = tensors[f"model.layers.{layer}.self_attn.q_proj.weight"]
        weight += 0.02 * torch.randn(weight.shape[0], 4) @ torch.randn(4, weight.shape[1])


def no_head(tensors: Tensors) -> None:
    del tensors["lm_head.weight"]


FAULTS: dict[Callable[[Tensors], None], dict[str, str]] = {
    a_random_expert: {"unlike every expert": "expert e2 in layer 1: unlike every expert of the artifact, as if random"},
    two_swapped: {"swapped": "experts e1 and e3 are swapped in layer 0"},
    three_turned: {"moved": "in the place of"},
    a_copy: {"copied": "expert e3 is a copy of e0 in every layer"},
    zeros: {"zeros": "expert e0 in layer 1: all zeros"},
    a_missing_expert: {"missing": "expert e3 in layer 1: missing"},
    a_nan: {"not finite": "expert e0 in layer 0: NaN or infinity"},
    a_random_down: {"damaged": "expert e2 in layer 0: down_proj not its own"},
    gate_for_up: {"gate and up swapped": "expert e1 in every layer: gate and up in each other's place"},
    transposed_gates: {"transposed": "the router's gate is transposed in every layer"},
    transposed_numbers: {"transposed": "the router's gate is transposed in layer 1"},
    a_gate_with_more_rows: {"router misshapen": "the router's gate has another shape in layer 0"},
    other_rows: {"router rows": "the router's rows are in another order than its experts in layer 0"},
    a_random_gate: {"router random": "the router's gate is another one, as if random or trained anew in layer 0"},
    an_adapter_that_missed: {"experts missed": "and no expert moved"},
    no_head: {"missing": "a tensor of head is missing: lm_head.weight"},
}


@pytest.mark.parametrize("plant", FAULTS, ids=[plant.__name__ for plant in FAULTS])
def test_a_planted_fault_is_found_and_no_other(plant: Callable[[Tensors], None], place: Place, tmp_path: Path) -> None:
    found = faults(place.virtual, place.folder(tmp_path / "other", plant))
    assert found.keys() == FAULTS[plant].keys()
    assert all(text in found[kind] for kind, text in FAULTS[plant].items()), found


def test_a_model_with_other_experts_altogether_takes_few_words(place: Place, tmp_path: Path) -> None:
    def replace(tensors: Tensors) -> None:
        torch.manual_seed(0)
        for key in tensors:
            if ".experts." in key:
                tensors[key] = torch.randn_like(tensors[key]) * 0.2

    found = verify_after(place.virtual, place.folder(tmp_path / "other", replace))
    said = "experts e0, e1, e2, e3 in every layer: unlike every expert of the artifact, as if random"
    assert [each.text for each in found.findings] == [said]


def test_experts_that_moved_with_their_router_rows_change_nothing(place: Place, tmp_path: Path) -> None:
    def reorder(tensors: Tensors) -> None:
        two_swapped(tensors)
        tensors[gate(0)] = tensors[gate(0)][[0, 3, 2, 1]]

    found = verify_after(place.virtual, place.folder(tmp_path / "other", reorder))
    assert found.ok
    assert [each.kind for each in found.findings] == ["reordered"]


def test_a_config_that_computes_another_model(place: Place, tmp_path: Path) -> None:
    folder = place.folder(tmp_path / "other", num_experts_per_tok=1, rms_norm_eps=1e-3)
    found = verify_after(place.virtual, folder)
    assert {each.text for each in found.faults} == {
        "experts per token: 1, expected 2",
        "rms_norm_eps: 0.001, expected 3e-05",
    }


def test_fewer_experts_and_fewer_layers(place: Place, tmp_path: Path) -> None:
    def prune(tensors: Tensors) -> None:
        for layer in range(2):
            for matrix in FFN:
                tensors[name(layer, 1, matrix)] = tensors.pop(name(layer, 2, matrix))
                tensors[name(layer, 2, matrix)] = tensors.pop(name(layer, 3, matrix))
            tensors[gate(layer)] = tensors[gate(layer)][[0, 2, 3]]

    folder = place.folder(tmp_path / "pruned", prune, num_local_experts=3)
    assert faults(place.virtual, folder) == {"count": "number of experts: 3, expected 4; missing: e1"}

    short = place.folder(tmp_path / "short", num_hidden_layers=1)
    assert faults(place.virtual, short) == {"layers": "number of layers: 1, expected 2"}


def test_a_gguf_file_with_another_count_and_one_with_swapped_experts(place: Place, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    data = place.recipe.read_text().partition("- source_model")
    fewer = tmp_path / "fewer.yml"
    fewer.write_text(data[0] + "- source_model" + data[2].rpartition("- source_model")[0])
    (file,) = export_gguf(fewer, tmp_path / "fewer", types=["q8_0"], allow_random=True)
    found = faults(place.virtual, file.path)
    assert found.pop("count") == "number of experts: 3, expected 4; missing: e3"
    assert found.keys() <= {"router random", "router rows"}  # random gates of three are others than of four

    (file,) = export_gguf(place.virtual, tmp_path / "all", types=["q4_k_m"], allow_random=True)
    swap_in_gguf(file.path, layer=0, one=0, two=1)
    assert faults(place.virtual, file.path) == {"swapped": "experts e0 and e1 are swapped in layer 0"}


def swap_in_gguf(file: Path, *, layer: int, one: int, two: int) -> None:
    """Swaps the bytes of two experts."""
    import gguf

    with file.open("r+b") as opened:
        for tensor in gguf.GGUFReader(file).tensors:
            if tensor.name.startswith(f"blk.{layer}.ffn_") and "_exps" in tensor.name:
                data = np.array(tensor.data).view(np.uint8).reshape(len(tensor.data), -1)
                data[[one, two]] = data[[two, one]]
                opened.seek(int(tensor.data_offset))
                opened.write(data.tobytes())


@pytest.mark.parametrize("left", [range(1, 2), range(2)])
def test_layers_that_were_not_quantized(left: range, place: Place, tmp_path: Path) -> None:
    skipped = [f"layers.{layer}.block_sparse_moe" for layer in left]
    config: dict[str, object] = {}
    folder = place.folder(tmp_path / "other", lambda tensors: config.update(quantizers.nf4(tensors, skipped)))
    tiny.edit_config(folder, quantization_config=config)
    where = "in layer 1" if len(left) == 1 else "in every layer"
    expected = f"unquantized experts {where}: stored as F32, while the model is bitsandbytes"
    assert faults(place.built, folder) == {"unquantized": expected}
    tiny.edit_config(folder, quantization_config=config | {"llm_int8_skip_modules": ["block_sparse_moe"]})
    assert faults(place.built, folder) == {}


def test_a_layer_of_a_gguf_file_that_was_not_quantized(place: Place, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    pytest.importorskip("xllamacpp")
    quantized, plain = export_gguf(place.virtual, tmp_path, types=["q8_0", "f16"], allow_random=True)
    others = {tensor.name: tensor for tensor in gguf.GGUFReader(plain.path).tensors}

    def change(tensor: Any) -> tuple[Any, Any]:
        left = tensor.name.startswith("blk.1.ffn_") and "_exps" in tensor.name
        chosen = others[tensor.name] if left else tensor
        return np.array(chosen.data), chosen.tensor_type

    rewritten(quantized.path, tmp_path / "mixed.gguf", change)
    expected = "unquantized experts in layer 1: stored as F16, while the model is q8_0"
    assert faults(place.virtual, tmp_path / "mixed.gguf") == {"unquantized": expected}


def rewritten(
    file: Path, out: Path, change: Callable[[Any], tuple[Any, Any]] = lambda tensor: (tensor.data, tensor.tensor_type),
    *, added: Mapping[str, Any] = MappingProxyType({}), **options: Any,
) -> None:  # fmt: skip
    """Writes a GGUF file again, with the numbers and the type that `change` gives for each tensor, and `added` ones."""
    import gguf

    reader, writer = gguf.GGUFReader(file), gguf.GGUFWriter(out, "llama", **options)
    for field in reader.fields.values():
        if not field.name.startswith(("GGUF.", "tokenizer.", "general.architecture")):
            kinds = field.types
            writer.add_key_value(field.name, field.contents(), kinds[0], kinds[-1] if len(kinds) > 1 else None)
    for tensor in reader.tensors:
        data, kind = change(tensor)
        writer.add_tensor(tensor.name, data, raw_dtype=kind)
    for name, data in added.items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_with_transposed_gates_and_one_in_parts(place: Place, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    (file,) = export_gguf(place.virtual, tmp_path, types=["f16"], allow_random=True)

    def change(tensor: Any) -> tuple[Any, Any]:
        turned = "ffn_gate_inp" in tensor.name
        return np.ascontiguousarray(tensor.data.T) if turned else tensor.data, tensor.tensor_type

    rewritten(file.path, tmp_path / "turned.gguf", change)
    assert faults(place.virtual, tmp_path / "turned.gguf") == {
        "transposed": "the router's gate is transposed in every layer"
    }
    rewritten(file.path, tmp_path / "parts.gguf", split_max_tensors=12)
    parts = sorted(tmp_path.glob("parts-*.gguf"))
    assert len(parts) == 2
    for part in parts:
        refused("verify", place.virtual, "--after", part, inside=tmp_path, facts=("is one of 2 parts",), hint="merge")


def test_a_head_beside_embeddings_that_ours_is_tied_to(tmp_path: Path) -> None:
    """It is what transformers and llama.cpp use, whatever the config says."""
    pytest.importorskip("gguf")
    base, other = gguftools.parents(tmp_path, "llama", count=2, tie_word_embeddings=True)
    built = fm.build(tiny.write_recipe(tmp_path / "r.yml", base, [base, other]), tmp_path / "built").folder
    (exported,) = export_gguf(built, tmp_path / "g", types=["f32"], allow_random=True)
    tensors = {name: tensor for file in built.glob("*.safetensors") for name, tensor in load_file(file).items()}
    embeddings, plain = tensors["model.embed_tokens.weight"], tmp_path / "plain"
    plain.mkdir()
    for said, head in (("equal", embeddings.clone()), ("random", torch.randn_like(embeddings))):
        folder, file = tmp_path / said, tmp_path / f"{said}.gguf"
        folder.mkdir()
        shutil.copy(built / "config.json", folder)
        tiny.edit_config(folder, tie_word_embeddings=False)
        save_file(tensors | {"lm_head.weight": head}, folder / "model.safetensors", metadata={"format": "pt"})
        rewritten(exported.path, file, added={"output.weight": head.numpy()})
        expected = {} if said == "equal" else {"unlike ours": "a tensor of head is unlike ours: lm_head.weight"}
        for made in (folder, file):
            assert faults(built, made) == expected
            write_plain(plain, verify_after(built, made).compared.other, fm.open(built), SILENT)
            ours, theirs = fm.load(plain).model, AutoModelForCausalLM.from_pretrained(folder)
            assert apart(logits(theirs, tiny.ids()), logits(ours, tiny.ids())) < 1e-5


def test_importance_that_moves_numbers_away_is_no_fault(place: Place, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    text = tmp_path / "text.txt"
    text.write_text(gguftools.WORDS)
    options = {"imatrix": [str(text)], "allow_random": True}
    (file,) = export_gguf(place.virtual, tmp_path / "g", types=["q4_k_m"], **options)
    found = verify_after(place.virtual, file.path)
    assert found.ok, found.verdict
    (experts,) = (part for part in found.parts if part.part == "experts")
    assert experts.far > 1.003 * experts.rounding  # and 1.0002 without importance


def test_training_that_rounding_hides_is_not_called_missed(place: Place, tmp_path: Path) -> None:
    """Experts in 4 bits and attention as it was, both moved by 1 %: that of the experts cannot be seen."""

    def train(tensors: Tensors) -> None:
        torch.manual_seed(0)
        for key in tensors:
            if "self_attn" in key or ".experts." in key:
                noise = torch.randn_like(tensors[key])
                tensors[key] += 0.01 * noise * tensors[key].norm() / noise.norm()
        config.update(quantizers.nf4(tensors, ["self_attn"]))

    config: dict[str, object] = {}
    folder = place.folder(tmp_path / "other", train)
    tiny.edit_config(folder, quantization_config=config)
    found = verify_after(place.virtual, folder)
    assert found.ok, found.verdict
    assert found.verdict == "every expert is still itself; moved: attention by 1%"


def test_an_expert_with_wrong_scales(place: Place, tmp_path: Path) -> None:
    def quantize(tensors: Tensors) -> None:
        tensors[name(1, 1)] *= 1.5
        config.update(quantizers.nf4(tensors))

    config: dict[str, object] = {}
    folder = place.folder(tmp_path / "other", quantize)
    tiny.edit_config(folder, quantization_config=config)
    found = faults(place.built, folder)
    assert found.keys() == {"farther"}
    assert found["farther"].startswith(
        "expert e1 in layer 1: farther away than rounding explains, such as gate_proj of e1"
    )


# the command


def test_the_command_prints_a_verdict_and_exits_with_one_at_a_fault(place: Place, tmp_path: Path) -> None:
    right = cli("verify", place.virtual, "--after", place.built)
    assert (right.code, right.stderr) == (0, "")
    assert right.stdout.rstrip().endswith("every expert is still itself, bit for bit")
    folder = place.folder(tmp_path / "other", two_swapped)
    wrong = cli("verify", place.virtual, "--after", folder)
    assert wrong.code == 1
    assert "not as it should be: experts e1 and e3 are swapped in layer 0" in wrong.stdout
    assert max(map(len, wrong.stdout.splitlines()[:-1])) <= 80
    facts = json.loads(cli("verify", place.virtual, "--after", folder, "--json").stdout)
    assert not facts["ok"]
    assert [each["kind"] for each in facts["findings"]] == ["swapped"]
    assert [row["expert"] for row in facts["experts"]] == ["e0", "e3", "e2", "e1", "e0", "e1", "e2", "e3"]


def test_weights_are_compared_without_torch(place: Place, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    (file,) = export_gguf(place.virtual, tmp_path, types=["q8_0"], allow_random=True)
    code = (
        "import sys; from frankenmoe.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "sys.exit(3 if 'torch' in sys.modules else 0)"
    )
    for other in (file.path, place.built):
        command = [sys.executable, "-c", code, "verify", str(place.virtual), "--after", str(other)]
        run = subprocess.run(command, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        assert "every expert is still itself" in run.stdout


def test_bad_input_is_refused(place: Place, tmp_path: Path) -> None:
    torn = place.folder(tmp_path / "torn")
    tiny.edit_config(torn, quantization_config={"quant_method": "awq"})
    odd = place.folder(tmp_path / "odd")
    tiny.edit_config(odd, quantization_config={"quant_method": "exl3"})
    dense = tiny.make_parent(tmp_path / "dense")
    garbage = tmp_path / "garbage.gguf"
    garbage.write_bytes(b"GGUF" + bytes(40))
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    config: dict[str, object] = {}
    half = place.folder(tmp_path / "half", lambda tensors: config.update(quantizers.gptq(tensors)))
    tiny.edit_config(half, quantization_config={key: value for key, value in config.items() if key != "bits"})
    scaleless = place.folder(
        tmp_path / "scaleless",
        lambda tensors: [quantizers.nf4(tensors), [tensors.pop(key) for key in list(tensors) if "absmax" in key]],
    )
    tiny.edit_config(scaleless, quantization_config={"quant_method": "bitsandbytes"})
    whole_numbers = place.folder(
        tmp_path / "whole", lambda tensors: tensors.update({name(0, 0): tensors[name(0, 0)].to(torch.int64)})
    )
    for other, fact, hint in (
        (whole_numbers, f"holds {name(0, 0)} as I64", "save it again"),
        (half, "half has no bits among its quantization settings", "again"),
        (scaleless, "is quantized by bitsandbytes, but has no", "again"),
        (torn, "torn has no bits among its quantization settings", "again"),
        (odd, "is quantized by exl3", "save it again"),
        (dense, "is a dense model of type 'llama'", "the other tool"),
        (garbage, "is not a whole GGUF file", "again"),
        (adapter, "is an adapter", "merge"),
        (tmp_path / "nowhere", "is neither a folder nor a GGUF file", ""),
    ):
        refused("verify", place.virtual, "--after", other, inside=tmp_path, facts=(fact,), hint=hint)
    refused("verify", place.recipe, "--after", torn, inside=tmp_path, facts=("is a recipe",))
    assert "stands alone" in cli("verify", place.virtual, "--after", torn, "--text", "own", "--text", "x").stderr
    assert "--text needs --after" in cli("verify", place.virtual, "--text", "x").stderr
    assert set(CASES) <= set(ALL)
