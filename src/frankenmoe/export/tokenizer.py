"""A tokenizer's files -> the vocabulary of a GGUF file.

A tokenizer that llama.cpp would split differently is rejected.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeGuard

from frankenmoe.checkpoint.header import parse_object
from frankenmoe.checkpoint.jsonfile import small_bytes
from frankenmoe.errors import SourceError
from frankenmoe.export.front import RUN_IT, front_note
from frankenmoe.export.sentencepiece import read_model
from frankenmoe.planning.parts import Parts

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
SPACE = {"String": " "}  # as a pattern of tokenizer.json; where spaces are replaced first, it matches nothing
NO_MERGE = -1e9  # score of a piece that no merge makes; below every rank
PADDING_SCORE = -10000.0
# metadata for end tokens, in the order in which they are filled; llama.cpp ends a reply at any of them
ENDS = ("eos", "eot", "eom")
# end tokens that llama.cpp knows by their text
KNOWN_ENDS = frozenset({"<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|eom_id|>", "<EOT>"})

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_QWEN35 = _QWEN2.replace(r"]?\p{L}+", r"]?[\p{L}\p{M}]+").replace(r"[^\s\p{L}\p{N}]+", r"[^\s\p{L}\p{M}\p{N}]+")
_SEED = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}|{_REST}"
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_ENDINGS}"
    rf"|\p{{N}}{{1,3}}|{_REST}"
)
_EACH_DIGIT, _THOUSANDS = r"\p{N}", r"\d{1,3}(?=(?:\d{3})*\b)"
# (the regexes that split one after the other, whole words are looked up before merging) -> llama.cpp's name.
# Each last regex leaves no character out. Source: src/llama-vocab.cpp of llama.cpp, read in its version of 2026-11.
PRE_TOKENIZERS: Mapping[tuple[tuple[str, ...], bool], str] = {
    ((_GPT2,), False): "gpt-2",
    ((_EACH_DIGIT, _GPT2), False): "smollm",  # also Granite 3, Cohere
    ((_LLAMA3,), True): "llama-bpe",
    ((_LLAMA3,), False): "smaug-bpe",  # also GLM 4, Granite 4, Phi-4, SmolLM3
    ((_QWEN2,), False): "qwen2",
    ((_QWEN35,), False): "qwen35",
    ((_TEKKEN,), True): "tekken",
    ((_GPT4O,), False): "gpt-4o",  # Phi-4-mini
    ((_THOUSANDS, _GPT4O), False): "tiny_aya",
    ((_SEED,), False): "seed-coder",
}
# where llama.cpp's own regex is not quite the tokenizer's, found by running both (tests/export/test_pretokenizers.py)
_NOT_ASCII = (
    "words in which small and capital letters beyond a to z meet, and letters with combining marks (Hindi, Thai)"
)
INEXACT: Mapping[str, str] = {
    "tekken": _NOT_ASCII,
    "gpt-4o": _NOT_ASCII,
    "tiny_aya": "words with capitals inside (camelCase), and numbers next to Chinese letters",
}


@dataclass(frozen=True)
class Vocabulary:
    """The keys `tokenizer.ggml.*`. `model` is "llama" (SentencePiece, with scores) or "gpt2" (BPE, with merges).

    `front` is text of special tokens that the tokenizer puts before every text, and that a file cannot: the chat
    template has it, other prompts must. `notes` are sentences about what does not fit into a file.
    """

    model: str
    pre: str
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    add_bos: bool
    add_eos: bool
    scores: tuple[float, ...] = ()
    merges: tuple[str, ...] = ()
    add_space_prefix: bool = False
    special: Mapping[str, int] = field(default_factory=dict)
    chat_template: str | None = None
    front: str = ""
    notes: tuple[str, ...] = ()

    @property
    def marks(self) -> dict[str, str]:
        """The special tokens that a chat template may write."""
        return {f"{name}_token": self.tokens[self.special[name]] for name in ("bos", "eos")}


def vocabulary_of(parts: Parts) -> Vocabulary:
    """The vocabulary of a planned or built MoE. Raises SourceError as `read_vocabulary` does."""
    return read_vocabulary(parts.folder, parts.config, rows=parts.stock[1].dims(parts.config).vocab)


def read_vocabulary(folder: Path, config: Mapping[str, Any], *, rows: int) -> Vocabulary:
    """The vocabulary of a checkpoint's folder, padded to the `rows` of its embedding.

    Raises SourceError for a tokenizer that is missing, broken, or not supported by llama.cpp.
    """
    settings = _json(folder / "tokenizer_config.json")
    if (folder / "tokenizer.json").is_file():
        found = _from_json(folder / "tokenizer.json", settings)
    elif (folder / "tokenizer.model").is_file():
        found = _from_sentencepiece(folder, settings)
    else:
        raise SourceError(
            f"{folder} has neither tokenizer.json nor tokenizer.model, but a GGUF file needs a tokenizer",
            hint="copy the base's tokenizer files there",
        )
    if len(found.tokens) > rows:
        raise SourceError(
            f"the tokenizer in {folder} has {len(found.tokens)} tokens, but the embedding has only {rows} rows",
            hint="use the tokenizer and the weights of the same model",
        )
    if found.model == "llama" and found.types.count(BYTE) < 256:
        raise _cannot(folder, f"has {found.types.count(BYTE)} of the 256 byte tokens for unknown characters")
    missing = rows - len(found.tokens)
    padding = [f"[PAD{index}]" for index in range(len(found.tokens), rows)]
    types = (*found.types, *[UNUSED] * missing)
    tokens = _distinct(folder, (*found.tokens, *padding), types)
    special, lost = _special(folder, settings, config, tokens)
    apart = INEXACT.get(found.pre)
    notes = [f"a GGUF file has room for three end tokens: a reply does not end at {', '.join(lost)}"] if lost else []
    if apart:
        notes.append(f"llama.cpp's pre-tokenizer {found.pre} splits {apart} in another way than the tokenizer")
    found = replace(
        found,
        tokens=tokens,
        types=types,
        scores=(*found.scores, *[PADDING_SCORE] * missing) if found.scores else (),
        special={**special, **found.special},
        chat_template=_chat_template(folder, settings),
    )
    if found.front:
        notes.append(front_note(folder, found.front, found.chat_template, found.marks))
    return replace(found, notes=tuple(notes))


def _distinct(folder: Path, tokens: Sequence[str], types: Sequence[int]) -> tuple[str, ...]:
    """The tokens, with padding renamed if a real token has its name: llama.cpp aborts on two equal tokens."""
    taken = Counter(token for token, kind in zip(tokens, types, strict=True) if kind != UNUSED)
    twice = next((token for token, count in taken.items() if count > 1), None)
    if twice is not None:
        raise _cannot(folder, f"has the token {twice!r} with two ids")

    def free(name: str) -> str:
        return free(f"[{name}]") if name in taken else name

    return tuple(free(token) if kind == UNUSED else token for token, kind in zip(tokens, types, strict=True))


def _from_json(file: Path, settings: Mapping[str, Any]) -> Vocabulary:
    data = _json(file)
    model = data.get("model") or {}
    if model.get("type") != "BPE":
        raise _cannot(file, f"is a {model.get('type')} tokenizer, expected BPE (byte-level or SentencePiece's)")
    for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(key):
            raise _cannot(file, f"has {key} {model[key]!r}")
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model.get("merges") or []]
    begin, add_eos, front = _ends(file, data.get("post_processor") or {}, settings)
    tokens, types = _table(file, data)
    special = {"bos": tokens.index(begin)} if begin in tokens else {}
    if model.get("byte_fallback"):
        scores, prefix = _scores(tokens, types, merges), _space_prefix(file, data)
        found = Vocabulary("llama", "default", tokens, types, bool(begin), add_eos, scores, add_space_prefix=prefix)
    else:
        joined = tuple(" ".join(part.replace(" ", "Ġ") for part in merge) for merge in merges)
        pre = _pre_tokenizer(file, data)
        found = Vocabulary("gpt2", pre, tokens, types, bool(begin), add_eos, merges=joined)
    return replace(found, special=special, front=front)


def _table(file: Path, data: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """(tokens, types) by id; missing ids are unused."""
    model, by_id = data["model"], {}
    kinds: dict[int, int] = {}
    for token, index in model["vocab"].items():
        by_id[index] = token
        byte = bool(model.get("byte_fallback")) and re.fullmatch(r"<0x[0-9A-F]{2}>", token)
        kinds[index] = UNKNOWN if token == model.get("unk_token") else BYTE if byte else NORMAL
    for added in data.get("added_tokens") or []:
        index = added["id"]
        by_id[index] = added["content"]
        if kinds.get(index) not in (UNKNOWN, BYTE):
            kinds[index] = CONTROL if added.get("special") else USER_DEFINED
    if not by_id:
        raise _cannot(file, "has no tokens")
    ids = range(max(by_id) + 1)
    return tuple(by_id.get(index, f"[PAD{index}]") for index in ids), tuple(kinds.get(index, UNUSED) for index in ids)


def _scores(tokens: Sequence[str], types: Sequence[int], merges: Sequence[Sequence[str]]) -> tuple[float, ...]:
    """Scores from the ranks of merges, as SentencePiece merges the best score first. transformers 5 keeps no scores.

    Tokens that are no merges (Gemma's runs of spaces) have the best one, because transformers cuts them out first.
    llama.cpp's converter then writes equal scores, which merge from the left instead.
    """
    rank: dict[str, int] = {}
    for index, merge in enumerate(merges):
        rank.setdefault("".join(merge), index)
    return tuple(
        0.0 if kind != NORMAL else -1.0 - rank[token] if token in rank else NO_MERGE
        for token, kind in zip(tokens, types, strict=True)
    )


def _space_prefix(file: Path, data: Mapping[str, Any]) -> bool:
    """Whether a text gets a space in front. Rejects a SentencePiece tokenizer with other changes of the text."""
    normalizer, pre = data.get("normalizer") or {}, data.get("pre_tokenizer") or {}
    steps = normalizer.get("normalizers", [normalizer]) if normalizer else []
    prefix = replaced = False
    for step in steps:
        if step["type"] == "Prepend" and step.get("prepend") == "▁":
            prefix = True
        elif step["type"] == "Replace" and step.get("content") == "▁" and step.get("pattern") == SPACE:
            replaced = True
        else:
            raise _cannot(file, f"normalizes with {step['type']}")
    if pre.get("type") == "Metaspace":
        scheme = pre.get("prepend_scheme", "always" if pre.get("add_prefix_space", True) else "never")
        prefix = scheme != "never"
        if pre.get("split", True):
            raise _cannot(file, "splits at every space before merging")
    elif pre and not (replaced and pre.get("type") == "Split" and pre.get("pattern") == SPACE):  # Gemma's
        raise _cannot(file, f"splits with {pre.get('type')} before merging")
    return prefix


def _pre_tokenizer(file: Path, data: Mapping[str, Any]) -> str:
    """llama.cpp's name for the split before merging. Rejects splits that are not known to be equal."""
    normalizer, pre = data.get("normalizer") or {}, data.get("pre_tokenizer") or {}
    if normalizer and normalizer["type"] != "NFC":  # llama.cpp leaves NFC out, also for Qwen
        raise _cannot(file, f"normalizes with {normalizer['type']}")
    *splits, last = pre.get("pretokenizers", [pre])
    regexes = [*map(_regex, splits), *_of_bytes(last)]
    if any(step.get("behavior") == "Removed" for step in splits[:-1]):
        regexes.append(None)  # what the first regexes do not match would be lost
    name = PRE_TOKENIZERS.get((tuple(map(str, regexes)), bool(data["model"].get("ignore_merges"))))
    if name is None:
        raise _cannot(file, f"splits texts in a way that is none of {', '.join(PRE_TOKENIZERS.values())}")
    return name


def _regex(step: Mapping[str, Any]) -> str | None:
    """The regex whose matches a step splits off; None if it does another thing.

    Splits that drop what the regex does not match are taken as well: the last of every known split matches all.
    """
    match step:
        case {"type": "Digits", "individual_digits": True}:
            return _EACH_DIGIT
        case {"type": "Split", "pattern": {"Regex": str(regex)}, "behavior": "Isolated"}:
            return _spelt(regex)
        case {"type": "Split", "pattern": {"Regex": str(regex)}, "behavior": "Removed", "invert": True}:
            return _spelt(regex)
    return None


def _spelt(regex: str) -> str:
    """A regex in which line ends are written as escapes; some files have the characters themselves."""
    return regex.replace("\r", "\\r").replace("\n", "\\n")


def _of_bytes(step: Mapping[str, Any]) -> list[str | None]:
    """The regexes of the step that turns text into bytes: GPT-2's or none; [None] for another step."""
    if step.get("type") != "ByteLevel" or step.get("add_prefix_space"):
        return [None]
    return [_GPT2] if step.get("use_regex", True) else []


def _ends(file: Path, post: Mapping[str, Any], settings: Mapping[str, Any]) -> tuple[str, bool, str]:
    """(the begin token that every text gets in front, whether it gets the end token behind, other tokens in front).

    Rejects other tokens behind it.
    """
    for step in post.get("processors", [post]):
        if step.get("type") == "TemplateProcessing":
            kinds = ["Sequence" in piece for piece in step["single"]]
            at = kinds.index(True)
            ids = [piece["SpecialToken"]["id"] for piece in step["single"] if "SpecialToken" in piece]
            before, behind = ids[:at], ids[at:]
            if behind and behind != [_content(settings.get("eos_token")) or behind[0]]:
                raise _cannot(file, f"puts {' '.join(behind)} behind a text, expected its eos_token alone")
            known = not before or before == [_content(settings.get("bos_token")) or before[0]]
            text = "".join(before)
            return text if known else "", bool(behind), "" if known else text
    return "", False, ""


def _llama_ends(settings: Mapping[str, Any]) -> tuple[bool, bool]:
    """The same for a tokenizer without tokenizer.json; with that file, transformers 5 does not read these settings."""
    return bool(settings.get("add_bos_token", False)), bool(settings.get("add_eos_token", False))


def _content(said: object) -> object:
    """The text of a special token, which transformers writes as text or as an object."""
    return said.get("content") if isinstance(said, dict) else said


def _from_sentencepiece(folder: Path, settings: Mapping[str, Any]) -> Vocabulary:
    pieces, is_bpe, prefix = read_model(folder / "tokenizer.model")
    if not is_bpe:
        raise _cannot(folder / "tokenizer.model", "is a unigram SentencePiece model, expected BPE")
    table = dict(enumerate(pieces))
    added: dict[int, tuple[str, int]] = {
        index: (token, USER_DEFINED) for token, index in _json(folder / "added_tokens.json").items()
    }
    for index, entry in (settings.get("added_tokens_decoder") or {}).items():
        added[int(index)] = (entry["content"], CONTROL if entry.get("special") else USER_DEFINED)
    for index, (token, kind) in added.items():
        known = table.get(index)
        if known is None or known[2] == NORMAL:
            table[index] = (token, 0.0, kind)
    rows = [table.get(index, (f"[PAD{index}]", PADDING_SCORE, UNUSED)) for index in range(max(table) + 1)]
    tokens, scores, types = zip(*rows, strict=True)
    return Vocabulary("llama", "default", tokens, types, *_llama_ends(settings), scores=scores, add_space_prefix=prefix)


def _special(
    folder: Path, settings: Mapping[str, Any], config: Mapping[str, Any], tokens: Sequence[str]
) -> tuple[dict[str, int], tuple[str, ...]]:
    """(ids of bos, unknown, padding and up to three end tokens; the end tokens for which there is no room).

    End tokens are those of the tokenizer, of generation_config.json and of config.json, in this order. One is always
    written, because llama.cpp would use token 11 by default.
    """
    ids = {token: index for index, token in enumerate(tokens)}
    found: dict[str, int] = {}
    for key, name in (("bos", "bos"), ("unk", "unknown"), ("pad", "padding")):
        text = _content(settings.get(f"{key}_token"))
        index = ids.get(text) if isinstance(text, str) else config.get(f"{key}_token_id")
        index = index[0] if isinstance(index, list) and index else index
        if _is_id(index, tokens):
            found[name] = index
    text = _content(settings.get("eos_token"))
    said = [
        ids.get(text) if isinstance(text, str) else None,
        *_listed(_json(folder / "generation_config.json").get("eos_token_id")),
        *_listed(config.get("eos_token_id")),
    ]
    ends = list(dict.fromkeys(end for end in said if _is_id(end, tokens)))
    if not ends:
        if "bos" not in found:
            raise SourceError(
                f"the tokenizer in {folder} has no end token, for which llama.cpp would use token 11",
                hint="set eos_token in tokenizer_config.json",
            )
        ends = [found["bos"]]
    # the first stays, as `eos`; those that llama.cpp knows anyway need no room
    ends = [ends[0], *sorted(ends[1:], key=lambda end: tokens[end] in KNOWN_ENDS)]
    found |= dict(zip(ENDS, ends, strict=False))
    found.setdefault("bos", found["eos"])
    return found, tuple(repr(tokens[end]) for end in ends[len(ENDS) :] if tokens[end] not in KNOWN_ENDS)


def _listed(value: object) -> list[object]:
    return value if isinstance(value, list) else [value]


def _is_id(value: object, tokens: Sequence[str]) -> TypeGuard[int]:
    return type(value) is int and 0 <= value < len(tokens)


def _chat_template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return small_bytes(file).decode(errors="replace")
    said = settings.get("chat_template") or _json(folder / "chat_template.json").get("chat_template")
    if isinstance(said, list):  # several by name; a plain conversation uses the one called default
        said = next((entry.get("template") for entry in said if entry.get("name") == "default"), None)
    return said if isinstance(said, str) else None


def _json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        return parse_object(small_bytes(file))
    except ValueError as error:
        raise SourceError(f"{file} is not JSON: {error}", hint="fetch the file again") from error


def _cannot(file: Path, what: str) -> SourceError:
    return SourceError(
        f"{file} {what}, which llama.cpp does not support",
        hint=RUN_IT,
    )
