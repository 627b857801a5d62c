"""A run keeps its best state, refuses what cannot learn, and goes on where it was killed, to the same losses."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import corpus
import pytest
import torch
from dying import run_apart
from pydantic import ValidationError

import forks
import frankenmoe as fm
import tiny
from frankenmoe.errors import ArtifactError, NumericsError, PlanError, SourceError
from frankenmoe.moe.router import Router
from frankenmoe.recipe.train import TrainSettings
from frankenmoe.train import checkpoint
from frankenmoe.train import losses as losses_module
from frankenmoe.train.loop import Run, RunResult, train_loop
from frankenmoe.train.routing import LearningRouter
from frankenmoe.train.run import train
from refusals import cli

Parents = dict[str, list[Path]]


def losses(out: Path) -> list[float]:
    return json.loads((out / "training.json").read_text())["losses"]


@pytest.fixture(scope="module")
def artifact(parents: Parents, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual artifact over two llamas."""
    folder = tmp_path_factory.mktemp("virtual")
    return fm.build(corpus.recipe(folder, parents["llama"]), folder / "moe", virtual=True).folder


@pytest.fixture
def virtual(artifact: Path, tmp_path: Path) -> Path:
    """The virtual artifact, with text in `tmp_path`."""
    corpus.write_texts(tmp_path)
    return artifact


def data(folder: Path) -> dict[str, list[str]]:
    return {name: [str(folder / f"{name}.txt")] for name in corpus.WORDS}


@pytest.mark.parametrize("die", [pytest.param(1, marks=pytest.mark.slow), 5])
def test_killed_at_a_step_the_same_command_ends_with_the_same_losses(die: int, virtual: Path, tmp_path: Path) -> None:
    settings = corpus.settings(what="routers,adapters", noise=0.1, balance=0.01, save_every=2, steps=7)

    def child(at: int | None) -> int:
        return run_apart(virtual, tmp_path / "killed", data=data(tmp_path), settings=settings, die=at)

    assert child(die) == -signal.SIGKILL
    assert not (tmp_path / "killed").exists()
    assert (checkpoint.last_checkpoint(tmp_path / "killed.partial") is not None) == (die > 1)
    assert child(None) == 0
    whole = train(virtual, tmp_path / "whole", data=data(tmp_path), settings=settings)
    assert losses(tmp_path / "killed") == whole.report["losses"]
    for name in ("model-routers.safetensors", "adapters/e1/adapter_model.safetensors"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_the_best_look_is_kept(virtual: Path, tmp_path: Path) -> None:
    """A rate that ruins the routers after a good start: what is written is the good start."""
    settings = corpus.settings(steps=12, guard_every=2, router_rate=0.03, warmup=0)
    found = train(virtual, tmp_path / "out", data=data(tmp_path), settings=settings)
    looks = {look["step"]: look["mean"] for look in found.report["looks"]}
    assert set(looks) == {0, 2, 4, 6, 8, 10, 12}
    assert looks[found.report["best_step"]] == min(looks.values()) == found.report["mean_held_out_loss"]["best"]
    short = corpus.settings(steps=1)
    again = train(tmp_path / "out", tmp_path / "again", data=data(tmp_path), settings=short, keep_anyway=True)
    assert again.report["looks"][0]["mean"] == pytest.approx(min(looks.values()), abs=1e-6)
    look = found.report["looks"][0]
    assert all(sum(layer) == pytest.approx(1) for layer in look["load"])
    assert all(0 <= entropy <= 0.6932 for entropy in look["entropy"])


def test_a_run_that_helps_nothing_writes_nothing_unless_told_to(virtual: Path, tmp_path: Path) -> None:
    settings = corpus.settings(what="norms", rate=3.0, warmup=0, steps=3, guard_every=1)
    with pytest.raises(PlanError, match=r"training made the model worse: mean held-out loss .* on e[01]") as told:
        train(virtual, tmp_path / "out", data=data(tmp_path), settings=settings)
    assert "--keep-anyway" in str(told.value)
    assert "out.partial holds the run" in str(told.value)
    assert not (tmp_path / "out").exists()
    kept = train(virtual, tmp_path / "out", data=data(tmp_path), settings=settings, keep_anyway=True)
    assert kept.report["improved"] is False
    assert kept.report["mean_held_out_loss"]["after"] > kept.report["mean_held_out_loss"]["before"]
    assert (
        float(
            (
                corpus.logits(fm.load(virtual).model, tiny.ids())
                - corpus.logits(fm.load(tmp_path / "out").model, tiny.ids())
            )
            .abs()
            .max()
        )
        > 0.1
    )


def poisoned(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """The loss of that step, counted from 0, is no number."""
    plain, calls = losses_module.next_token, []

    def nan_at_step(logits_TV: torch.Tensor, targets_T: torch.Tensor) -> torch.Tensor:
        calls.append(logits_TV.requires_grad)  # the guard's looks need no gradient, a check before the first step does
        bad = logits_TV.requires_grad and sum(calls) == step + 2
        return plain(logits_TV, targets_T) * (float("nan") if bad else 1)

    monkeypatch.setattr(losses_module, "next_token", nan_at_step)


def test_nan_stops_and_keeps_the_best_state_before_it(
    virtual: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poisoned(monkeypatch, 4)
    with pytest.raises(NumericsError, match=r"the loss is nan at step 5.*has the best earlier state, of step 3"):
        train(virtual, tmp_path / "out", data=data(tmp_path), settings=corpus.settings())
    report = json.loads((tmp_path / "out/training.json").read_text())
    assert (report["steps"], report["best_step"], len(report["losses"])) == (4, 3, 4)
    fm.verify(tmp_path / "out")


def test_nan_before_anything_was_better_writes_nothing_even_if_told_to(
    virtual: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poisoned(monkeypatch, 1)
    with pytest.raises(NumericsError, match=r"nan at step 2.*nothing was written") as told:
        train(virtual, tmp_path / "out", data=data(tmp_path), settings=corpus.settings(), keep_anyway=True)
    assert not (tmp_path / "out").exists()
    assert "out.partial holds the run, so remove it" in told.value.hint


def test_a_body_that_changes_while_its_routers_are_trained_is_noticed(
    virtual: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = fm.build(virtual, tmp_path / "built").folder

    def meanwhile(run: Run, **keys: Any) -> RunResult:
        found = train_loop(run, **keys)
        shard = next(body.glob("model-0*.safetensors"))
        raw = bytearray(shard.read_bytes())
        raw[-1] ^= 1
        shard.write_bytes(raw)
        return found

    monkeypatch.setattr("frankenmoe.train.run.train_loop", meanwhile)
    with pytest.raises(ArtifactError, match="changed during training"):
        train(body, tmp_path / "out", data=data(tmp_path), settings=corpus.settings(), keep_anyway=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("virtual_form", [True, False], ids=["virtual", "built"])
def test_a_moved_artifact_finds_its_data_beside_it(virtual_form: bool, parents: Parents, tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    corpus.write_texts(old)
    experts = [
        {"source_model": str(parent), "name": name, "data": f"{name}.txt"}
        for name, parent in zip(corpus.WORDS, parents["llama"][1:], strict=True)
    ]
    recipe = tiny.write_recipe(old / "r.yml", parents["llama"][0], [], experts=experts, gate_mode="random")
    fm.build(recipe, old / "moe", virtual=virtual_form)
    old.rename(new)
    found = train(new / "moe", tmp_path / "out", settings=corpus.settings(), keep_anyway=True)
    assert found.report["data"] == {name: [f"{name}.txt"] for name in corpus.WORDS}


def test_data_in_the_home_folder_is_found(virtual: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    text = {name: [f"~/{name}.txt"] for name in corpus.WORDS}
    assert train(virtual, tmp_path / "out", data=text, settings=corpus.settings(), keep_anyway=True).report["steps"]
    assert cli("fit", virtual, "--data", "e0=~/e0.txt", "--data", "e1=~/e1.txt", "--keep-anyway").code == 0


def test_one_block_cannot_be_learnt_from_and_measured_with(virtual: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("abc " * 7)
    text = {**data(tmp_path), "e1": [str(tmp_path / "short.txt")]}
    with pytest.raises(SourceError, match="data of e1 is one block of 16 tokens, expected two at least"):
        train(virtual, tmp_path / "out", data=text, settings=corpus.settings())


def test_a_full_disk_leaves_the_old_checkpoint(virtual: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, calls = checkpoint.write_atomic, []

    def full(path: Path, raw: bytes) -> None:
        if path.name == checkpoint.WEIGHTS:
            calls.append(path)
            if len(calls) == 2:
                raise ArtifactError("the disk is full", hint="free some space")
        plain(path, raw)

    monkeypatch.setattr(checkpoint, "write_atomic", full)
    settings = corpus.settings(save_every=2)
    with pytest.raises(ArtifactError, match=r"checkpoint of step 4 cannot be written.*that of step 2 is intact"):
        train(virtual, tmp_path / "out", data=data(tmp_path), settings=settings)
    assert [step for step, _ in checkpoint.checkpoints(tmp_path / "out.partial")] == [2]
    found = train(virtual, tmp_path / "out", data=data(tmp_path), settings=settings)
    whole = train(virtual, tmp_path / "whole", data=data(tmp_path), settings=settings)
    assert found.report["losses"] == whole.report["losses"]


def test_other_settings_do_not_go_on_from_a_checkpoint(
    virtual: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as broken:
        broken.setattr(checkpoint, "write_json", lambda *_: (_ for _ in ()).throw(ArtifactError("x")))
        with pytest.raises(ArtifactError):
            train(virtual, tmp_path / "out", data=data(tmp_path), settings=corpus.settings())
    with pytest.raises(ArtifactError, match="was begun from another"):
        train(virtual, tmp_path / "out", data=data(tmp_path), settings=corpus.settings(seed=5))


def refused(moe: Path, tmp_path: Path, match: str, **changes: Any) -> str:
    with pytest.raises(PlanError, match=match) as told:
        train(moe, tmp_path / "out", data=data(tmp_path), settings=corpus.settings(**changes))
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()
    return str(told.value)


def test_identical_experts_are_a_trap(parents: Parents, tmp_path: Path) -> None:
    corpus.write_texts(tmp_path)
    base = parents["llama"][0]
    recipe = tiny.write_recipe(tmp_path / "r.yml", base, [base, base])
    assert "--what routers,adapters" in refused(recipe, tmp_path, "bit-identical")
    assert train(recipe, tmp_path / "out", data=data(tmp_path), settings=corpus.settings(what="routers,adapters"))


def test_identical_experts_in_a_built_body_are_found_by_their_numbers_and_by_their_gradient(
    parents: Parents, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus.write_texts(tmp_path)
    base = parents["llama"][0]
    recipe = tiny.write_recipe(tmp_path / "r.yml", base, [base, base])
    fm.build(recipe, tmp_path / "built", allow_identical=True)
    with pytest.raises(PlanError, match="hold the same numbers, so the loss has no gradient in the gates") as told:
        train(tmp_path / "built", tmp_path / "out", data=data(tmp_path), settings=corpus.settings())
    assert "--virtual" in str(told.value)
    monkeypatch.setattr("frankenmoe.train.traps.check_experts", lambda layers: None)
    with pytest.raises(PlanError, match=r"no gradient in the gates \(.*"):
        train(tmp_path / "built", tmp_path / "out", data=data(tmp_path), settings=corpus.settings())


def test_one_expert_per_token_is_a_trap_that_two_while_training_open(parents: Parents, tmp_path: Path) -> None:
    corpus.write_texts(tmp_path)
    recipe = corpus.recipe(tmp_path, parents["llama"], experts_per_token=1)
    says = refused(recipe, tmp_path, "weight is always 1")
    assert "--train-top-k 2" in says
    assert "--straight-through" in says
    found = train(recipe, tmp_path / "out", data=data(tmp_path), settings=corpus.settings(experts_per_token=2))
    assert found.artifact.record["experts_per_token"] == 1
    assert fm.load(found.artifact).model.model.layers[0].mlp.router.top_k == 1


def test_a_straight_through_weight_is_one_and_has_the_gradient_of_the_probability() -> None:
    torch.manual_seed(0)
    plain = Router(torch.randn(3, 8), top_k=1, renormalize=True)
    options = {"top_k": 1, "noise": 0.0, "jitter": 0.0}
    learning = LearningRouter(plain, straight_through=True, **options).train()
    hidden_TD, probe_T1 = torch.randn(5, 8), torch.randn(5, 1)
    found, without = learning(hidden_TD), LearningRouter(plain, straight_through=False, **options).train()(hidden_TD)
    assert torch.equal(found.weights_TK, torch.ones(5, 1))
    assert all(map(torch.equal, found, plain(hidden_TD))), "forward is unchanged"
    ours, none = (torch.autograd.grad((each.weights_TK * probe_T1).sum(), plain.weight)[0] for each in (found, without))
    chosen_T1 = (hidden_TD @ plain.weight.T).softmax(dim=1).amax(dim=1, keepdim=True)
    torch.testing.assert_close(ours, torch.autograd.grad((chosen_T1 * probe_T1).sum(), plain.weight)[0])
    assert float(none.abs().max()) < 1e-6 < float(ours.abs().max())
    weights = learning.eval()(hidden_TD).weights_TK
    assert float(torch.autograd.grad(weights.sum(), plain.weight)[0].abs().max()) < 1e-6, "while training only"


def test_the_gates_of_one_expert_per_token_learn_straight_through(parents: Parents, tmp_path: Path) -> None:
    corpus.write_texts(tmp_path)
    recipe = corpus.recipe(tmp_path, parents["llama"], experts_per_token=1)
    settings = corpus.settings(straight_through=True, steps=12, router_rate=0.003)
    found = train(recipe, tmp_path / "out", data=data(tmp_path), settings=settings)
    assert found.report["improved"]
    assert found.artifact.record["experts_per_token"] == 1
    assert type(fm.load(found.artifact).model.model.layers[0].mlp.router) is Router


def test_one_expert_has_no_routers_to_train(parents: Parents, tmp_path: Path) -> None:
    corpus.write_texts(tmp_path)
    recipe = tiny.write_recipe(tmp_path / "r.yml", parents["llama"][0], parents["llama"][1:2], experts_per_token=1)
    assert "--what adapters,norms" in refused(recipe, tmp_path, "the MoE has one expert, whose weight is always 1")
    found = train(recipe, tmp_path / "out", data=data(tmp_path), settings=corpus.settings(what="adapters,norms"))
    assert found.report["looks"]


def test_a_straight_through_weight_for_two_experts_is_refused(virtual: Path, tmp_path: Path) -> None:
    assert "leave --straight-through out" in refused(
        virtual, tmp_path, "found 2 experts per token", straight_through=True
    )


@pytest.mark.parametrize(("children", "top_k", "trap"), [(2, 1, True), (2, 2, False), (1, 1, False)])
def test_one_expert_per_token_within_an_expert_is_a_trap(
    children: int, top_k: int, trap: bool, parents: Parents, tmp_path: Path
) -> None:
    corpus.write_texts(tmp_path)
    leaves = [{"source_model": str(parent)} for parent in parents["llama"]]
    nested = {"name": "e0", "experts": leaves[:children], "experts_per_token": top_k}
    recipe = tiny.write_recipe(
        tmp_path / "r.yml", parents["llama"][0], [], experts=[nested, leaves[2] | {"name": "e1"}]
    )
    if trap:
        hint = refused(recipe, tmp_path, "expert e0 is an MoE that takes one expert per token")
        assert "--straight-through" in hint
    found = train(recipe, tmp_path / "out", data=data(tmp_path), settings=corpus.settings(straight_through=trap))
    assert found.report["looks"]


def test_what_cannot_learn_is_refused(virtual: Path, parents: Parents, tmp_path: Path) -> None:
    fm.build(virtual, tmp_path / "built")
    refused(tmp_path / "built", tmp_path, "built artifact can have its routers trained", what="routers,norms")
    average = corpus.recipe(tmp_path, parents["llama"], backbone="average")
    refused(average, tmp_path, "parents' average", what="attention")
    text = data(tmp_path)
    with pytest.raises(PlanError, match="needs the expert that owns each text, found none called verse"):
        train(virtual, tmp_path / "out", data={"verse": text["e0"]}, settings=corpus.settings(domain=0.1))


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ({"bias_balance": 0.001}, "no place for"),
        ({"next_token": 0}, "something to learn from"),
        ({"batch": 6, "accumulate": 4}, "must divide the batch"),
        ({"what": "routers,heads"}, "must be one of routers"),
        ({"what": []}, "at least one part"),
        ({"stepz": 3}, "is not a known key"),
        ({"rate": 0}, "greater than 0"),
        ({"router_rate": 1e38}, "less than or equal to 1000000"),
        ({"straight_through": "very"}, "must be true or false"),
    ],
)
def test_settings_that_make_no_sense_are_refused(table: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        TrainSettings.model_validate(table)


def test_distillation_pulls_towards_the_parent(virtual: Path, tmp_path: Path) -> None:
    settings = corpus.settings(what="routers,norms", distill=1.0, next_token=0.0, steps=8, domain=0.1, z=0.001)
    found = train(virtual, tmp_path / "out", data=data(tmp_path), settings=settings, keep_anyway=True)
    assert found.report["losses"][-1] < found.report["losses"][0]
    assert not (tmp_path / "out/teachers").exists()


def test_a_batch_in_parts_is_the_batch(virtual: Path, tmp_path: Path) -> None:
    one = train(virtual, tmp_path / "a", data=data(tmp_path), settings=corpus.settings())
    two = train(virtual, tmp_path / "b", data=data(tmp_path), settings=corpus.settings(accumulate=2))
    assert one.report["losses"] == pytest.approx(two.report["losses"], abs=1e-5)


def test_sixteen_bit_sources_stay_sixteen_bit_while_float32_learns(parents: Parents, tmp_path: Path) -> None:
    corpus.write_texts(tmp_path)
    halves = [tiny.make_parent(tmp_path / f"p{seed}", seed=seed, dtype=torch.bfloat16) for seed in range(3)]
    recipe = corpus.recipe(tmp_path, halves)
    found = train(
        recipe, tmp_path / "out", data=data(tmp_path), settings=corpus.settings(what="routers,adapters,norms")
    )
    assert found.report["improved"]
    fm.build(tmp_path / "out", tmp_path / "built")
    ids = tiny.ids()
    ours, stock = fm.load(tmp_path / "built").model, corpus.stock(tmp_path / "built")
    assert float((corpus.logits(ours, ids) - corpus.logits(stock, ids)).abs().max()) < 0.1
    assert {parameter.dtype for parameter in ours.parameters()} == {torch.bfloat16}


def test_a_recipe_may_say_everything(parents: Parents, tmp_path: Path) -> None:
    """Data per expert and `train:` in the recipe; the trained recipe keeps both, and learns on without a word."""
    corpus.write_texts(tmp_path)
    base, *others = parents["llama"]
    experts = [
        {"source_model": str(parent), "name": f"e{index}", "data": f"e{index}.txt"}
        for index, parent in enumerate(others)
    ]
    table = corpus.settings(what="routers,attention").to_dict()
    recipe = tiny.write_recipe(tmp_path / "r.yml", base, [], experts=experts, train=table)
    found = train(recipe, tmp_path / "sub" / "out")
    assert found.report["settings"] == table
    assert train(tmp_path / "sub" / "out", tmp_path / "again", keep_anyway=True).report["steps"] == 6


def test_training_is_killed_by_ctrl_c_and_goes_on(virtual: Path, tmp_path: Path) -> None:
    words = ["train", str(virtual), str(tmp_path / "out"), "--steps", "400", "--block", "16", "--save-every", "2"]
    words += [f"--data={name}={files[0]}" for name, files in data(tmp_path).items()]
    (tmp_path / "said").mkdir()
    child = forks.start(forks.COMMAND, *words, out=tmp_path / "said")
    deadline = time.monotonic() + 120
    while checkpoint.last_checkpoint(tmp_path / "out.partial") is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert child.pid
    os.kill(child.pid, signal.SIGINT)
    child.join(timeout=60)
    said = (tmp_path / "said/stderr").read_text()
    assert child.exitcode == 130, said
    assert "continues from here" in said
    assert checkpoint.last_checkpoint(tmp_path / "out.partial") is not None


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--what", ""], "at least one part"),
        (["--data", "e0=nowhere.txt"], "looked for at {here}/nowhere.txt"),
        (["--rate", "1e38"], "must be at most 1000000"),
    ],
)
def test_the_command_refuses(
    options: list[str], says: str, virtual: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = [part for name, (file,) in data(tmp_path).items() for part in ("--data", f"{name}={file}")]
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    outcome = cli("train", virtual, tmp_path / "out", *text, *options)
    assert outcome.code == 2
    assert says.format(here=tmp_path / "here") in outcome.stderr
    assert not list(tmp_path.glob("out*"))
