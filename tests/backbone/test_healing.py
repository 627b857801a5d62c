"""Healed MoEs: known answers, the guard, the forms they are written in, killed runs and bad input."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import frankenmoe as fm
import tiny
from frankenmoe.artifact.healing import HealReport
from frankenmoe.backbone import healed as healed_module
from frankenmoe.backbone.run import heal
from frankenmoe.errors import ArtifactError, PlanError, RecipeError
from frankenmoe.evaluate.run import _texts
from frankenmoe.gates.forcing import forced
from frankenmoe.pipeline import run
from frankenmoe.publish.card import make_card
from frankenmoe.subject import open_subject
from refusals import cli, refused

Parents = dict[str, list[Path]]
BLOCK, BLOCKS = 32, 128
SHARP = 4  # random models predict nothing; with larger logits their text can be told from chance
SETTINGS = {"tokens": BLOCK * BLOCKS, "block": BLOCK}


def mixed(folder: Path, base: Path, other: Path, *, share: float, only: str = "") -> Path:
    """The base moved towards another model, as a near fine-tune is; `only` limits it to tensors with that in a name."""
    model, moved = (AutoModelForCausalLM.from_pretrained(each) for each in (base, other))
    goal = moved.state_dict()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if only in name:
                tensor.lerp_(goal[name], share)
        model.get_output_embeddings().weight.mul_(SHARP)
    model.save_pretrained(folder)
    tiny.make_tokenizer().save_pretrained(folder)
    return folder


def write_text(file: Path, model: Path, *, seed: int = 0) -> Path:
    """Text that a model has made, one block per sample: no other model predicts it better than this one."""
    torch.manual_seed(seed)
    parent = AutoModelForCausalLM.from_pretrained(model).eval()
    ids = torch.zeros(BLOCKS, 1, dtype=torch.long)
    with torch.no_grad():
        while ids.shape[1] < BLOCK:
            logits = parent(input_ids=ids).logits[:, -1, 2:97]  # the printable tokens
            ids = torch.cat([ids, torch.multinomial(logits.softmax(-1), 1) + 2], dim=1)
    file.write_text("".join(chr(30 + token) for row in ids[:, 1:].tolist() for token in row))
    return file


@pytest.fixture(scope="module")
def near(parents: Parents, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, two fine-tunes of every weight (e0, e1), one of the FFNs only (ffn), and their texts."""
    root = tmp_path_factory.mktemp("near")
    base, one, two = parents["llama"]
    mixed(root / "base", base, base, share=0)
    for name, other, only in (("e0", one, ""), ("e1", two, ""), ("ffn", one, ".mlp.")):
        mixed(root / name, base, other, share=0.2, only=only)
        write_text(root / f"{name}.txt", root / name)
    return root


def recipe(root: Path, file: Path, *names: str, expert: dict[str, Any] | None = None, **keys: Any) -> Path:
    experts = [
        {"source_model": str(root / name), "name": name, "data": [str(root / f"{name}.txt")], **(expert or {})}
        for name in names
    ]
    file.parent.mkdir(exist_ok=True)
    file.write_text(
        yaml.safe_dump(
            {"base_model": str(root / "base"), "backbone": "base", "gate_mode": "random", "experts": experts} | keys
        )
    )
    return file


def logits(what: Path, path: tuple[int, ...] | None = None) -> torch.Tensor:
    """Of a running MoE in float32, with the expert at `path` forced if given."""
    moe = fm.load(what, dtype="float32")
    with torch.no_grad():
        if path is None:
            return moe.model(input_ids=tiny.ids()).logits
        with forced(moe.model, path):
            return moe.model(input_ids=tiny.ids()).logits


def test_experts_follow_their_parents(near: Path, tmp_path: Path) -> None:
    file = recipe(near, tmp_path / "r.yml", "e0", "e1")

    found = heal(file, tmp_path / "out", **SETTINGS)

    assert [part.name for part in found.report.kept] == ["e0", "e1"]
    for part in found.report.experts:
        assert part.parent < part.after < part.before
        assert max(part.left) < 0.8
    assert HealReport.read(tmp_path / "out" / "heal.json").experts == found.report.experts
    stages = found.artifact.record["stages"]
    assert [stage["stage"] for stage in stages] == ["heal", "routers"]
    assert stages[0]["kept"] == ["e0", "e1"]
    for name in ("e0", "e1"):
        text = stages[0]["text"][name]
        assert (text["tokens"], text["block"]) == (94 * BLOCK, BLOCK)
        assert sum(end - start for start, end in text["spans"]) == 94 * (BLOCK - 1)


def test_a_scaled_down_projection_is_scaled_back(near: Path, tmp_path: Path) -> None:
    """Only the FFNs differ from the base, and residual_scale halves their last matrix: the change is known exactly."""
    file = recipe(near, tmp_path / "r.yml", "ffn", expert={"residual_scale": 0.5}, experts_per_token=1)

    found = heal(file, tmp_path / "out", ridge=1e-7, **SETTINGS)

    (part,) = found.report.experts
    assert part.step == 1
    assert part.after == pytest.approx(part.parent, abs=1e-3)
    parent = load_file(near / "ffn" / "model.safetensors")
    tensors = load_file(tmp_path / "out" / "model-trained.safetensors")
    assert set(tensors) == {f"experts.0.model.layers.{layer}.mlp.down_proj.weight" for layer in (0, 1)}
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor * 0.5, parent[name.removeprefix("experts.0.")], rtol=0.02, atol=0.02)


def test_an_moe_that_has_its_parents_backbone_is_left_as_it_is(near: Path, tmp_path: Path) -> None:
    file = recipe(near, tmp_path / "r.yml", "ffn", experts_per_token=1)

    found = heal(file, tmp_path / "out", **SETTINGS)

    assert found.report.kept == ()
    assert all(part.before == part.after == pytest.approx(part.parent, abs=1e-6) for part in found.report.experts)
    assert not (tmp_path / "out" / "model-trained.safetensors").exists()
    torch.testing.assert_close(logits(tmp_path / "out"), logits(file), rtol=0, atol=0)


def test_nothing_is_kept_that_does_not_lower_the_loss(near: Path, tmp_path: Path) -> None:
    """The text is that of the MoE as it is, so every step towards the parent is one away from the text."""
    file = recipe(near, tmp_path / "r.yml", "e0", "e1")
    fm.build(file, tmp_path / "moe")
    alone = fm.extract(tmp_path / "moe", tmp_path / "alone", expert="e0")
    write_text(tmp_path / "own.txt", alone)

    found = heal(file, tmp_path / "out", data={"e0": [tmp_path / "own.txt"]}, **SETTINGS)

    first, second = found.report.experts
    assert not first.kept
    assert first.after == first.before < first.parent
    assert second.kept
    names = load_file(tmp_path / "out" / "model-trained.safetensors")
    assert all(name.startswith("experts.1.") for name in names)


def test_virtual_is_built_and_healed_again(near: Path, tmp_path: Path) -> None:
    file = recipe(near, tmp_path / "r.yml", "e0", "e1", backbone="average")
    heal(file, tmp_path / "virtual", **SETTINGS)
    fm.build(tmp_path / "virtual", tmp_path / "built")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "built").eval()

    with torch.no_grad():
        expected = stock(input_ids=tiny.ids()).logits
    torch.testing.assert_close(logits(tmp_path / "virtual"), expected, rtol=1e-4, atol=1e-4)
    fm.verify(tmp_path / "built")
    # a built artifact still has its sources: the result is virtual, keeps its routers and is not worse
    again = heal(tmp_path / "built", tmp_path / "again", **SETTINGS)
    assert again.artifact.form == "virtual"
    assert all(part.after <= part.before for part in again.report.experts)
    for name, gate in load_file(tmp_path / "built" / "model-routers.safetensors").items():
        assert torch.equal(gate, load_file(tmp_path / "again" / "model-routers.safetensors")[name])


def test_changes_of_full_rank_as_adapters_are_the_whole_changes(near: Path, tmp_path: Path) -> None:
    file = recipe(near, tmp_path / "r.yml", "e0", "e1")

    whole = heal(file, tmp_path / "whole", **SETTINGS)
    low = heal(file, tmp_path / "low", rank=32, **SETTINGS)
    small = heal(file, tmp_path / "small", rank=2, **SETTINGS)

    assert low.report.means["after"] == pytest.approx(whole.report.means["after"], abs=1e-3)
    torch.testing.assert_close(logits(tmp_path / "low"), logits(tmp_path / "whole"), rtol=0.01, atol=0.01)
    assert small.report.bytes < whole.report.bytes / 4
    assert whole.report.means["after"] < small.report.means["after"] < small.report.means["before"]
    assert not (tmp_path / "low" / "model-trained.safetensors").exists()
    assert yaml.safe_load((tmp_path / "low" / "recipe.yml").read_text())["experts"][0]["adapter"] == "adapters/e0"


@pytest.mark.parametrize("rank", [None, 4])
def test_adapter_experts_keep_their_adapters(rank: int | None, near: Path, tmp_path: Path) -> None:
    """An adapter on all linear layers, of which an FFN merge keeps the FFN's part; the text is that of the whole."""
    from peft import LoraConfig, PeftModel, get_peft_model

    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(near / "base")
    lora = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    lora.save_pretrained(tmp_path / "lora")
    base = AutoModelForCausalLM.from_pretrained(near / "base")
    merged = PeftModel.from_pretrained(base, tmp_path / "lora").merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    write_text(tmp_path / "lora.txt", tmp_path / "merged")
    experts = [
        {"source_model": str(near / "base"), "adapter": str(tmp_path / "lora"), "name": "lora", "data": "lora.txt"},
        {"source_model": str(near / "e0"), "name": "e0"},
    ]
    file = recipe(near, tmp_path / "r.yml", experts=experts)

    found = heal(file, tmp_path / "out", rank=rank, **SETTINGS)

    first, second = found.report.experts
    assert first.kept
    assert first.after < first.before
    assert second.reason == "it has no data"
    fm.build(tmp_path / "out", tmp_path / "built")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "built").eval()
    with torch.no_grad():
        expected = stock(input_ids=tiny.ids()).logits
    torch.testing.assert_close(logits(tmp_path / "out"), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_type_to_compute_in_is_not_the_type_that_is_stored(dtype: str, near: Path, tmp_path: Path) -> None:
    file = recipe(near, tmp_path / "r.yml", "e0", dtype="bfloat16", experts_per_token=1)

    (found,) = heal(file, tmp_path / "out", dtype=dtype, **SETTINGS).report.experts

    tensors = load_file(tmp_path / "out" / "model-trained.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert found.kept


def test_nested_experts_are_healed(near: Path, tmp_path: Path) -> None:
    inner = [{"source_model": str(near / name), "name": name, "data": f"{near}/{name}.txt"} for name in ("e0", "e1")]
    experts = [{"name": "both", "experts": inner}, {"source_model": str(near / "base"), "name": "plain"}]
    file = recipe(near, tmp_path / "r.yml", experts=experts)

    found = heal(file, tmp_path / "out", **SETTINGS)

    assert [part.name for part in found.report.kept] == ["both/e0", "both/e1"]
    names = load_file(tmp_path / "out" / "model-trained.safetensors")
    assert {name.split(".model.")[0] for name in names} == {"experts.0.0", "experts.0.1"}
    assert logits(tmp_path / "out").isfinite().all()


def test_a_killed_run_goes_on_after_the_last_finished_expert(
    near: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = recipe(near, tmp_path / "r.yml", "e0", "e1")
    heal(file, tmp_path / "whole", **SETTINGS)
    real, begun = healed_module.heal_expert, []

    def dying(plan: Any, leaf: Any, **keys: Any) -> Any:
        begun.append(leaf.name)
        if begun == ["e0", "e1"]:
            raise KeyboardInterrupt
        return real(plan, leaf, **keys)

    monkeypatch.setattr(healed_module, "heal_expert", dying)
    with pytest.raises(KeyboardInterrupt):
        heal(file, tmp_path / "out", **SETTINGS)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ArtifactError, match="begun from another recipe"):
        heal(file, tmp_path / "out", ridge=0.5, **SETTINGS)
    heal(file, tmp_path / "out", **SETTINGS)

    assert begun == ["e0", "e1", "e1"]
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        file.name for file in (tmp_path / "whole").iterdir()
    }
    for name in ("model-trained.safetensors", "model-routers.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_run_heals_before_it_fits_and_builds(near: Path, tmp_path: Path) -> None:
    keys = {"fit": {"method": "ridge", "tokens": 1024, "block": 32}, "heal": SETTINGS}
    file = recipe(near, tmp_path / "r.yml", "e0", "e1", gate_mode="ridge", **keys)

    found = run(file, tmp_path / "run")

    assert [step.name for step in found.steps] == ["heal", "fit", "build"]
    assert found.steps[0].summary.startswith("2 of 2 experts: held-out loss ")
    healed = load_file(tmp_path / "run" / "work" / "heal" / "model-trained.safetensors")
    built = load_file(tmp_path / "run" / "model" / "model-00001-of-00001.safetensors")
    name = "model.layers.1.{}.weight"
    assert torch.equal(
        healed["experts.1." + name.format("mlp.down_proj")], built[name.format("block_sparse_moe.experts.1.w2")]
    )
    assert not any(step.now for step in run(file, tmp_path / "run").steps)
    model = open_subject(tmp_path / "run" / "model")
    stages = found.artifact.record["stages"]
    assert [stage["stage"] for stage in stages] == ["heal", "fit", "build"]
    card = make_card(model).text
    assert "The down projections of e0, e1 were then refitted to that backbone" in card
    assert "The gates of every layer were fitted" in card
    # fits hold out every tenth block of 32 tokens, healing also the last 24 of 128: what they read is no held-out text
    fitted = [text.fitted for text in _texts({}, [model])]
    assert fitted[0] == fitted[1]
    heal, fit = stages[0]["text"]["e0"]["spans"], stages[1]["fit"]["text"]["e0"]["spans"]
    assert fitted[0] == tuple(dict.fromkeys(map(tuple, heal + fit)))
    assert sum(end - start for start, end in heal) == 94 * 31
    assert sum(end - start for start, end in fit) == 29 * 31


def test_random_routers_of_a_healed_moe_are_not_exported_unasked(near: Path, tmp_path: Path) -> None:
    heal(recipe(near, tmp_path / "r.yml", "e0", "e1"), tmp_path / "out", **SETTINGS)

    refused(
        "export", tmp_path / "out", tmp_path / "gguf", inside=tmp_path, facts=("are random",), hint="--allow-random"
    )


@pytest.mark.parametrize("rank", [None, 8])
def test_the_plan_says_what_healing_adds(near: Path, tmp_path: Path, rank: int | None) -> None:
    settings = SETTINGS | ({"rank": rank} if rank else {})
    file = recipe(near, tmp_path / "r.yml", "e0", "e1", heal=settings)

    planned = json.loads(cli("plan", file, "--json").stdout)["heal"]["bytes"]

    assert planned == heal(file, tmp_path / "out").report.bytes
    assert f"  healed            at most {planned / 2**10:.2f} KiB more virtual" in cli("plan", file).stdout


def test_the_command_shows_the_losses(near: Path, tmp_path: Path) -> None:
    file = recipe(near, tmp_path / "r.yml", "e0", "e1")

    found = cli("heal", file, tmp_path / "out", "--tokens", BLOCK * BLOCKS, "--block", BLOCK, "--json")

    assert found.code == 0, found.stderr
    report = json.loads(found.stdout)
    assert [expert["kept"] for expert in report["experts"]] == [True, True]
    assert report["artifact"] == str(tmp_path / "out")


def test_bad_input_is_one_sentence_and_leaves_nothing(near: Path, tmp_path: Path) -> None:
    file = recipe(near, tmp_path / "r.yml", "e0", "e1")
    out = tmp_path / "out"
    (tmp_path / "short.txt").write_text("abc " * 50)
    without = recipe(near, tmp_path / "without.yml", "e0", "e1", expert={"data": []})
    noisy = recipe(near, tmp_path / "noisy.yml", "e0", "e1", expert={"noise_relative": 0.01})

    with pytest.raises(PlanError, match="'e0' has 6 blocks of 32 tokens, expected at least 8") as short:
        heal(file, out, data={"e0": [tmp_path / "short.txt"]}, **SETTINGS)
    assert "more text" in short.value.hint
    with pytest.raises(PlanError, match="e0, for example, because it has no data"):
        heal(without, out, **SETTINGS)
    with pytest.raises(PlanError, match="e0, for example, because its weights have noise"):
        heal(noisy, out, **SETTINGS)
    with pytest.raises(RecipeError, match="no expert 'e7'"):
        heal(file, out, data={"e7": [tmp_path / "short.txt"]}, **SETTINGS)
    with pytest.raises(RecipeError, match="ridge"):
        heal(file, out, ridge=-1, **SETTINGS)
    assert not list(tmp_path.glob("out*"))


def test_a_built_artifact_without_its_parents_is_refused(near: Path, tmp_path: Path) -> None:
    copy = tmp_path / "e0"
    copy.mkdir()
    for source in (near / "e0").iterdir():
        (copy / source.name).write_bytes(source.read_bytes())
    (tmp_path / "e0.txt").write_text((near / "e0.txt").read_text())
    experts = [{"source_model": "e0", "name": "e0", "data": "e0.txt"}]
    file = recipe(near, tmp_path / "r.yml", experts=experts, experts_per_token=1)
    fm.build(file, tmp_path / "built")
    tensors = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()

    with pytest.raises(ArtifactError, match="was made from 2 weight files, found 1"):
        heal(tmp_path / "built", tmp_path / "out", **SETTINGS)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(ArtifactError, match="changed since"):
        heal(tmp_path / "built", tmp_path / "out", **SETTINGS)
    assert not list(tmp_path.glob("out*"))
