"""Text that is told bit by bit is the text of the whole answer; stop strings end it wherever they are cut."""

import random
from collections.abc import Callable
from typing import Any

import pytest

import gguftools
import tiny
from frankenmoe.serve.writing import Decoder, Stopper

TOKENIZERS: dict[str, Callable[[], Any]] = {
    "bpe": lambda: gguftools.bpe("gpt-2"),
    "sentencepiece": gguftools.sentencepiece,
    "characters": tiny.make_tokenizer,
}


@pytest.mark.parametrize("name", list(TOKENIZERS))
def test_pieces_make_the_whole_text(name: str) -> None:
    tokenizer = TOKENIZERS[name]()
    chance = random.Random(0)
    texts = ["東京 🙂 déjà vu", "  two  spaces\n\n", "def f(x):\n    return x"]
    answers = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    # bytes in any order are no text, and tokenizers then changes what it made of the first ones
    usual = [id for word, id in tokenizer.get_vocab().items() if not word.startswith("<0x")]
    answers += [[chance.choice(usual) for _ in range(60)] for _ in range(200)]
    for ids in answers:
        decoder = Decoder(tokenizer)
        pieces = [decoder.add(token) for token in ids] + [decoder.rest()]
        assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True)


def test_no_piece_ends_within_a_character() -> None:
    tokenizer = gguftools.bpe("gpt-2")
    decoder = Decoder(tokenizer)
    pieces = [decoder.add(token) for token in tokenizer("🙂🙂")["input_ids"]]
    assert set(pieces) == {"", "🙂"}


@pytest.mark.parametrize(
    ("text", "stops", "told"),
    [
        ("one two three", ["two"], "one "),
        ("one two three", ["three", "two"], "one "),
        ("aaab", ["aab"], "a"),
        ("ababac", ["abac"], "ab"),
        ("stop", ["stop"], ""),
        ("one st", ["stop"], "one st"),
        ("one", [], "one"),
    ],
)
@pytest.mark.parametrize("size", [1, 2, 100])
def test_a_stop_string_is_found_in_any_pieces(text: str, stops: list[str], told: str, size: int) -> None:
    stopper = Stopper(stops)
    found = ""
    for at in range(0, len(text), size):
        found += stopper.add(text[at : at + size])
        if stopper.stopped:
            break
    assert found + ("" if stopper.stopped else stopper.rest()) == told
    assert stopper.stopped == any(stop in text for stop in stops)
