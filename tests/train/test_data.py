"""Which block comes when follows from the item's number alone, in the proportions asked for."""

from collections import Counter
from pathlib import Path

import corpus
import pytest

import tiny
from frankenmoe.data.blocks import Block
from frankenmoe.errors import PlanError, SourceError
from frankenmoe.train.data import Domain, Mixture, order, read_domains


def domain(name: str, *, blocks: int, weight: float = 1.0, first: int = 2) -> Domain:
    made = tuple(Block((0, first + at, first), (False, True, True)) for at in range(blocks))
    return Domain(name, -1, weight, made, made[:1])


def test_domains_come_by_weight_in_every_stretch() -> None:
    domain_N, _ = order([domain("a", blocks=5, weight=3), domain("b", blocks=5)], items=80, seed=0)
    assert Counter(domain_N.tolist()) == {0: 60, 1: 20}
    assert all(Counter(domain_N[start : start + 4].tolist()) == {0: 3, 1: 1} for start in range(0, 80, 4))


def test_every_block_is_used_before_any_returns() -> None:
    _, block_N = order([domain("a", blocks=7)], items=21, seed=3)
    rounds = [block_N[start : start + 7].tolist() for start in (0, 7, 14)]
    assert [sorted(each) for each in rounds] == [list(range(7))] * 3
    assert len({tuple(each) for each in rounds}) > 1


def test_an_item_depends_on_nothing_before_it() -> None:
    domains = [domain("a", blocks=7, first=10), domain("b", blocks=3, weight=0.3, first=50)]
    long, short = (order(domains, items=items, seed=1) for items in (90, 40))
    assert [each[:40].tolist() for each in long] == [each.tolist() for each in short]
    mixture = Mixture(domains, items=90, seed=1)
    late = mixture[71]["input_ids"].tolist()
    assert late == Mixture(domains, items=90, seed=1)[71]["input_ids"].tolist()
    assert mixture[0]["labels"][0] == -100


def read(folder: Path, data: dict[str, list[str]], **changes: object) -> tuple[Domain, ...]:
    return read_domains(
        data, tiny.make_tokenizer(), folder=folder, settings=corpus.settings(**changes), experts=["e0", "e1"], vocab=128
    )


def test_held_out_blocks_are_no_training_blocks(tmp_path: Path) -> None:
    one, two = read(tmp_path, corpus.write_texts(tmp_path))
    assert (one.owner, two.owner) == (0, 1)
    assert len(one.held) == 4
    assert all(len(block.ids) == 16 for block in (*one.blocks, *one.held))
    assert not set(map(id, one.held)) & set(map(id, one.blocks))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "does not exist"),
        ("", "holds no text"),
        ("abc", "fewer tokens than one block"),
        (b"\xff\xfe\xfa", "not UTF-8"),
    ],
)
def test_text_that_cannot_be_used_is_named(text: str | bytes | None, says: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "t.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(SourceError, match=f"the data of e1: .*{says}"):
        read(tmp_path, corpus.write_texts(tmp_path) | {"e1": ["t.txt"]})


def test_a_broken_line_and_a_conversation_without_a_reply_are_named(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"text": "abc"}\n{"text": \n')
    with pytest.raises(SourceError, match=r"t\.jsonl:2"):
        read(tmp_path, {"e0": ["t.jsonl"]})
    (tmp_path / "t.jsonl").write_text('{"conversations": [{"from": "human", "value": "hello"}]}\n')
    with pytest.raises(SourceError, match=r"t\.jsonl:1.*repl"):
        read(tmp_path, {"e0": ["t.jsonl"]})


def test_no_data_and_a_weight_for_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="nothing to learn from"):
        read(tmp_path, {})
    with pytest.raises(PlanError, match="e2, which has no data"):
        read(tmp_path, corpus.write_texts(tmp_path), weights={"e2": 2.0})
