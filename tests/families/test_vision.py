"""A model that reads pictures: its text becomes experts, and all around it passes through."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

import frankenmoe as fm
import gguftools
import tiny
from family_cases import LONG, SIZES, PerToken, apart
from family_cases import logits as text_logits
from frankenmoe.audit.run import audit
from frankenmoe.checkpoint.reader import open_checkpoint
from frankenmoe.errors import SourceError
from frankenmoe.export.check import kl
from frankenmoe.export.llama import Engine
from frankenmoe.export.run import export_gguf
from frankenmoe.families import FORMATS
from frankenmoe.publish.card import make_card
from frankenmoe.recipe.train import TrainSettings
from frankenmoe.train.run import train
from gguf_cases import CONTEXT
from published import NESTED
from refusals import refused

FMT = FORMATS["qwen3_vl_moe"]
CLOSE = 5e-6
TEXT: dict[str, Any] = SIZES | {
    "head_dim": 8,
    "rope_parameters": {
        "rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1], "mrope_interleaved": True,
    },
}  # fmt: skip
VISION: dict[str, Any] = {
    "depth": 3, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 36, "patch_size": 4,
    "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 2],
}  # fmt: skip
TOKENS = {"image_token_id": 97, "video_token_id": 98, "vision_start_token_id": 99, "vision_end_token_id": 100}
PICTURE = 4  # tokens: 16 patches, of which four become one
PROCESSOR = {"preprocessor_config.json": {"patch_size": 4}, "video_preprocessor_config.json": {"fps": 2}}


def make_parent(folder: Path, *, seed: int = 0, tied: bool = False, vocab: int = 101, **text: Any) -> Path:
    """A random Qwen3-VL with a processor's files, in which norms and biases count."""
    config = AutoConfig.for_model(
        "qwen3_vl",
        text_config=TEXT | {"tie_word_embeddings": tied, "vocab_size": vocab} | text,
        vision_config=VISION | {"initializer_range": 0.3},
        tie_word_embeddings=tied,
        **TOKENS,
    )
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(config)
    tiny.scatter(model)
    model.save_pretrained(folder)
    tiny.make_tokenizer().save_pretrained(folder)
    for name, content in PROCESSOR.items():
        (folder / name).write_text(json.dumps(content))
    return folder


def stock(folder: Path) -> Any:
    """The model that stock transformers loads; no parameter may be missing or left over."""
    model, report = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    return model.eval()


def picture_logits(model: Any, *, seed: int = 0) -> torch.Tensor:
    """All logits of two texts, each around a picture."""
    ids = tiny.ids(LONG, batch=2, vocab=90)
    ids[:, 5], ids[:, 6 : 6 + PICTURE], ids[:, 6 + PICTURE] = 99, 97, 100
    patches = torch.randn(2 * 4 * PICTURE, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return model(
            input_ids=ids,
            pixel_values=patches,
            image_grid_thw=torch.tensor([[1, 4, 4]] * 2),
            mm_token_type_ids=(ids == 97).int(),
        ).logits.float()


def per_token(base: Path, parents: list[Path], gates: dict[str, torch.Tensor]) -> Any:
    """The stock model of `base` with a loop over tokens in place of every FFN of its text."""
    model, *others = map(stock, (base, *parents))
    for index, layer in enumerate(model.model.language_model.layers):
        experts = [other.model.language_model.layers[index].mlp for other in others]
        layer.mlp = PerToken(FMT.name, gates[FMT.gate.format(layer=index)], experts, None, None, top_k=2)
    return model


@pytest.mark.parametrize("tied", [True, False])
def test_equal_experts_are_the_dense_model_with_pictures_too(tied: bool, tmp_path: Path) -> None:
    base = make_parent(tmp_path / "base", tied=tied)
    recipe = tiny.write_recipe(tmp_path / "r.yml", base, [base] * 4, experts_per_token=2)
    made = fm.plan(fm.Recipe.load(recipe))
    assert made.fmt is FMT
    assert not made.unused
    fm.build(recipe, tmp_path / "built", allow_identical=True)
    dense, moe, ids = stock(base), stock(tmp_path / "built"), tiny.ids(LONG, vocab=90)
    seen = picture_logits(dense)
    assert apart(seen, picture_logits(dense, seed=1)) > 0.05  # pictures count
    assert apart(seen, picture_logits(moe)) <= CLOSE
    assert apart(text_logits(dense, ids), text_logits(moe, ids)) <= CLOSE
    for name, content in PROCESSOR.items():
        assert json.loads((tmp_path / "built" / name).read_text()) == content
    theirs, ours = (json.loads((folder / "config.json").read_text()) for folder in (base, tmp_path / "built"))
    assert ours["vision_config"] == theirs["vision_config"] | {"model_type": "qwen3_vl_moe"}
    assert {key: ours[key] for key in TOKENS} == TOKENS


def test_different_experts_virtual_is_built_is_a_loop_over_tokens(tmp_path: Path) -> None:
    base, *others = (make_parent(tmp_path / str(seed), seed=seed, tied=True) for seed in range(3))
    recipe = tiny.write_recipe(tmp_path / "r.yml", base, [base, *others], experts_per_token=2)
    made = fm.plan(fm.Recipe.load(recipe))
    built, ids = fm.build(recipe, tmp_path / "built"), tiny.ids(LONG, vocab=90)
    gates = load_file(built.folder / "model-routers.safetensors")
    loop, moe = per_token(base, [base, *others], gates), stock(built.folder)
    want = text_logits(loop, ids)
    for model in (moe, fm.load(recipe).model, fm.load(built).model):
        assert apart(want, text_logits(model, ids)) <= CLOSE
    assert apart(picture_logits(loop), picture_logits(moe)) <= CLOSE
    written = open_checkpoint(built.folder).tensors
    assert made.bill.total == sum(ref.numel for ref in written.values())
    assert made.bill.total - made.bill.shared - 3 * made.bill.per_expert == sum(
        ref.numel for name, ref in written.items() if name.startswith("model.visual.")
    )
    fm.verify(built)
    # others' towers are not used, and the reason is named
    assert (str(others[0]), "model.visual.pos_embed.weight", "what reads pictures comes from the base") in made.unused


def test_a_language_model_alone_may_be_a_parent_too(tmp_path: Path) -> None:
    base = make_parent(tmp_path / "base")
    text = {key: value for key, value in TEXT.items() if key != "rope_parameters"} | {"vocab_size": 101}
    other = tiny.make_parent(tmp_path / "other", "qwen3", seed=1, **text)
    recipe = tiny.write_recipe(tmp_path / "r.yml", base, [base, other], experts_per_token=2)
    built, ids = fm.build(recipe, tmp_path / "built"), tiny.ids(LONG, vocab=90)
    assert built.record["format"] == FMT.name
    assert apart(text_logits(fm.load(recipe).model, ids), text_logits(stock(built.folder), ids)) <= CLOSE
    # the other way round nothing reads pictures
    turned = tiny.write_recipe(tmp_path / "t.yml", other, [base, other])
    assert fm.plan(fm.Recipe.load(turned)).fmt.name == "qwen3_moe"


@pytest.mark.parametrize("name", NESTED)
def test_published_models_are_counted_as_their_class_counts_them(name: str, tmp_path: Path) -> None:
    dense, moe = tmp_path / "dense", tmp_path / "moe"
    for folder in (dense, moe):
        folder.mkdir()
    (dense / "config.json").write_text(json.dumps(NESTED[name].config))
    made = fm.plan(fm.Recipe.load(tiny.write_recipe(tmp_path / "r.yml", dense, [dense] * 4)))
    assert made.fmt is FMT
    assert all(text.startswith("no weights in") for text in made.problems)
    (moe / "config.json").write_text(json.dumps(made.config))
    config = AutoConfig.from_pretrained(moe)
    assert config.text_config.rope_parameters["mrope_section"] == [24, 20, 20]
    assert config.text_config.rope_parameters["rope_theta"] == 5e6
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    numbers = {key: tensor.numel() for key, tensor in model.state_dict().items()}
    tied = numbers["lm_head.weight"] if config.tie_word_embeddings else 0
    assert config.tie_word_embeddings == NESTED[name].config["tie_word_embeddings"]
    assert made.bill.total == sum(numbers.values()) - tied
    seen = sum(count for key, count in numbers.items() if key.startswith("model.visual."))
    assert made.bill.total - made.bill.shared - 4 * made.bill.per_expert == seen


def test_sizes_that_the_config_leaves_out_are_those_of_the_class(tmp_path: Path) -> None:
    config = dict(NESTED["Qwen/Qwen3-VL-8B-Instruct"].config)
    config["vision_config"] = {"out_hidden_size": 4096, "depth": None}  # all else is the class's own
    for key in TOKENS:
        del config[key]
    (tmp_path / "dense").mkdir()
    (tmp_path / "dense" / "config.json").write_text(json.dumps(config))
    made = fm.plan(fm.Recipe.load(tiny.write_recipe(tmp_path / "r.yml", tmp_path / "dense", [tmp_path / "dense"] * 2)))
    theirs = AutoConfig.for_model("qwen3_vl")
    assert {key: made.config[key] for key in TOKENS} == {key: getattr(theirs, key) for key in TOKENS}
    with torch.device("meta"):
        tower = Qwen3VLVisionModel(Qwen3VLVisionConfig(out_hidden_size=4096))
    assert {write.name.removeprefix("model.visual."): write.shape for write in made.passed} == {
        key: tuple(tensor.shape) for key, tensor in tower.state_dict().items()
    }


def test_stages_work_on_the_text(tmp_path: Path) -> None:
    base, other = (make_parent(tmp_path / str(seed), seed=seed) for seed in range(2))
    recipe = tiny.write_recipe(tmp_path / "r.yml", base, [base, other], experts_per_token=2, gate_mode="ridge")
    texts = {}
    table = yaml.safe_load(recipe.read_text())
    for row, letters in zip(table["experts"], ("abcdef", "uvwxyz"), strict=True):
        texts[row["name"]] = tmp_path / f"{letters}.txt"
        texts[row["name"]].write_text("".join(random.Random(letters).choices(letters, k=2000)))
        row["data"] = [str(texts[row["name"]])]
    recipe.write_text(yaml.safe_dump(table | {"fit": {"tokens": 512, "block": 16}}))
    built, ids = fm.build(recipe, tmp_path / "built"), tiny.ids(LONG, vocab=90)
    fm.fit(built, method="logistic", keep_anyway=True, tokens=512, block=16)
    assert apart(text_logits(fm.load(built).model, ids), text_logits(stock(built.folder), ids)) <= CLOSE
    assert audit(built, out=tmp_path / "audit", tokens=128)
    settings = TrainSettings(what=("routers", "norms"), steps=2, batch=2, block=16)
    virtual = fm.build(recipe, tmp_path / "virtual", virtual=True)
    assert train(virtual, tmp_path / "trained", settings=settings, keep_anyway=True).artifact
    # an expert is a language model alone
    dense = AutoModelForCausalLM.from_pretrained(fm.extract(built, tmp_path / "e1", expert="e1")).eval()
    assert dense.config.model_type == "qwen3"
    assert fm.verify(built.folder)
    card = make_card(built.folder).text
    assert "AutoModelForImageTextToText.from_pretrained" in card
    assert "pipeline_tag: image-text-to-text" in card


@pytest.mark.parametrize(
    ("changes", "facts"),
    [
        ({"vision_config": {"depth": 0}}, ("config.json has depth 0", "a whole number")),
        ({"vision_config": {"patch_size": "four"}}, ("config.json has patch_size 'four'", "a whole number")),
        ({"vision_config": {"deepstack_visual_indexes": 2}}, ("deepstack_visual_indexes 2", "a list of layers")),
        ({"vision_config": {"deepstack_visual_indexes": [0, 3]}}, ("[0, 3]", "a list of layers from 0 to 2")),
        ({"vision_config": {"num_heads": 3}}, ("config.json has num_heads 3 for a hidden size of 16", "a divisor")),
        ({"vision_config": {"hidden_act": "foo"}}, ("transformers cannot make a model", "KeyError 'foo'")),
        ({"vision_config": {"initializer_range": "a"}}, ("transformers cannot make", "'initializer_range' expected")),
        ({"image_token_id": None}, ("config.json has image_token_id None, expected a token id",)),
        ({"vision_end_token_id": 1.5}, ("config.json has vision_end_token_id 1.5",)),
        ({"vision_config": {"intermediate_size": 25}}, ("holds model.visual.blocks.0.mlp.linear_fc1", "[24, 16]")),
        ({"vision_config": {"depth": 4}}, ("lacks", "model.visual.blocks.3")),
    ],
)
def test_odd_settings_of_what_passes_through_are_refused(
    changes: dict[str, Any], facts: tuple[str, ...], tmp_path: Path
) -> None:
    base = make_parent(tmp_path / "base")
    file = base / "config.json"
    config = json.loads(file.read_text())
    own = {key: config[key] | value if isinstance(value, dict) else value for key, value in changes.items()}
    file.write_text(json.dumps(config | own))
    recipe = tiny.write_recipe(tmp_path / "r.yml", base, [base] * 2)
    refused("build", recipe, tmp_path / "built", "--allow-identical", inside=tmp_path, facts=facts)


def test_what_cannot_be_built_is_refused_by_name(tmp_path: Path) -> None:
    base = make_parent(tmp_path / "base")
    recipe = tiny.write_recipe(tmp_path / "r.yml", base, [base] * 2, experts_per_token=2)
    built = fm.build(recipe, tmp_path / "built", allow_identical=True).folder
    stock(built).save_pretrained(tmp_path / "theirs")
    facts = ("theirs", "a part that reads pictures")
    refused("adopt", tmp_path / "theirs", inside=tmp_path, facts=facts, hint="name the dense models")
    with pytest.raises(SourceError, match="reads pictures too"):
        fm.verify_after(built, tmp_path / "theirs")
    text = tiny.make_parent(tmp_path / "text", "qwen3", **SIZES)
    asked = tiny.write_recipe(tmp_path / "asked.yml", text, [text] * 2, architecture="Qwen3-VL MoE")
    refused("build", asked, tmp_path / "x", inside=tmp_path, facts=("Qwen3-VL MoE cannot be built from qwen3",))
    # transformers takes experts with rows and columns exchanged or not, and tells by their sizes
    for ffn in (18, 36):
        odd = make_parent(tmp_path / f"odd-{ffn}", intermediate_size=ffn)
        made = fm.plan(fm.Recipe.load(tiny.write_recipe(tmp_path / "o.yml", odd, [odd] * 2)))
        assert made.fmt is FMT
        assert f"FFNs of {ffn} rows for a hidden size of 36" in made.problems[0]
        assert made.problems[1] == "architecture: Qwen3 MoE supports it"


def test_an_adapter_on_what_reads_pictures_is_not_lost_silently(tmp_path: Path) -> None:
    base = make_parent(tmp_path / "base")
    wanted = LoraConfig(r=2, target_modules=r".*visual.blocks.0.attn.qkv", init_lora_weights=False)
    get_peft_model(AutoModelForImageTextToText.from_pretrained(base), wanted).save_pretrained(tmp_path / "lora")
    recipe = tiny.write_recipe(tmp_path / "r.yml", Path(f"{base}+{tmp_path / 'lora'}"), [base] * 2)
    facts = ("the adapter on base_model changes model.visual.blocks.0.attn.qkv", "passes through unchanged")
    refused("build", recipe, tmp_path / "x", inside=tmp_path, facts=facts)


TOKENS_WRITTEN = 200


def test_llama_cpp_writes_the_tokens_of_the_text(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    pytest.importorskip("xllamacpp")
    tokenizer, parents = gguftools.bpe("qwen2"), []
    for seed in range(3):
        parents.append(
            make_parent(tmp_path / str(seed), seed=seed, vocab=len(tokenizer), max_position_embeddings=CONTEXT)
        )
        tokenizer.save_pretrained(parents[-1])
    recipe = tiny.write_recipe(tmp_path / "r.yml", parents[0], parents, experts_per_token=2)
    built = fm.build(recipe, tmp_path / "built").folder
    file, half = export_gguf(built, tmp_path / "out", types=["f32", "f16"], allow_random=True)
    assert any("mmproj" in note for note in file.notes)
    assert gguftools.architecture(file.path) == "qwen3vlmoe"
    ids = tiny.ids(24, batch=1, vocab=len(tokenizer))
    engine, found = Engine(file.path, context=CONTEXT), ids
    model = stock(built)
    for _ in range(TOKENS_WRITTEN):
        found = torch.cat([found, text_logits(model, found)[:, -1:].argmax(-1)], dim=1)
    assert engine.greedy(ids[0].tolist(), tokens=TOKENS_WRITTEN) == tuple(found[0, ids.shape[1] :].tolist())
    logprobs_TV = text_logits(model, found)[0].log_softmax(-1).numpy()
    places, written = range(7, found.shape[1], 28), found[0].tolist()
    for each, most in ((engine, 1e-8), (Engine(half.path, context=CONTEXT), 1e-3)):
        answers = [each.next_token(written[: place + 1], top=len(tokenizer)) for place in places]
        assert max(kl(logprobs_TV[place], answer) for place, answer in zip(places, answers, strict=True)) < most
