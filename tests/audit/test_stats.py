"""Statistics of routing against sums done by hand."""

import math

import pytest
import torch

from frankenmoe.audit import stats


def counts(*values: int) -> torch.Tensor:
    return torch.tensor(values)


def test_load_is_a_share() -> None:
    assert stats.load(counts(1, 3, 0)).tolist() == [0.25, 0.75, 0.0]
    assert stats.load(counts(0, 0)).tolist() == [0.0, 0.0]


def test_coefficient_of_variation_by_hand() -> None:
    """Mean 4, deviations -2, 0, 2: variance 8/3."""
    assert stats.coefficient_of_variation(counts(2, 4, 6)) == pytest.approx(math.sqrt(8 / 3) / 4)
    assert stats.coefficient_of_variation(counts(5, 5)) == 0
    assert stats.coefficient_of_variation(counts(9, 0, 0, 0)) == pytest.approx(math.sqrt(3))
    assert stats.coefficient_of_variation(counts(0, 0)) == 0


def test_max_violation_by_hand() -> None:
    assert stats.max_violation(counts(2, 4, 6)) == pytest.approx((6 - 4) / 4)
    assert stats.max_violation(counts(3, 3, 3)) == 0
    assert stats.max_violation(counts(0, 8, 0, 0)) == 3
    assert stats.max_violation(counts(0, 0)) == 0


def test_dead_experts_are_named() -> None:
    assert stats.dead(counts(0, 4, 0)) == [0, 2]
    assert stats.dead(counts(1, 1)) == []


@pytest.mark.parametrize(("factor", "limit"), [(1.0, 50), (1.1, 55), (1.25, 63), (2.0, 100)])
def test_capacity_rounds_up_what_a_person_wrote(factor: float, limit: int) -> None:
    """200 assignments over 4 experts: 50 each; 1.1 * 50 is 55, in binary a little more; 62.5 becomes 63."""
    assert stats.capacity(factor, assignments=200, experts=4) == limit


def test_overflow_by_hand() -> None:
    """20 assignments over 4 experts, 5 each: at 1.0 the first is 5 over, the second 1; at 2.0 nobody is."""
    found = counts(10, 6, 3, 1)
    assert [stats.overflow(found, factor=factor) for factor in (1.0, 1.25, 2.0)] == [6, 3, 0]


def test_switch_balance_by_hand() -> None:
    assert stats.switch_balance(counts(4, 0), torch.tensor([0.75, 0.25])) == pytest.approx(2 * 0.75)
    assert stats.switch_balance(counts(2, 2), torch.tensor([0.9, 0.1])) == pytest.approx(1)


def test_mutual_information_by_hand() -> None:
    assert stats.mutual_information(torch.tensor([[5, 0], [0, 5]])) == pytest.approx(1)
    assert stats.mutual_information(torch.tensor([[3, 3], [3, 3]])) == 0
    # P(e|a) = (3/4, 1/4), P(e|b) = (1/4, 3/4): 1 - H(1/4)
    quarter = -(0.25 * math.log2(0.25) + 0.75 * math.log2(0.75))
    assert stats.mutual_information(torch.tensor([[3, 1], [1, 3]])) == pytest.approx(1 - quarter)


def test_a_domain_with_more_text_does_not_count_for_more() -> None:
    assert stats.mutual_information(torch.tensor([[5000, 0], [0, 5]])) == pytest.approx(1)
    assert stats.mutual_information(torch.tensor([[5, 0], [0, 5], [0, 0]])) == pytest.approx(1)
    assert stats.mutual_information(torch.zeros(2, 2)) == 0


def test_own_share_by_hand() -> None:
    found = stats.own_share(torch.tensor([[3, 1], [2, 2], [4, 0]]), [0, None, 1], tokens_C=torch.tensor([4, 4, 0]))
    assert found == [0.75, None, None]


def test_cosines_by_hand() -> None:
    gate_ED = torch.tensor([[1.0, 0.0], [3.0, 3.0], [0.0, 0.0]])
    half = math.sqrt(0.5)
    assert stats.cosines(gate_ED).flatten().tolist() == pytest.approx([1, half, 0, half, 1, 0, 0, 0, 0])
    alike = stats.largest_cosine(gate_ED)
    assert alike is not None
    assert (alike[0], alike[1]) == (pytest.approx(half), (0, 1))
    assert stats.largest_cosine(gate_ED[:1]) is None


def test_the_most_alike_may_all_be_opposed() -> None:
    alike = stats.largest_cosine(torch.tensor([[1.0, 0.0], [-2.0, 0.0]]))
    assert alike is not None
    assert alike[0] == pytest.approx(-1)


def test_condition_number_by_hand() -> None:
    assert stats.condition_number(torch.diag(torch.tensor([6.0, 2.0, 3.0]))) == pytest.approx(3)
    assert stats.condition_number(torch.tensor([[1.0, 2.0, 0.0], [2.0, 4.0, 0.0]])) == math.inf
    assert stats.condition_number(torch.tensor([[0.5, 0.5]])) == pytest.approx(1)


def test_what_all_rows_share_does_not_count_when_centred() -> None:
    """Less their mean the rows are (1, 0), (0, 1), (-1, -1): A'A is ((2, 1), (1, 2)), with eigenvalues 3 and 1."""
    gate_ED = torch.tensor([[500.0, 1.0, 0.0], [500.0, 0.0, 1.0], [500.0, -1.0, -1.0]])
    assert stats.condition_number(gate_ED) > 400
    assert stats.centred_condition_number(gate_ED) == pytest.approx(math.sqrt(3))
    opposed = torch.tensor([[1.0, 2.0], [-1.0, -2.0]])  # two experts that are each other's negative prompts
    assert stats.condition_number(opposed) == math.inf
    assert stats.centred_condition_number(opposed) == pytest.approx(1)


def test_rows_that_cannot_be_told_apart_are_infinite_centred_too() -> None:
    assert stats.centred_condition_number(torch.ones(3, 4)) == math.inf
    assert stats.centred_condition_number(torch.tensor([[1.0, 0.0, 3.0], [1.0, 0.0, 3.0]])) == math.inf
    assert stats.centred_condition_number(torch.zeros(2, 2)) == math.inf
    assert stats.centred_condition_number(torch.tensor([[0.0, 7.0]])) == 1


def test_distances_are_those_of_the_vectors() -> None:
    """Experts 3, 4 and the reference itself away from it: a 3-4-5 triangle."""
    difference_EN = torch.tensor([[3.0, 0.0], [0.0, 4.0], [0.0, 0.0]], dtype=torch.float64)
    gram_EE = difference_EN @ difference_EN.T
    assert stats.pair_distances(gram_EE, scale=10).tolist() == [[0, 0.5, 0.3], [0.5, 0, 0.4], [0.3, 0.4, 0]]
    assert stats.reference_distances(gram_EE, scale=10).tolist() == [0.3, 0.4, 0]
    assert stats.off_diagonal(stats.pair_distances(gram_EE, scale=10)).tolist() == [0.5, 0.3, 0.4]


def test_others_are_the_next_best() -> None:
    ranked_TE = torch.tensor([[3, 1, 0, 2], [0, 1, 2, 3]])
    assert stats.others(ranked_TE, top_k=1).tolist() == [[1], [1]]
    assert stats.others(ranked_TE, top_k=2).tolist() == [[0, 2], [2, 3]]
    assert stats.others(ranked_TE, top_k=3).tolist() == [[2, 2, 2], [3, 3, 3]]
