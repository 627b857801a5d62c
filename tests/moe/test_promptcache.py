"""A history that is known is not read again, and the reply is the same."""

from pathlib import Path
from typing import Any

import pytest
import torch

import family_cases
import frankenmoe as fm
import tiny
from frankenmoe.moe import promptcache
from frankenmoe.moe.generate import reply
from frankenmoe.moe.promptcache import PromptCache, common, size

CASES = ("llama", "mistral-window", "gemma3", "gemma4", "qwen3_5", "lfm2", "granite4", "cohere2")


class Counted:
    """A cache of transformers as far as PromptCache looks at it."""

    def __init__(self, length: int, *, croppable: bool = True) -> None:
        self.length, self.croppable = length, croppable

    def get_seq_length(self) -> int:
        return self.length

    def crop(self, change: int) -> None:
        if not self.croppable:
            raise RuntimeError("linear attention")
        assert change < 0
        self.length += change


@pytest.mark.parametrize("name", CASES)
def test_replies_with_a_known_history_are_the_same(name: str, tmp_path: Path) -> None:
    case = family_cases.CASES[name]
    base, one = (family_cases.make_parent(tmp_path / str(seed), case, seed=seed) for seed in range(2))
    moe: Any = fm.load(family_cases.write_recipe(tmp_path / "r.yml", case, base, [base, one]))
    tokenizer, cache = moe.tokenizer(), PromptCache()
    history = [{"role": "user", "content": "a beginning"}]
    for more in (" goes", " on", " to end"):
        plain = reply(moe, tokenizer, history, max_new_tokens=4)
        assert reply(moe, tokenizer, history, max_new_tokens=4, cache=cache).text == plain.text
        again = reply(moe, tokenizer, history, max_new_tokens=4, cache=cache)  # from a shorter beginning
        assert (again.text, again.tokens) == (plain.text, plain.tokens)
        history = [*history, {"role": "assistant", "content": plain.text}, {"role": "user", "content": more}]
    known = reply(moe, tokenizer, history, max_new_tokens=4, cache=cache)
    assert known.tokens == reply(moe, tokenizer, history, max_new_tokens=4).tokens
    assert len(known.read) == len(known.layers[0].ids_TK)
    if name == "llama":
        assert len(known.read) <= len(" to end") + 5  # and what was written, and the last token before
        assert known.read == known.tokens[-1 - len(known.read) : -1]


def test_what_was_computed_on_the_other_side_of_a_turn_is_not_taken() -> None:
    cache = PromptCache(turns=[4])
    cache.keep([1, 2, 3, 4], short := Counted(4), prompt=4)
    assert cache.take([1, 2, 3, 4, 5]) == (None, 0)
    assert cache.take([1, 2, 3, 4]) == (short, 3)
    cache.keep([1, 2, 3, 4, 5], long := Counted(5), prompt=5)
    assert cache.take([1, 2, 3, 4]) == (None, 0)
    assert cache.take([1, 2, 3, 4, 5, 6]) == (long, 5)


def test_the_longest_beginning_is_taken_and_cut() -> None:
    cache = PromptCache()
    cache.keep([1, 2, 3, 4], one := Counted(4), prompt=2)
    cache.keep([1, 2, 9], Counted(3), prompt=3)
    assert cache.take([1, 2, 3, 5, 6]) == (one, 3)
    assert one.length == 3
    assert cache.take([1, 2, 3, 5, 6])[1] == 2  # the other one; the first was taken
    assert cache.take([1, 2, 3, 5, 6]) == (None, 0)


def test_what_is_not_kept_and_not_taken() -> None:
    cache = PromptCache(sequences=2)
    cache.keep([1, 2, 3], Counted(2), prompt=2)  # of other tokens than it says
    cache.keep([1, 2, 3], None, prompt=2)
    assert cache.take([1, 2, 3, 4]) == (None, 0)
    cache.keep([1, 2, 3], Counted(3), prompt=3, way="one")
    assert cache.take([1, 2, 3, 4], way="other") == (None, 0)
    assert cache.take([1, 8, 9], way="one") == (None, 0)  # a third of the prompt
    assert cache.take([1, 2, 3], way="one")[1] == 2  # one token is left to compute
    cache.keep([1, 2, 3], Counted(3, croppable=False), prompt=3)
    assert cache.take([1, 2, 4, 5]) == (None, 0)
    for first in (5, 6, 7):
        cache.keep([first, 1], Counted(2), prompt=2)
    assert cache.take([5, 1, 1]) == (None, 0)  # the oldest
    assert cache.take([7, 1, 1])[1] == 2
    cache.clear()
    assert cache.take([6, 1, 1]) == (None, 0)


def test_only_the_latest_may_be_large(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    base, one = (tiny.make_parent(tmp_path / name) for name in ("base", "one"))
    model: Any = fm.load(tiny.write_recipe(tmp_path / "r.yml", base, [base, one])).model
    caches = [model(torch.tensor([ids])).past_key_values for ids in ([1, 2, 3], [4, 5, 6, 7])]
    assert [size(cache) for cache in caches] == [2 * 2 * 2 * 8 * 4 * tokens for tokens in (3, 4)]  # k, v; layers; heads
    monkeypatch.setattr(promptcache, "BYTES", sum(map(size, caches)) - 1)
    cache = PromptCache()
    cache.keep([1, 2, 3], caches[0], prompt=3)
    assert cache.take([1, 2, 3, 4])[1] == 3
    cache.keep([1, 2, 3], caches[0], prompt=3)
    cache.keep([4, 5, 6, 7], caches[1], prompt=4)
    assert cache.take([1, 2, 3, 4]) == (None, 0)
    assert cache.take([4, 5, 6, 7, 8])[1] == 4


def test_common_beginnings() -> None:
    assert common([1, 2, 3], [1, 2, 4]) == 2
    assert common([], [1]) == 0
    assert common([1, 2], [1, 2, 3]) == 2
