"""`adopt`: finished mixtures of other programs, against transformers and mergekit-moe themselves."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import frankenmoe as fm
import gguftools
import tiny
from family_cases import CASES, LONG, SHARED, Case, apart, logits, make_parent, write_recipe
from frankenmoe.artifact.folder import RECORD
from frankenmoe.checkpoint.values import materialize
from frankenmoe.families import FAMILIES, FORMATS, moe_config
from frankenmoe.families.config import NORMALIZES
from frankenmoe.families.mixtures import UNLIKE_DENSE, VIEWS, read_mixture
from frankenmoe.families.rotary import rope
from refusals import cli, refused, spoil, tree

# the first case of every format, and settings that another family of the same format brings
SINKS = -1e4  # so far below every score that the sink of Granite's windowed attention adds nothing
TRIED = [
    *{case.fmt: name for name, case in reversed(CASES.items()) if case.fmt in VIEWS}.values(),
    *("mistral-window", "llama-biases", "ernie4_5-shared", "glm", "granite4-shared", "nemotron_h-shared"),
]
PAIR = {"experts": 4, "experts_per_token": 2}


def mixture_of(case: Case, **changes: Any) -> Any:
    """A random MoE of stock transformers in the format of a case, with gates that tell the experts apart."""
    fmt, family = FORMATS[case.fmt], FAMILIES[case.family]
    dense = AutoConfig.for_model(case.family, **(case.sizes | {"pad_token_id": None})).to_dict()
    shared = family.dims(dense).ffn if "shared_experts" in case.recipe else 0
    config = moe_config(fmt, family, dense, **PAIR, shared_ffn=shared, dtype="float32")
    kept = {key: value for key, value in config.items() if key not in ("architectures", "dtype", "torch_dtype")}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**kept | changes), **case.loading).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith((".gate.weight", "router.weight", "router.layer.weight")):
                parameter.normal_()
            elif name.endswith("sinks"):
                parameter.fill_(SINKS)
            elif parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def saved(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    tiny.make_tokenizer().save_pretrained(folder)
    return folder


def saved_packed(model: Any, folder: Path) -> Path:
    """The tensors under the names that they have in memory, as trainers save a state dict."""
    saved(model, folder)
    (folder / "model.safetensors").unlink()
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name not in tied}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def output(*arguments: object) -> str:
    outcome = cli(*arguments)
    assert outcome.code == 0, outcome.stderr
    return outcome.stdout


@pytest.mark.parametrize("name", TRIED)
def test_every_format_computes_what_transformers_does(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    model, ids = mixture_of(case), tiny.ids(LONG)
    theirs = logits(model, ids)
    for folder in (saved(model, tmp_path / "saved"), saved_packed(model, tmp_path / "packed")):
        ours = fm.load(fm.adopt(folder).artifact).model
        assert apart(theirs, logits(ours, ids)) <= case.close


@pytest.mark.parametrize("name", ["llama-qwen", "gemma", "glm-shared", "ernie4_5-shared", "nemotron_h", "deepseek"])
def test_our_own_build_that_has_lost_its_record(name: str, tmp_path: Path) -> None:
    """With what a format adds: zero biases and shared experts, doubled projections, permuted rows, shifted norms."""
    deepseek = Case("llama", "deepseek", {"head_dim": 6}, {"architecture": "DeepSeek", **SHARED})
    case = CASES.get(name, deepseek)
    base, other = (make_parent(tmp_path / str(seed), case, seed=seed) for seed in range(2))
    built = fm.build(write_recipe(tmp_path / "r.yml", case, base, [base, other, other, base]), tmp_path / "built")
    before = logits(fm.load(built).model, tiny.ids(LONG))
    (tmp_path / "built" / RECORD).unlink()
    again = fm.load(tmp_path / "built")
    assert again.experts == ("expert-0", "expert-1", "expert-2", "expert-3")
    assert apart(before, logits(again.model, tiny.ids(LONG))) <= case.close


def test_every_format_has_a_view_and_is_tried_or_is_refused() -> None:
    assert sorted([*VIEWS, *UNLIKE_DENSE]) == sorted(FORMATS)
    assert {CASES[name].fmt for name in TRIED} == {name for name in VIEWS if FORMATS[name].loads_in_transformers}


def test_a_mixture_that_is_unlike_a_dense_model_is_refused_and_its_dense_model_is_not(tmp_path: Path) -> None:
    """Gemma 4 has one class for both."""
    saved(mixture_of(CASES["gemma4"]), tmp_path / "gemma4")
    facts = ("gemma4 has in every layer a dense FFN beside its experts",)
    refused("adopt", tmp_path / "gemma4", inside=tmp_path, facts=facts, hint="name the dense models")
    make_parent(tmp_path / "dense", CASES["gemma4"])
    refused("adopt", tmp_path / "dense", inside=tmp_path, facts=("'gemma4_text' model, expected a mixture",), hint="")
    recipe = write_recipe(tmp_path / "r.yml", CASES["gemma4"], tmp_path / "dense", [tmp_path / "dense"] * 2)
    made = fm.plan(fm.Recipe.load(recipe))
    assert made.fmt is not None
    assert made.fmt.name == "gemma4"


@pytest.mark.parametrize("name", [name for name in VIEWS if FORMATS[name].loads_in_transformers])
def test_a_setting_that_is_left_out_has_the_default_of_the_formats_class(name: str) -> None:
    fmt, view = FORMATS[name], VIEWS[name]
    theirs = AutoConfig.for_model(fmt.model_type).to_dict()
    family = FAMILIES[view.family]
    sizes = {key: theirs[key] for key in theirs if key in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
    sizes |= dict.fromkeys((*fmt.counted, "intermediate_size"), 4) | {"vocab_size": 8, "model_type": fmt.model_type}
    read = read_mixture(fmt, sizes)
    dims = family.dims(read.dense)
    assert dims.kv_heads == theirs.get("num_key_value_heads", dims.kv_heads)
    assert dims.head_dim == (theirs.get("head_dim") or dims.hidden // dims.heads)
    for key in ("rms_norm_eps", "attention_bias", "max_position_embeddings", "tie_word_embeddings"):
        if theirs.get(key) is not None and key in family.defaults:
            assert family.value(read.dense, key) == theirs[key], key
    if fmt.rotates:
        assert rope(family, read.dense)["rope_theta"] == theirs["rope_parameters"]["rope_theta"]
    assert read.rule.normalizes == theirs.get(NORMALIZES, True)
    written = sizes | {key: theirs[key] for key in fmt.constants if theirs.get(key) is not None}
    assert read.problems == read_mixture(fmt, written).problems


def test_weights_that_are_not_divided_by_their_sum_and_a_wide_shared_expert(tmp_path: Path) -> None:
    """As in the Qwen-MoEs of the hub."""
    model = mixture_of(CASES["qwen2"], norm_topk_prob=False, shared_expert_intermediate_size=84)
    folder, ids = saved(model, tmp_path / "qwen"), tiny.ids(LONG)
    theirs = logits(model, ids)
    fm.adopt(folder, tmp_path / "adopted")
    fm.build(tmp_path / "adopted", tmp_path / "built")
    fm.verify(tmp_path / "built")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "built").eval()
    for other in (fm.load(tmp_path / "adopted").model, fm.load(tmp_path / "built").model, again):
        assert apart(theirs, logits(other, ids)) <= 5e-6
    assert not json.loads((tmp_path / "built" / "config.json").read_text())["norm_topk_prob"]


def test_a_shared_expert_that_its_format_cannot_count_is_refused(tmp_path: Path) -> None:
    case, base = CASES["llama-shared"], make_parent(tmp_path / "base", CASES["llama"])
    other = make_parent(tmp_path / "other", CASES["llama"], seed=1)
    recipes = {}
    for wide in (84, 104):
        folder = saved(mixture_of(case, shared_intermediate_size=wide), tmp_path / str(wide))
        keys = {"architecture": "deepseek", "shared_experts": [{"source_model": f"{folder}#shared"}]}
        recipes[wide] = tiny.write_recipe(tmp_path / f"{wide}.yml", base, [base, other], **keys)
    facts = ("DeepSeek MoE has shared experts as wide as others, found widths 84 and 52",)
    refused("build", recipes[84], tmp_path / "out", inside=tmp_path, facts=facts)
    assert fm.plan(fm.Recipe.load(recipes[104])).config["n_shared_experts"] == 2


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("qwen2", {"shared_expert_intermediate_size": 84, "norm_topk_prob": False}),
        ("glm-shared", {"n_shared_experts": 2}),
        ("ernie4_5-shared", {"moe_num_shared_experts": 2}),
        ("llama-shared", {"shared_intermediate_size": 84}),
    ],
)
def test_a_shared_expert_that_is_wider_than_the_others_in_llama_cpp(
    name: str, changes: dict[str, Any], padded: bool, tmp_path: Path
) -> None:
    tokenizer = gguftools.bpe("gpt-2")
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 256}
    folder = saved(mixture_of(CASES[name], **sizes, **changes), tmp_path / "mixture")
    tokenizer.save_pretrained(folder)
    words = ["export", folder, tmp_path / "gguf", "--types", "f32", *(["--pad256"] if padded else [])]
    if padded and name == "qwen2":
        refused(*words, inside=tmp_path, facts=("qwen2moe does not allow",), hint="omit --pad256")
        return
    output(*words)
    report = json.loads((tmp_path / "gguf" / "export.json").read_text())
    assert report["files"][0]["check"]["kl"] < 1e-6


def test_a_head_of_its_own_beside_a_config_that_ties_it(tmp_path: Path) -> None:
    """Transformers uses a stored head that differs from the embeddings, whatever the config says."""
    folder = saved(mixture_of(CASES["llama"], tie_word_embeddings=True), tmp_path / "mixture")
    tensors = load_file(folder / "model.safetensors")
    assert "lm_head.weight" not in tensors
    tensors["lm_head.weight"] = torch.randn_like(tensors["model.embed_tokens.weight"]) * 0.1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    stock = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert torch.equal(stock.lm_head.weight, tensors["lm_head.weight"])
    expected = logits(stock, tiny.ids())
    assert apart(expected, logits(fm.load(folder).model, tiny.ids())) <= 5e-6  # without being adopted
    fm.adopt(folder)
    fm.verify(folder)
    built = fm.build(folder, tmp_path / "built").folder
    assert json.loads((built / "config.json").read_text())["tie_word_embeddings"] is False
    for model in (fm.load(folder).model, fm.load(built).model, AutoModelForCausalLM.from_pretrained(built).eval()):
        assert apart(expected, logits(model, tiny.ids())) <= 5e-6


@pytest.fixture(scope="module")
def retrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with parents, recipe.yml, our build, and that build as a trainer saves it, experts 0 and 2 swapped."""
    root = tmp_path_factory.mktemp("retrained")
    parents = gguftools.parents(root, "llama")
    texts = {"one": "ABCDEFGH ", "two": "123456789+= ", "three": "abcabcxyz. "}
    rows = []
    for (name, text), parent in zip(texts.items(), parents, strict=True):
        (root / f"{name}.txt").write_text(text * 300)
        rows.append({"source_model": f"./{parent.name}", "name": name, "data": [f"{name}.txt"]})
    recipe = {"base_model": "./llama0", "gate_mode": "random", "experts_per_token": 1, "experts": rows}
    (root / "recipe.yml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    fm.build(root / "recipe.yml", root / "built")
    model = AutoModelForCausalLM.from_pretrained(root / "built")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.01 * parameter.std())
        for layer in model.model.layers:
            for tensor in (layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj, layer.mlp.gate.weight):
                tensor.copy_(tensor[[2, 1, 0]])
    model.save_pretrained(root / "tuned")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(root / "built" / name, root / "tuned")
    return root


@pytest.fixture
def tuned(retrained: Path, tmp_path: Path) -> Path:
    """The folder of the trainer, for a test of its own, beside recipe and parents."""
    shutil.copytree(retrained, tmp_path / "work")
    return tmp_path / "work" / "tuned"


def test_experts_are_paired_with_their_sources_by_content(tuned: Path) -> None:
    said = json.loads(output("adopt", tuned, "--recipe", tuned.parent / "recipe.yml", "--json"))
    assert [row["name"] for row in said["experts"]] == ["three", "two", "one"]
    assert [row["made_from"] for row in said["experts"]] == ["./llama2", "./llama1", "./llama0"]
    assert all(row["distance"] < 0.05 < 1 < row["next"] for row in said["experts"])
    recipe = fm.Recipe.load(tuned / "recipe.yml")
    assert [expert.data for expert in recipe.experts] == [(f"../{name}.txt",) for name in ("three", "two", "one")]


def test_every_command_works_on_an_adopted_folder(tuned: Path, tmp_path: Path) -> None:
    weights = (tuned / "model.safetensors").read_bytes()
    stock = logits(AutoModelForCausalLM.from_pretrained(tuned).eval(), tiny.ids())
    fm.adopt(tuned, recipe=tuned.parent / "recipe.yml")
    assert apart(stock, logits(fm.load(tuned).model, tiny.ids())) <= 5e-6
    assert "matches its recipe" in output("verify", tuned)
    output("chat", tuned, "--prompt", "ABC", "--max-new-tokens", 3, "--trace")
    output("audit", tuned, "--out", tmp_path / "report")
    fitted = json.loads(output("fit", tuned, "--block", 32, "--tokens", 512, "--json"))
    before, after = (fitted["held_out_loss"][key].values() for key in ("before", "after"))
    assert sum(after) < sum(before)
    assert fitted["replaced"]
    assert "matches its recipe" in output("verify", tuned)
    words = ["--steps", 3, "--what", "routers,experts", "--block", 32, "--keep-anyway", "--straight-through"]
    output("train", tuned, tmp_path / "trained", *words)
    output("extract", tuned, tmp_path / "dense", "--expert", "two")
    one = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").model.layers[1].mlp.down_proj.weight
    name = "model.layers.1.block_sparse_moe.experts.1.w2.weight"
    assert torch.equal(one, load_file(tuned / "model.safetensors")[name])
    output("export", tmp_path / "trained", tmp_path / "gguf", "--types", "f16", "--no-check")
    output("card", tuned)
    assert "Another program made or trained this mixture" in (tuned / "README.md").read_text()
    assert "other programs read the routers in the weights" in cli("push", tuned, "me/moe", "--dry-run").stderr
    for what in (tuned, tmp_path / "trained"):
        output("build", what, tmp_path / f"built-{what.name}")
        output("verify", tmp_path / f"built-{what.name}")
    assert (tuned / "model.safetensors").read_bytes() == weights
    assert (
        apart(
            logits(AutoModelForCausalLM.from_pretrained(tmp_path / "built-tuned").eval(), tiny.ids()),
            logits(fm.load(tuned).model, tiny.ids()),
        )
        <= 5e-6
    )


def test_reading_needs_no_adoption(tuned: Path, tmp_path: Path) -> None:
    before = tree(tuned)
    output("export", tuned, tmp_path / "gguf", "--types", "f16")
    report = json.loads((tmp_path / "gguf" / "export.json").read_text())
    assert report["files"][0]["check"]["kl"] < 1e-4
    output("chat", tuned, "--prompt", "ABC", "--max-new-tokens", 3)
    assert json.loads(output("plan", tuned, "--json"))["experts"] == 3
    output("build", tuned, tmp_path / "built")
    ours, theirs = (AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (tmp_path / "built", tuned))
    assert torch.equal(logits(ours, tiny.ids()), logits(theirs, tiny.ids()))
    assert tree(tuned) == before


def test_a_folder_of_its_own_reads_the_weights_where_they_are(tuned: Path, tmp_path: Path) -> None:
    before, out = tree(tuned), tmp_path / "work" / "out"
    said = output("adopt", tuned, out)
    assert "expert-2" in said
    assert tree(tuned) == before
    assert sum(file.stat().st_size for file in out.iterdir()) < (tuned / "model.safetensors").stat().st_size / 2
    output("verify", out)
    assert json.loads(output("plan", out / "recipe.yml", "--json"))["experts"] == 3
    stock = AutoModelForCausalLM.from_pretrained(tuned).eval()
    # both may be moved together
    (tmp_path / "work").rename(tmp_path / "moved")
    assert apart(logits(stock, tiny.ids()), logits(fm.load(tmp_path / "moved" / "out").model, tiny.ids())) <= 5e-6


def test_what_mergekit_moe_writes(retrained: Path, tmp_path: Path) -> None:
    from mergekit.moe.config import MoEMergeConfig
    from mergekit.options import MergeOptions
    from mergekit.scripts.moe import build

    rows = [
        {"source_model": str(retrained / f"llama{at}"), "positive_prompts": [text]} for at, text in ((1, "A"), (2, "b"))
    ]
    recipe = {"base_model": str(retrained / "llama0"), "gate_mode": "hidden", "dtype": "float32", "experts": rows}
    (tmp_path / "merge.yml").write_text(yaml.safe_dump(recipe))
    build(MoEMergeConfig.model_validate(recipe), str(tmp_path / "merged"), MergeOptions(), device="cpu")
    said = fm.adopt(tmp_path / "merged", tmp_path / "adopted", recipe=tmp_path / "merge.yml")
    assert [row["name"] for row in said.facts["experts"]] == ["llama1", "llama2"]
    assert [row["distance"] for row in said.facts["experts"]] == [0.0, 0.0]
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert apart(logits(stock, tiny.ids()), logits(fm.load(tmp_path / "adopted").model, tiny.ids())) <= 5e-6


def test_one_expert_of_a_mixture_beside_a_dense_model(retrained: Path, tmp_path: Path) -> None:
    rows = [{"source_model": f"{retrained}/tuned#1"}, {"source_model": f"{retrained}/llama2"}]
    recipe = {"base_model": f"{retrained}/llama0", "gate_mode": "random", "experts": rows}
    (tmp_path / "r.yml").write_text(yaml.safe_dump(recipe))
    built = fm.build(tmp_path / "r.yml", tmp_path / "built")
    assert built.record["experts"] == ["tuned-1", "llama2"]
    ours, tuned = (fm.open(folder).parts.nodes for folder in (tmp_path / "built", retrained / "tuned"))
    for one, two in ((ours[0], tuned[1]), (ours[1], fm.open(retrained / "recipe.yml").parts.nodes[2])):
        assert all(
            (materialize(one.folded(layer, suffix)) == materialize(two.folded(layer, suffix))).all()
            for layer, row in one.ffn.items()
            for suffix in row
        )


def test_an_expert_is_added_to_an_adopted_mixture(tuned: Path, tmp_path: Path) -> None:
    fm.adopt(tuned, recipe=tuned.parent / "recipe.yml")
    fm.fit(tuned, method="ridge", block=32, tokens=512, keep_anyway=True)
    words = {"source": str(tuned.parent / "llama1"), "name": "four", "data": [str(tuned.parent / "two.txt")]}
    assert fm.add_expert(tuned, tmp_path / "larger", **words, block=32).artifact.record["experts"] == [
        *("three", "two", "one", "four")
    ]
    fm.verify(tmp_path / "larger")


@pytest.mark.parametrize(
    ("words", "facts", "hint"),
    [
        (["adopt", "llama0"], ("'llama' model, expected a mixture of experts",), "name it in a recipe"),
        (["adopt", "built"], ("is an artifact already",), "move frankenmoe.json"),
        (["adopt", "neox"], ("'gpt_neox' model, expected a mixture",), "known formats: Mixtral"),
        (["adopt", "cut"], ("is truncated",), "fetch the file again"),
        (["adopt", "nothing/here/x"], ("neither a folder",), ""),
        (["adopt", "tuned", "--recipe", "two.yml"], ("3 experts against 2",), "leave --recipe out"),
        (["adopt", "tuned", "--recipe", "wide.yml"], ("48 FFN width against 64",), "leave --recipe out"),
        (["adopt", "tuned", "--recipe", "other.yml"], ("resembles no expert",), "leave --recipe out"),
        (["adopt", "sparse"], ("decoder_sparse_step 2",), "eval runs it"),
        (["adopt", "unknown"], ("secret_factor 2.5",), "eval runs it"),
        (["adopt", "fewer"], ("its config.json says [4, 32]",), "two different models"),
        (["adopt", "taken"], ("holds a recipe.yml",), "adopt taken OUT"),
        (["adopt", "tuned", "llama0"], ("exists and is not empty",), ""),
        (["eval", "tuned-out", "--against-parents", "--text", "one=one.txt"], ("are not known",), "name the models"),
        (["heal", "tuned-out", "healed"], ("are not known",), "train"),
        (["fit", "tuned"], ("is a recipe",), ""),
        (["card", "tuned"], ("a mixture of another program",), "frankenmoe adopt tuned"),
    ],
)
def test_what_cannot_be_adopted(
    words: list[str], facts: tuple[str, ...], hint: str, spoiled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(spoiled)
    refused(*words, inside=spoiled, facts=facts, hint=hint)


@pytest.fixture(scope="module")
def spoiled(retrained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same folder with damaged and foreign ones, and with recipes of other MoEs; not to be changed."""
    root = tmp_path_factory.mktemp("spoiled") / "all"
    shutil.copytree(retrained, root)
    fm.adopt(root / "tuned", root / "tuned-out", recipe=root / "recipe.yml")
    tiny.make_parent(root / "neox", tiny.UNLISTED)
    for name in ("cut", "unknown", "fewer", "taken"):
        shutil.copytree(root / "tuned", root / name)
    file = root / "cut" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    tiny.edit_config(root / "unknown", secret_factor=2.5)
    tiny.edit_config(root / "fewer", num_local_experts=4)
    spoil(root / "fewer", lambda tensors: [tensors.update(_fourth(name, tensors)) for name in list(tensors)])
    (root / "taken" / "recipe.yml").write_text("base_model: x\n")
    saved(mixture_of(CASES["qwen2"]), root / "sparse")
    tiny.edit_config(root / "sparse", decoder_sparse_step=2)
    table = yaml.safe_load((root / "recipe.yml").read_text())
    (root / "two.yml").write_text(yaml.safe_dump({**table, "experts": table["experts"][:2]}))
    for name, changes in (("wide", {"intermediate_size": 64}), ("other", {})):
        parents = [tiny.make_parent(root / f"{name}{seed}", "llama", seed=9 + seed, **changes) for seed in range(3)]
        rows = [{"source_model": f"./{parent.name}"} for parent in parents]
        recipe = {**table, "base_model": f"./{parents[0].name}", "experts": rows}
        (root / f"{name}.yml").write_text(yaml.safe_dump(recipe))
    return root


def _fourth(name: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A fourth expert beside the third one, which the gates do not have."""
    return {name.replace("experts.2.", "experts.3."): tensors[name].clone()} if "experts.2." in name else {}


@pytest.mark.parametrize("rotary", [{"rope_scaling": {"type": "linear", "factor": 2.0}}, {"rope_parameters": {}}, {}])
def test_the_rotary_base_of_the_class_stays_where_other_settings_are_given(rotary: dict[str, Any]) -> None:
    sizes = AutoConfig.for_model("mixtral").to_dict() | {"rope_theta": None, "rope_parameters": None}
    read = read_mixture(FORMATS["mixtral"], sizes | rotary)
    assert rope(FAMILIES["mistral"], read.dense)["rope_theta"] == 1e6


def test_a_class_that_always_divides_weights_by_their_sum_ignores_another_setting() -> None:
    sizes = AutoConfig.for_model("mixtral").to_dict()
    assert read_mixture(FORMATS["mixtral"], sizes | {NORMALIZES: False}).rule.normalizes


@pytest.mark.parametrize("name", ["qwen2_moe", "qwen3_5_moe", "ernie4_5_moe", "glm4_moe"])
def test_a_shared_expert_is_seen_where_the_config_leaves_its_size_out(name: str) -> None:
    fmt = FORMATS[name]
    written = AutoConfig.for_model(fmt.model_type).to_dict()
    size = next(key for key, quantity in fmt.counted.items() if quantity.startswith("shared"))
    without = {key: value for key, value in written.items() if key != size}
    assert read_mixture(fmt, without).shared_ffn == read_mixture(fmt, written).shared_ffn > 0
