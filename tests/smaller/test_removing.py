"""`remove-expert`: the rest is what it would be without the expert, in both forms, and nothing is written by halves."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file
from smallercases import SIZE, gates, recipe_of, write_texts
from transformers import AutoModelForCausalLM

import frankenmoe as fm
import tiny
from frankenmoe.artifact.folder import ROUTERS, STATISTICS, open_artifact
from frankenmoe.build import run
from frankenmoe.checkpoint.fingerprint import sha256
from frankenmoe.checkpoint.values import materialize
from frankenmoe.errors import ArtifactError, PlanError, SourceError
from frankenmoe.gates.forcing import forced
from frankenmoe.gates.statistics import load_statistics
from frankenmoe.planning.names import named_leaves
from frankenmoe.recipe.train import TrainSettings
from frankenmoe.train.run import train
from refusals import cli, refused

Parents = dict[str, list[Path]]


@pytest.fixture(scope="module")
def place(parents: Parents, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with texts, the fitted virtual artifacts `three` (ridge) and `likely` (logistic); only read."""
    folder = tmp_path_factory.mktemp("smaller")
    write_texts(folder)
    fm.fit(recipe_of(folder / "three.yml", parents["llama"], gate_mode="ridge"), folder / "three", **SIZE)
    fm.fit(recipe_of(folder / "likely.yml", parents["llama"], gate_mode="logistic"), folder / "likely", **SIZE)
    return folder


def hashes(folder: Path) -> dict[str, str]:
    return {file.name: sha256(file) for file in folder.iterdir()}


def same_tensors(one: Path, two: Path, names: dict[str, str]) -> None:
    """Asserts that the backbones of two MoEs are equal, and so are the experts `names` (in one -> in two)."""
    first, second = (fm.open(folder).parts for folder in (one, two))
    assert len(second.backbone) > 1
    for mine, theirs in zip(first.backbone, second.backbone, strict=True):
        assert (materialize(mine) == materialize(theirs)).all(), mine.name
    ours, others = (dict(named_leaves(parts.nodes)) for parts in (first, second))
    assert list(others) == list(names.values())
    for old, new in names.items():
        for mine, theirs in zip(ours[old].folded_writes(), others[new].folded_writes(), strict=True):
            assert (materialize(mine) == materialize(theirs)).all(), mine.name


@pytest.mark.parametrize("method", ["centroid", "lda", "ridge"])
@pytest.mark.parametrize("gone", ["e0", "e1", "e2"])
def test_closed_forms_give_the_gates_of_a_fit_that_never_saw_the_expert(
    method: str, gone: str, parents: Parents, place: Path, tmp_path: Path
) -> None:
    rest = [name for name in ("e0", "e1", "e2") if name != gone]
    fm.fit(
        recipe_of(place / f"{method}{gone}.yml", parents["llama"], rest, gate_mode=method), tmp_path / "never", **SIZE
    )
    removed = fm.remove_expert(place / "three", tmp_path / "less", experts=[gone], method=method)
    assert removed.report["gates"] == method
    less, never = (load_statistics(tmp_path / name / STATISTICS) for name in ("less", "never"))
    assert less.routers[()].texts == never.routers[()].texts
    assert torch.equal(less.routers[()].mean_ULD, never.routers[()].mean_ULD)
    largest = float(never.routers[()].second_LDD.abs().max())
    assert float((less.routers[()].second_LDD - never.routers[()].second_LDD).abs().max()) < 1e-12 * largest
    # one factor for all gates is the scale, which is that of the earlier fit
    factor = load_statistics(place / "three" / STATISTICS).facts["closed_scale"] / never.facts["closed_scale"]
    for name, gate in gates(tmp_path / "never").items():
        assert torch.allclose(
            gates(tmp_path / "less")[name], factor * gate, rtol=0, atol=1e-6 * float(gate.abs().max())
        )


@pytest.mark.parametrize("virtual", [True, False])
def test_what_was_added_and_removed_leaves_the_former_gates(
    virtual: bool, parents: Parents, place: Path, tmp_path: Path
) -> None:
    recipe = recipe_of(place / "two.yml", parents["llama"], ["e0", "e1"], gate_mode="ridge", backbone="average")
    fm.build(recipe, tmp_path / "before", virtual=virtual)
    data = [str(place / "e2.txt")]
    fm.add_expert(tmp_path / "before", tmp_path / "more", source=str(parents["llama"][2]), name="e2", data=data, **SIZE)
    removed = fm.remove_expert(tmp_path / "more", tmp_path / "after", experts=["e2"])
    assert removed.artifact.form == ("virtual" if virtual else "built")
    facts = [load_statistics(tmp_path / name / STATISTICS).facts for name in ("before", "after")]
    assert facts[0]["scale"] == facts[1]["scale"]
    assert facts[0]["method"] == facts[1]["method"] == "ridge"
    for name, gate in gates(tmp_path / "before").items():
        assert torch.allclose(gates(tmp_path / "after")[name], gate, rtol=0, atol=1e-6 * float(gate.abs().max()))
    before, after = (open_artifact(tmp_path / name).record["recipe"] for name in ("before", "after"))
    assert before["backbone"] == after["backbone"] == "average"
    assert [row["name"] for row in after["experts"]] == ["e0", "e1"]
    assert not (tmp_path / "after" / "backbone.safetensors").exists()
    fm.verify(tmp_path / "after")


def test_other_fits_keep_their_rows_and_the_statistics_follow(parents: Parents, place: Path, tmp_path: Path) -> None:
    removed = fm.remove_expert(place / "likely", tmp_path / "less", experts=["1"])
    assert removed.report["gates"] == "kept"
    for name, gate in gates(place / "likely").items():
        assert torch.equal(gates(tmp_path / "less")[name], gate[[0, 2]])
    facts = load_statistics(tmp_path / "less" / STATISTICS).facts
    assert facts["method"] == "logistic"
    assert list(facts["text"]) == ["e0", "e2"]
    words = {"source": str(parents["llama"][1]), "name": "e1", "data": [str(place / "e1.txt")], "method": "ridge"}
    fm.add_expert(tmp_path / "less", tmp_path / "again", **words, **SIZE)
    fm.remove_expert(place / "likely", tmp_path / "ridge", experts=["e1"], method="ridge")
    fm.remove_expert(place / "three", tmp_path / "three", experts=["e1"])
    factor = gates(tmp_path / "ridge"), gates(tmp_path / "three")
    for name in factor[0]:
        one, two = (each[name] / each[name].norm() for each in factor)
        assert torch.allclose(one, two, atol=1e-6)


def test_nothing_else_of_the_model_changes(parents: Parents, place: Path, tmp_path: Path) -> None:
    fm.build(place / "three", tmp_path / "built")
    for form in ("built", "virtual"):
        source = tmp_path / "built" if form == "built" else place / "three"
        made = fm.remove_expert(source, tmp_path / f"less-{form}", experts=["e1"])
        assert made.artifact.record["experts"] == ["e0", "e2"]
        assert [stage["stage"] for stage in made.artifact.record["stages"]][-1] == "remove-expert"
        same_tensors(source, tmp_path / f"less-{form}", {"e0": "e0", "e2": "e2"})
        fm.verify(tmp_path / f"less-{form}")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "less-built").eval()
    ids = tiny.ids()
    with torch.no_grad():
        assert stock.config.num_local_experts == 2
        assert torch.allclose(stock(ids).logits, fm.load(tmp_path / "less-virtual").model(ids).logits, atol=1e-5)


def test_what_the_smaller_recipe_would_compute_otherwise_is_written_out(parents: Parents, tmp_path: Path) -> None:
    layer = "model.layers.1.mlp.up_proj.weight"
    trained = {f"experts.2.{layer}": torch.randn(48, 32), "model.norm.weight": torch.rand(32)}
    save_file(trained, tmp_path / "t.safetensors")
    rows = {"e0": {"noise_scale": 0.1}, "e1": {"noise_relative": 0.1, "residual_scale": 0.7}}
    keys = {"backbone": {"attention": "average", "norms": "average"}, "trained": "t.safetensors"}
    recipe = recipe_of(tmp_path / "r.yml", parents["llama"], data=False, rows=rows, **keys)
    for virtual in (True, False):
        source, less, one = (tmp_path / f"{name}{virtual}" for name in ("moe", "less", "one"))
        fm.build(recipe, source, virtual=virtual)
        fm.remove_expert(source, less, experts=["e0"])
        same_tensors(source, less, {"e1": "e1", "e2": "e2"})
        fm.verify(less)
        fm.remove_expert(less, one, experts=["e1"])  # once more, from what was written out
        same_tensors(source, one, {"e2": "e2"})
        fm.verify(one)


@pytest.mark.parametrize("keys", [{}, {"backbone": "average"}], ids=["clean", "written out"])
def test_a_fault_leaves_no_half_and_the_same_call_goes_on(
    keys: dict[str, object], parents: Parents, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fm.build(recipe_of(tmp_path / "r.yml", parents["llama"], data=False, **keys), tmp_path / "moe")
    before = hashes(tmp_path / "moe")

    def fail(*_: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr("frankenmoe.build.run._prove", fail)
        with pytest.raises(MemoryError):
            fm.remove_expert(tmp_path / "moe", tmp_path / "less", experts=["e0"])
    assert {path.name for path in tmp_path.iterdir()} == {"r.yml", "moe", "less.partial"}
    (shard,) = (tmp_path / "less.partial").glob("model-0*")
    written = shard.stat().st_mtime_ns
    fm.remove_expert(tmp_path / "moe", tmp_path / "less", experts=["e0"])
    assert (tmp_path / "less" / shard.name).stat().st_mtime_ns == written
    assert {path.name for path in tmp_path.iterdir()} == {"r.yml", "moe", "less"}
    assert hashes(tmp_path / "moe") == before
    same_tensors(tmp_path / "moe", tmp_path / "less", {"e1": "e1", "e2": "e2"})
    fm.verify(tmp_path / "less")


def test_another_process_is_refused_and_does_no_harm(
    parents: Parents, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fm.build(recipe_of(tmp_path / "r.yml", parents["llama"], data=False, backbone="average"), tmp_path / "moe")
    write_routers = run._write_routers

    def meanwhile(*given: Any) -> None:
        monkeypatch.undo()
        words = ("remove-expert", tmp_path / "moe", tmp_path / "less", "e0")
        refused(*words, inside=tmp_path, facts=("another process",), hint="wait")
        write_routers(*given)

    monkeypatch.setattr(run, "_write_routers", meanwhile)
    fm.remove_expert(tmp_path / "moe", tmp_path / "less", experts=["e0"])
    assert {path.name for path in tmp_path.iterdir()} == {"r.yml", "moe", "less"}
    same_tensors(tmp_path / "moe", tmp_path / "less", {"e1": "e1", "e2": "e2"})


def test_a_built_artifact_needs_no_sources(parents: Parents, tmp_path: Path) -> None:
    sources = [shutil.copytree(folder, tmp_path / "away" / folder.name) for folder in parents["llama"]]
    fm.build(recipe_of(tmp_path / "r.yml", sources, data=False), tmp_path / "built")
    shutil.rmtree(tmp_path / "away")
    fm.remove_expert(tmp_path / "built", tmp_path / "less", experts=["e1"])
    same_tensors(tmp_path / "built", tmp_path / "less", {"e0": "e0", "e2": "e2"})
    for name, gate in gates(tmp_path / "built").items():
        assert torch.equal(gates(tmp_path / "less")[name], gate[[0, 2]])
    fm.verify(tmp_path / "less")


def test_an_adopted_mixture_and_its_plain_folder(parents: Parents, tmp_path: Path) -> None:
    fm.build(recipe_of(tmp_path / "r.yml", parents["llama"], data=False), tmp_path / "built")
    AutoModelForCausalLM.from_pretrained(tmp_path / "built").save_pretrained(tmp_path / "plain")
    tiny.make_tokenizer().save_pretrained(tmp_path / "plain")
    fm.remove_expert(tmp_path / "plain", tmp_path / "one", experts=["expert-0"])
    fm.adopt(tmp_path / "plain", recipe=tmp_path / "r.yml")
    fm.remove_expert(tmp_path / "plain", tmp_path / "two", experts=["e0"])
    for name, gate in gates(tmp_path / "built").items():
        assert torch.equal(gates(tmp_path / "one")[name], gate[1:])
        assert torch.equal(gates(tmp_path / "two")[name], gate[1:])
    same_tensors(tmp_path / "plain", tmp_path / "two", {"e1": "e1", "e2": "e2"})
    stages = [stage["stage"] for stage in open_artifact(tmp_path / "two").record["stages"]]
    assert stages == ["adopt", "remove-expert"]


def test_a_group_goes_with_its_router_and_the_other_group_keeps_its_own(
    parents: Parents, place: Path, tmp_path: Path
) -> None:
    base, one, two = parents["llama"]

    def group(name: str, *texts: str) -> dict[str, object]:
        inner = [{"source_model": str(one), "name": f"{text}-in", "data": f"{text}.txt"} for text in texts]
        return {
            "name": name,
            "experts": [{**row, "source_model": str(folder)} for row, folder in zip(inner, (one, two), strict=True)],
        }

    experts = [
        group("left", "e0", "e1"),
        group("right", "e1", "e2"),
        {"source_model": str(two), "name": "plain", "data": "e2.txt"},
    ]
    keys = {"experts": experts, "gate_mode": "ridge", "experts_per_token": 1, "backbone": "base"}
    fm.fit(tiny.write_recipe(place / "nested.yml", base, [], **keys), tmp_path / "nested", **SIZE)
    fm.remove_expert(tmp_path / "nested", tmp_path / "less", experts=["left"])
    keys["experts"] = experts[1:]
    fm.fit(tiny.write_recipe(place / "never.yml", base, [], **keys), tmp_path / "never", **SIZE)
    assert gates(tmp_path / "less").keys() == gates(tmp_path / "never").keys()
    for name, gate in gates(tmp_path / "less").items():
        other = gates(tmp_path / "never")[name]
        assert torch.allclose(gate / gate.norm(), other / other.norm(), atol=1e-5), name
    inside = [name for name in gates(tmp_path / "less") if "experts.0" in name]
    assert len(inside) == 2
    for name in inside:
        assert torch.equal(
            gates(tmp_path / "less")[name], gates(tmp_path / "nested")[name.replace("experts.0", "experts.1")]
        )


def test_the_expert_that_stays_alone_is_the_dense_model(parents: Parents, place: Path, tmp_path: Path) -> None:
    outcome = cli("remove-expert", place / "three", tmp_path / "one", "e0", "e2", "--keep-gates")
    assert outcome.code == 0, outcome.stderr
    assert "uses 1 of the experts now, not 2" in outcome.stderr
    assert open_artifact(tmp_path / "one").record["experts_per_token"] == 1
    assert not (tmp_path / "one" / STATISTICS).exists()
    ids, whole = tiny.ids(), fm.load(place / "three").model
    with torch.no_grad(), forced(whole, (1,)):
        assert torch.allclose(fm.load(tmp_path / "one").model(ids).logits, whole(ids).logits, atol=1e-5)


def test_text_that_is_elsewhere_or_other_text(parents: Parents, place: Path, tmp_path: Path) -> None:
    write_texts(tmp_path)
    fm.fit(recipe_of(tmp_path / "r.yml", parents["llama"], gate_mode="ridge"), tmp_path / "moe", **SIZE)
    (tmp_path / "e1.txt").rename(tmp_path / "moved.txt")
    for name in ("e0", "e2"):
        (tmp_path / f"{name}.txt").unlink()  # the others' text is not needed
    with pytest.raises(SourceError, match=r"must leave the routers' statistics.*e1\.txt"):
        fm.remove_expert(tmp_path / "moe", tmp_path / "less", experts=["e1"])
    other = tmp_path / "other.txt"
    other.write_text((tmp_path / "moved.txt").read_text()[::-1])
    with pytest.raises(SourceError, match=r"is not the one.*mean state differs"):
        fm.remove_expert(tmp_path / "moe", tmp_path / "less", experts=["e1"], data={"e1": [other]})
    assert not list(tmp_path.glob("less*"))
    fm.remove_expert(tmp_path / "moe", tmp_path / "less", experts=["e1"], data={"e1": [tmp_path / "moved.txt"]})
    fm.remove_expert(place / "three", tmp_path / "known", experts=["e1"])
    assert (tmp_path / "less" / ROUTERS).read_bytes() == (tmp_path / "known" / ROUTERS).read_bytes()


def test_prompts_leave_the_statistics_too(parents: Parents, tmp_path: Path) -> None:
    def fitted(names: list[str], out: Path, **more: object) -> Path:
        said = {
            "e0": ["ABC DEF", "FED", "A long one that is cut in two, at least"],
            "e1": ["12", "3"],
            "e2": ["xyz", "zz"],
        }
        rows = {name: {"positive_prompts": said[name], **more} for name in names}
        recipe = recipe_of(out.with_suffix(".yml"), parents["llama"], names, data=False, rows=rows, gate_mode="ridge")
        return fm.fit(recipe, out, block=16).artifact.folder

    three, two = fitted(["e0", "e1", "e2"], tmp_path / "three"), fitted(["e1", "e2"], tmp_path / "two")
    fm.remove_expert(three, tmp_path / "less", experts=["e0"])
    for name, gate in gates(tmp_path / "less").items():
        other = gates(two)[name]
        assert torch.allclose(gate / gate.norm(), other / other.norm(), atol=1e-6)
    wary = fitted(["e0", "e1", "e2"], tmp_path / "wary", negative_prompts=["no no no"])
    with pytest.raises(PlanError, match="negative prompts of expert 'e0' were read with all other experts"):
        fm.remove_expert(wary, tmp_path / "no", experts=["e1"])


@pytest.mark.parametrize(
    ("words", "facts", "hint"),
    [
        (["three", "less", "e3"], ("has no expert 'e3'",), "choose one of e0, e1, e2"),
        (["three", "less", "e0", "e1", "2"], ("no expert of three would stay", "expected at least one"), "extract"),
        (["three", "likely", "e0"], ("likely exists and is not empty",), "choose another folder"),
        (["three.yml", "less", "e0"], ("three.yml is a recipe, expected an artifact",), "from the recipe"),
        (["three", "less", "e0", "--method", "regret"], ("expected one of centroid, lda, ridge",), "frankenmoe fit"),
        (["three", "less", "e0", "--method", "ridge", "--keep-gates"], ("--keep-gates keeps them",), "--method out"),
        (["three", "less", "9" * 5000], ("has no expert '999",), "choose one of e0, e1, e2"),
        (["three", "less", "e0", "--keep-gates", "--data", "e0=e0.txt"], ("no text is read",), "leave --data out"),
        (["three", "less", "e0", "--data", "e1=e1.txt"], ("'e1', which is no expert that goes",), "choose one of e0"),
        (["three", "less", "e0", "--data", "e0=none.txt"], ("text of expert 'e0'", "none.txt"), "--keep-gates"),
    ],
)
def test_mistakes_are_refused_and_nothing_is_written(
    words: list[str], facts: tuple[str, ...], hint: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    refused("remove-expert", *words, inside=place, facts=facts, hint=hint)


def test_gates_without_statistics_are_not_refitted(parents: Parents, tmp_path: Path) -> None:
    fm.build(recipe_of(tmp_path / "r.yml", parents["llama"], data=False), tmp_path / "moe", virtual=True)
    with pytest.raises(PlanError, match=STATISTICS):
        fm.remove_expert(tmp_path / "moe", tmp_path / "less", experts=["e1"], method="ridge")
    with pytest.raises(ArtifactError, match="has no expert"):
        fm.remove_expert(tmp_path / "moe", tmp_path / "less", experts=["e"])
    assert fm.remove_expert(tmp_path / "moe", tmp_path / "less", experts=["e1"]).report["gates"] == "kept"
    assert "trained" not in yaml.safe_load((tmp_path / "less" / "recipe.yml").read_text())


def test_adapters_stay_adapters(parents: Parents, tmp_path: Path) -> None:
    """Extracted ones, and those that training has written into the artifact."""
    rows = {name: {"as_adapter": {"rank": 3}} for name in ("e1", "e2")}
    fm.build(recipe_of(tmp_path / "r.yml", parents["llama"], data=False, rows=rows), tmp_path / "moe", virtual=True)
    write_texts(tmp_path)
    data = {name: [str(tmp_path / f"{name}.txt")] for name in ("e1", "e2")}
    settings = {"what": ("adapters",), "steps": 2, "batch": 2, "block": 32, "rank": 2}
    train(tmp_path / "moe", tmp_path / "tuned", data=data, settings=TrainSettings(**settings), keep_anyway=True)
    for source in ("moe", "tuned"):
        out = tmp_path / f"less-{source}"
        fm.remove_expert(tmp_path / source, out, experts=["e1"])
        same_tensors(tmp_path / source, out, {"e0": "e0", "e2": "e2"})
        assert [bool(node.loras[0]) for node in fm.open(out).parts.nodes] == [source == "tuned", True]
        assert {folder.name for folder in out.glob("adapters/*")} == ({"extracted-e2"} if source == "moe" else set())
        fm.verify(out)


def test_routers_with_sigmoid_scores(tmp_path: Path) -> None:
    parents = [tiny.make_parent(tmp_path / f"p{seed}", "phi3", seed=seed) for seed in range(3)]
    write_texts(tmp_path)
    keys = {"gate_mode": "ridge", "architecture": "glm4_moe"}
    fm.fit(recipe_of(tmp_path / "three.yml", parents, **keys), tmp_path / "three", **SIZE)
    fm.fit(recipe_of(tmp_path / "two.yml", parents, ["e0", "e2"], **keys), tmp_path / "two", **SIZE)
    fm.remove_expert(tmp_path / "three", tmp_path / "less", experts=["e1"])
    assert fm.open(tmp_path / "less").plan.rule.score == "sigmoid"
    for name, gate in gates(tmp_path / "less").items():
        other = gates(tmp_path / "two")[name]
        one, two = (each - each.mean(dim=0) for each in (gate, other))
        assert torch.allclose(one / one.norm(), two / two.norm(), atol=1e-6)
        assert torch.allclose(gate.mean(dim=0), other.mean(dim=0), atol=1e-5)  # what lowers the scores
