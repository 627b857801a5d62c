"""Packing and what is learnt, on real tokenizers made here."""

import math
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from frankenmoe.data.blocks import Block, encode, hold_out, joined_spans, packed, spread, text_blocks
from frankenmoe.data.rows import Document
from frankenmoe.errors import SourceError

TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% if m.role == 'assistant' %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>"]
CHAT = (
    {"role": "user", "content": "ab"},
    {"role": "assistant", "content": "cd"},
    {"role": "user", "content": "e"},
    {"role": "assistant", "content": "f"},
)


def make(*, template: str | None = TEMPLATE, bos: bool = True) -> Any:
    """A tokenizer with a token per letter, whose special tokens come first."""
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *"abcdefghij "])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<s>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    found = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>" if bos else None, eos_token="</s>",
        additional_special_tokens=SPECIAL[2:],
    )  # fmt: skip
    found.chat_template = template
    return found


def letters(tokenizer: Any, block: Block) -> str:
    return "".join(tokenizer.convert_ids_to_tokens(list(block.ids)))


def test_text_is_cut_behind_a_bos_each() -> None:
    tokenizer = make()
    blocks = list(packed([Document("abcdefg", closed=False)], tokenizer, length=4))
    assert [letters(tokenizer, block) for block in blocks] == ["<s>abc", "<s>def", "<s>g"]
    assert [block.learn for block in blocks] == [(False, True, True, True)] * 2 + [(False, True)]


def test_documents_are_packed_with_an_end_between_them() -> None:
    tokenizer = make()
    blocks = list(packed([Document("ab"), Document(""), Document("cde")], tokenizer, length=5))
    assert [letters(tokenizer, block) for block in blocks] == ["<s>ab</s>c", "<s>de</s>"]


def test_without_bos_a_blocks_first_token_is_not_learnt() -> None:
    blocks = list(packed([Document("abcd", closed=False)], make(bos=False), length=3))
    assert [block.learn for block in blocks] == [(False, True, True)]


def test_of_conversations_the_replies_are_learnt_with_their_ends() -> None:
    tokenizer = make()
    ids, learn = encode(Document(turns=CHAT), tokenizer)
    learnt = [
        "".join(tokenizer.convert_ids_to_tokens([token])) for token, wanted in zip(ids, learn, strict=True) if wanted
    ]
    assert learnt == ["c", "d", "</s>", "f", "</s>"]


def test_blocks_without_anything_to_learn_are_left_out() -> None:
    chat = Document(turns=({"role": "user", "content": "aaaaaaaa"}, {"role": "assistant", "content": "b"}))
    blocks = list(packed([chat], make(), length=5))
    assert [block.targets for block in blocks] == [2]


@given(
    texts=st.lists(st.text("abcdefghij ", min_size=1), min_size=1),
    length=st.integers(3, 40),
    closed=st.booleans(),
)
def test_no_token_is_lost_or_learnt_twice(texts: list[str], length: int, closed: bool) -> None:
    tokenizer = make()
    blocks = list(packed([Document(text, closed=closed) for text in texts], tokenizer, length=length))
    joined = "".join(letters(tokenizer, block).removeprefix("<s>") for block in blocks)
    assert joined == "".join(text + "</s>" * closed for text in texts)
    assert all(len(block.ids) == len(block.learn) <= length for block in blocks)
    assert all(len(block.ids) == length for block in blocks[:-1])


def test_limits_and_whole_blocks() -> None:
    documents = [Document("abcdefgh", closed=False)]
    assert len(text_blocks(documents, make(), length=4)) == 3
    assert len(text_blocks(documents, make(), length=4, whole=True)) == 2
    assert len(text_blocks(documents, make(), length=4, limit=1)) == 1
    with pytest.raises(SourceError, match="fewer tokens than one block of 64"):
        text_blocks(documents, make(), length=64, whole=True)
    with pytest.raises(SourceError, match="fewer tokens than two"):
        text_blocks([], make(), length=64)


@given(count=st.integers(1, 60), share=st.sampled_from([0.05, 0.1, 0.25, 0.5]))
def test_held_out_blocks_are_a_steady_share(count: int, share: float) -> None:
    blocks = [Block((number,), (True,)) for number in range(count)]
    kept, held = hold_out(blocks, share=share)
    assert kept
    assert held
    assert (kept, held) == hold_out(blocks, share=share)
    if count > 1:
        assert sorted(block.ids for block in [*kept, *held]) == [block.ids for block in blocks]
    assert len(held) == max(1, int(count * share))


def test_a_template_that_thinks_in_the_last_reply_only() -> None:
    """As Qwen3's: the conversation is read up to each reply, as the model sees it."""
    template = TEMPLATE.replace(
        "{{ m.content }}", "{% if m.role == 'assistant' and loop.last %}j{% endif %}{{ m.content }}"
    )
    tokenizer = make(template=template)
    ids, _ = encode(Document(turns=CHAT), tokenizer)
    first, second = "<|user|>ab<|assistant|>jcd</s>", "<|user|>ab<|assistant|>cd</s><|user|>e<|assistant|>jf</s>"
    assert "".join(tokenizer.convert_ids_to_tokens(ids)) == first + second
    assert learnt(Document(turns=CHAT), tokenizer) == "jcd</s>jf</s>"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "has no chat template"),
        (
            "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}",
            "writes the turns before a reply in another way",
        ),
        ("{{ raise_exception('roles must alternate') }}", "refuses a conversation of user, assistant.*must alternate"),
    ],
)
def test_templates_that_cannot_be_used(template: str | None, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        encode(Document(turns=CHAT), make(template=template))


@given(st.integers(1, 200), st.integers(1, 250))
def test_spread_blocks_come_evenly_from_all(count: int, wanted: int) -> None:
    blocks = [Block((at,), (True,), (at, at + 1)) for at in range(count)]

    found = [block.span[0] for block in spread(blocks, wanted)]

    assert len(found) == min(count, wanted)
    assert found == sorted(set(found))
    gaps = [second - first for first, second in pairwise([-1, *found, count])]
    assert max(gaps) <= math.ceil(count / len(found)) + 1


def test_spans_of_neighbours_are_joined() -> None:
    blocks = [Block((), (), span) for span in ((5, 9), (0, 3), (3, 5), (20, 22))]

    assert joined_spans(blocks) == [(0, 9), (20, 22)]


def learnt(document: Document, tokenizer: Any) -> str:
    ids, learn = encode(document, tokenizer)
    return "".join(
        tokenizer.convert_ids_to_tokens([token])[0] for token, wanted in zip(ids, learn, strict=True) if wanted
    )


def test_of_a_completion_only_the_answer_is_learnt() -> None:
    assert learnt(Document(text="abcdef", given=2), make()) == "cdef</s>"


@pytest.mark.parametrize("template", [TEMPLATE, None])
def test_of_a_question_and_its_answer_only_the_answer_is_learnt(template: str | None) -> None:
    turns = ({"role": "user", "content": "ab"}, {"role": "assistant", "content": "cd"})
    assert learnt(Document(turns=turns, plain=True), make(template=template)) == "cd</s>"


def test_tool_calls_are_learnt_as_the_template_writes_them() -> None:
    template = (
        "{% if tools %}{{ tools[0].name }}{% endif %}"
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
        "{% for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments.x }}{% endfor %}"
        "{% if m.role == 'assistant' %}</s>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    call = {"function": {"name": "f", "arguments": {"x": "g"}}}
    turns = (
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "b"},
        {"role": "assistant", "content": "c"},
    )
    found = Document(turns=turns, tools=({"name": "h"},))
    assert learnt(found, make(template=template)) == "fg</s>c</s>"
    assert encode(found, make(template=template))[0][0] == make().convert_tokens_to_ids("h")
