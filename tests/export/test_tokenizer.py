"""llama.cpp splits texts as the source's tokenizer does, and a tokenizer that it would split otherwise is refused."""

import json
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import gguftools
import tiny
from frankenmoe.errors import SourceError
from frankenmoe.export import run as exporting
from frankenmoe.export.llama import Engine
from frankenmoe.export.ollama import shape_of
from frankenmoe.export.probe import split_otherwise
from frankenmoe.export.run import check_files, export_gguf
from frankenmoe.export.tokenizer import BYTE, CONTROL, PRE_TOKENIZERS, UNUSED, USER_DEFINED, read_vocabulary

pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")

QWEN2 = {
    "type": "Split",
    "pattern": {"Regex": next(regexes[0] for (regexes, _), name in PRE_TOKENIZERS.items() if name == "qwen2")},
    "behavior": "Isolated",
}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
PLAIN = BYTES | {"use_regex": False}
DIGITS = {"type": "Digits", "individual_digits": True}
TEXTS = [
    *gguftools.WORDS.splitlines(keepends=True),
    *(word for word in gguftools.WORDS.split()),
    "hello  world", "tab\there", "end\n", "a\n\n\nb", "x = {'a': [1, 2.5e-3]}", "12345678", "don't DON'T I'LL we'Ve",
    "中文字符和标点。", "🙂🙃🚀 emoji", "İstanbul ŞİİR", "école—ÉCOLE", "a" * 50,
    "</s> in <s>", "\u00a0nbsp\u2009thin",
]  # fmt: skip


def around(*specials: str) -> dict[str, Any]:
    """What puts these in front of every text."""
    single = [{"SpecialToken": {"id": token, "type_id": 0}} for token in specials]
    return {"type": "TemplateProcessing", "single": [*single, {"Sequence": {"id": "A", "type_id": 0}}]}


def behind(special: str) -> dict[str, Any]:
    template = around(special)
    return template | {"single": template["single"][::-1]}


def glm(*, template: str) -> PreTrainedTokenizerFast:
    """A tokenizer that puts two tokens before every text, as GLM 4's does."""
    tokenizer = gguftools.bpe("smaug-bpe")
    tokenizer.add_special_tokens({"additional_special_tokens": ["[gMASK]", "<sop>", "<|user|>"]})
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in ("[gMASK]", "<sop>")}
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[gMASK] <sop> $A", special_tokens=list(ids.items())
    )
    tokenizer.chat_template = template
    return tokenizer


GLM_TEMPLATE = "[gMASK]<sop>{% for message in messages %}<|user|>{{ message.content }}{% endfor %}"


def test_tokens_in_front_that_the_chat_template_has(tmp_path: Path) -> None:
    """Raw prompts must begin with them: so `export` says, and so prompts are compared."""
    base, *others = gguftools.parents(
        tmp_path, "llama", tokenizer=glm(template=GLM_TEMPLATE), max_position_embeddings=256
    )
    recipe = tiny.write_recipe(tmp_path / "r.yml", base, others)
    files = export_gguf(recipe, tmp_path / "out", types=["f32"], allow_random=True)
    assert [note for note in files[0].notes if "puts [gMASK]<sop> before every text" in note]
    (checked,) = check_files(recipe, files)
    assert checked.same_prompts == checked.prompts == checked.same_replies > 0
    tokenizer = AutoTokenizer.from_pretrained(base)
    vocabulary = read_vocabulary(base, {}, rows=len(tokenizer))
    assert split_otherwise(vocabulary, tokenizer, TEXTS) == []
    assert split_otherwise(replace(vocabulary, front=""), tokenizer, TEXTS) == TEXTS
    chat = [{"role": "user", "content": "hello"}]
    running = Engine(files[0].path, context=64)
    ids = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=True)["input_ids"]
    assert gguftools.tokenize(running, tokenizer.apply_chat_template(chat, tokenize=False)) == ids


def test_one_token_in_front_is_the_begin_token_where_the_settings_name_none(tmp_path: Path) -> None:
    tokenizer = gguftools.bpe("smaug-bpe", bos=True)
    tokenizer.bos_token = None
    tokenizer.save_pretrained(tmp_path)
    vocabulary = read_vocabulary(tmp_path, {}, rows=len(tokenizer))
    assert split_otherwise(vocabulary, AutoTokenizer.from_pretrained(tmp_path), TEXTS) == []


SAID = "{% for message in messages %}{{ message.content }}{% endfor %}"
OF_SYSTEM = "{% if messages[0].role == 'system' %}[gMASK]<sop>{% endif %}"
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"


@pytest.mark.parametrize(
    "template",
    [
        SAID,
        "{# [gMASK]<sop> #}" + SAID,
        SAID + "[gMASK]<sop>",
        OF_SYSTEM + SAID,
        OF_SYSTEM.replace("==", "!=") + SAID,
        OF_SYSTEM.replace("==", "!=").replace("[gMASK]", "[gMASK] ") + SAID,
    ],
)
def test_tokens_in_front_that_the_chat_template_does_not_write(template: str, tmp_path: Path) -> None:
    tokenizer = glm(template=template)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(SourceError, match=r"puts \[gMASK\]<sop> before a text"):
        read_vocabulary(tmp_path, {}, rows=len(tokenizer))


@pytest.mark.parametrize("template", ["{{ '[gMASK]' + '<sop>' }}" + SAID, "[gMASK]<sop>" + NO_SYSTEM + SAID])
def test_tokens_in_front_that_the_chat_template_writes(template: str, tmp_path: Path) -> None:
    tokenizer = glm(template=template)
    tokenizer.save_pretrained(tmp_path)
    vocabulary = read_vocabulary(tmp_path, {}, rows=len(tokenizer))
    assert vocabulary.front == "[gMASK]<sop>"
    assert shape_of(vocabulary).begin == "[gMASK]<sop>"


def engine(tmp_path: Path, tokenizer: Any) -> Engine:
    base, *others = gguftools.parents(tmp_path, "llama", tokenizer=tokenizer)
    path = tiny.write_recipe(tmp_path / "r.yml", base, others)
    (file,) = export_gguf(path, tmp_path / "out", types=["f16"], allow_random=True)
    return Engine(file.path, context=64)


@pytest.mark.parametrize("name", PRE_TOKENIZERS.values())
def test_byte_level_bpe(name: str, tmp_path: Path) -> None:
    tokenizer = gguftools.bpe(name, bos=name == "llama-bpe")
    running = engine(tmp_path, tokenizer)
    for text in TEXTS:
        assert gguftools.tokenize(running, text) == tokenizer(text)["input_ids"], text


def test_sentencepiece_without_scores(tmp_path: Path) -> None:
    tokenizer = gguftools.sentencepiece()
    running = engine(tmp_path, tokenizer)
    octets = ["<0xF0>", "<0x9F>", "<0x9A>", "<0x80>"]
    assert tokenizer("🚀")["input_ids"][-4:] == tokenizer.convert_tokens_to_ids(octets)
    for text in TEXTS:
        if "<s>" not in text:  # whether a space follows a special token is not settled between the two
            assert gguftools.tokenize(running, text) == tokenizer(text)["input_ids"], text


def test_sentencepiece_by_its_own_file(tmp_path: Path) -> None:
    """tokenizer.model alone: the same pieces, scores and kinds as from the merges of tokenizer.json."""
    tokenizer = gguftools.sentencepiece()
    tokenizer.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"add_bos_token": True}))
    config = {"bos_token_id": 1, "eos_token_id": 2}
    by_merges = read_vocabulary(tmp_path, config, rows=len(tokenizer) + 3)
    assert by_merges.types[-3:] == (UNUSED,) * 3
    assert by_merges.types.count(BYTE) == 256
    pieces = list(zip(by_merges.tokens, by_merges.scores, by_merges.types, strict=True))[:-3]
    (tmp_path / "tokenizer.json").rename(tmp_path / "elsewhere.json")
    (tmp_path / "tokenizer.model").write_bytes(b"".join(sentencepiece_file(pieces)))
    by_file = read_vocabulary(tmp_path, config, rows=len(tokenizer) + 3)
    assert (by_file.tokens, by_file.types) == (by_merges.tokens, by_merges.types)
    assert by_file.scores == by_merges.scores
    assert by_file.add_bos
    assert by_file.add_space_prefix


def sentencepiece_file(pieces: list[tuple[str, float, int]]) -> Iterator[bytes]:
    """A protocol buffer with these pieces, a BPE trainer and a dummy prefix."""

    def field(number: int, raw: bytes) -> bytes:
        return varint(number << 3 | 2) + varint(len(raw)) + raw

    for text, score, kind in pieces:
        body = field(1, text.encode()) + varint(2 << 3 | 5) + struct.pack("<f", score) + varint(3 << 3) + varint(kind)
        yield field(1, body)
    yield field(2, varint(3 << 3) + varint(2))
    yield field(3, varint(3 << 3) + varint(1))


def varint(value: int) -> bytes:
    out = bytearray()
    while True:
        out.append(value & 0x7F | (0x80 if value > 0x7F else 0))
        value >>= 7
        if not value:
            return bytes(out)


def saved(folder: Path, raw: Tokenizer) -> Path:
    PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return folder


def test_special_tokens_keep_their_kinds(tmp_path: Path) -> None:
    tokenizer = gguftools.bpe("gpt-2")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    tokenizer.add_tokens(["frankenmoe"])
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, len(tokenizer) - 2]}))
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    found = read_vocabulary(tmp_path, {}, rows=len(tokenizer))
    assert found.types[-2:] == (CONTROL, USER_DEFINED)
    assert found.special == {"bos": 1, "eos": 2, "unknown": 0, "eot": len(tokenizer) - 2}
    assert found.chat_template == "{{ messages }}"


def test_an_unknown_split_is_refused_not_guessed(tmp_path: Path) -> None:
    raw = gguftools.bpe("gpt-2").backend_tokenizer
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "merged_with_next"), pre_tokenizers.ByteLevel(use_regex=False)]
    )
    with pytest.raises(SourceError, match="splits texts in a way that is none of gpt-2"):
        read_vocabulary(saved(tmp_path, raw), {}, rows=1000)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"model": {"type": "WordLevel", "vocab": {"a": 0}}}, "WordLevel"),
        ({"normalizer": {"type": "Lowercase"}}, "Lowercase"),
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}}, "none of"),
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [QWEN2, BYTES]}}, "none of"),  # split twice
        (
            {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [QWEN2 | {"behavior": "Removed"}, PLAIN]}},
            "none of",
        ),
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [PLAIN]}}, "none of"),  # not split at all
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [BYTES, DIGITS]}}, "none of"),
        (
            {"post_processor": around("<unk>")},
            "puts <unk> before a text, but a GGUF file has room for the bos_token alone",
        ),
        ({"post_processor": around("<s>", "<unk>")}, "puts <s><unk> before a text"),
        ({"post_processor": behind("<unk>")}, "puts <unk> behind a text, expected its eos_token alone"),
    ],
)
def test_other_tokenizers_are_refused(change: dict[str, Any], word: str, tmp_path: Path) -> None:
    file = saved(tmp_path, gguftools.bpe("gpt-2").backend_tokenizer) / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(SourceError, match=word):
        read_vocabulary(tmp_path, {}, rows=1000)


def test_a_tokenizer_must_be_there_whole_and_fit(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="neither"):
        read_vocabulary(tmp_path, {}, rows=10)
    saved(tmp_path, gguftools.bpe("gpt-2").backend_tokenizer)
    with pytest.raises(SourceError, match="only 10 rows"):
        read_vocabulary(tmp_path, {}, rows=10)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(SourceError, match="not JSON"):
        read_vocabulary(tmp_path, {}, rows=1000)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a\xff\xff")
    with pytest.raises(SourceError, match="not a SentencePiece model"):
        read_vocabulary(tmp_path, {}, rows=1000)


def test_no_end_token_is_said_and_not_left_to_chance(tmp_path: Path) -> None:
    raw = Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=raw).save_pretrained(tmp_path)
    with pytest.raises(SourceError, match="no end token"):
        read_vocabulary(tmp_path, {}, rows=2)


def test_padding_takes_no_name_that_a_token_has(tmp_path: Path) -> None:
    """llama.cpp aborts, and the process with it, on two tokens of one name."""
    tokenizer = gguftools.bpe("gpt-2")
    tokenizer.add_tokens([f"[PAD{len(tokenizer) + 2}]"])
    tokenizer.save_pretrained(tmp_path)
    found = read_vocabulary(tmp_path, {}, rows=len(tokenizer) + 3)
    assert len(set(found.tokens)) == len(tokenizer) + 3
    assert found.tokens[: len(tokenizer)] == tuple(tokenizer.convert_ids_to_tokens(range(len(tokenizer))))
    file = tmp_path / "tokenizer.json"
    data = json.loads(file.read_text())
    data["added_tokens"].append(data["added_tokens"][0] | {"id": len(tokenizer)})
    file.write_text(json.dumps(data))
    with pytest.raises(SourceError, match="'<unk>' with two ids"):
        read_vocabulary(tmp_path, {}, rows=len(tokenizer) + 3)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda data: data["model"]["vocab"].update({"xyz": data["model"]["vocab"].pop("<0xF0>")}), "255 of the 256"),
        (lambda data: data.update(normalizer=None, pre_tokenizer={"type": "Metaspace", "replacement": "▁"}), "every"),
    ],
)
def test_a_sentencepiece_that_llama_cpp_cannot_follow_is_refused(change: Any, word: str, tmp_path: Path) -> None:
    gguftools.sentencepiece().save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))
    with pytest.raises(SourceError, match=word):
        read_vocabulary(tmp_path, {}, rows=1000)


def test_the_one_end_of_the_generation_settings_counts(tmp_path: Path) -> None:
    gguftools.bpe("gpt-2").save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 7}))
    assert read_vocabulary(tmp_path, {}, rows=1000).special["eot"] == 7


@pytest.mark.parametrize("processed", [True, False])
@pytest.mark.parametrize("name", ["LlamaTokenizer", "LlamaTokenizerFast", "PreTrainedTokenizerFast", "GPT2Tokenizer"])
@pytest.mark.parametrize("flag", [None, True, False])
def test_a_begin_token_where_transformers_puts_one(
    processed: bool, name: str, flag: bool | None, tmp_path: Path
) -> None:
    gguftools.bpe("gpt-2", bos=processed).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 400}))
    file = tmp_path / "tokenizer_config.json"
    settings = json.loads(file.read_text()) | {"tokenizer_class": name}
    file.write_text(json.dumps(settings | ({} if flag is None else {"add_bos_token": flag})))
    theirs = AutoTokenizer.from_pretrained(tmp_path)("x")["input_ids"]
    assert read_vocabulary(tmp_path, {}, rows=400).add_bos == (theirs[0] == 1)


def with_ends(folder: Path, *, generation: object, config: object, extra: list[str]) -> tuple[Any, dict[str, Any]]:
    tokenizer = gguftools.bpe("gpt-2")
    tokenizer.add_special_tokens({"additional_special_tokens": extra})
    tokenizer.save_pretrained(folder)
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    return read_vocabulary(folder, {"eos_token_id": config}, rows=len(tokenizer)), tokenizer.get_vocab()


def test_end_tokens_of_all_three_places_are_kept(tmp_path: Path) -> None:
    found, ids = with_ends(tmp_path, generation=[2, 400], config=401, extra=["<stop>", "<over>"])
    assert (ids["<stop>"], ids["<over>"]) == (400, 401)
    assert {key: found.special[key] for key in ("eos", "eot", "eom")} == {"eos": 2, "eot": 400, "eom": 401}
    assert found.notes == ()


def test_an_end_token_without_text_is_kept(tmp_path: Path) -> None:
    """An embedding's row that the tokenizer does not name: the model can still choose it."""
    tokenizer = gguftools.bpe("gpt-2")
    tokenizer.save_pretrained(tmp_path)
    found = read_vocabulary(tmp_path, {"eos_token_id": [2, len(tokenizer) + 3]}, rows=len(tokenizer) + 8)
    assert (found.special["eos"], found.special["eot"]) == (2, len(tokenizer) + 3)


def test_end_tokens_without_room_are_named_unless_llama_cpp_knows_them(tmp_path: Path) -> None:
    extra = ["<a>", "<|im_end|>", "<b>", "<c>"]
    found, ids = with_ends(tmp_path, generation=[2, 400, 401, 402, 403, True, -1, 9999], config=[2], extra=extra)
    assert [found.special[key] for key in ("eos", "eot", "eom")] == [2, ids["<a>"], ids["<b>"]]
    assert found.notes == ("a GGUF file has room for three end tokens: a reply does not end at '<c>'",)


def test_the_check_tells_end_tokens_that_llama_cpp_passes(tmp_path: Path) -> None:
    tokenizer = gguftools.bpe("gpt-2")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<a>", "<b>", "<c>"]})
    base, *others = gguftools.parents(tmp_path, "llama", tokenizer=tokenizer)
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": [400, 401, 402]}))
    recipe = tiny.write_recipe(tmp_path / "r.yml", base, others)
    files = export_gguf(recipe, tmp_path / "out", types=["f16"], allow_random=True)
    (found,) = check_files(recipe, files)
    assert found.runs_past == (402,)
    assert any("does not end at '<c>'" in note for note in files[0].notes)


def test_tokens_are_compared_without_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = gguftools.bpe("gpt-2")
    base, *others = gguftools.parents(tmp_path, "llama", tokenizer=tokenizer)
    recipe = tiny.write_recipe(tmp_path / "r.yml", base, others)
    files = export_gguf(recipe, tmp_path / "out", types=["f16"], allow_random=True)
    assert exporting.token_notes(recipe, files) == []  # small: compared as a whole
    monkeypatch.setattr(exporting, "SMALL_FILE", 0)
    assert exporting.token_notes(recipe, files) == []
    vocabulary = read_vocabulary(base, {}, rows=len(tokenizer))
    wrong = replace(vocabulary, add_bos=True)
    assert split_otherwise(wrong, tokenizer, ["one", "two three"]) == ["one", "two three"]
    wrong = replace(vocabulary, pre="smollm")
    assert split_otherwise(wrong, tokenizer, ["one", "we've 1234567 reasons"]) == ["we've 1234567 reasons"]
