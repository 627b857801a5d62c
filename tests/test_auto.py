"""Virtual artifacts in other programs: transformers' Auto classes and pipelines, PEFT, lm-eval."""

import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, MixtralForCausalLM, pipeline

import frankenmoe as fm
import gguftools
import tiny
from frankenmoe.build.proof import verify
from frankenmoe.errors import ArtifactError, PlanError, SourceError
from test_tokenizers import as_sentencepiece, as_two_files, parents, same_ids


@pytest.fixture(scope="module")
def virtual(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual artifact of two llamas, with gates from prompts; only read."""
    folder = tmp_path_factory.mktemp("auto")
    models = [tiny.make_parent(folder / f"p{seed}", "llama", seed=seed) for seed in range(3)]
    recipe = tiny.write_recipe(folder / "r.yml", models[0], models[1:], prompts=True, gate_mode="hidden", name="toy")
    return fm.build(recipe, folder / "moe", virtual=True).folder


def in_python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """What a fresh Python prints."""
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)


def test_it_is_what_frankenmoe_loads_and_mapped_as_there(virtual: Path) -> None:
    theirs, ours = AutoModelForCausalLM.from_pretrained(virtual), fm.load(virtual).model
    assert torch.equal(theirs(tiny.ids()).logits, ours(tiny.ids()).logits)
    assert theirs.lm_head.weight.data_ptr() == ours.lm_head.weight.data_ptr()
    config = AutoConfig.from_pretrained(virtual)
    assert (config.num_local_experts, config.hidden_size, config.base_model_type) == (2, 32, "llama")
    assert verify(virtual)


def test_importing_frankenmoe_does_not_import_transformers() -> None:
    done = in_python("import sys, frankenmoe; print(sorted({'torch', 'transformers'} & set(sys.modules)))")
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("first", ["frankenmoe", "transformers.models.auto.modeling_auto"])
def test_it_is_known_whichever_is_imported_first(first: str, virtual: Path) -> None:
    code = (
        f"import sys, {first}, frankenmoe\n"
        "from transformers import AutoModelForCausalLM\n"
        "print(type(AutoModelForCausalLM.from_pretrained(sys.argv[1])).__name__)"
    )
    assert in_python(code, virtual).stdout == "LlamaForCausalLM\n"


def test_a_program_that_knows_nothing_of_frankenmoe_runs_the_code_in_the_folder(virtual: Path, tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "if sys.argv[2] == 'missing': sys.modules['frankenmoe'] = None\n"
        "from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "print(type(model.model.layers[0].mlp).__name__)"
    )
    assert in_python(code, virtual, "there").stdout == "MoEBlock\n"
    missing = in_python(code, virtual, "missing")
    assert missing.returncode == 1
    assert "this model is a virtual artifact of frankenmoe, which is not installed: pip install" in missing.stderr


def test_a_pipeline_takes_it(virtual: Path) -> None:
    asked: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "return_full_text": False}
    (said,) = pipeline("text-generation", model=str(virtual))("hello", **asked)
    moe = fm.load(virtual)
    ids = moe.tokenizer()("hello", return_tensors="pt")
    out = moe.model.generate(**ids, max_new_tokens=6, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert said["generated_text"] == moe.tokenizer().decode(out, skip_special_tokens=True)


def test_saving_builds_what_stock_transformers_loads(virtual: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(virtual)
    model.save_pretrained(tmp_path / "built")
    built = AutoModelForCausalLM.from_pretrained(tmp_path / "built")
    assert type(built) is MixtralForCausalLM
    assert torch.allclose(built(tiny.ids()).logits, model(tiny.ids()).logits, atol=1e-5)
    assert verify(tmp_path / "built")
    model.save_pretrained(tmp_path / "other", is_main_process=False)
    assert not (tmp_path / "other").exists()


def test_changed_weights_are_not_saved_as_if_they_were_not(virtual: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"  # the changed pages are seen by whoever maps the same files in this process
    shutil.copytree(virtual.parent, own)
    (moe,) = (own / "moe",)
    model = AutoModelForCausalLM.from_pretrained(moe)
    model.model.norm.weight.data += 1
    with pytest.raises(ArtifactError, match=r"1 tensor of the model changed .* the first is model\.norm\.weight"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ArtifactError, match="push_to_hub cannot send") as caught:
        model.push_to_hub("me/moe")
    assert "frankenmoe push" in str(caught.value.hint)
    same = AutoModelForCausalLM.from_pretrained(virtual)
    state = {name: tensor + 1 for name, tensor in same.state_dict().items()}
    with pytest.raises(ArtifactError, match=r"\d+ tensors of the model changed"):
        same.save_pretrained(tmp_path / "out", state_dict=state)
    with pytest.raises(ArtifactError, match="push_to_hub cannot send"):
        same.save_pretrained(tmp_path / "out", push_to_hub=True)
    assert not (tmp_path / "out").exists()


def test_its_number_of_experts_and_its_type_can_be_chosen(virtual: Path) -> None:
    wanted: dict[str, Any] = {"num_experts_per_tok": 1, "dtype": "bfloat16", "device_map": "cpu"}
    one = AutoModelForCausalLM.from_pretrained(virtual.parent, subfolder=virtual.name, **wanted)
    ours = fm.open(virtual, experts_per_token=1).load(dtype="bfloat16").model
    assert torch.equal(one(tiny.ids()).logits, ours(tiny.ids()).logits)
    eager = AutoModelForCausalLM.from_pretrained(virtual, attn_implementation="eager")
    assert eager.config._attn_implementation == "eager"
    quick = AutoModelForCausalLM.from_pretrained(virtual, use_cache=False, pad_token_id=1, output_hidden_states=True)
    assert not quick.config.use_cache
    assert quick.config.pad_token_id == 1
    assert len(quick(tiny.ids()).hidden_states) == 3


def test_the_report_on_loading_has_what_other_models_have(virtual: Path) -> None:
    dense = json.loads((virtual / "frankenmoe.json").read_text())["recipe"]["base_model"]
    found, expected = (
        AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)[1] for folder in (virtual, dense)
    )
    assert {key: list(value) for key, value in found.items()} == {key: list(value) for key, value in expected.items()}


def test_it_can_be_pickled(virtual: Path, tmp_path: Path) -> None:
    again = pickle.loads(pickle.dumps(AutoModelForCausalLM.from_pretrained(virtual)))
    assert torch.equal(again(tiny.ids()).logits, fm.load(virtual).model(tiny.ids()).logits)
    again.save_pretrained(tmp_path / "built")
    assert verify(tmp_path / "built")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"load_in_4bit": True}, "cannot be loaded with load_in_4bit"),
        ({"vocab_size": 7}, "cannot be loaded with another vocab_size"),
        ({"num_experts_per_tok": 3}, "has 2 experts, found 3 experts per token"),
        ({"num_experts_per_tok": "2"}, "has 2 experts, found '2' experts per token"),
        ({"num_experts_per_tok": 0}, "has 2 experts, found 0 experts per token"),
        ({"device_map": {"model": 0, "lm_head": "cpu"}}, "runs on one device, found a device_map of 2"),
    ],
)
def test_what_it_cannot_do_is_refused_with_a_way_out(options: dict[str, Any], words: str, virtual: Path) -> None:
    with pytest.raises(PlanError, match=words):
        AutoModelForCausalLM.from_pretrained(virtual, **options)


def test_a_config_alone_is_no_model(virtual: Path) -> None:
    with pytest.raises(PlanError, match="does not say what its model consists of"):
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(virtual))


def test_as_a_source_it_is_named(virtual: Path, tmp_path: Path) -> None:
    recipe = tiny.write_recipe(tmp_path / "r.yml", virtual, [virtual, virtual])
    with pytest.raises(SourceError, match="is a virtual artifact of frankenmoe, expected a dense model"):
        fm.plan(fm.Recipe.load(recipe))


def test_an_adapter_finds_the_artifact_again(virtual: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = AutoModelForCausalLM.from_pretrained(virtual)
    tuned = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    )
    expected = tuned(input_ids=tiny.ids()).logits
    tuned.save_pretrained(tmp_path)
    again = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(input_ids=tiny.ids()).logits, expected)
    by_transformers = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(by_transformers(tiny.ids()).logits, expected)
    by_transformers.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / "config.json").exists()  # of the adapter alone, as transformers does
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(saved(tiny.ids()).logits, expected)


def no_class(folder: Path, tokenizer: Any) -> None:
    tokenizer.save_pretrained(folder)
    marks = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(marks))


@pytest.mark.parametrize("write", [as_two_files, as_sentencepiece, no_class])
def test_auto_tokenizer_splits_text_as_beside_the_base(write: Callable[[Path, Any], None], tmp_path: Path) -> None:
    tokenizer = gguftools.sentencepiece() if write is no_class else gguftools.bpe("gpt-2")
    folders = parents(tmp_path, tokenizer)
    for folder in folders:
        write(folder, tokenizer)
    recipe = tiny.write_recipe(tmp_path / "r.yml", folders[0], folders)
    assert same_ids(folders[0], fm.build(recipe, tmp_path / "out", virtual=True).folder)


@pytest.mark.slow
def test_lm_eval_takes_it(virtual: Path) -> None:
    """lm-eval's own backend for transformers gives the log-likelihood that the logits of `fm.load` give."""
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    harness = HFLM(pretrained=str(virtual), trust_remote_code=True, device="cpu", batch_size=1)
    asked = ("hello wor", "ld")
    request = Instance(request_type="loglikelihood", doc={}, arguments=asked, idx=0)
    ((likelihood, _),) = harness.loglikelihood([request])
    tokenizer = AutoTokenizer.from_pretrained(virtual)
    context, whole = (tokenizer(text)["input_ids"] for text in (asked[0], "".join(asked)))
    logprobs_TV = fm.load(virtual).model(torch.tensor([whole])).logits[0].log_softmax(-1)
    told = sum(float(logprobs_TV[at - 1, whole[at]]) for at in range(len(context), len(whole)))
    assert likelihood == pytest.approx(told, abs=1e-4)


def test_an_artifact_from_before_runs_as_before_and_can_be_written_anew(virtual: Path, tmp_path: Path) -> None:
    old = tmp_path / "old"
    shutil.copytree(virtual, old)
    record = json.loads((old / "frankenmoe.json").read_text())
    for name in ("config.json", "modeling_frankenmoe.py"):
        (old / name).unlink()
        del record["files"][name]
    (old / "frankenmoe.json").write_text(json.dumps(record))
    assert verify(old)
    assert torch.equal(fm.load(old).model(tiny.ids()).logits, fm.load(virtual).model(tiny.ids()).logits)
    new = AutoModelForCausalLM.from_pretrained(fm.build(old, tmp_path / "new", virtual=True).folder)
    assert torch.equal(new(tiny.ids()).logits, fm.load(virtual).model(tiny.ids()).logits)


def test_transformers_serve_loads_it(virtual: Path) -> None:
    managers = pytest.importorskip("transformers.cli.serving.model_manager")
    model, tokenizer = managers.ModelManager(device="cpu").load_model_and_processor(f"{virtual}@main")
    assert torch.equal(model(tiny.ids()).logits, fm.load(virtual).model(tiny.ids()).logits)
    assert tokenizer("hello")["input_ids"] == fm.load(virtual).tokenizer()("hello")["input_ids"]


@pytest.mark.slow
def test_trl_trains_an_adapter_on_it_and_adds_no_balance_loss(virtual: Path, tmp_path: Path) -> None:
    trl, peft = pytest.importorskip("trl"), pytest.importorskip("peft")
    from datasets import Dataset

    asked = {"max_steps": 2, "per_device_train_batch_size": 2, "report_to": [], "use_cpu": True, "bf16": False}
    settings = trl.SFTConfig(output_dir=str(tmp_path / "trl"), max_length=32, **asked)
    text = Dataset.from_dict({"text": ["hello world " * 3] * 8})
    lora = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    trainer = trl.SFTTrainer(model=str(virtual), train_dataset=text, args=settings, peft_config=lora)
    trainer.train()
    trainer.save_model(str(tmp_path / "lora"))
    assert peft.PeftConfig.from_pretrained(tmp_path / "lora").base_model_name_or_path == str(virtual)
    AutoModelForCausalLM.from_pretrained(virtual).save_pretrained(tmp_path / "built")
    built = trl.SFTTrainer(model=str(tmp_path / "built"), train_dataset=text, args=settings)
    assert not built.aux_loss_enabled
