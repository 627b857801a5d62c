"""The audit of recipes and artifacts from end to end: what the report says, where it goes, and what is refused."""

import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

import frankenmoe as fm
import tiny
from frankenmoe.audit.compare import same_text
from frankenmoe.audit.examine import Audit
from frankenmoe.audit.page import page
from frankenmoe.audit.run import _texts, audit, look
from frankenmoe.audit.write import write_report
from frankenmoe.cli.audit import show_audit
from frankenmoe.errors import ArtifactError, FrankenMoEError, NumericsError, RecipeError, SourceError

Parents = dict[str, list[Path]]
Audits = dict[str, Audit]
QUESTIONS = ["moe", "load", "domain", "gate", "survive", "token"]


@pytest.fixture
def own_recipe(recipe: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return Path(shutil.copy(recipe, tmp_path))


@pytest.fixture
def own_artifact(place: Path, tmp_path: Path) -> Path:
    """A copy of the virtual artifact to change."""
    return shutil.copytree(place / "virtual", tmp_path / "out")


def report(what: Any, **keys: Any) -> dict[str, Any]:
    return look(what, **keys).report


def answer(found: dict[str, Any], key: str) -> dict[str, Any]:
    return next(each for each in found["answers"] if each["key"] == key)


def test_six_answers_and_every_layer(audits: Audits) -> None:
    found = audits["r.yml"].report
    assert [each["key"] for each in found["answers"]] == QUESTIONS
    assert all(each["sentence"].endswith(".") for each in found["answers"])
    assert [each["number"] is not None for each in found["answers"]] == [True] * 6
    assert [(facts["layer"], facts["path"]) for facts in found["routers"]] == [(0, ""), (1, "")]
    for facts in found["routers"]:
        assert set(facts["sentences"]) == set(QUESTIONS)
        assert sum(facts["load"]["share"]) == pytest.approx(1, abs=1e-4)
        assert sum(facts["load"]["assignments"]) == 2 * facts["tokens"]
    assert set(found["text"]) == {"e0", "e1", "e2"}


def test_the_report_says_what_it_is_of(place: Path, audits: Audits) -> None:
    of_recipe, of_built = audits["r.yml"].report, audits["built"].report
    for found in (of_recipe, of_built):
        assert (found["kind"], found["version"]) == ("frankenmoe audit", 1)
        assert found["recipe_digest"] == fm.Recipe.load(place / "r.yml").digest
        assert {"frankenmoe", "torch", "transformers", "python"} <= set(found["versions"])
        assert found["recipe"]["name"] == "tiny"
    assert of_recipe["record"] is None
    assert of_built["record"] == json.loads((place / "built" / "frankenmoe.json").read_text())
    assert of_built["subject"]["what"] == "built artifact"


def test_recipe_virtual_and_built_have_the_same_numbers(audits: Audits) -> None:
    one, *others = (each.report["routers"] for each in audits.values())
    for other in others:
        assert [facts["load"]["assignments"] for facts in one] == [facts["load"]["assignments"] for facts in other]
        for left, right in zip(one, other, strict=True):
            assert left["apart"]["pairs"] == right["apart"]["pairs"]
            assert left["apart"]["moved"] == pytest.approx(right["apart"]["moved"], rel=1e-3)


def test_identical_experts_are_told(parents: Parents, tmp_path: Path) -> None:
    base, one, _ = parents["llama"]
    same = report(tiny.write_recipe(tmp_path / "same.yml", base, [base] * 3, prompts=True))
    assert answer(same, "moe")["verdict"] == "no"
    assert "computes its base exactly" in answer(same, "moe")["sentence"]
    assert same["outputs"]["base"]["computes_base"]
    other = report(tiny.write_recipe(tmp_path / "other.yml", base, [one] * 3, prompts=True))
    assert "one dense model" in answer(other, "moe")["sentence"]
    assert not other["outputs"]["base"]["computes_base"]
    part = report(tiny.write_recipe(tmp_path / "part.yml", base, [one, base, one], prompts=True))
    assert part["identical_experts"] == [["e0", "e2"]]
    assert "e0 = e2" in answer(part, "moe")["sentence"]


def test_a_dead_expert_is_listed(own_artifact: Path) -> None:
    _set_gates(own_artifact, lambda gate: gate * 0 + _towards_first_two(gate))
    found = report(own_artifact)
    for facts in found["routers"]:
        assert len(facts["load"]["dead"]) >= 1
        assert facts["gate"]["condition"] is None
        assert facts["gate"]["degenerate"]
    assert answer(found, "load")["level"] == answer(found, "survive")["level"] == "bad"
    assert "imatrix, GPTQ and AWQ would find no data" in answer(found, "survive")["sentence"]
    assert "infinite in every layer" in answer(found, "gate")["sentence"]
    json.dumps(found, allow_nan=False)
    shown = io.StringIO()
    show_audit(found, Console(width=80, file=shown))
    assert "dead in layer 1: e2" in shown.getvalue()


def _towards_first_two(gate: Any) -> Any:
    import torch

    rows = torch.zeros_like(gate)
    rows[:, 0] = 1.0  # all rows the same: the first two by number win every tie
    return rows


def _set_gates(folder: Path, change: Any) -> None:
    from safetensors.torch import load_file, save_file

    file = folder / "model-routers.safetensors"
    save_file({name: change(gate).contiguous() for name, gate in load_file(file).items()}, file, {"format": "pt"})


def test_a_router_that_gives_no_numbers_is_an_error(own_artifact: Path) -> None:
    _set_gates(own_artifact, lambda gate: gate * 0 + 3e38)  # finite, but not what it makes of a hidden state
    with pytest.raises(NumericsError, match="router of layer 0"):
        look(own_artifact)


def test_labels_follow_the_text(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abc " * 100)
    (tmp_path / "b.txt").write_text("XYZ " * 100)
    found = report(recipe, data=[("e1", str(tmp_path / "a.txt")), ("e2", str(tmp_path / "b.txt"))])
    domains = found["routers"][0]["domains"]
    assert domains["first"].keys() == {"e1", "e2"}
    assert [found["text"][name]["own_expert"] for name in ("e1", "e2")] == [1, 2]
    total = sum(domains["first"]["e1"])
    assert domains["own_first"]["e1"] == pytest.approx(domains["first"]["e1"][1] / total, abs=1e-4)
    assert found["text"]["e1"]["origin"] == [str(tmp_path / "a.txt")]


def test_text_without_a_label_asks_nothing_of_domains(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abc " * 100)
    found = report(recipe, data=[(None, str(tmp_path / "a.txt"))])
    assert answer(found, "domain")["verdict"] == "no labels"
    assert found["routers"][0]["domains"] is None


def test_the_recipes_own_data_come_before_its_prompts(own_recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_text("own text " * 50)
    text = yaml.safe_load(own_recipe.read_text())
    text["experts"][1]["data"] = ["own.txt"]
    own_recipe.write_text(yaml.safe_dump(text))
    found = report(own_recipe)
    assert {name: part["origin"] for name, part in found["text"].items()} == {"e1": ["own.txt"]}


def test_limit_is_per_domain(recipe: Path) -> None:
    assert {part["tokens"] for part in report(recipe, tokens=5)["text"].values()} == {5}


def test_a_prompt_is_shown_token_by_token(recipe: Path) -> None:
    (passage,) = report(recipe, prompt="More")["passages"]
    assert passage["tokens"] == ["<s>", "M", "o", "r", "e"]
    assert len(passage["layers"]) == 2
    assert len(passage["layers"][0]["experts"]) == 5


def test_a_prompt_longer_than_the_model_sees_goes_in_windows(recipe: Path) -> None:
    (passage,) = report(recipe, prompt="x" * 200)["passages"]  # the tiny model sees 64
    assert len(passage["tokens"]) == len(passage["layers"][0]["experts"]) == 201


def test_nested_and_shared_experts(parents: Parents, tmp_path: Path) -> None:
    base, one, two = parents["qwen2"]
    inner = [{"source_model": str(each), "name": each.name, "positive_prompts": [each.name * 5]} for each in (one, two)]
    recipe = tiny.write_recipe(
        tmp_path / "r.yml", base, [base], prompts=True, experts_per_token=1,
        shared_experts=[{"source_model": str(one), "name": "always"}],
    )  # fmt: skip
    data = yaml.safe_load(recipe.read_text())
    data["experts"].append({"name": "inner", "experts": inner})
    recipe.write_text(yaml.safe_dump(data))
    found = report(recipe)
    assert [(facts["layer"], facts["path"]) for facts in found["routers"]] == [(0, ""), (0, "1"), (1, ""), (1, "1")]
    assert found["routers"][0]["apart"]["paths"] == ["0", "1.0", "1.1"]
    assert found["model"]["paths"]["1.1"] == f"inner/{two.name}"
    assert found["model"]["shared_expert"]
    assert found["model"]["nested_routers"] == 2
    assert found["routers"][1]["domains"] is None
    assert found["routers"][1]["apart"] is None


def test_one_expert_alone(parents: Parents, tmp_path: Path) -> None:
    base, one, _ = parents["llama"]
    found = look(tiny.write_recipe(tmp_path / "r.yml", base, [one], prompts=True, experts_per_token=1))
    assert answer(found.report, "moe")["verdict"] == "no choice"
    assert answer(found.report, "gate")["number"] is None
    write_report([found], tmp_path / "out")


def test_a_built_artifact_without_its_sources(parents: Parents, tmp_path: Path) -> None:
    folders = [shutil.copytree(folder, tmp_path / folder.name) for folder in parents["llama"]]
    recipe = tiny.write_recipe(tmp_path / "r.yml", folders[0], folders, prompts=True)
    built = fm.build(recipe, tmp_path / "out")
    for folder in folders:
        shutil.rmtree(folder)
    found = report(built.folder)
    assert not found["model"]["sources_at_hand"]
    assert found["outputs"]["base"] is None
    assert found["routers"][0]["apart"]["reference"] == "mean"
    assert "norm of the experts' mean" in answer(found, "moe")["sentence"]


@pytest.mark.usefixtures("no_page")
def test_a_report_that_is_there_is_kept(recipe: Path, audits: Audits, tmp_path: Path) -> None:
    first = audit(recipe, out=tmp_path / "reports")
    second = write_report([audits["r.yml"]], tmp_path / "reports")
    assert (first.name, second.name) == ("audit-tiny", "audit-tiny-2")
    assert sorted(file.name for file in first.iterdir()) == ["audit.html", "audit.json"]
    assert json.loads((second / "audit.json").read_text())["kind"] == "frankenmoe audit"
    assert sorted(path.name for path in (tmp_path / "reports").iterdir()) == ["audit-tiny", "audit-tiny-2"]


def test_two_reports_side_by_side(own_artifact: Path, audits: Audits, tmp_path: Path) -> None:
    _set_gates(own_artifact, lambda gate: gate * 3)
    folder = write_report([audits["virtual"], look(own_artifact)], tmp_path / "reports")
    found = json.loads((folder / "audit.json").read_text())
    assert found["kind"] == "frankenmoe audit of two"
    assert found["difference"]["same_recipe"]
    assert found["difference"]["same_text"]
    for layer, left, right in zip(
        found["difference"]["layers"], *(each["routers"] for each in found["audits"]), strict=True
    ):
        first, second, change = layer["entropy_share"]
        assert (first, second) == (left["load"]["entropy_share"], right["load"]["entropy_share"])
        assert change == pytest.approx(second - first, abs=1e-4)
        assert second < first  # sharper gates
    assert "From the first to the second" in (folder / "audit.html").read_text()


def test_the_same_text_is_known_by_its_tokens(recipe: Path, audits: Audits, tmp_path: Path) -> None:
    for folder, words in (("a", "hello "), ("b", "hello "), ("c", "other ")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "text.txt").write_text(words * 50)
    one, two, other = (report(recipe, data=[("e1", str(tmp_path / each / "text.txt"))]) for each in "abc")
    assert same_text(one, two)
    assert not same_text(one, other)
    assert "read different text" in page([audits["r.yml"], look(recipe, prompt="x", tokens=3)])


def test_an_expert_called_text_keeps_its_own(parents: Parents, tmp_path: Path) -> None:
    base, one, _ = parents["llama"]
    recipe = tiny.write_recipe(tmp_path / "r.yml", base, [base, one], prompts=True)
    recipe.write_text(recipe.read_text().replace("name: e1", "name: text"))
    (tmp_path / "a.txt").write_text("abc " * 30)
    found = report(recipe, data=[("text", str(tmp_path / "a.txt")), (None, str(tmp_path / "a.txt"))])["text"]
    assert {name: part["own_expert"] for name, part in found.items()} == {"text": 1, "text without a label": None}


def test_a_character_of_several_tokens_stands_at_its_last() -> None:
    class Bytes:
        def decode(self, tokens: list[int]) -> str:
            return bytes(tokens).decode(errors="replace")

    def texts(text: bytes) -> list[str]:
        return list(_texts(Bytes(), text))

    assert texts("né日!".encode()) == ["n", "…", "é", "…", "…", "日", "!"]
    assert texts("👩".encode()) == ["…", "…", "…", "👩"]
    assert texts(b"\xe2x") == ["…", "x"]  # a character that never ends
    assert texts(b"\xff\xff\xff\xff!") == ["…", "…", "…", "\ufffd", "!"]


# what a person may get wrong


def test_a_label_that_names_no_expert_gets_the_nearest(recipe: Path) -> None:
    with pytest.raises(RecipeError, match=r"E1=a\.txt names an unknown expert, expected one of e0, e1, e2") as caught:
        look(recipe, data=[("E1", "a.txt")])
    assert caught.value.hint == "did you mean 'e1'?"


def _empty(file: Path) -> str:
    file.write_text("  \n")
    return str(file)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (lambda folder: {"data": [("e1", _empty(folder / "empty.txt"))]}, "holds no text"),
        (lambda folder: {"data": [("e1", str(folder / "missing.txt"))]}, "does not exist"),
        (lambda folder: {"prompt": ""}, "prompt must not be empty"),
    ],
)
def test_text_without_tokens(keys: Any, words: str, recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(FrankenMoEError, match=words):
        look(recipe, **keys(tmp_path))


def test_a_recipe_without_any_text(parents: Parents, tmp_path: Path) -> None:
    base, one, two = parents["llama"]
    with pytest.raises(SourceError, match="neither data nor prompts") as caught:
        look(tiny.write_recipe(tmp_path / "r.yml", base, [one, two]))
    assert "--data EXPERT=FILE" in str(caught.value.hint)


def test_a_dense_model_and_an_artifact_without_routers(own_artifact: Path, parents: Parents) -> None:
    with pytest.raises(ArtifactError, match=r"holds no frankenmoe\.json"):
        look(parents["llama"][0])
    (own_artifact / "model-routers.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"has lost its model-routers\.safetensors"):
        look(own_artifact)


@pytest.mark.usefixtures("no_page")
def test_a_place_where_nothing_can_be_written(audits: Audits, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(FrankenMoEError, match="report cannot be written"):
        write_report([audits["r.yml"]], tmp_path / "file" / "reports")


def test_a_bad_place_is_told_before_anything_is_computed(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("frankenmoe.subject.Subject.load", lambda *_, **__: pytest.fail("loaded"))
    (tmp_path / "file").write_text("in the way")
    for out in ("file", "file/reports"):
        with pytest.raises(ArtifactError, match=r"file is not a folder"):
            audit(recipe, out=tmp_path / out)
    with pytest.raises(SourceError, match="does not exist"):
        look(recipe, data=[(None, "a" * 5000)])  # longer than a disk lets a name be


@pytest.mark.usefixtures("no_page")
def test_ctrl_c_while_writing_leaves_nothing(audits: Audits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("frankenmoe.audit.write.write_atomic", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_report([audits["r.yml"]], tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_recipe_whose_name_is_no_text(own_recipe: Path, tmp_path: Path) -> None:
    odd = own_recipe.rename(own_recipe.with_name(os.fsdecode(b"caf\xe9.yml")))
    folder = audit(odd, out=tmp_path / "out")
    assert json.loads((folder / "audit.json").read_text())["subject"]["path"] == str(odd)
    assert "caf\\udce9.yml" in (folder / "audit.html").read_text()


def test_names_cannot_leave_the_folder_or_the_page(own_recipe: Path, tmp_path: Path) -> None:
    data = yaml.safe_load(own_recipe.read_text())
    data["name"] = "../<script>alert(1)</script>"
    data["experts"][0]["name"] = "</script><img src=x>"
    own_recipe.write_text(yaml.safe_dump(data))
    folder = write_report([look(own_recipe, prompt="a</script>b")], tmp_path / "reports")
    assert folder.parent == tmp_path / "reports"
    html = (folder / "audit.html").read_text()
    assert html.count("</script>") == 2
    assert "<script>alert" not in html
    assert "<img" not in html
