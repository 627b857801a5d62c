"""`prune`: the ranking against a loop by hand, known answers, the loss that is measured, and the guard."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from smallercases import SIZE, gates, recipe_of, write_texts
from transformers import AutoModelForCausalLM

import frankenmoe as fm
import tiny
from frankenmoe.artifact.folder import ROUTERS, open_artifact
from frankenmoe.data.blocks import Block
from frankenmoe.gates.states import mean_loss
from frankenmoe.gates.texts import data_text
from frankenmoe.moe.trace import outer_blocks, stream
from frankenmoe.progress import SILENT
from frankenmoe.smaller.saliency import saliency
from frankenmoe.subject import Subject
from refusals import cli, refused

Parents = dict[str, list[Path]]
PRUNE = {"tokens": 512, "block": 32}
LAYERS = [f"model.layers.{layer}.block_sparse_moe.gate.weight" for layer in range(2)]


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """The folder of a test, with a text for each expert."""
    write_texts(tmp_path)
    return tmp_path


def test_the_ranking_is_that_of_a_loop_over_tokens(parents: Parents, tmp_path: Path) -> None:
    moe = fm.load(recipe_of(tmp_path / "r.yml", parents["llama"], data=False))
    rows = [tiny.ids(length, batch=1, seed=length)[0].tolist() for length in (5, 9, 12)]
    found = saliency(moe, [Block(tuple(row), (True,) * len(row)) for row in rows], progress=SILENT)
    sums, counts = torch.zeros(2, 3, dtype=torch.float64), torch.zeros(2, 3, dtype=torch.int64)
    for row in rows:  # one text at a time, without padding
        states: dict[int, torch.Tensor] = {}
        with torch.no_grad(), stream(moe.model, lambda trace, hidden, into=states: into.update({trace.layer: hidden})):
            moe.model(torch.tensor([row]))
        with torch.no_grad():
            for layer, block in outer_blocks(moe.model).items():
                for state in states[layer]:
                    weights, ids, _ = block.router(state[None])
                    for weight, expert in zip(weights[0].tolist(), ids[0].tolist(), strict=True):
                        sums[layer, expert] += weight * float(block.experts[expert](state[None]).norm())
                        counts[layer, expert] += 1
    assert torch.equal(found.tokens_LE, counts)
    assert int(counts.sum()) == 2 * 2 * 26
    assert torch.allclose(found.reap_LE, sums / counts.clamp(min=1), rtol=1e-5)


def test_a_copy_of_another_expert_goes_first(parents: Parents, texts: Path) -> None:
    base, one, two = parents["llama"]
    rows = {"e1": {"source_model": str(one)}, "e2": {"source_model": str(two)}, "e0": {"source_model": str(one)}}
    fm.build(recipe_of(texts / "r.yml", [base, one, two], rows=rows), texts / "moe", virtual=True)
    report = fm.prune(texts / "moe", experts=2, **PRUNE).report
    first, twin = report["ranking"][0], report["ranking"][0]["copy_of"]
    assert {first["expert"], twin} == {"e0", "e1"}
    assert report["removed"] == [first["expert"]]
    shares = {row["expert"]: row["saliency"] for row in report["ranking"]}
    assert shares[first["expert"]] <= shares[twin]
    assert sum(shares.values()) == pytest.approx(1)
    again = fm.prune(texts / "moe", experts=1, **PRUNE).report["ranking"]
    assert [row["expert"] for row in again] == [row["expert"] for row in report["ranking"]]


@pytest.mark.parametrize("virtual", [True, False])
def test_a_dead_expert_costs_nothing(virtual: bool, parents: Parents, texts: Path) -> None:
    row = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    # of l, l / 2 and -l the second is never the largest
    save_file(
        {name: torch.stack([row[at], row[at] / 2, -row[at]]) for at, name in enumerate(LAYERS)}, texts / "g.safetensors"
    )
    recipe = recipe_of(texts / "r.yml", parents["llama"], routers="g.safetensors", experts_per_token=1)
    fm.build(recipe, texts / "moe", virtual=virtual)
    made = fm.prune(texts / "moe", texts / "less", experts=2, rise=0.0, **PRUNE)
    assert made.report["removed"] == ["e1"]
    assert made.report["rise"] == 0
    assert made.report["ranking"][0] | {"saliency": 0, "load": 0} == made.report["ranking"][0]
    assert made.report["held_out_loss"]["before"] == made.report["held_out_loss"]["after"]
    ids = tiny.ids()
    with torch.no_grad():
        one, two = (fm.load(texts / name).model(ids).logits for name in ("moe", "less"))
    assert torch.equal(one, two)


@pytest.mark.parametrize("gate_mode", ["ridge", "logistic", "random"])
def test_the_loss_is_that_of_what_is_written(gate_mode: str, parents: Parents, texts: Path) -> None:
    recipe = recipe_of(texts / "r.yml", parents["llama"], gate_mode=gate_mode, fit=SIZE)
    fm.build(recipe, texts / "moe", virtual=True)
    made = fm.prune(texts / "moe", texts / "less", experts=2, keep_anyway=True, **PRUNE)
    assert made.report["gates"] == ("ridge" if gate_mode == "ridge" else "kept")
    stage = open_artifact(texts / "less").record["stages"][-1]
    assert stage["stage"] == "prune"
    assert stage["held_out_loss"] == made.report["held_out_loss"]
    moe = fm.load(texts / "less")
    for name, loss in made.report["held_out_loss"]["after"].items():
        text = data_text(name, (), (f"{name}.txt",), moe.tokenizer(), texts, 512, 32)
        assert mean_loss(moe.model, text.held) == pytest.approx(loss, abs=1e-5)
    assert gates(texts / "less").keys() == gates(texts / "moe").keys()
    fm.verify(texts / "less")
    assert cli("card", texts / "less").code == 0
    card = (texts / "less" / "README.md").read_text()
    assert f"Then the experts {made.report['removed'][0]} were taken out" in card


def test_an_adopted_mixture_on_text_without_a_label(parents: Parents, texts: Path) -> None:
    fm.build(recipe_of(texts / "r.yml", parents["llama"], data=False), texts / "built")
    AutoModelForCausalLM.from_pretrained(texts / "built").save_pretrained(texts / "plain")
    tiny.make_tokenizer().save_pretrained(texts / "plain")
    fm.adopt(texts / "plain")
    words = ["--data", texts / "e0.txt", "--data", texts / "e1.txt", "--tokens", 512, "--block", 32, "--json"]
    outcome = cli("prune", texts / "plain", texts / "less", "--experts", 2, *words, "--keep-anyway")
    assert outcome.code == 0, outcome.stderr
    said = json.loads(outcome.stdout)
    assert list(said["held_out_loss"]["after"]) == ["text"]
    stay = [int(name.removeprefix("expert-")) for name in said["experts"]]
    for name, gate in gates(texts / "plain").items():
        assert torch.equal(gates(texts / "less")[name], gate[stay])
    built = fm.build(texts / "less", texts / "less-built").folder
    stock, ids = AutoModelForCausalLM.from_pretrained(built).eval(), tiny.ids()
    with torch.no_grad():
        assert torch.allclose(stock(ids).logits, fm.load(texts / "less").model(ids).logits, atol=1e-5)


@pytest.mark.parametrize("form", ["virtual", "built", "adopted"])
def test_layers_keep_experts_of_their_own(form: str, parents: Parents, texts: Path) -> None:
    row = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    half, whole, minus = (row * factor for factor in (0.5, 1, -1))
    # the expert of the half is never chosen: e1 in the first layer, e2 in the second
    rows = [torch.stack([whole[0], half[0], minus[0]]), torch.stack([minus[1], whole[1], half[1]])]
    save_file(dict(zip(LAYERS, rows, strict=True)), texts / "g.safetensors")
    recipe = recipe_of(texts / "r.yml", parents["llama"], routers="g.safetensors", experts_per_token=1)
    fm.build(recipe, texts / "moe", virtual=form == "virtual")
    if form == "adopted":
        AutoModelForCausalLM.from_pretrained(texts / "moe").save_pretrained(texts / "plain")
        tiny.make_tokenizer().save_pretrained(texts / "plain")
        fm.adopt(texts / "plain", recipe=texts / "r.yml")
    source = texts / ("plain" if form == "adopted" else "moe")
    made = fm.prune(source, texts / "less", experts=2, rise=0.0, per_layer=True, **PRUNE)
    assert made.report["by_layer"] == [["e0", "e2"], ["e0", "e1"]]
    assert made.report["experts"] == ["e0", "expert-1"]
    assert [row["goes"] for row in sorted(made.report["ranking"], key=lambda row: row["expert"])] == [0, 1, 1]
    assert made.report["removed"] == []
    assert made.report["rise"] == 0
    assert json.loads((texts / "less" / "prune.json").read_text())["by_layer"] == made.report["by_layer"]
    ids = tiny.ids()
    stock = AutoModelForCausalLM.from_pretrained(texts / "less").eval()
    with torch.no_grad():
        before, after, theirs = (
            model(ids).logits for model in (*(fm.load(x).model for x in (source, texts / "less")), stock)
        )
    assert torch.equal(before, after)
    assert torch.allclose(before, theirs, atol=1e-5)
    fm.verify(texts / "less")
    assert fm.prune(source, experts=2, **PRUNE).report["rise"] != 0


def test_only_a_standard_checkpoint_has_layers_of_its_own(parents: Parents, texts: Path) -> None:
    base, one, two = parents["gpt_neox"]
    fm.build(recipe_of(texts / "r.yml", [base, one, two]), texts / "moe", virtual=True)
    words = ["--experts", 2, "--tokens", 512, "--block", 32, "--per-layer"]
    refused("prune", texts / "moe", texts / "less", *words, inside=texts, facts=("cannot be one",), hint="--per-layer")
    said = ("--method ridge fits one row per expert",)
    refused(
        "prune", texts / "moe", texts / "less", *words, "--method", "ridge", inside=texts, facts=said, hint="leave one"
    )


def test_a_loss_that_rises_too_much_is_reported_and_nothing_is_written(parents: Parents, texts: Path) -> None:
    fm.build(recipe_of(texts / "r.yml", parents["llama"]), texts / "moe", virtual=True)
    words = ["--experts", 1, "--tokens", 512, "--block", 32]
    rise = json.loads(cli("prune", texts / "moe", *words, "--json").stdout)["rise"]
    assert rise > 0.01
    refused(
        *("prune", texts / "moe", texts / "less", *words, "--rise", rise - 0.005),
        inside=texts,
        facts=("the mean held-out loss rises by", "expected at most", "was not written"),
        hint="allow more with --rise",
    )
    outcome = cli("prune", texts / "moe", texts / "less", *words, "--rise", rise + 0.005)
    assert outcome.code == 0, outcome.stderr
    assert "uses 1 of the experts now, not 2" in outcome.stderr
    lines = outcome.stdout.splitlines()
    assert lines[0].split() == ["expert", "share", "of", "output", "load"]
    assert [line.split()[-1] for line in lines[1:4]] == ["goes", "goes", lines[3].split()[-1]]
    assert (texts / "less" / ROUTERS).is_file()


def test_without_a_folder_nothing_is_written(parents: Parents, texts: Path) -> None:
    fm.build(recipe_of(texts / "r.yml", parents["llama"]), texts / "moe", virtual=True)
    before = sorted(texts.iterdir())
    outcome = cli("prune", texts / "moe", "--experts", 2, "--tokens", 512, "--block", 32)
    assert outcome.code == 0, outcome.stderr
    assert "nothing was written: name a folder OUT" in outcome.stdout
    assert sorted(texts.iterdir()) == before


@pytest.mark.parametrize(
    ("words", "facts", "hint"),
    [
        (["--experts", 3], ("--experts is 3", "fewer than moe has (3)"), "that stay"),
        (["--experts", 2, "--data", "e9=e0.txt"], ("names an unknown expert",), "choose one of e0, e1, e2"),
        (["--experts", 2], ("neither data nor prompts",), "--data EXPERT=FILE"),
        (["--experts", 2, "--data", "none.txt"], ("none.txt",), "path"),
    ],
)
def test_mistakes_are_refused(
    words: list[object], facts: tuple[str, ...], hint: str, parents: Parents, texts: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(texts)
    fm.build(recipe_of(texts / "r.yml", parents["llama"], data=False), texts / "moe", virtual=True)
    refused("prune", "moe", "less", *words, inside=texts, facts=facts, hint=hint)


def test_one_expert_must_stay(parents: Parents, texts: Path) -> None:
    recipe = recipe_of(texts / "one.yml", parents["llama"], ["e1"], experts_per_token=1)
    out = fm.build(recipe, texts / "one", virtual=True).folder
    refused("prune", out, "--experts", 1, inside=texts, facts=("fewer than", "has (1)"), hint="there is only one")


def test_what_cannot_work_is_refused_before_the_text_is_read(
    parents: Parents, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = {"e0": {"negative_prompts": ["no no no"]}}
    fm.build(recipe_of(texts / "r.yml", parents["llama"], rows=rows, gate_mode="ridge", fit=SIZE), texts / "moe")
    monkeypatch.setattr(Subject, "load", lambda *given, **more: pytest.fail("the model was loaded"))
    words = ("prune", texts / "moe", texts / "less", "--experts", 2)
    refused(*words, inside=texts, facts=("negative prompts of expert 'e0'",), hint="--keep-gates")


def test_the_text_of_the_fit_that_is_elsewhere(parents: Parents, texts: Path) -> None:
    fm.fit(recipe_of(texts / "r.yml", parents["llama"], gate_mode="ridge"), texts / "moe", **SIZE)
    data = []
    for name in ("e0", "e1", "e2"):
        (texts / f"{name}.txt").rename(texts / f"{name}-moved.txt")
        data += ["--data", f"{name}={texts / name}-moved.txt"]
    words = ("prune", texts / "moe", texts / "less", "--experts", 2, "--tokens", 512, "--block", 32, *data)
    refused(*words, inside=texts, facts=("must leave the routers' statistics",), hint="`frankenmoe remove-expert`")
