"""Where models run: names, memory that is too small, and every stage on a second device with the CPU's results."""

import io
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch

import frankenmoe as fm
import tiny
from elsewhere import DEVICE, HERE, THERE, recipe_with_texts, second_device
from frankenmoe.audit.run import look
from frankenmoe.backbone.run import heal
from frankenmoe.cli import main
from frankenmoe.errors import PlanError
from frankenmoe.moe import device
from frankenmoe.moe.device import CPU, Weights, check_room, resolve
from frankenmoe.moe.generate import reply

GIB = 2**30


@pytest.fixture
def recipe(parents: dict[str, list[Path]], tmp_path: Path) -> Path:
    return recipe_with_texts(tmp_path, parents["llama"])


@pytest.fixture
def there(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    with second_device(monkeypatch) as found:
        yield found


def run(*words: object) -> tuple[int, str, str]:
    """A command in this process: exit code, stdout, stderr."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["frankenmoe", *map(str, words)])
        try:
            main()
        except SystemExit as ended:
            code = int(ended.code or 0)
    return code, out.getvalue(), err.getvalue()


# ---- names ----


def test_auto_is_the_accelerator_if_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve() == CPU
    with second_device(monkeypatch):
        assert resolve() == DEVICE
        assert resolve("cpu") == CPU


@pytest.mark.parametrize(("rank", "name", "found"), [(0, "cuda", 0), (5, "cuda", 1), (5, "auto", 1), (5, "cuda:0", 0)])
def test_every_process_has_a_gpu_of_its_own(rank: int, name: str, found: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    for key, value in {"RANK": rank, "WORLD_SIZE": 8, "MASTER_ADDR": "127.0.0.1", "LOCAL_RANK": rank}.items():
        monkeypatch.setenv(key, str(value))
    assert resolve(name) == torch.device("cuda", found)


@pytest.mark.parametrize("name", ["cuda", "cuda:3", "mps", "tpu", "meta", "", "cuda:x"])
def test_a_device_that_is_not_there_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(PlanError, match=rf"no device {name!r} .* which offers cpu\n"):
        resolve(name)


def test_the_message_names_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(PlanError, match=r"which offers cpu, cuda:0, cuda:1\n"):
        resolve("cuda:2")


@pytest.mark.parametrize(
    "command",
    [
        ("chat", "RECIPE", "--prompt", "A"),
        ("fit", "RECIPE", "OUT"),
        ("heal", "RECIPE", "OUT"),
        ("train", "RECIPE", "OUT"),
        ("audit", "RECIPE"),
        ("eval", "RECIPE"),
        ("run", "RECIPE", "OUT"),
    ],
)
def test_every_command_refuses_a_missing_device(command: tuple[str, ...], recipe: Path, tmp_path: Path) -> None:
    names = {"RECIPE": recipe, "OUT": tmp_path / "out"}
    code, _, said = run(*(names.get(word, word) for word in command), "--device", "cuda:77")
    assert code == 2
    assert "there is no device 'cuda:77'" in said
    assert "which offers cpu" in said
    assert not (tmp_path / "out").exists()


# ---- memory ----


@pytest.mark.parametrize(
    ("stored", "dtype", "options", "fits"),
    [
        (8 * GIB, None, {}, ["--int8 of `chat` (4.0 GiB)", "--device cpu"]),
        (8 * GIB, torch.float32, {}, ["--int8 of `chat` (4.0 GiB)", "--device cpu"]),
        (4 * GIB, torch.float32, {}, ["--dtype bfloat16 (4.0 GiB)", "--int8 of `chat` (2.0 GiB)", "--device cpu"]),
        (16 * GIB, None, {"int8": True}, ["--device cpu"]),
    ],
)
def test_what_does_not_fit_is_refused_with_what_would(
    stored: int, dtype: torch.dtype | None, options: dict[str, bool], fits: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    weights = Weights(stored, torch.bfloat16)
    needed = weights.bytes(dtype, **options) / GIB
    with second_device(monkeypatch, free=6 * GIB) as small, pytest.raises(PlanError) as raised:
        check_room(weights, small, dtype=dtype, **options)
    assert f"mps has 6.0 GiB of memory free, but the weights need {needed:.1f} GiB as" in raised.value.message
    assert raised.value.hint is not None
    listed = raised.value.hint.removeprefix("what fits: ").split(", or ")
    assert [each.startswith(want) for each, want in zip(listed, fits, strict=True)] == [True] * len(fits)


def test_mapped_weights_need_no_memory_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "free_memory", lambda _: 6 * GIB)
    weights = Weights(60 * GIB, torch.bfloat16)
    check_room(weights, CPU)
    check_room(weights, CPU, dtype=torch.bfloat16)
    with pytest.raises(PlanError, match=r"cpu has 6.0 GiB .* need 120.0 GiB as float32"):
        check_room(weights, CPU, dtype=torch.float32)


def test_another_gpu_with_room_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    free = {"cuda:0": 3 * GIB, "cuda:1": 5 * GIB, "cuda:2": 24 * GIB}
    monkeypatch.setattr(device, "free_memory", lambda place: free[str(place)])
    with pytest.raises(PlanError) as raised:
        check_room(Weights(8 * GIB, torch.bfloat16), torch.device("cuda", 0))
    assert raised.value.hint is not None
    assert "--device cuda:2 (24.0 GiB free)" in raised.value.hint
    assert "cuda:1" not in raised.value.hint


def test_a_small_device_is_reported_before_anything_is_read(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = fm.plan(fm.Recipe.load(recipe)).bill.memory_virtual
    monkeypatch.setattr("frankenmoe.moe.load.load_parts", lambda *_, **__: pytest.fail("it was loaded"))
    with second_device(monkeypatch, free=size - 1), pytest.raises(PlanError, match="of memory free, but the weights"):
        fm.load(recipe, device="mps")


# ---- stages ----


def test_loading_stays_on_the_cpu_unless_told_otherwise(recipe: Path, there: torch.device) -> None:
    assert fm.load(recipe).model.device == CPU
    moe = fm.load(recipe, device="auto")
    assert {each.device for each in moe.model.parameters()} == {there}


def test_a_tensor_of_the_wrong_device_would_be_noticed(recipe: Path, there: torch.device) -> None:
    moe = fm.load(recipe, device="auto")
    with pytest.raises(RuntimeError, match="met tensors"):
        moe.model(input_ids=torch.tensor([[1, 2, 3]]))


def test_replies_are_the_same_there(recipe: Path, there: torch.device) -> None:
    made = []
    for place in (HERE, THERE):
        moe = fm.load(recipe, **place)
        made.append(reply(moe, moe.tokenizer(), [{"role": "user", "content": "ABC"}], max_new_tokens=5))
    assert made[0].tokens == made[1].tokens
    assert made[0].layers[0].ids_TK.tolist() == made[1].layers[0].ids_TK.tolist()


@pytest.mark.parametrize("method", ["ridge", "logistic", "regret"])
def test_routers_fitted_there_are_the_same(method: str, recipe: Path, tmp_path: Path, there: torch.device) -> None:
    places = {"here": HERE, "there": THERE}
    made = {name: fm.fit(recipe, tmp_path / name, method=method, block=32, **place) for name, place in places.items()}
    assert made["there"].report["held_out_loss"] == made["here"].report["held_out_loss"]
    assert gates(tmp_path / "there") == gates(tmp_path / "here")
    again = fm.fit(tmp_path / "there", method=method, block=32, keep_anyway=True, **THERE)  # in place
    assert again.report["held_out_loss"]["after"] == made["here"].report["held_out_loss"]["after"]


def test_an_expert_added_there_is_the_same(recipe: Path, tmp_path: Path, there: torch.device, parents: Any) -> None:
    fm.fit(recipe, tmp_path / "fitted", method="ridge", block=32)
    new = {"source": str(parents["llama"][1]), "name": "e2", "data": [str(tmp_path / "e1.txt")]}
    for name, place in {"here": HERE, "there": THERE}.items():
        fm.add_expert(tmp_path / "fitted", tmp_path / name, block=32, **new, **place)
    assert gates(tmp_path / "there") == gates(tmp_path / "here")


@pytest.mark.parametrize("mode", ["hidden", "cheap_embed"])
def test_gates_from_prompts_made_there_are_the_same(
    mode: str, parents: Any, tmp_path: Path, there: torch.device
) -> None:
    recipe = tiny.write_recipe(
        tmp_path / "p.yml", parents["llama"][0], parents["llama"][1:], prompts=True, gate_mode=mode
    )
    for name, place in {"here": "cpu", "there": "auto"}.items():
        subject = fm.open(recipe, cache=False)
        fm.build(subject, tmp_path / name, virtual=True, device=place)
    assert gates(tmp_path / "there") == gates(tmp_path / "here")


@pytest.mark.parametrize("backbone", ["average", "regmean"])
def test_experts_healed_there_are_the_same(backbone: str, recipe: Path, tmp_path: Path, there: torch.device) -> None:
    recipe.write_text(f"{recipe.read_text()}\nbackbone: {backbone}\n")
    made = {}
    for name, place in {"here": HERE, "there": THERE}.items():
        subject = fm.open(recipe, cache=False)
        made[name] = heal(subject, tmp_path / name, tokens=512, block=16, **place).report
    for here, elsewhere in zip(made["here"].experts, made["there"].experts, strict=True):
        assert elsewhere.step == here.step
        assert elsewhere.left == pytest.approx(here.left, rel=1e-4)
        assert min(here.left) < 1


def test_an_audit_there_is_the_same(recipe: Path, there: torch.device) -> None:
    found = [look(recipe, tokens=64, **place) for place in (HERE, THERE)]
    assert found[0].report["routers"] == found[1].report["routers"]


def test_an_evaluation_there_is_the_same(recipe: Path, there: torch.device) -> None:
    pytest.importorskip("lm_eval")
    from frankenmoe.evaluate.run import evaluate
    from frankenmoe.evaluate.score import Scoring

    reports = [
        evaluate([recipe], against_parents=True, scoring=Scoring(store=None), **place) for place in (HERE, THERE)
    ]
    here, elsewhere = ({each.name: each for each in report.results} for report in reports)
    assert here.keys() == elsewhere.keys()
    for name in here:
        assert elsewhere[name].facts["device"] == there.type
        for domain, losses in here[name].losses.items():
            assert elsewhere[name].losses[domain].nats == pytest.approx(losses.nats, abs=1e-4)


@pytest.mark.gpu
def test_stages_on_a_real_gpu(recipe: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    from frankenmoe.evaluate.run import evaluate
    from frankenmoe.evaluate.score import Scoring

    gpu = {"device": "cuda", "dtype": "float32"}
    replies, losses, heldout = [], [], []
    for number, place in enumerate((HERE, gpu)):
        moe = fm.load(recipe, **place)
        assert moe.model.device.type == place["device"]
        made = reply(moe, moe.tokenizer(), [{"role": "user", "content": "ABC"}], max_new_tokens=5)
        replies.append(made.tokens)
        (found,) = evaluate([recipe], scoring=Scoring(store=None), **place).results
        losses.append(found.mean_loss)
        heldout.append(
            fm.fit(recipe, tmp_path / str(number), method="regret", block=32, **place).report["held_out_loss"]
        )
        look(recipe, tokens=64, **place)
    assert replies[0] == replies[1]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert heldout[1]["own_expert"] == pytest.approx(heldout[0]["own_expert"], rel=1e-3)


def gates(artifact: Path) -> dict[str, list[list[float]]]:
    """Every gate of an artifact."""
    from frankenmoe.moe.load import gate_tensors

    found = gate_tensors(fm.open(artifact).routers().routers)
    return {name: gate.tolist() for name, gate in found.items()}


@pytest.mark.parametrize(("wanted", "found"), [({}, "64"), ({"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "7"}, "7")])
def test_few_compiled_products_are_kept_unless_the_user_says_how_many(wanted: dict[str, str], found: str) -> None:
    code = "import os, frankenmoe.moe.dense; print(os.environ['ONEDNN_PRIMITIVE_CACHE_CAPACITY'])"
    plain = {name: value for name, value in os.environ.items() if name != "ONEDNN_PRIMITIVE_CACHE_CAPACITY"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=plain | wanted, capture_output=True, text=True, check=True, timeout=300
    )
    assert done.stdout.strip() == found


def test_freed_memory_goes_back_to_the_system() -> None:
    code = """
import ctypes
from pathlib import Path
from frankenmoe.system import give_back_memory
def anonymous():
    return next(int(line.split()[1]) for line in Path("/proc/self/status").open() if line.startswith("RssAnon"))
kept = [bytearray(2**16) for _ in range(2000)][-1]  # glibc keeps what lies below it
before = anonymous()
give_back_memory()
print(before - anonymous() if hasattr(ctypes.CDLL(None), "malloc_trim") else "none")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    if done.stdout.strip() == "none":
        pytest.skip("this C library cannot return memory")
    assert int(done.stdout) > 100_000
