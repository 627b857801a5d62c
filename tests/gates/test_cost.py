"""What a fit costs: the counter against hooks, the forecast against the counter, the limit of memory, two processes."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_fit import WORDS, data_recipe, text_of

import frankenmoe as fm
import tiny
from frankenmoe.artifact.folder import ROUTERS, STATISTICS
from frankenmoe.gates import samples
from frankenmoe.gates.cost import Meter, head_share
from frankenmoe.gates.fit import Fit, fit_gates
from frankenmoe.gates.samples import affordable, read_samples
from frankenmoe.gates.statistics import load_statistics
from frankenmoe.gates.texts import OwnText, read_texts, size_of
from frankenmoe.planning import fitting
from frankenmoe.progress import SILENT, Progress
from launch import run_together
from refusals import cli

Parents = dict[str, list[Path]]


def texts_of(recipe: Path, *, tokens: int = 2560) -> tuple[OwnText, ...]:
    return read_texts(fm.plan(fm.Recipe.load(recipe)), tiny.make_tokenizer(), tokens=tokens, length=64)


def long_texts(folder: Path) -> None:
    for name in WORDS:
        (folder / f"{name}.txt").write_text(text_of(name, 3000))


def fitted(recipe: Path, method: str, *, progress: Progress = SILENT) -> tuple[Fit, dict[str, int]]:
    """A fit, and the real tokens that hooks saw in the decoder and in the head."""
    model = fm.load(recipe).model
    seen = {"layers": 0, "head": 0}
    current = [0]

    def decoder(_module: object, _args: object, kwargs: dict[str, torch.Tensor]) -> None:
        current[0] = int(kwargs["attention_mask"].sum())
        seen["layers"] += current[0]

    def head(*_: object) -> None:
        seen["head"] += current[0]

    model.get_decoder().register_forward_pre_hook(decoder, with_kwargs=True)
    model.get_output_embeddings().register_forward_pre_hook(head)
    texts = texts_of(recipe)
    return fit_gates(model, texts, {(): 2}, method=method, bos=0, progress=progress), seen


def test_the_head_s_share_is_that_of_its_multiplications(parents: Parents, tmp_path: Path) -> None:
    recipe = data_recipe(tmp_path, parents["llama"])  # hidden 32, FFN 48, 2 layers, 4 heads of 8, 2 for keys, top-1
    attention, ffn, gate, norms = 32 * 32 * 2 + 32 * 16 * 2, 3 * 32 * 48, 2 * 32, 2 * 32
    layers = 2 * (attention + ffn + gate + norms) + 32
    assert head_share(fm.load(recipe).model) == pytest.approx(128 * 32 / (128 * 32 + layers))
    assert fitting.head_share(fm.plan(fm.Recipe.load(recipe))) == pytest.approx(128 * 32 / (128 * 32 + layers))


@pytest.mark.parametrize(("method", "limit"), [("ridge", 1.5), ("logistic", 2.5), ("regret", 2.5 + 2 / 3)])
def test_the_cost_is_what_hooks_count(method: str, limit: float, parents: Parents, tmp_path: Path) -> None:
    recipe = data_recipe(tmp_path, parents["llama"])
    long_texts(tmp_path)
    started: list[int] = []
    done: list[int] = []
    bar = Progress(start=lambda _title, total, _unit: started.append(total), advance=done.append)
    made, seen = fitted(recipe, method, progress=bar)
    head = head_share(fm.load(recipe).model)
    assert sum(made.cost.steps.values()) == pytest.approx((1 - head) * seen["layers"] + head * seen["head"])
    assert made.cost.tokens == sum(len(b.ids) for text in texts_of(recipe) for b in (*text.kept, *text.held))
    assert made.cost.forward_passes <= limit
    compared = made.cost.steps[fitting.BEFORE]  # a recipe's routers are compared with none
    assert (seen["layers"] - compared) / made.cost.tokens <= limit  # also if readings without the head count in full
    assert len(started) == 1
    assert sum(done) == pytest.approx(sum(made.cost.steps.values()), abs=len(done))


def test_a_fit_says_what_it_cost_and_a_plan_what_it_will(parents: Parents, tmp_path: Path) -> None:
    recipe = data_recipe(tmp_path, parents["llama"], fit={"block": 32})
    long_texts(tmp_path)
    said = cli("fit", recipe, tmp_path / "out")
    assert "forward passes over" in said.stdout
    cost = load_statistics(tmp_path / "out" / STATISTICS).facts["cost"]
    assert cost["forward_passes"] == pytest.approx(sum(cost["by_step"].values()), abs=0.01)
    planned = json.loads(cli("plan", recipe, "--json").stdout)["fit"]
    assert planned["method"] == "logistic"
    assert planned["forward_passes"] == pytest.approx(cost["forward_passes"], abs=0.2)
    assert "forward passes" in cli("plan", recipe).stdout
    plain = tiny.write_recipe(tmp_path / "plain.yml", parents["llama"][0], parents["llama"][1:])
    assert json.loads(cli("plan", plain, "--json").stdout)["fit"] is None


def test_the_forecast_adds_up() -> None:
    one = fitting.TextSize((0,), kept=900, held=100, unseen=0, searched=30, cut=920, lost=310)
    texts = [one, replace(one, path=(1,))]
    steps = fitting.fit_steps("regret", texts, {(): 2}, layers=0.5, compare=True)
    assert steps == {
        fitting.BEFORE: 200,
        fitting.STATISTICS: 900,
        fitting.OWN_LOSS: 200,
        fitting.SCALE: 2 * 3 * 3 * 30,
        fitting.AFTER: 200,
        fitting.STATES: 920,
        fitting.LOSSES: 2 * 620,
    }


def test_a_text_is_cut_into_whole_blocks_quarters_and_sixteenths() -> None:
    # of 256 with BOS: whole; 255 in four parts and BOS; 15 and BOS seventeen times
    pieces = [[256] * 2, [64, 65, 65, 65], [16] * 17]
    size = fitting.text_size((0,), [256] * 4, [256] * 4, (), head=1)
    assert size.cut == sum(map(sum, pieces))
    assert size.lost == 256 + (64 + 65) + 6 * 16
    assert size.searched == 2 * 256
    assert fitting.text_size((0,), [256] * 4, [256], (), head=1).searched == 85
    assert fitting.text_size((0,), [40] * 4, [40], (), head=1).searched == 40  # too short for a part of it


@pytest.mark.parametrize("tokens", [640, 2560])
def test_only_the_tries_of_the_scale_are_not_known_beforehand(tokens: int, parents: Parents, tmp_path: Path) -> None:
    recipe = data_recipe(tmp_path, parents["llama"])
    long_texts(tmp_path)
    model, texts = fm.load(recipe).model, texts_of(recipe, tokens=tokens)
    cost = fit_gates(model, texts, {(): 2}, method="regret", bos=0).cost
    sizes = [size_of(text, bos=0) for text in texts]
    steps = fitting.fit_steps("regret", sizes, {(): 2}, layers=1 - head_share(model), compare=True)
    assert cost.steps.keys() == steps.keys()
    for step in steps.keys() - {fitting.SCALE}:
        assert cost.steps[step] == pytest.approx(steps[step]), step


def test_states_are_rounded_then_thinned_out_to_fit_into_memory(
    parents: Parents, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samples, "STATES_BYTES", 4096)
    assert affordable(16, layers=2, hidden=32, dtype=torch.float32) == (torch.float32, 1.0)
    assert affordable(32, layers=2, hidden=32, dtype=torch.float32) == (torch.bfloat16, 1.0)
    assert affordable(320, layers=2, hidden=32, dtype=torch.float32) == (torch.bfloat16, 0.1)
    assert affordable(320, layers=2, hidden=32, dtype=torch.float16) == (torch.float16, 0.1)
    recipe = data_recipe(tmp_path, parents["llama"])
    model, texts = fm.load(recipe).model, texts_of(recipe)
    meter = Meter(model, text=1, progress=SILENT)
    thin = read_samples(model, texts, bos=0, meter=meter)
    monkeypatch.setattr(samples, "STATES_BYTES", 2**30)
    whole = read_samples(model, texts, bos=0, meter=meter)
    tokens = len(whole.layer(0))
    assert len(thin.layer(0)) == pytest.approx(4096 / (2 * 32 * 2), abs=2)
    assert len(thin.layer(0)) < tokens
    for few, all_of in zip(thin.chunks, whole.chunks, strict=True):
        assert few.blocks == all_of.blocks
        rows = whole.layer(1)[all_of.rows][few.keep_N]
        assert torch.allclose(thin.layer(1)[few.rows].float(), rows, rtol=1e-2, atol=1e-2)


TOGETHER = """
from pathlib import Path
import frankenmoe as fm
fm.fit(Path(sys.argv[1]), Path(sys.argv[2]), method=sys.argv[3], block=64)
"""


@pytest.mark.parametrize("method", ["logistic", "regret"])
def test_two_processes_make_the_gates_of_one(method: str, parents: Parents, tmp_path: Path) -> None:
    recipe = data_recipe(tmp_path, parents["llama"])
    long_texts(tmp_path)
    found = {}
    for processes in (1, 2):
        out = tmp_path / str(processes)
        done = run_together(TOGETHER, recipe, out, method, processes=processes)
        assert [each.returncode for each in done] == [0] * processes, done[-1].stderr
        found[processes] = load_file(out / ROUTERS), load_statistics(out / STATISTICS)
    (one, known), (two, other) = found[1], found[2]
    assert one.keys() == two.keys()
    for name, gate in one.items():
        assert torch.allclose(gate.float(), two[name].float(), rtol=0, atol=1e-6 * float(gate.abs().max())), name
    assert torch.allclose(known.routers[()].second_LDD, other.routers[()].second_LDD, rtol=1e-12)
    assert known.facts["cost"] == other.facts["cost"]
    assert known.facts["held_out_loss"] == other.facts["held_out_loss"]
