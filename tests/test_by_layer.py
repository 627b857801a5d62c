"""Models that a device cannot hold: their layers are brought there one by one, with the results of the CPU."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import frankenmoe as fm
import tiny
from elsewhere import HERE, THERE, recipe_with_texts, second_device
from frankenmoe.backbone.run import heal
from frankenmoe.errors import PlanError
from frankenmoe.moe.device import CPU, KEPT_FREE


@pytest.fixture
def recipe(parents: dict[str, list[Path]], tmp_path: Path) -> Path:
    return recipe_with_texts(tmp_path, parents["llama"], backbone="average")


def least(model: nn.Module) -> int:
    """The bytes of one layer without its routers, and of everything outside of the layers."""
    sizes = {name: tensor.nbytes for name, tensor in model.named_parameters()}
    outside = sum(size for name, size in sizes.items() if ".layers." not in name or "router" in name)
    outside += sum(buffer.nbytes for buffer in model.buffers())
    return outside + sum(size for name, size in sizes.items() if ".layers.0." in name and "router" not in name)


@pytest.fixture
def small(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """A device with room for one layer of the MoE, which has less than each parent has."""
    needed = least(fm.load(recipe).model)
    with second_device(monkeypatch, free=int(needed / (1 - KEPT_FREE)) + 1) as found:
        yield found


def test_only_one_layer_is_on_the_device(recipe: Path, small: torch.device) -> None:
    with pytest.raises(PlanError, match="of memory free, but the weights need"):
        fm.load(recipe, device="auto")

    model = fm.open(recipe).load(device="auto", by_layer=True).model

    found = {name: tensor.device for name, tensor in model.named_parameters()}
    assert {place for name, place in found.items() if ".layers." in name and "router" not in name} == {CPU}
    assert {place for name, place in found.items() if ".layers." not in name or "router" in name} == {small}
    seen: list[torch.device] = []
    layers = model.model.layers
    for layer in layers:
        linear = layer.self_attn.q_proj
        linear.register_forward_hook(
            lambda module, *_: seen.extend(each.self_attn.q_proj.weight.device for each in layers)
        )
    with torch.no_grad():
        logits = model(input_ids=tiny.ids().to(small)).logits
        expected = fm.load(recipe).model(input_ids=tiny.ids()).logits
    assert seen == [small, CPU, CPU, small]
    torch.testing.assert_close(logits.cpu(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", ["ridge", "logistic", "regret"])
def test_a_fit_is_the_same(method: str, recipe: Path, tmp_path: Path, small: torch.device) -> None:
    for name, place in {"here": HERE, "there": THERE}.items():
        fm.fit(recipe, tmp_path / name, method=method, block=32, **place)
        fm.fit(tmp_path / name, method=method, block=32, keep_anyway=True, **place)  # in place
    wanted, found = (fm.open(tmp_path / name).load().model.state_dict() for name in ("here", "there"))
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6 * float(tensor.abs().max()))


def test_healing_is_the_same(recipe: Path, tmp_path: Path, small: torch.device) -> None:
    one, two = (
        heal(recipe, tmp_path / name, tokens=512, block=16, **place).report
        for name, place in {"here": HERE, "there": THERE}.items()
    )
    for here, there in zip(one.experts, two.experts, strict=True):
        assert there.step == here.step
        assert there.left == pytest.approx(here.left, rel=1e-4)  # Apple's type has no float64
        assert min(here.left) < 1
        assert (there.before, there.parent) == pytest.approx((here.before, here.parent), rel=1e-6)


def test_an_evaluation_is_the_same(recipe: Path, small: torch.device) -> None:
    pytest.importorskip("lm_eval")
    from frankenmoe.evaluate.run import evaluate
    from frankenmoe.evaluate.score import Scoring

    one, two = (evaluate([recipe], limit=1, scoring=Scoring(memory=10**7), **place) for place in (HERE, THERE))
    assert [each.name for each in one.results] == [each.name for each in two.results]
    for here, there in zip(one.results, two.results, strict=True):
        for domain, losses in here.losses.items():
            assert there.losses[domain].nats == pytest.approx(losses.nats, rel=1e-6)


def test_a_device_without_room_for_one_layer_is_refused(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = least(fm.load(recipe).model)
    with second_device(monkeypatch, free=needed), pytest.raises(PlanError, match="but one layer with the embeddings"):
        fm.fit(recipe, tmp_path / "out", block=32, **THERE)
    assert not list(tmp_path.glob("out*"))
