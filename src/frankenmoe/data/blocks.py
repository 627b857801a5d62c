"""Packs documents into blocks of tokens and marks the tokens to learn."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, TypeVar

from frankenmoe.data.rows import Document
from frankenmoe.data.templates import rendered
from frankenmoe.errors import SourceError

T = TypeVar("T")
Span = tuple[int, int]
"""(start, end) of a run of tokens or characters; `end` is the place behind the last one."""
Marked = tuple[list[int], list[bool]]
"""Token ids, and for each whether it is to be learned."""


@dataclass(frozen=True, slots=True)
class Block:
    """Tokens that are read together. `learn[i]`: whether token i is a target of the loss.

    `span` is its place in the stream of all documents' tokens; BOS has none there.
    """

    ids: tuple[int, ...]
    learn: tuple[bool, ...]
    span: Span = field(default=(0, 0), compare=False)

    @property
    def targets(self) -> int:
        """The number of tokens in the loss."""
        return sum(self.learn)


def packed(documents: Iterable[Document], tokenizer: Any, *, length: int) -> Iterator[Block]:
    """Blocks of `length` tokens, BOS included, from a stream of documents; only the last one may be shorter.

    Blocks begin with BOS and documents end with EOS, where the tokenizer has them. In text, all tokens but BOS are
    learned; in conversations (through the chat template), the replies. Blocks without tokens to learn are left out.
    """
    head: list[int] = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    if length <= len(head) + 1:
        raise ValueError(f"a block of {length} tokens has no room for one to learn")
    room = length - len(head)
    ids: list[int] = []
    learn: list[bool] = []
    at = 0
    for document in documents:
        more_ids, more_learn = encode(document, tokenizer)
        ids += more_ids
        learn += more_learn
        while len(ids) >= room:
            yield from _block(head, ids[:room], learn[:room], at)
            ids, learn, at = ids[room:], learn[room:], at + room
    yield from _block(head, ids, learn, at)


def text_blocks(
    documents: Iterable[Document], tokenizer: Any, *, length: int, limit: int | None = None, whole: bool = False
) -> list[Block]:
    """The first `limit` blocks, or all; with `whole`, without a shorter last one.

    Raises SourceError if there is no block.
    """
    found = (block for block in packed(documents, tokenizer, length=length) if not whole or len(block.ids) == length)
    blocks = list(islice(found, limit))
    if not blocks:
        least = f"one block of {length}" if whole else "two"
        raise SourceError(
            f"the data has fewer tokens than {least}, so there is nothing to learn",
            hint="give more text" + (", or shorter blocks" if whole else ""),
        )
    return blocks


def hold_out(blocks: Sequence[T], *, share: float = 0.1) -> tuple[list[T], list[T]]:
    """(kept, held out): every n-th block is held out, the same ones each time.

    A single block is both kept and held out, because neither side may be empty.
    """
    every = max(2, round(1 / share))
    places = range(len(blocks))
    taken = places[every - 1 :: every] or places[-1:]
    return [blocks[at] for at in places if at not in taken] or list(blocks), [blocks[at] for at in taken]


def spread(blocks: Sequence[Block], count: int) -> list[Block]:
    """`count` of the blocks, evenly from all of them, in their order; all if they are not more."""
    if count >= len(blocks):
        return list(blocks)
    return [blocks[(2 * index + 1) * len(blocks) // (2 * count)] for index in range(count)]


def joined_spans(blocks: Iterable[Block]) -> list[Span]:
    """The places of the blocks in the stream of tokens, sorted; those of neighbours are one."""
    found: list[Span] = []
    for start, end in sorted(block.span for block in blocks):
        if found and start <= found[-1][1]:
            start, end = found[-1][0], max(end, found.pop()[1])
        found.append((start, end))
    return found


def encode(document: Document, tokenizer: Any) -> Marked:
    """Token ids of a document, with EOS if it is closed, and which of them are to be learned."""
    if document.plain and not tokenizer.chat_template:
        document = _in_plain_text(document)
    if document.turns:
        return _encode_turns(document, tokenizer)
    if document.given:
        ids, learn = _encode_answer(document, tokenizer)
    else:
        ids = tokenizer(document.text, add_special_tokens=False, verbose=False)["input_ids"] if document.text else []
        learn = [True] * len(ids)
    if document.closed and ids and tokenizer.eos_token_id is not None:
        ids, learn = [*ids, tokenizer.eos_token_id], [*learn, True]
    return ids, learn


def check_vocabulary(ids: Iterable[int], vocabulary: int | None, tokenizer: Any, *, what: str) -> None:
    """Raises SourceError for a token id outside the model's vocabulary (None: unknown); `what` names the text."""
    highest = max(ids, default=0)
    if vocabulary and highest >= vocabulary:
        raise SourceError(
            f"the tokenizer in {tokenizer.name_or_path} makes token {highest} from {what}, but the model has only "
            f"{vocabulary} tokens",
            hint="put the model's own tokenizer next to its weights",
        )


def _block(head: Sequence[int], ids: Sequence[int], learn: Sequence[bool], at: int) -> Iterator[Block]:
    # without BOS, nothing predicts the first token of a block
    marks = [*[False] * len(head), *learn] if head else [False, *learn[1:]]
    if any(marks):
        yield Block((*head, *ids), tuple(marks), (at, at + len(ids)))


def _in_plain_text(document: Document) -> Document:
    """A question and its answer as one text, for models without a chat template."""
    *before, answer = (turn["content"] for turn in document.turns)
    question = "".join(f"{text}\n\n" for text in before)
    return Document(text=question + answer, given=len(question))


def _encode_answer(document: Document, tokenizer: Any) -> Marked:
    """A text of which the tokens that begin behind its given part are learned."""
    found = tokenizer(document.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return list(found["input_ids"]), [begin >= document.given for begin, _ in found["offset_mapping"]]


def _encode_turns(document: Document, tokenizer: Any) -> Marked:
    """A conversation through the chat template; tokens that begin in a reply or its end mark are learned.

    Templates such as Qwen3's write a reply in another way once another one follows. Then the conversation is read up to
    each of its replies, one after the other, as the model will see it.
    """
    if not tokenizer.chat_template:
        raise SourceError(
            "the data holds conversations, but the base's tokenizer has no chat template",
            hint="put the chat_template.jinja that the parents were trained with beside the base's tokenizer",
        )
    turns = document.turns
    text = rendered(turns, tokenizer, tools=document.tools)
    replies = [
        (
            rendered(turns[:at], tokenizer, tools=document.tools, add_generation_prompt=True),
            rendered(turns[: at + 1], tokenizer, tools=document.tools),
        )
        for at, turn in enumerate(turns)
        if turn["role"] == "assistant"
    ]
    if any(not after.startswith(before) for before, after in replies):
        raise SourceError(
            "the chat template writes the turns before a reply in another way than without it, so the reply cannot be "
            "found in the text",
            hint="use a chat template that only adds to what it wrote for the turns before",
        )
    spans = [(len(before), len(after)) for before, after in replies]
    if all(text.startswith(after) for _, after in replies):
        return _encode_spans(text, spans, tokenizer)
    parts = [_encode_spans(after, [span], tokenizer) for (_, after), span in zip(replies, spans, strict=True)]
    return [token for ids, _ in parts for token in ids], [mark for _, learn in parts for mark in learn]


def _encode_spans(text: str, spans: Sequence[Span], tokenizer: Any) -> Marked:
    """A text of which the tokens that begin in `spans`, in characters, are learned; without BOS."""
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids = list(found["input_ids"])
    learn = [any(start <= begin < end for start, end in spans) for begin, _ in found["offset_mapping"]]
    if ids and ids[0] == tokenizer.bos_token_id:  # every block has its own
        ids, learn = ids[1:], learn[1:]
    return ids, learn
