"""Short texts that tokenizers split differently: spaces, digits, scripts, emoji, code, special tokens."""

from typing import Any

HARD = (
    "Hello world", " a leading space", "two  spaces   and\ttabs\t\there", "line\nbreaks\r\n\n\nat the end \n",
    "1234567890 3.14 2,000,000 007", "don't WE'LL I'd they've", "naïve façade, Größe, Ångström", "İstanbul ŞİİR ẞ",
    "中文字符和标点。東京タワー", "Привет, мир! γειά σου", "مرحبا בעולם", "नमस्ते ไทย 한국어", "🙂🚀👩‍👩‍👧 🇫🇷",
    "def f(x):\n    return {'a': x[0] ** 2}  # note\n", "<html><b>&amp;</b></html>", "\u00a0thin\u2009spaces\u200b",
    "aaaaaaaaaaaaaaaaaaaaaaaa", "CamelCase snake_case kebab-case", "“quotes” — ‘dashes’…", "\u0000\u0007", "",
)  # fmt: skip
MOST_SPECIAL = 40


def hard_texts(tokenizer: Any, *, rows: int) -> list[str]:
    """HARD, and between words the tokenizer's special tokens among the first `rows`, which a model can read."""
    known = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}
    special = sorted(token for token in known if tokenizer.convert_tokens_to_ids(token) < rows)[:MOST_SPECIAL]
    return [*HARD, *(f"one{token}two {token} three" for token in special)]


def token_ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """The ids of every text, as a model gets them: with the tokens that the tokenizer puts around a text."""
    return [list(tokenizer(text)["input_ids"]) for text in texts]
