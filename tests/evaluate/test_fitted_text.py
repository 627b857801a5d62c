"""The held-out text of an evaluation: nothing that routers were fitted to or experts were healed from."""

import random
from pathlib import Path

import pytest

import tiny
from frankenmoe.data.blocks import Span, hold_out, joined_spans, text_blocks
from frankenmoe.data.documents import read_documents
from frankenmoe.evaluate.domains import DomainText, read_domain
from frankenmoe.evaluate.run import _spans

CHARACTERS = 20_000
CUT, FIT = 127, 255  # characters of a block: BOS is the first of its 128 or 256 tokens


@pytest.fixture
def text(tmp_path: Path) -> str:
    found = "".join(random.Random(0).choices("abcdefghijklmnopqrstuvwxyz", k=CHARACTERS))
    (tmp_path / "a.txt").write_text(found)
    return found


def places(text: str, folder: Path, *fitted: Span) -> list[int]:
    """Where the blocks of an evaluation begin in the text."""
    tokenizer = tiny.make_tokenizer()
    source = DomainText("a", ("a.txt",), folder, held_out=True, fitted=fitted)
    blocks = read_domain(source, tokenizer, limit=None)
    return [text.index(tokenizer.decode(block.ids, skip_special_tokens=True)) for block in blocks]


def spans(folder: Path, *, length: int, limit: int | None = None) -> list[Span]:
    """Where a fit to blocks of this length read."""
    blocks = text_blocks(read_documents(["a.txt"], folder=folder), tiny.make_tokenizer(), length=length, limit=limit)
    return joined_spans(hold_out(blocks)[0])


def test_what_was_fitted_is_not_held_out(text: str, tmp_path: Path) -> None:
    """Training holds out every tenth block of 128 tokens; of those, a fit must have held out every character."""
    cut = [CUT * at for at in range(9, CHARACTERS // CUT, 10)]
    fitted = {place for at in range(CHARACTERS // FIT) if at % 10 != 9 for place in range(FIT * at, FIT * at + FIT)}

    assert places(text, tmp_path) == cut
    found = places(text, tmp_path, *spans(tmp_path, length=256))

    assert found == [start for start in cut if not fitted & set(range(start, start + CUT))]
    assert 0 < len(found) < len(cut)


def test_text_behind_what_was_fitted_stays(text: str, tmp_path: Path) -> None:
    """A fit to two blocks of 256 tokens read 510 characters; the first block that training holds out is behind them."""
    few, all_of_it = spans(tmp_path, length=256, limit=3), spans(tmp_path, length=256)

    assert few == [(0, 2 * FIT)]
    assert places(text, tmp_path, *few) == places(text, tmp_path)
    assert places(text, tmp_path, *few, *all_of_it) == places(text, tmp_path, *all_of_it)


def test_text_that_was_fitted_whole_is_read_all_the_same(text: str, tmp_path: Path) -> None:
    """Where nothing is left, a loss on fitted text is better than none."""
    both = (*spans(tmp_path, length=256), *spans(tmp_path, length=64))

    assert places(text, tmp_path, *both) == places(text, tmp_path)


def test_a_record_without_places_counts_as_the_beginning_of_the_text() -> None:
    """Records of before named only the amount; every tenth block of what a fit read was held out."""
    assert _spans({"tokens": 900, "block": 100}) == [(0, 1100)]
    assert _spans({"tokens": 900, "block": 100, "spans": [[5, 9]]}) == [(5, 9)]
    assert _spans({"tokens": 900}) == []
