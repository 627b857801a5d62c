"""AWQ in `verify --after`: factors that were moved rightly raise no alarm, those moved to one side do.

Run once beside what was written here: AutoAWQ 0.2.9 (gemm and gemv) and llm-compressor 0.14.0.1 on small Mixtral and
Qwen3-MoE models, on a CPU. Both leave Mixtral's router out, as AutoAWQ does Qwen3-MoE's, which is found.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import quantizers
import torch
from safetensors.torch import load_file, save_file
from test_after import a_random_down, a_random_expert, name, two_swapped, zeros
from transformers import AutoModelForCausalLM

import frankenmoe as fm
import tiny
from conftest import Place, Tensors
from family_cases import apart, logits, make_parent, write_recipe
from frankenmoe.after.packing import packing
from frankenmoe.after.plain import write_plain
from frankenmoe.after.run import verify_after
from frankenmoe.checkpoint.reader import open_checkpoint
from frankenmoe.errors import SourceError
from frankenmoe.progress import SILENT
from gguf_cases import ALL
from refusals import refused

Writer = Callable[[Tensors], dict[str, object]]
# of the matrix below, by awq.modules.linear.WQLinear_GEMM and WQLinear_GEMV of AutoAWQ 0.2.9
WRITTEN = {
    "gemm": ("a8678e0852284dba", "e8b72e0b71c772f8", "4327e8c25d55530f"),
    "gemv": ("97ff43184afd64a1", "738373db25f0d818", "eb47dfca074e5f65"),
}


def gemv(tensors: Tensors) -> dict[str, object]:
    return quantizers.awq(tensors, gemv=True)


def made(
    place: Place,
    folder: Path,
    *changes: Callable[[Tensors], object],
    write: Writer = quantizers.awq,
) -> Path:
    """A quantized folder after some changes."""
    config: dict[str, object] = {}

    def change(tensors: Tensors) -> None:
        for each in changes:
            each(tensors)
        config.update(write(tensors))

    place.folder(folder, change)
    tiny.edit_config(folder, quantization_config=config)
    return folder


def faults(artifact: Path, other: Path) -> dict[str, str]:
    return {each.kind: each.text for each in verify_after(artifact, other).faults}


@pytest.mark.parametrize("version", ["gemm", "gemv"])
def test_the_layout_is_that_of_autoawq(version: str, tmp_path: Path) -> None:
    rows, columns = torch.arange(32)[:, None], torch.arange(64)
    weight = ((rows * 37 + columns * 11) % 29 - 14) / 8
    packed = quantizers.awq_linear(weight, group=32, gemv=version == "gemv")
    hashes = [hashlib.sha256(packed[key].numpy().tobytes()).hexdigest()[:16] for key in ("qweight", "qzeros", "scales")]
    assert tuple(hashes) == WRITTEN[version]
    save_file({f"x.{key}": tensor for key, tensor in packed.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    config = {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 32, "version": version}}
    matrix = packing(open_checkpoint(tmp_path).tensors, config, where="x").find("x.weight")
    assert matrix is not None
    step = (weight.max() - weight.min()) / 15
    assert abs(matrix.rows(0, 32) - weight.numpy()).max() <= 0.51 * step
    assert (matrix.rows(0, 32)[5:23] == matrix.rows(5, 23)).all()


@pytest.mark.parametrize("write", [quantizers.awq, gemv, quantizers.compressed])
def test_factors_that_were_moved_rightly(write: Writer, place: Place, tmp_path: Path) -> None:
    folded = place.folder(tmp_path / "folded", quantizers.fold)
    ours, theirs = (AutoModelForCausalLM.from_pretrained(each) for each in (place.built, folded))
    assert apart(logits(ours, tiny.ids()), logits(theirs, tiny.ids())) < 1e-4  # the same model
    assert not torch.allclose(ours.model.norm.weight, ours.model.layers[0].input_layernorm.weight)

    found = verify_after(place.virtual, made(place, tmp_path / "other", quantizers.fold, write=write))
    assert found.ok, found.verdict
    assert [each.kind for each in found.findings] == ["factors"]
    (experts,) = (part for part in found.parts if part.part == "experts")
    assert 0.05 < experts.far == pytest.approx(experts.rounding, rel=0.1)
    assert all(part.moved == 0 for part in found.parts)


@pytest.mark.parametrize("case", ["qwen2-shared", "qwen3"])
def test_other_formats_with_biases_and_shared_experts(case: str, tmp_path: Path) -> None:
    it, sizes = ALL[case], {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 4, "head_dim": 16}
    parents = [make_parent(tmp_path / str(seed), it, seed=seed, **sizes) for seed in range(3)]
    recipe = write_recipe(tmp_path / "r.yml", it, parents[0], parents, dtype="float32")
    built = fm.build(recipe, tmp_path / "built").folder
    tensors = {name: tensor for file in built.glob("*.safetensors") for name, tensor in load_file(file).items()}
    place = Place(recipe, built, built, tensors, json.loads((built / "config.json").read_text()))
    folded = place.folder(tmp_path / "folded", quantizers.fold)
    ours, theirs = (AutoModelForCausalLM.from_pretrained(each) for each in (built, folded))
    assert apart(logits(ours, tiny.ids()), logits(theirs, tiny.ids())) < 1e-4
    found = verify_after(built, made(place, tmp_path / "other", quantizers.fold))
    assert found.ok, found.verdict
    assert all(part.moved == 0 for part in found.parts)


def without_the_router(tensors: Tensors) -> None:
    quantizers.fold(tensors, router=False)


def without_experts(tensors: Tensors) -> None:
    quantizers.fold(tensors, experts=False)


def without_the_norm(tensors: Tensors) -> None:
    """Gates and experts are multiplied alone."""
    quantizers.fold(tensors, norm=False, router=False)


def without_up(tensors: Tensors) -> None:
    quantizers.fold(tensors, up=False)


def without_an_expert(tensors: Tensors) -> None:
    """Columns of one expert are not multiplied."""
    columns = {key: tensors[key].clone() for key in (name(1, 2, "w1"), name(1, 2, "w3"))}
    quantizers.fold(tensors)
    tensors |= columns


NORM = "the norm before"
UNKNOWN = "unlike every expert of the artifact, as if random"
FAULTS: dict[Callable[[Tensors], None], dict[str, str]] = {
    without_the_router: {"one-sided": f"{NORM} the router's gate was divided by factors that it was not multiplied by"},
    without_experts: {"one-sided": f"{NORM} the experts was divided by factors that they were not multiplied by"},
    without_the_norm: {"one-sided": "are not those that their inputs were divided by"},
    without_up: {"one-sided": "are not those that their inputs were divided by"},
    without_an_expert: {"one-sided": "the factors of columns of gate_proj, up_proj, down_proj of e2"},
}
BEFORE: dict[Callable[[Tensors], None], dict[str, str]] = {
    a_random_expert: {"unlike every expert": f"expert e2 in layer 1: {UNKNOWN}"},
    two_swapped: {"swapped": "experts e1 and e3 are swapped in layer 0"},
    zeros: {"zeros": "expert e0 in layer 1: all zeros"},
    a_random_down: {"damaged": "expert e2 in layer 0: down_proj not its own"},
}


@pytest.mark.parametrize("plant", FAULTS, ids=[plant.__name__ for plant in FAULTS])
def test_factors_on_one_side_only(plant: Callable[[Tensors], None], place: Place, tmp_path: Path) -> None:
    found = faults(place.virtual, made(place, tmp_path / "other", plant))
    assert found.keys() == FAULTS[plant].keys(), found
    assert all(text in found[kind] for kind, text in FAULTS[plant].items()), found


@pytest.mark.parametrize("plant", BEFORE, ids=[plant.__name__ for plant in BEFORE])
def test_other_faults_are_found_behind_the_factors(
    plant: Callable[[Tensors], None], place: Place, tmp_path: Path
) -> None:
    found = faults(place.virtual, made(place, tmp_path / "other", plant, quantizers.fold))
    assert found == BEFORE[plant]


def test_norms_that_were_trained_are_not_called_divided(place: Place, tmp_path: Path) -> None:
    def train(tensors: Tensors) -> None:
        torch.manual_seed(5)
        for key in tensors:
            if "layernorm" in key:
                tensors[key] = tensors[key] * (1 + 0.05 * torch.randn_like(tensors[key]))

    found = verify_after(place.virtual, made(place, tmp_path / "other", train, write=quantizers.compressed))
    assert found.ok, found.verdict
    assert found.verdict.startswith("every expert is still itself; moved: norms by ")


def test_an_expert_of_another_shape_and_one_that_is_missing(place: Place, tmp_path: Path) -> None:
    def change(tensors: Tensors) -> None:
        for matrix in ("w1", "w3", "w2"):
            del tensors[name(1, 3, matrix)]
        tensors[name(0, 1, "w1")] = tensors[name(0, 1, "w1")][:128].clone()

    found = faults(place.virtual, made(place, tmp_path / "other", quantizers.fold, change))
    assert found == {"missing": "expert e3 in layer 1: missing", "misshapen": "expert e1 in layer 0: another shape"}


def test_a_layer_that_was_not_quantized(place: Place, tmp_path: Path) -> None:
    def write(tensors: Tensors) -> dict[str, object]:
        return quantizers.awq(tensors, ["layers.1.block_sparse_moe"])

    found = faults(place.virtual, made(place, tmp_path / "other", quantizers.fold, write=write))
    assert found == {"unquantized": "unquantized experts in layer 1: stored as F32, while the model is awq"}


def test_text_is_read_by_the_model_that_they_made(place: Place, tmp_path: Path) -> None:
    """Factors are taken back for the comparison alone: what runs has the numbers as they are stored."""
    other = made(place, tmp_path / "other", quantizers.fold)
    (tmp_path / "plain").mkdir()
    write_plain(tmp_path / "plain", verify_after(place.virtual, other).compared.other, fm.open(place.virtual), SILENT)
    plain, stored = (load_file(folder / "model.safetensors") for folder in (tmp_path / "plain", other))
    norms = [key for key in stored if "layernorm" in key]
    assert len(norms) == 4
    for key in norms:
        assert torch.equal(plain[key], stored[key])
        assert not torch.allclose(plain[key], place.tensors[key], rtol=0.1)


def test_other_layouts_are_refused(place: Place, tmp_path: Path) -> None:
    for number, change in enumerate(({"version": "gemv_fast"}, {"version": "marlin"}, {"bits": 8})):
        folder = made(place, tmp_path / str(number))
        config = json.loads((folder / "config.json").read_text())["quantization_config"]
        tiny.edit_config(folder, quantization_config=config | change)
        facts = ("has AWQ weights of", str(next(iter(change.values()))))
        refused("verify", place.virtual, "--after", folder, inside=tmp_path, facts=facts, hint="save it again")


@pytest.mark.parametrize("write", [quantizers.awq, gemv])
def test_a_group_size_that_the_scales_do_not_have_is_refused(write: Writer, place: Place, tmp_path: Path) -> None:
    folder = made(place, tmp_path / "other", write=write)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    for group in (-1, 16, 48, 64):
        tiny.edit_config(folder, quantization_config=config | {"group_size": group})
        facts = ("w1.scales has 256 x", f"for a group_size of {group}")
        refused("verify", place.virtual, "--after", folder, inside=tmp_path, facts=facts, hint="quantize it again")


AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32}
NUMBERS = {"num_bits": 4, "group_size": 32}
COMPRESSED = {"format": "pack-quantized", "config_groups": {"group_0": {"weights": NUMBERS}}}
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
BITS = "expected a whole number, from 1 to 32"
GROUP = "expected a whole number, at least 1"
NAMES = "expected a list of names of modules"
BROKEN: dict[str, tuple[dict[str, object], str]] = {
    "bits in words": (AWQ | {"bits": "four"}, "has bits 'four' among its quantization settings, expected a whole"),
    "bits null": (AWQ | {"bits": None}, "has bits None among"),
    "bits absent": ({"quant_method": "awq"}, "has no bits among its quantization settings, expected a whole number"),
    "bits a fraction": (AWQ | {"bits": 4.5}, "has bits 4.5 among"),
    "bits not a number": (AWQ | {"bits": float("nan")}, "has bits nan among"),
    "bits true": (AWQ | {"bits": True}, "has bits True among"),
    "group in words": (AWQ | {"group_size": "128"}, f"has group_size '128' among its quantization settings, {GROUP}"),
    "group null": (AWQ | {"group_size": None}, "has group_size None among"),
    "group negative": (AWQ | {"group_size": -7}, "has group_size -7 among"),
    "group zero": (AWQ | {"group_size": 0}, "has group_size 0 among"),
    "gptq bits zero": (GPTQ | {"bits": 0}, f"has bits 0 among its quantization settings, {BITS}"),
    "gptq bits negative": (GPTQ | {"bits": -4}, "has bits -4 among"),
    "gptq bits a list": (GPTQ | {"bits": [4]}, "has bits [4] among"),
    "compressed bits": ({**COMPRESSED, "config_groups": {"g": {"weights": {"num_bits": "4"}}}}, "has num_bits '4'"),
    "compressed group": (
        {**COMPRESSED, "config_groups": {"g": {"weights": NUMBERS | {"group_size": -3}}}}, "has group_size -3 among",
    ),
    "compressed groups a list": ({**COMPRESSED, "config_groups": [NUMBERS]}, "has config_groups [{'num_bits': 4,"),
    "compressed groups empty": ({**COMPRESSED, "config_groups": {}}, "has config_groups {} among"),
    "compressed weights a word": ({**COMPRESSED, "config_groups": {"g": {"weights": "int4"}}}, "has config_groups"),
    "block a number": (FP8 | {"weight_block_size": 128}, "has weight_block_size 128 among"),
    "block too short": (FP8 | {"weight_block_size": [128]}, "expected a list of 2 sizes"),
    "block zero": (FP8 | {"weight_block_size": [128, 0]}, "has weight_block_size [128, 0] among"),
    "block of words": (FP8 | {"weight_block_size": ["a", "b"]}, "expected a list of 2 sizes"),
    "names one word": (AWQ | {"modules_to_not_convert": "lm_head"}, NAMES),
    "names a number": (AWQ | {"modules_to_not_convert": 5}, NAMES),
    "names numbers": (COMPRESSED | {"ignore": [5]}, NAMES),
    "a pattern without end": (COMPRESSED | {"ignore": ["lm_head", "re:(a+)+$"]}, "by the pattern '(a+)+$'"),
    "a broken pattern": (COMPRESSED | {"ignore": ["re:(gate"]}, "by the pattern '(gate'"),
    "a pattern of choices": (COMPRESSED | {"ignore": ["re:" + "(a|a)" * 40]}, "by the pattern '(a|a)"),
    "many patterns": (COMPRESSED | {"ignore": ["re:.*a.*b.*"] * 31}, "by the pattern '.*a.*b.*'"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_settings_that_cannot_be_are_named(case: str) -> None:
    settings, said = BROKEN[case]
    with pytest.raises(SourceError) as caught:
        packing({}, {"quantization_config": settings}, where="other")
    assert caught.value.message.startswith("other ")
    assert said in caught.value.message
    assert caught.value.hint


def test_a_command_refuses_them(place: Place, tmp_path: Path) -> None:
    folder = made(place, tmp_path / "other")
    for key, value in (("bits", "four"), ("group_size", None), ("group_size", -7)):
        tiny.edit_config(folder, quantization_config=AWQ | {key: value})
        facts = (f"{folder} has {key} {value!r} among its quantization settings, expected a whole number",)
        refused("verify", place.virtual, "--after", folder, inside=tmp_path, facts=facts, hint="quantize it again")


AS_WRITTEN = {  # by quantizers, so far as it matters here
    "AutoAWQ": AWQ | {"version": "GEMM", "group_size": -1, "zero_point": True, "modules_to_not_convert": None},
    "GPTQModel": GPTQ | {"group_size": -1, "checkpoint_format": "gptq", "desc_act": False, "dynamic": None},
    "numbers with a point": AWQ | {"bits": 4.0, "group_size": 128.0},
    "DeepSeek": FP8 | {"activation_scheme": "dynamic", "fmt": "e4m3", "modules_to_not_convert": ["lm_head"]},
    "FP8 by rows": FP8 | {"weight_block_size": None, "modules_to_not_convert": None},
    "FP8 with a point": FP8 | {"weight_block_size": [128.0, 128.0]},
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True, "llm_int8_skip_modules": None},
    "activations alone": {
        **COMPRESSED,
        "config_groups": {"a": {"weights": None, "targets": ["re:.*k_proj"]}, "b": {"weights": NUMBERS}},
    },
    "Kimi": COMPRESSED | {"ignore": [r"re:.*mlp\.(gate|up|gate_up|down)_proj.*", "re:.*self_attn.*", "re:vision.*"]},
    "all but experts": COMPRESSED | {"ignore": ["re:^(?!.*experts).*$", r"re:.*attn\.(?:q_proj|k_proj)$"]},
    "three repetitions": COMPRESSED | {"ignore": [r"re:.*layers\.[0-9]+\.mlp\.experts\.[0-9]+\.(gate|up)_proj$"] * 9},
}


@pytest.mark.parametrize("case", AS_WRITTEN)
def test_settings_that_quantizers_write_are_read(case: str) -> None:
    assert packing({}, {"quantization_config": AS_WRITTEN[case]}, where="other").method


@pytest.mark.parametrize("group", [-1, None])
def test_compressed_tensors_may_have_a_scale_for_a_whole_row(group: int | None) -> None:
    settings = {**COMPRESSED, "config_groups": {"g": {"weights": NUMBERS | {"group_size": group}}}}
    assert packing({}, {"quantization_config": settings}, where="other").method == "compressed-tensors"


def test_names_of_modules_that_stay_as_they_were() -> None:
    settings = COMPRESSED | {"ignore": ["lm_head", r"re:.*\.gate$", "re:model.layers.[0-9]+.mlp.shared"]}
    kept = packing({}, {"quantization_config": settings}, where="other").kept
    assert kept("lm_head.weight")
    assert kept("model.layers.7.mlp.gate.weight")
    assert kept("model.layers.12.mlp.shared_expert.up_proj")
    assert not kept("model.layers.7.mlp.gate_proj")
    assert not kept("model.layers.7.mlp.experts.0.up_proj")
    settings = COMPRESSED | {"ignore": [r"re:^(?!.*\.experts\.).*$"]}
    kept = packing({}, {"quantization_config": settings}, where="other").kept
    assert kept("model.layers.7.self_attn.q_proj.weight")
    assert not kept("model.layers.7.mlp.experts.0.up_proj.weight")


def test_attention_that_is_lost_is_not_called_trained(place: Place, tmp_path: Path) -> None:
    def write(tensors: Tensors) -> dict[str, object]:
        config = quantizers.awq(tensors)
        tensors["model.layers.0.self_attn.q_proj.scales"][0, 0] = float("nan")
        return config

    found = faults(place.virtual, made(place, tmp_path / "other", quantizers.fold, write=write))
    assert list(found) == ["unlike ours"], found
