"""`backbone: auto` and `regmean`: what is measured, chosen, cached and kept in artifacts."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

import backbone_cases
import frankenmoe as fm
import tiny
from frankenmoe.backbone import choose, resolve
from frankenmoe.backbone.measure import Losses
from frankenmoe.cache import cache_folder
from frankenmoe.errors import FrankenMoEError, RecipeError
from frankenmoe.pipeline import run
from frankenmoe.publish.card import make_card
from frankenmoe.subject import open_subject


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, list[Path]]:
    root = tmp_path_factory.mktemp("case")
    return root, *backbone_cases.truth_and_parents(root)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The measurements that were made."""
    seen: list[str] = []
    original = choose.choose

    def counting(*args: object, **keys: object) -> object:
        seen.append("measured")
        return original(*args, **keys)

    monkeypatch.setattr(choose, "choose", counting)
    return seen


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = cache_folder("kernels")
    home = tmp_path / "cache" / "frankenmoe"
    home.mkdir(parents=True)
    (home / "kernels").symlink_to(kernels)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_auto_finds_the_average_where_it_wrote_the_text(
    case: tuple[Path, Path, list[Path]], tmp_path: Path, counted: list[str]
) -> None:
    recipe = backbone_cases.recipe(*case)
    artifact = fm.build(recipe, tmp_path / "out", virtual=True)

    assert artifact.record["recipe"]["backbone"] == "average"
    first, *_ = artifact.record["stages"]
    assert first["stage"] == "backbone"
    assert first["chosen"] == "average"
    means = {each["backbone"]: each["mean"] for each in first["tried"]}
    assert len(means) >= 4
    assert min(means, key=means.__getitem__) == "average"
    for each in first["tried"]:
        assert set(each["held_out_loss"]) == {"a", "b"}
        assert each["behind"] >= 0
        assert each["mean"] == pytest.approx(sum(each["held_out_loss"].values()) / 2)
    assert 0 < first["forward_passes"] < 4

    said = make_card(artifact).text
    assert "It was chosen by the loss on held-out text" in said
    assert f"average {means['average']:.4f}" in said

    # the second time nothing is measured, and all stages see the same plan
    subject = open_subject(recipe)
    assert subject.plan.recipe.backbone_for("attention").method == "average"
    assert counted == ["measured"]
    assert [entry.name for entry in cache_folder(resolve.KIND).iterdir()]


def test_changed_text_is_measured_again_and_no_cache_keeps_nothing(
    case: tuple[Path, Path, list[Path]], tmp_path: Path, counted: list[str]
) -> None:
    root, base, parents = case
    here = tmp_path / "copy"
    here.mkdir()
    for name in "ab":
        shutil.copy(root / f"{name}.txt", here)
    recipe = backbone_cases.recipe(here, base, parents)
    subject = open_subject(recipe, cache=False)
    _ = subject.plan
    assert not cache_folder(resolve.KIND).exists()
    assert open_subject(recipe).plan.measured == subject.plan.measured
    kept = open_subject(recipe)
    _ = kept.plan
    assert len(counted) == 2
    (here / "a.txt").write_text((here / "b.txt").read_text())
    again = open_subject(kept)
    assert again is not kept
    _ = again.plan
    assert len(counted) == 3


def test_a_run_measures_once_and_a_second_run_not_at_all(
    case: tuple[Path, Path, list[Path]], tmp_path: Path, counted: list[str]
) -> None:
    recipe = backbone_cases.recipe(*case, fit={"tokens": 2048}, build={"virtual": True})
    first = run(open_subject(recipe, cache=False), tmp_path / "run")
    again = run(open_subject(recipe, cache=False), tmp_path / "run")

    assert counted == ["measured"]
    assert [step.now for step in first.steps] == [True, True]
    assert [step.now for step in again.steps] == [False, False]
    stages = [stage["stage"] for stage in again.artifact.record["stages"]]
    assert stages == ["backbone", "fit", "build"]


def test_planning_never_measures(case: tuple[Path, Path, list[Path]], counted: list[str]) -> None:
    made = open_subject(backbone_cases.recipe(*case)).planned

    assert made.backbone_open
    assert not counted


def test_regmean_is_the_same_virtual_built_and_in_stock_transformers(
    case: tuple[Path, Path, list[Path]], tmp_path: Path
) -> None:
    recipe = backbone_cases.recipe(*case, backbone="regmean")
    virtual = fm.build(recipe, tmp_path / "virtual", virtual=True)
    built = fm.build(virtual, tmp_path / "built")
    direct = fm.build(recipe, tmp_path / "direct")
    shutil.rmtree(cache_folder(resolve.KIND))  # artifacts have their own copy
    ids = tiny.ids(12)
    stock = AutoModelForCausalLM.from_pretrained(built.folder, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = stock(ids).logits
        for what in (virtual, built, direct):
            assert torch.allclose(fm.load(what.folder).model(ids).logits, expected, atol=1e-5)
    assert (virtual.folder / "backbone.safetensors").is_file()
    assert virtual.record["recipe"]["trained"] == "backbone.safetensors"
    moved = tmp_path / "elsewhere" / "deeper" / "moved"  # its own tensors go with it, its sources stay where they are
    moved.parent.mkdir(parents=True)
    shutil.copytree(virtual.folder, moved)
    (virtual.folder / "backbone.safetensors").unlink()  # the copy has its own
    with torch.no_grad():
        assert torch.allclose(fm.load(moved).model(ids).logits, expected, atol=1e-5)
    shutil.rmtree(virtual.folder)
    with torch.no_grad():
        assert torch.allclose(fm.load(moved).model(ids).logits, expected, atol=1e-5)


def test_regmean_of_equal_parents_is_that_parent(case: tuple[Path, Path, list[Path]], tmp_path: Path) -> None:
    root, base, (parent, _) = case
    moe = fm.load(backbone_cases.recipe(root, base, [parent, parent], backbone="regmean"))
    dense = AutoModelForCausalLM.from_pretrained(parent)
    ids = tiny.ids(12)

    with torch.no_grad():
        assert torch.allclose(moe.model(ids).logits, dense(ids).logits, atol=1e-3)


def test_a_recipe_without_data_is_planned_by_rule(case: tuple[Path, Path, list[Path]], counted: list[str]) -> None:
    root, base, parents = case
    file = backbone_cases.recipe(root, base, parents)
    table = yaml.safe_load(file.read_text())
    for expert in table["experts"]:
        expert["positive_prompts"] = [expert.pop("data")[0][-9:]]
    file.write_text(yaml.safe_dump(table | {"gate_mode": "logistic"}))
    made = open_subject(file).plan

    assert not counted
    assert made.recipe.backbone is not None  # explicit, so that a later version reads the same


def test_too_short_text_leaves_nothing(case: tuple[Path, Path, list[Path]], tmp_path: Path) -> None:
    _, base, parents = case
    here = tmp_path / "short"
    here.mkdir()
    for name in "ab":
        (here / f"{name}.txt").write_text("ab")
    recipe = backbone_cases.recipe(here, base, parents)
    with pytest.raises(FrankenMoEError) as error:
        fm.build(recipe, tmp_path / "out", virtual=True)

    assert error.value.hint
    assert not list(tmp_path.glob("out*"))
    assert not cache_folder(resolve.KIND).exists()


@pytest.mark.parametrize("method", ["regmean", "auto"])
def test_an_expert_without_text_is_named_with_the_method_that_reads_it(
    method: str, case: tuple[Path, Path, list[Path]], tmp_path: Path
) -> None:
    root, base, parents = case
    rows = [{"name": "a", "source_model": str(parents[0]), "data": [str(root / "a.txt")]}]
    rows.append({"name": "b", "source_model": str(parents[1])})
    file = tmp_path / "r.yml"
    file.write_text(json.dumps({"base_model": str(base), "experts": rows, "gate_mode": "random", "backbone": method}))
    with pytest.raises(RecipeError, match=rf"'b' has neither data nor positive_prompts, but backbone: {method} reads"):
        fm.build(file, tmp_path / "out", virtual=True)
    assert not list(tmp_path.glob("out*"))


def test_noise_decides_towards_the_simpler_candidate() -> None:
    one = Losses({"a": (1.0, 2.0, 3.0, 4.0)})
    near = Losses({"a": (1.3, 1.8, 3.2, 3.9)})
    far = Losses({"a": (1.3, 2.3, 3.3, 4.31)})

    assert near.behind(one) == pytest.approx(0.05)
    assert near.behind(one) < near.noise(one)
    assert far.behind(one) > 10 * far.noise(one)
    spread = torch.tensor([0.3, -0.2, 0.2, -0.1]).double()
    assert near.noise(one) == pytest.approx(float(spread.std() / 2))


def test_a_damaged_entry_is_measured_again(case: tuple[Path, Path, list[Path]], counted: list[str]) -> None:
    recipe = backbone_cases.recipe(*case)
    _ = open_subject(recipe).plan
    (entry,) = (each for each in cache_folder(resolve.KIND).iterdir())
    (entry / resolve.RESULT).write_text(json.dumps({"backbone": "base"}))

    assert open_subject(recipe).plan.recipe.backbone_for("attention").method == "average"
    assert len(counted) == 2


def test_backbones_are_measured_on_the_device_that_was_asked_for(
    case: tuple[Path, Path, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[object] = []
    original = choose.load_with_zeros

    def watching(*args: object, **keys: object) -> object:
        seen.append(keys.get("device"))
        return original(*args, **keys)

    monkeypatch.setattr(choose, "load_with_zeros", watching)
    open_subject(backbone_cases.recipe(*case), cache=False).load(device="cpu")

    assert set(seen) == {"cpu"}
