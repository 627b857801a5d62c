"""A loss taken a few tokens at a time is the loss of the whole, and so is its gradient."""

import functools
from pathlib import Path
from typing import Any

import corpus
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import frankenmoe as fm
import tiny
from frankenmoe.train import head as heads
from frankenmoe.train import losses
from frankenmoe.train.head import FEWEST, is_direct, summed
from frankenmoe.train.run import train

Parents = dict[str, list[Path]]
BLOCKS, LENGTH = 3, 60


def tiny_model(family: str = "llama", **changes: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **(tiny.SIZES | changes)))


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """ids_BT, and labels_T of which some are not to be learnt."""
    ids_BT = tiny.ids(LENGTH, batch=BLOCKS)
    labels_T = ids_BT[:, 1:].flatten()
    return ids_BT, labels_T.masked_fill(torch.arange(len(labels_T)) % 5 == 0, -100)


def next_token(logits_TV: torch.Tensor, rows: slice, *, labels_T: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    sizes.append(len(logits_TV))
    return losses.next_token(logits_TV, labels_T[rows]).sum()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("learning", ["norm", "norm embed", "norm embed lm_head"])
def test_loss_and_gradients_are_those_of_whole_logits(learning: str, tied: bool) -> None:
    model, (ids_BT, labels_T) = tiny_model(tie_word_embeddings=tied), batch()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(word in name for word in learning.split()))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found = []
    for head in (None, model.lm_head):
        sizes: list[int] = []
        loss = functools.partial(next_token, labels_T=labels_T, sizes=sizes)
        total = summed(model, ids_BT, loss, head=head, numbers=1) / 7
        found.append((total, *torch.autograd.grad(total, parameters)))
        assert sizes == ([FEWEST, FEWEST, len(labels_T) - 2 * FEWEST] if head else [len(labels_T)])
    for whole, parts in zip(*found, strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        again = summed(model, ids_BT, loss, head=model.lm_head, numbers=1) / 7
    torch.testing.assert_close(again, found[0][0].detach())
    assert model(input_ids=ids_BT).logits.shape == (BLOCKS, LENGTH, tiny.SIZES["vocab_size"]), (
        "the head is its own again"
    )


def test_a_loss_without_logits_has_no_gradient() -> None:
    model, (ids_BT, _) = tiny_model(), batch()
    total = summed(model, ids_BT, lambda logits_TV, rows: torch.zeros(()), head=model.lm_head)
    assert (float(total), total.requires_grad) == (0.0, False)


@pytest.mark.parametrize(
    ("family", "changes", "direct"),
    [
        ("llama", {}, True),
        ("qwen2", {}, True),
        ("granite", {"logits_scaling": 2.0}, False),
        ("gemma2", {"final_logit_softcapping": 5.0}, False),
    ],
)
def test_a_model_that_does_more_with_its_logits_is_found(family: str, changes: dict[str, Any], direct: bool) -> None:
    model = tiny_model(family, **changes).train()
    assert is_direct(model) is direct
    assert model.training


def test_training_is_the_same_in_parts(parents: Parents, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All terms that read logits, a head that learns, and what the guard sees."""
    text = corpus.write_texts(tmp_path)
    moe = fm.build(corpus.recipe(tmp_path, parents["llama"]), tmp_path / "moe", virtual=True).folder
    settings = corpus.settings(what="routers,embeddings", distill=0.5, rate=0.001)
    monkeypatch.setattr(heads, "FEWEST", 7)
    monkeypatch.setattr(summed, "__kwdefaults__", {"numbers": 1})
    parts = train(moe, tmp_path / "parts", data=text, settings=settings, keep_anyway=True).report
    monkeypatch.setattr("frankenmoe.train.loop.is_direct", lambda model, context: False)
    whole = train(moe, tmp_path / "whole", data=text, settings=settings, keep_anyway=True).report
    assert parts["losses"] == pytest.approx(whole["losses"], abs=1e-5)
    for mine, other in zip(parts["looks"], whole["looks"], strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], abs=1e-5)
