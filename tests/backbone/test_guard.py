"""The text that healing holds out, and how much of a change it keeps."""

import pytest

from frankenmoe.backbone.expert import surely_best
from frankenmoe.backbone.healed import ending
from frankenmoe.backbone.measure import Losses
from frankenmoe.data.blocks import Block, hold_out
from frankenmoe.gates.texts import OwnText

BEFORE = (2.0, 3.0, 2.5, 4.0)  # nats per token, by block


def losses(*changes: float) -> Losses:
    """Those before, plus a change for each block."""
    return Losses({"e0": tuple(before + change for before, change in zip(BEFORE, changes, strict=True))})


NOTHING = losses(0, 0, 0, 0)


@pytest.mark.parametrize(
    ("half", "whole", "kept"),
    [
        (losses(-0.1, -0.1, -0.1, -0.1), losses(0.1, 0.1, 0.1, 0.1), 0.5),
        (losses(-0.1, -0.1, -0.1, -0.1), losses(-0.3, -0.3, -0.3, -0.3), 1.0),
        # mean -0.05, standard error 0.0866: one block says so, the others do not
        (losses(-0.3, 0.05, 0.05, 0), losses(0.1, 0.1, 0.1, 0.1), 0.0),
        # all of the change is better by 0.01 +- 0.0286, so half of it, which surely lowers the loss, will do
        (losses(-0.1, -0.1, -0.1, -0.1), losses(-0.1, -0.18, -0.04, -0.12), 0.5),
        (losses(0.1, 0.1, 0.1, 0.1), losses(0.2, 0.2, 0.2, 0.2), 0.0),
    ],
)
def test_kept_is_the_smallest_share_within_one_standard_error(half: Losses, whole: Losses, kept: float) -> None:
    assert surely_best({0.0: NOTHING, 0.5: half, 1.0: whole}) == kept


def test_differences_are_paired_by_block() -> None:
    """The losses of the blocks differ by 2 nats, their changes by less than 0.01."""
    assert surely_best({0.0: NOTHING, 1.0: losses(-0.02, -0.025, -0.03, -0.025)}) == 1.0


@pytest.mark.parametrize(("count", "held"), [(8, 2), (16, 5), (80, 24), (128, 24), (1000, 100)])
def test_the_end_of_the_text_is_held_out(count: int, held: int) -> None:
    """Nothing is kept of what fits hold out, so text that is held out from both is left for an evaluation."""
    blocks = [Block((1, index), (False, True), span=(index, index + 1)) for index in range(count)]
    fits_keep, fits_hold = map(tuple, hold_out(blocks))

    found = ending(OwnText("e0", (0,), False, ("e0.txt",), fits_keep, fits_hold))

    assert found.held == tuple(blocks[-held:])
    assert found.kept == tuple(block for block in blocks[:-held] if block in fits_keep)
    assert found.kept == fits_keep[: len(found.kept)]  # by which the record of an artifact tells what was read
