"""Losses are the sums one gets by hand."""

import math

import torch

from frankenmoe.train import losses


def rows(*lists: list[float]) -> torch.Tensor:
    return torch.tensor(lists)


def test_next_token_is_minus_the_log_of_the_probability() -> None:
    logits_TV = rows([math.log(2), 0.0, 0.0], [0.0, 0.0, 0.0], [5.0, 1.0, 2.0])
    found_T = losses.next_token(logits_TV, torch.tensor([0, 2, -100]))
    assert torch.allclose(found_T, torch.tensor([-math.log(2 / 4), math.log(3), 0.0]))


def test_balance_is_one_when_even_and_experts_when_collapsed() -> None:
    even = losses.switch_balance(torch.zeros(6, 4), torch.full((4,), 0.25))
    assert torch.allclose(even, torch.tensor(1.0))
    collapsed = losses.switch_balance(rows([50.0, 0.0, 0.0, 0.0]), torch.tensor([1.0, 0, 0, 0]))
    assert torch.allclose(collapsed, torch.tensor(4.0))


def test_balance_by_hand() -> None:
    """Two tokens, two experts: P = (mean of 3/4 and 1/2, ...), f = (3/4, 1/4): 2 * (5/8 * 3/4 + 3/8 * 1/4)."""
    logits_TE = rows([math.log(3), 0.0], [0.0, 0.0])
    found = losses.switch_balance(logits_TE, torch.tensor([0.75, 0.25]))
    assert torch.allclose(found, torch.tensor(2 * (5 / 8 * 3 / 4 + 3 / 8 * 1 / 4)))


def test_balance_agrees_with_transformers_on_one_layer() -> None:
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    logits_TE = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
    ids_TK = logits_TE.topk(2).indices
    counts_E = losses.choice_counts(ids_TK, experts=5)
    ours = losses.switch_balance(logits_TE, counts_E / counts_E.sum())
    theirs = load_balancing_loss_func((logits_TE,), 5, 2)
    assert torch.allclose(2 * ours, theirs, atol=1e-5), "theirs counts each token's two choices, so it is k times ours"


def test_choices_are_counted_without_the_dropped() -> None:
    assert losses.choice_counts(torch.tensor([[0, 2], [2, -1]]), experts=4).tolist() == [1, 0, 2, 0]


def test_z_is_the_squared_log_of_the_sum() -> None:
    logits_TE = rows([0.0, 0.0], [math.log(3), 0.0])
    assert torch.allclose(losses.router_z(logits_TE), torch.tensor((math.log(2) ** 2 + math.log(4) ** 2) / 2))


def test_domain_is_cross_entropy_over_owned_tokens() -> None:
    logits_TE = rows([math.log(3), 0.0], [0.0, 0.0], [9.0, 0.0])
    assert torch.allclose(
        losses.domain(logits_TE, torch.tensor([0, 1, -1])), torch.tensor((math.log(4 / 3) + math.log(2)) / 2)
    )
    assert losses.domain(logits_TE, torch.tensor([-1, -1, -1])) == 0


def test_distill_is_the_divergence_over_kept_tokens_and_the_rest() -> None:
    teacher_V, student_V = torch.tensor([0.5, 0.25, 0.125, 0.125]), torch.tensor([0.25, 0.25, 0.25, 0.25])
    found_T = losses.distill(student_V.log()[None], teacher_V[:2].log()[None], torch.tensor([[0, 1]]))
    by_hand = 0.5 * math.log(0.5 / 0.25) + 0.25 * math.log(1.0) + 0.25 * math.log(0.25 / 0.5)
    assert torch.allclose(found_T, torch.tensor([by_hand]))
    same_T = losses.distill(teacher_V.log()[None], teacher_V[:2].log()[None], torch.tensor([[0, 1]]))
    assert torch.allclose(same_T, torch.zeros(1), atol=1e-6)
