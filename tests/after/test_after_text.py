"""Both models on text, against transformers, llama.cpp and numbers that are known."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional
from transformers import AutoModelForCausalLM

import frankenmoe as fm
import gguftools
import tiny
from conftest import Place, Tensors
from frankenmoe.after import plain
from frankenmoe.after.plain import write_plain
from frankenmoe.after.run import _opened, verify_after
from frankenmoe.artifact.folder import RECORD
from frankenmoe.data.blocks import text_blocks
from frankenmoe.data.documents import read_documents
from frankenmoe.export.run import export_gguf
from frankenmoe.progress import SILENT
from refusals import cli, refused


def softer(tensors: Tensors) -> None:
    """Attention a little changed, so that words and routers change too."""
    torch.manual_seed(0)
    for name in tensors:
        if "self_attn" in name or "experts" in name:
            tensors[name] *= 1 + 0.02 * torch.randn_like(tensors[name])


def test_words_and_experts_are_those_of_transformers(place: Place, tmp_path: Path) -> None:
    folder, text = place.folder(tmp_path / "other", softer), tmp_path / "text.txt"
    text.write_text(gguftools.WORDS)
    found = verify_after(place.virtual, folder, text=[("notes", str(text))], device="cpu")
    assert found.text is not None
    (row,) = found.text.domains

    models = [AutoModelForCausalLM.from_pretrained(each) for each in (place.built, folder)]
    tokenizer = fm.load(place.virtual).tokenizer()
    sums = dict.fromkeys(("kl", "word", "loss", "other", "same", "tokens", "choices"), 0.0)
    for each in text_blocks(read_documents([str(text)], folder=tmp_path), tokenizer, length=64):
        block, learnt = torch.tensor([each.ids]), torch.tensor(each.learn[1:])
        with torch.no_grad():
            one, two = (model(block, output_router_logits=True) for model in models)
        p_TV, q_TV = (out.logits[0, :-1][learnt].log_softmax(-1) for out in (one, two))
        sums["tokens"] += len(p_TV)
        sums["kl"] += float(functional.kl_div(q_TV, p_TV, log_target=True, reduction="sum"))
        sums["word"] += float((p_TV.argmax(-1) == q_TV.argmax(-1)).sum())
        for key, logs_TV in (("loss", p_TV), ("other", q_TV)):
            sums[key] += float(functional.nll_loss(logs_TV, block[0, 1:][learnt], reduction="sum"))
        for ours, theirs in zip(one.router_logits, two.router_logits, strict=True):
            for mine, yours in zip(ours.topk(2).indices.tolist(), theirs.topk(2).indices.tolist(), strict=True):
                sums["same"] += len(set(mine) & set(yours))
                sums["choices"] += 2
    assert row.domain == "notes"
    assert row.tokens == sums["tokens"]
    assert row.kl == pytest.approx(sums["kl"] / row.tokens, rel=1e-3)
    assert row.kl > 0.01
    assert row.same_token == pytest.approx(sums["word"] / row.tokens)
    assert row.loss == pytest.approx(sums["loss"] / row.tokens, rel=1e-5)
    assert row.other_loss == pytest.approx(sums["other"] / row.tokens, rel=1e-5)
    assert row.same_experts == pytest.approx(sums["same"] / sums["choices"])
    assert row.same_experts < 1


@pytest.mark.parametrize("kind", ["f16", "q4_k_m"])
def test_a_gguf_file_written_out_is_the_model_that_llama_cpp_runs(
    kind: str, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With rows of q and k in llama.cpp's order, which would give other words if they were left there."""
    pytest.importorskip("xllamacpp")
    monkeypatch.setattr(plain, "CHUNK", 128)  # matrices of attention have far more numbers, as in large models
    (file,) = export_gguf(place.virtual, tmp_path / "g", types=[kind], allow_random=True)
    subject, out = fm.open(place.virtual), tmp_path / "plain"
    out.mkdir()
    write_plain(out, _opened(file.path, subject), subject, SILENT)
    # llama.cpp rounds what it multiplies with quantized weights to 8 bits
    assert gguftools.greatest_kl(file.path, fm.load(out)) < (1e-4 if kind == "f16" else 0.3)
    assert gguftools.greatest_kl(file.path, fm.load(place.virtual)) > (1e-6 if kind == "f16" else 0.5)


def test_the_recipes_own_data_and_a_quantized_file(place: Place, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    text = tmp_path / "text.txt"
    text.write_text(gguftools.WORDS)
    base, *others = gguftools.parents(tmp_path, "llama")
    experts = [
        {"source_model": str(each), "name": name, "data": [str(text)]}
        for each, name in zip(others, ("maths", "verse"), strict=True)
    ]
    virtual = fm.build(tiny.write_recipe(tmp_path / "r.yml", base, [], experts=experts), tmp_path / "v", virtual=True)
    (file,) = export_gguf(virtual, tmp_path / "g", types=["q8_0"], allow_random=True)
    outcome = cli("verify", virtual.folder, "--after", file.path, "--text", "own", "--device", "cpu")
    assert outcome.code == 0, outcome.stderr
    assert [line.split()[0] for line in outcome.stdout.splitlines() if "100.0%" in line] == ["maths", "verse"]
    assert max(map(len, outcome.stdout.splitlines()[:-1])) <= 80
    refused(
        "verify",
        place.virtual,
        "--after",
        place.built,
        "--text",
        "own",
        inside=tmp_path,
        facts=("names no data",),
        hint="--text FILE",
    )
    refused(
        "verify",
        place.virtual,
        "--after",
        place.built,
        "--text",
        tmp_path / "none.txt",
        inside=tmp_path,
        facts=("none.txt",),
    )


def test_a_record_that_a_tool_has_copied_means_nothing(place: Place, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(gguftools.WORDS)
    folder = place.folder(tmp_path / "other", softer)
    alone = verify_after(place.virtual, folder, text=[(None, str(text))], device="cpu").text
    shutil.copy(place.built / RECORD, folder)
    beside = verify_after(place.virtual, folder, text=[(None, str(text))], device="cpu").text
    assert alone is not None
    assert alone.domains[0].kl > 0.01
    assert beside == alone


def test_a_model_that_lacks_an_expert_is_not_run(place: Place, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(gguftools.WORDS)
    gone = [name for name in place.tensors if ".experts.3." in name]
    folder = place.folder(tmp_path / "other", lambda tensors: [tensors.pop(name) for name in gone])
    outcome = cli("verify", place.virtual, "--after", folder, "--text", text)
    assert outcome.code == 1
    assert "not run on text: it lacks tensors" in outcome.stdout
    assert "expert e3 in every layer: missing" in outcome.stdout


@pytest.mark.parametrize(
    ("names", "moved"),
    [(["w1", "w2", "w3"], {"attention", "experts"}), (["gate_proj", "up_proj", "down_proj"], {"attention"})],
)
def test_an_adapter_that_peft_merges(names: list[str], moved: set[str], place: Place, tmp_path: Path) -> None:
    """PEFT finds the experts of Mixtral by the names in its files. By those of other families it finds attention alone,
    and does not say so."""
    stock = AutoModelForCausalLM.from_pretrained(place.folder(tmp_path / "stock"))
    settings = LoraConfig(target_modules=["q_proj", "v_proj", *names], init_lora_weights=False)
    get_peft_model(stock, settings).merge_and_unload().save_pretrained(tmp_path / "merged")
    found = verify_after(place.virtual, tmp_path / "merged")
    assert {part.part for part in found.parts if part.moved} == moved
    assert [each.kind for each in found.faults] == ([] if "experts" in moved else ["experts missed"])


def test_numbers_that_are_none_are_valid_json(place: Place, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(gguftools.WORDS)
    folder = place.folder(tmp_path / "other", lambda tensors: tensors["lm_head.weight"].fill_(torch.nan))
    outcome = cli("verify", place.virtual, "--after", folder, "--text", tmp_path / "text.txt", "--json")
    assert outcome.code == 1, outcome.stderr
    facts = json.loads(outcome.stdout, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert facts["text"]["domains"][0]["kl"] is None
