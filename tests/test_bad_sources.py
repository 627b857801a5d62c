"""Sources that are damaged, lie, or bring code along: each refused in one sentence, and none of their code run."""

import json
import os
import pickle
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import dynamic_module_utils

import tiny
from refusals import Tensors, cli, copy_of, refused, spoil

Parents = dict[str, list[Path]]
Header = dict[str, Any]
OWN_LLAMA = """
from transformers import LlamaConfig, LlamaForCausalLM
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""
WEIGHT = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def bad(tmp_path: Path, parents: Parents) -> Path:
    """A copy of an expert's parent, to be damaged."""
    return copy_of(parents["llama"][1], tmp_path / "bad")


@pytest.fixture
def build(tmp_path: Path, parents: Parents, bad: Path) -> tuple[object, ...]:
    """The command that makes an MoE with `bad` as an expert."""
    recipe = tiny.write_recipe(tmp_path / "recipe.yml", parents["llama"][0], [bad, parents["llama"][2]])
    return "build", recipe, tmp_path / "out"


def rewrite_header(folder: Path, change: Callable[[Header], object]) -> None:
    """Edits the JSON in front of a safetensors file and leaves the data behind it as it is."""
    file = folder / "model.safetensors"
    raw = file.read_bytes()
    end = 8 + struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8:end])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + raw[end:])


def shard(folder: Path, name: str) -> Path:
    """Turns a folder's single file into a sharded checkpoint whose index calls the file `name`."""
    header = folder / "model.safetensors"
    raw = header.read_bytes()
    tensors = json.loads(raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]])
    tensors.pop("__metadata__", None)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(tensors, name)}))
    return index


# damaged files


def test_a_truncated_file(build: tuple[object, ...], bad: Path, tmp_path: Path) -> None:
    file = bad / "model.safetensors"
    os.truncate(file, file.stat().st_size - 100)
    refused(*build, inside=tmp_path, facts=(str(file), "is truncated: 100 of its"), hint="fetch the file again")


def test_a_truncated_shard(build: tuple[object, ...], bad: Path, tmp_path: Path) -> None:
    name = "model-00001-of-00001.safetensors"
    shard(bad, name)
    file = (bad / "model.safetensors").rename(bad / name)
    os.truncate(file, file.stat().st_size - 1)
    refused(*build, inside=tmp_path, facts=(str(file), "is truncated: 1 of its"), hint="fetch the file again")


def test_a_missing_shard(build: tuple[object, ...], bad: Path, tmp_path: Path) -> None:
    index = shard(bad, "model-00001-of-00001.safetensors")
    (bad / "model.safetensors").unlink()
    facts = (str(index), "names model-00001-of-00001.safetensors, which is not there")
    refused(*build, inside=tmp_path, facts=facts, hint="missing shard")


@pytest.mark.parametrize("elsewhere", ["../../elsewhere.safetensors", "/etc/elsewhere.safetensors", "a/b.safetensors"])
def test_an_index_that_names_a_file_elsewhere(
    build: tuple[object, ...], bad: Path, tmp_path: Path, elsewhere: str
) -> None:
    index = shard(bad, elsewhere)
    (bad / "model.safetensors").unlink()
    facts = (str(index), repr(elsewhere), "expected the bare name")
    refused(*build, inside=tmp_path, facts=facts, hint="do not use this source")


def test_a_header_larger_than_the_file(build: tuple[object, ...], bad: Path, tmp_path: Path) -> None:
    file = bad / "model.safetensors"
    raw = file.read_bytes()
    file.write_bytes(struct.pack("<Q", len(raw)) + raw[8:])
    facts = (str(file), f"announces a header of {len(raw):,} bytes", f"only {len(raw) - 8:,} bytes follow")
    refused(*build, inside=tmp_path, facts=facts, hint="damaged")


def test_overlapping_tensors(build: tuple[object, ...], bad: Path, tmp_path: Path) -> None:
    def overlap(header: Header) -> None:
        start, end = header[WEIGHT]["data_offsets"]
        header[WEIGHT]["data_offsets"] = [start - 8, end - 8]

    rewrite_header(bad, overlap)
    refused(*build, inside=tmp_path, facts=(str(bad), "overlaps the tensor before it by 8 bytes"), hint="damaged")


def test_a_tensor_that_lies_about_its_size(build: tuple[object, ...], bad: Path, tmp_path: Path) -> None:
    rewrite_header(bad, lambda header: header[WEIGHT].update(shape=[48, 33]))
    facts = (WEIGHT, str(bad), f"spans {48 * 32 * 4} bytes, but F32 [48, 33] takes {48 * 33 * 4}")
    refused(*build, inside=tmp_path, facts=facts, hint="damaged")


@pytest.mark.parametrize("content", [b"", b"\0" * 7, b"<!DOCTYPE html>" * 9, struct.pack("<Q", 4) + b"[1]\n"])
def test_a_file_that_is_no_safetensors(build: tuple[object, ...], bad: Path, tmp_path: Path, content: bytes) -> None:
    (bad / "model.safetensors").write_bytes(content)
    refused(*build, inside=tmp_path, facts=(str(bad / "model.safetensors"),), hint="damaged")


def test_a_file_without_tensors(build: tuple[object, ...], bad: Path, tmp_path: Path) -> None:
    (bad / "model.safetensors").write_bytes(struct.pack("<Q", 2) + b"{}")
    facts = (str(bad), "lacks 21 of the 21 tensors", "model.embed_tokens.weight")
    refused(*build, inside=tmp_path, facts=facts, hint="download it again")


def test_tensors_of_other_names(build: tuple[object, ...], bad: Path, tmp_path: Path) -> None:
    spoil(bad, lambda tensors: [tensors.__setitem__(f"llm.{name}", tensors.pop(name)) for name in list(tensors)])
    refused(*build, inside=tmp_path, facts=(str(bad), "lacks 21 of the 21"), hint="config.json belongs")


def test_no_weights_at_all(build: tuple[object, ...], bad: Path, tmp_path: Path) -> None:
    (bad / "model.safetensors").unlink()
    refused(*build, inside=tmp_path, facts=(str(bad), "no weights"), hint="safetensors")
    assert cli("plan", build[1]).code == 0  # enough for the bill


# code


class Bomb:
    """A pickle that makes a file when somebody opens it."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.file),)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickled_weights_are_never_opened(build: tuple[object, ...], bad: Path, tmp_path: Path, name: str) -> None:
    (bad / "model.safetensors").unlink()
    (bad / name).write_bytes(pickle.dumps(Bomb(tmp_path / "boom")))
    facts = (str(bad), f"only pickled weights ({name})", "expected safetensors")
    refused(*build, inside=tmp_path, facts=facts, hint="save_pretrained")
    pickle.loads((bad / name).read_bytes())
    assert (tmp_path / "boom").is_dir()  # it would have gone off


def with_code(folder: Path, *, model_type: str, boom: Path) -> None:
    """Gives a model Python of its own that makes a folder when it is imported."""
    auto_map = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    tiny.edit_config(folder, model_type=model_type, auto_map=auto_map)
    (folder / "own.py").write_text(f"import os\nos.mkdir({str(boom)!r})\n")


@pytest.mark.parametrize("command", [("plan",), ("build",), ("chat", "--prompt", "x")])
def test_remote_code_does_not_run_unasked(tmp_path: Path, parents: Parents, command: tuple[str, ...]) -> None:
    folders = [copy_of(parent, tmp_path / parent.name) for parent in parents["llama"]]
    for folder in folders:
        with_code(folder, model_type="own", boom=tmp_path / "boom")
    recipe = tiny.write_recipe(tmp_path / "recipe.yml", folders[0], folders[1:])
    out = (tmp_path / "out",) if command == ("build",) else ()
    facts = (str(folders[0]), "'own' model with Python code of its own, which is not run")
    refused(command[0], recipe, *out, *command[1:], inside=tmp_path, facts=facts, hint="--trust-remote-code")


def test_code_beside_a_known_family_is_ignored(tmp_path: Path, parents: Parents) -> None:
    folders = [copy_of(parent, tmp_path / parent.name) for parent in parents["llama"]]
    for folder in folders:
        with_code(folder, model_type="llama", boom=tmp_path / "boom")
    recipe = tiny.write_recipe(tmp_path / "recipe.yml", folders[0], folders[1:], prompts=True, gate_mode="hidden")
    outcome = cli("build", recipe, tmp_path / "out")
    assert outcome.code == 0, outcome.stderr
    assert not (tmp_path / "boom").exists()


def test_code_beside_a_family_without_a_table_is_ignored_where_transformers_knows_it(
    tmp_path: Path, parents: Parents
) -> None:
    folders = [copy_of(parent, tmp_path / parent.name) for parent in parents[tiny.UNLISTED]]
    for folder in folders:
        with_code(folder, model_type=tiny.UNLISTED, boom=tmp_path / "boom")
    recipe = tiny.write_recipe(tmp_path / "recipe.yml", folders[0], folders[1:], prompts=True, gate_mode="hidden")
    outcome = cli("build", recipe, tmp_path / "out", "--virtual")
    assert outcome.code == 0, outcome.stderr
    assert cli("chat", tmp_path / "out", "--prompt", "hi", "--max-new-tokens", 2).code == 0
    assert not (tmp_path / "boom").exists()


def test_what_transformers_knows_is_read_without_importing_it() -> None:
    code = (
        "import sys\nfrom frankenmoe.planning.sources import known_to_transformers as known\n"
        "print([known(name) for name in ('falcon', 'gpt_neox', 'own', 'gpt.neox', '')])\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "[True, True, False, False, False]\n", done.stderr


def test_remote_code_runs_when_asked(tmp_path: Path, parents: Parents, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    folders = [copy_of(parent, tmp_path / parent.name) for parent in parents["llama"]]
    for folder in folders:
        with_code(folder, model_type="own", boom=tmp_path / f"boom-{folder.name}")
        with (folder / "own.py").open("a") as file:
            file.write(OWN_LLAMA)
    recipe = tiny.write_recipe(tmp_path / "recipe.yml", folders[0], folders[1:], prompts=True, gate_mode="hidden")
    outcome = cli("build", recipe, tmp_path / "out", "--virtual", "--trust-remote-code")
    assert outcome.code == 0, outcome.stderr
    assert (tmp_path / "boom-0").is_dir()


# configs


@pytest.mark.parametrize(
    ("changes", "facts"),
    [
        ({"num_hidden_layers": 4}, ("lacks 18 of the 39 tensors", "model.layers.2.")),
        ({"num_hidden_layers": "two"}, ("num_hidden_layers 'two'", "expected a whole number from 1 to 10000")),
        ({"num_hidden_layers": 10**12}, ("num_hidden_layers 1000000000000", "from 1 to 10000")),
        ({"num_hidden_layers": -2}, ("num_hidden_layers -2",)),
        ({"num_hidden_layers": 2.0}, ("num_hidden_layers 2.0",)),
        ({"num_hidden_layers": True}, ("num_hidden_layers True",)),
        ({"hidden_size": 0}, ("hidden_size 0",)),
        ({"hidden_size": None}, ("hidden_size None",)),
        ({"hidden_size": [32]}, ("hidden_size [32]",)),
        ({"hidden_size": 10**9}, ("model.embed_tokens.weight of shape [128, 32]", "says [128, 1000000000]")),
        ({"num_attention_heads": 0}, ("num_attention_heads 0",)),
        ({"num_key_value_heads": 3}, ("4 attention heads, 3 key-value heads",)),
        ({"num_key_value_heads": 0}, ("num_key_value_heads 0",)),
        ({"head_dim": 16}, ("q_proj.weight of shape [32, 32]", "says [64, 32]")),
        ({"intermediate_size": 49}, ("gate_proj.weight of shape [48, 32]", "says [49, 32]")),
        ({"vocab_size": "128"}, ("vocab_size '128'",)),
        ({"model_type": None}, ("no model_type",)),
        ({"model_type": "nobody-knows"}, ("nobody-knows",)),
        ({"rope_parameters": "fast"}, ("rotary settings 'fast'",)),
        ({"rope_theta": "fast", "rope_parameters": None}, ("rope_theta 'fast'", "expected a finite number")),
        ({"rope_parameters": {"rope_type": "nobody-knows", "rope_theta": 1e4}}, ("'nobody-knows'",)),
        ({"rope_parameters": None, "rope_theta": float("nan")}, ("rope_theta nan", "expected a positive number")),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 0}}, ("rope_theta 0",)),
        ({"rms_norm_eps": -1e-5}, ("rms_norm_eps -1e-05",)),
        ({"rms_norm_eps": float("inf")}, ("rms_norm_eps inf",)),
        ({"rms_norm_eps": "small"}, ("rms_norm_eps 'small'", "expected a positive number")),
        ({"rms_norm_eps": None}, ("rms_norm_eps None", "expected a positive number")),
        ({"rms_norm_eps": True}, ("rms_norm_eps True", "expected a positive number")),
        ({"sliding_window": "wide"}, ("sliding_window 'wide'", "expected a whole number or null")),
        ({"hidden_act": "nobody-knows"}, ("nobody-knows",)),
        ({"dtype": "int8"}, ("int8", "expected float32, float16 or bfloat16")),
        ({"tie_word_embeddings": "maybe"}, ("tie_word_embeddings",)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("form", [(), ("--virtual",)])
def test_a_config_that_lies(
    tmp_path: Path, parents: Parents, changes: dict[str, Any], facts: tuple[str, ...], form: tuple[str, ...]
) -> None:
    folders = [copy_of(parent, tmp_path / parent.name) for parent in parents["llama"]]
    for folder in folders:
        tiny.edit_config(folder, **changes)
    recipe = tiny.write_recipe(tmp_path / "recipe.yml", folders[0], folders[1:], prompts=True, gate_mode="hidden")
    refused("build", recipe, tmp_path / "out", *form, inside=tmp_path, facts=facts)


@pytest.mark.parametrize(
    "key", ["model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size"]
)
def test_a_config_without_a_size(tmp_path: Path, parents: Parents, key: str) -> None:
    folders = [copy_of(parent, tmp_path / parent.name) for parent in parents["llama"]]
    for folder in folders:
        config = json.loads((folder / "config.json").read_text())
        del config[key]
        (folder / "config.json").write_text(json.dumps(config))
    recipe = tiny.write_recipe(tmp_path / "recipe.yml", folders[0], folders[1:])
    facts = (str(folders[0] / "config.json"), f"no {key}")
    refused("plan", recipe, inside=tmp_path, facts=facts, hint="fetch config.json again")
    refused("build", recipe, tmp_path / "out", inside=tmp_path, facts=facts)


# quantized weights


@pytest.mark.parametrize(
    ("said", "method", "hint"),
    [
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8", "FineGrainedFP8Config(dequantize=True)"),
        ({"quant_method": "mxfp4"}, "mxfp4", "Mxfp4Config(dequantize=True)"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes", "model.dequantize()"),
        ({"quant_method": "gptq", "bits": 4}, "gptq", "the model it was quantized from"),
        ({"bits": 4}, "None", "the model it was quantized from"),
        ("int4", "int4", "the model it was quantized from"),
    ],
)
@pytest.mark.parametrize("who", ["base", "expert"])
def test_a_quantized_source_is_refused_by_the_plan(
    tmp_path: Path, parents: Parents, said: object, method: str, hint: str, who: str
) -> None:
    bad = copy_of(parents["llama"][1], tmp_path / "bad")
    tiny.edit_config(bad, quantization_config=said)
    others = parents["llama"]
    recipe = tiny.write_recipe(
        tmp_path / "recipe.yml", bad if who == "base" else others[0], [others[2], bad if who == "expert" else others[0]]
    )
    facts = (str(bad), "is quantized", f"method {method}", "float32, float16 or bfloat16")
    refused("plan", recipe, inside=tmp_path, facts=facts, hint=hint)
    refused("build", recipe, tmp_path / "out", "--virtual", inside=tmp_path, facts=facts, hint=hint)
    (bad / "model.safetensors").unlink()
    refused("plan", recipe, inside=tmp_path, facts=facts, hint=hint)


@pytest.mark.parametrize(
    ("dtype", "spelt"), [(torch.float8_e4m3fn, "F8_E4M3"), (torch.int8, "I8"), (torch.uint8, "U8")]
)
@pytest.mark.parametrize("family", ["llama", tiny.UNLISTED])
def test_codes_in_the_place_of_weights(
    tmp_path: Path, parents: Parents, dtype: torch.dtype, spelt: str, family: str
) -> None:
    def code(tensors: Tensors) -> None:
        name = next(name for name in tensors if ".mlp." in name and tensors[name].dim() == 2)
        tensors[name] = tensors[name].to(dtype)

    bad = spoil(copy_of(parents[family][1], tmp_path / "bad"), code)
    recipe = tiny.write_recipe(tmp_path / "recipe.yml", parents[family][0], [bad, parents[family][2]])
    facts = (str(bad), "is quantized", ".mlp.", f"as {spelt}")
    refused("plan", recipe, inside=tmp_path, facts=facts, hint="dequantize")


def test_an_empty_quantization_config_says_nothing(build: tuple[object, ...], bad: Path) -> None:
    tiny.edit_config(bad, quantization_config=None)
    assert cli(*build).code == 0


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000])
def test_a_config_that_is_no_json_object(build: tuple[object, ...], bad: Path, tmp_path: Path, content: bytes) -> None:
    (bad / "config.json").write_bytes(content)
    facts = (str(bad / "config.json"), "is not a JSON object")
    refused(*build, inside=tmp_path, facts=facts, hint="save_pretrained")
