"""llama.cpp's pre-tokenizers against the tokenizers they stand for, on hard text.

The merges here know no borders between words, so two splits that differ anywhere give different tokens.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import CohereTokenizer, GemmaTokenizer, PreTrainedTokenizerFast
from transformers.models.qwen3_5.tokenization_qwen3_5 import Qwen3_5Tokenizer

import gguftools
from frankenmoe.errors import SourceError
from frankenmoe.export.probe import split_otherwise
from frankenmoe.export.tokenizer import INEXACT, PRE_TOKENIZERS, Vocabulary, read_vocabulary

pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")

HARD: Mapping[str, str] = {
    "spaces": "a  b   c    d\te\t\tf \t g\n h\r\n i \n\n  j\r\n\r\n k\u00a0l\u2003m   \n\n\n  ",
    "digits": "1 12 123 1234 12345 1234567 3.14159 1,234,567 2024-11-30 0x1F 10% a1b22c333 v1.2.3",
    "other numbers": "x\u00b2 y\u00b3 \u00bd \u2177 \u2163 ١٢٣٤٥ १२३४ ①②③ 百二十 𝟙𝟚𝟛𝟜",
    "CJK": "東京は2024年に1314151天です。我想在apple工作。한국어 텍스트와 영어 words 섞기。「引用」、テスト！",
    "emoji": "🙂🙃🚀 👩\u200d👩\u200d👧\u200d👦 🏳\ufe0f\u200d🌈 ✅ 1\ufe0f\u20e3 😶\u200d🌫\ufe0f(emoji)",
    "contractions": "I'm don't DON'T we'Ve they'LL it's ''quoted'' o'clock 's 're l'été",
    "accents": "école École ÉCOLE—naïve façade Größe Żółć İstanbul ŞİİR Ελληνικά Привет МИР",
    "mixed case": "camelCase HTTPServer iPhone éÉcole carteÉlectronique ÀB aÀb МосКва ǅungla",
    "marks": "नमस्ते दुनिया สวัสดีชาวโลก tiếng Việt e\u0301cole ab\u0308c বাংলা עִבְרִית عَرَبِيّ",
    "code": "x = {'a': [1, 2.5e-3]}; // comment\n/* c */ a->b != c && d || !e; $100 €5 ~/x/y/ http://a.b/c?d=e&f\nf();\n\ng();\r\n}\n",
    "specials": "</s> in <s> and <unk>x",
}  # fmt: skip
# what of it llama.cpp splits otherwise
APART: Mapping[str, Sequence[str]] = {
    "tekken": ["accents", "mixed case", "marks"],
    "gpt-4o": ["accents", "mixed case", "marks"],
    "tiny_aya": ["CJK", "mixed case"],
}
WHOLE = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def merges(*, ignore: bool = False) -> Tokenizer:
    """A byte-level BPE whose tokens are whole words of the hard text, with what stands around them."""
    raw = Tokenizer(models.BPE(ignore_merges=ignore))
    raw.pre_tokenizer = WHOLE
    trainer = trainers.BpeTrainer(
        vocab_size=6000,
        special_tokens=gguftools.SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        max_token_length=24,
    )
    raw.train_from_iterator([part for text in HARD.values() for part in [text, text, *text.split(" ")]], trainer)
    raw.decoder = decoders.ByteLevel()
    return raw


def splits(regexes: Sequence[str], **behavior: Any) -> pre_tokenizers.PreTokenizer:
    given = {"behavior": "isolated"} | behavior
    return pre_tokenizers.Sequence([*(pre_tokenizers.Split(Regex(regex), **given) for regex in regexes), WHOLE])


def saved(folder: Path, raw: Tokenizer) -> tuple[Vocabulary, Any]:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.save_pretrained(folder)
    return read_vocabulary(folder, {}, rows=len(tokenizer)), tokenizer


@pytest.mark.parametrize(("key", "name"), PRE_TOKENIZERS.items(), ids=PRE_TOKENIZERS.values())
def test_hard_text(key: tuple[tuple[str, ...], bool], name: str, tmp_path: Path) -> None:
    regexes, ignore = key
    raw = merges(ignore=ignore)
    raw.pre_tokenizer = splits(regexes)
    if name in ("gpt-2", "smollm"):  # they have GPT-2's regex inside the step for bytes
        digits = [pre_tokenizers.Digits(individual_digits=True)] if name == "smollm" else []
        raw.pre_tokenizer = pre_tokenizers.Sequence([*digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    vocabulary, tokenizer = saved(tmp_path, raw)
    assert vocabulary.pre == name
    odd = split_otherwise(vocabulary, tokenizer, list(HARD.values()))
    assert [kind for kind, text in HARD.items() if text in odd] == list(APART.get(name, ()))
    assert bool(vocabulary.notes) == (name in INEXACT)


def test_the_splits_tell_the_hard_text_apart() -> None:
    """Else the comparison above could not fail."""
    raw, found = merges(), set()
    for regexes, _ in PRE_TOKENIZERS:
        raw.pre_tokenizer = splits(regexes)
        found.add(tuple(tuple(raw.encode(text).ids) for text in HARD.values()))
    assert len(found) == len({regexes for regexes, _ in PRE_TOKENIZERS})


def test_where_a_split_is_not_exact_it_is_named(tmp_path: Path) -> None:
    raw = merges()
    raw.pre_tokenizer = splits(next(regexes for (regexes, _), name in PRE_TOKENIZERS.items() if name == "gpt-4o"))
    (note,) = saved(tmp_path, raw)[0].notes
    assert note.startswith("llama.cpp's pre-tokenizer gpt-4o splits words in which")


@pytest.mark.parametrize("name", ["smaug-bpe", "gpt-4o", "qwen2"])
def test_what_a_split_leaves_out_is_nothing(name: str, tmp_path: Path) -> None:
    """Phi-4's files drop what the regex does not match, which is nothing."""
    regexes = next(regexes for (regexes, _), each in PRE_TOKENIZERS.items() if each == name)
    kept, dropped = merges(), merges()
    kept.pre_tokenizer, dropped.pre_tokenizer = splits(regexes), splits(regexes, behavior="removed", invert=True)
    assert [kept.encode(text).ids for text in HARD.values()] == [dropped.encode(text).ids for text in HARD.values()]
    assert saved(tmp_path, dropped)[0].pre == name


def test_line_ends_in_a_regex_are_read_in_both_spellings(tmp_path: Path) -> None:
    regexes = next(regexes for (regexes, _), name in PRE_TOKENIZERS.items() if name == "seed-coder")
    raw = merges()
    raw.pre_tokenizer = splits([regex.replace(r"\r", "\r").replace(r"\n", "\n") for regex in regexes])
    assert saved(tmp_path, raw)[0].pre == "seed-coder"


def test_a_first_split_that_drops_text_is_refused(tmp_path: Path) -> None:
    regexes = next(regexes for (regexes, _), name in PRE_TOKENIZERS.items() if name == "tiny_aya")
    raw = merges()
    raw.pre_tokenizer = splits(regexes, behavior="removed", invert=True)
    with pytest.raises(SourceError, match="none of gpt-2"):
        saved(tmp_path, raw)


@pytest.mark.parametrize(("made", "name"), [(CohereTokenizer, "smollm"), (Qwen3_5Tokenizer, "qwen35")])
def test_tokenizers_of_transformers_are_known(made: Any, name: str, tmp_path: Path) -> None:
    model = json.loads(merges().to_str())["model"]
    made(vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]]).save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    assert read_vocabulary(tmp_path, {}, rows=7000).pre == name


def test_gemma(tmp_path: Path) -> None:
    """SentencePiece with runs of spaces as tokens of their own, and a split that never happens."""
    raw = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    raw.normalizer = normalizers.Replace(" ", "▁")
    raw.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    octets = [f"<0x{byte:02X}>" for byte in range(256)]
    specials = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    trainer = trainers.BpeTrainer(
        vocab_size=1200, special_tokens=[*specials, *octets], limit_alphabet=200, show_progress=False
    )
    words = [word for text in HARD.values() for word in text.split(" ")]
    raw.train_from_iterator([*words, *words, *(f" {word}" for word in words)], trainer)
    model = json.loads(raw.to_str())["model"]
    tokenizer = GemmaTokenizer(model["vocab"], [tuple(pair) for pair in model["merges"]])
    tokenizer.add_tokens(["▁" * count for count in range(2, 9)] + ["\n\n", "<table>"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<start_of_turn>", "<end_of_turn>"]})
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 2)]
    )
    tokenizer.save_pretrained(tmp_path)
    vocabulary = read_vocabulary(tmp_path, {}, rows=len(tokenizer) + 5)
    assert (vocabulary.model, vocabulary.add_bos, vocabulary.add_space_prefix) == ("llama", True, False)
    more = [
        "<start_of_turn>user\nhi<end_of_turn>\n",
        "two  three   five     \n\n<table>  x",
        "       seven",
        "x" + " " * 11,
    ]
    assert split_otherwise(vocabulary, tokenizer, [*HARD.values(), *more]) == []
