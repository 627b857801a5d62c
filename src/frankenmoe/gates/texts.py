"""Every expert's data or prompts as blocks of tokens, and each router's target for every text."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

from frankenmoe.data.blocks import Block, check_vocabulary, hold_out, spread, text_blocks
from frankenmoe.data.documents import read_documents
from frankenmoe.data.rows import Document
from frankenmoe.errors import RecipeError, SourceError
from frankenmoe.gates.statistics import RouterText
from frankenmoe.planning import Plan
from frankenmoe.planning.fitting import (
    HELD_OUT_DATA,
    HELD_OUT_PROMPTS,
    SEARCHED,
    TextSize,
    piece_ends,
    piece_lengths,
    searched_length,
    text_size,
)
from frankenmoe.planning.layout import SHARED, RouterPath
from frankenmoe.planning.names import named_experts
from frankenmoe.recipe import Expert
from frankenmoe.recipe.text import written
from frankenmoe.suggest import did_you_mean

PROMPTS = ("prompts",)  # the origin of text from prompts
POOL = 8  # times as much text as is wanted is read, if there is so much


@dataclass(frozen=True)
class OwnText:
    """An expert's text, or (`negative`) text that it should not get. `path` is the path of that expert.

    `origin` are files or datasets, or PROMPTS. `kept` is for fitting; `held` is for the choice of the scale and for
    measuring.
    """

    name: str
    path: RouterPath
    negative: bool
    origin: tuple[str, ...]
    kept: tuple[Block, ...]
    held: tuple[Block, ...]

    @property
    def from_prompts(self) -> bool:
        return self.origin == PROMPTS

    @property
    def title(self) -> str:
        return f"not {self.name}" if self.negative else self.name


def read_texts(
    plan: Plan,
    tokenizer: Any,
    *,
    tokens: int,
    length: int,
    data: Mapping[str, Sequence[str]] | None = None,
    folder: Path | None = None,
    only: str | None = None,
) -> tuple[OwnText, ...]:
    """The text of every expert at every depth, and of a gated shared expert: its data, or else its prompts.

    Of data that hold more than `tokens`, blocks are chosen evenly from the first POOL times as many: the beginning of a
    file is often a single document. Every tenth block of the data is held out, whatever `tokens` is.

    `data` maps experts' names ("group/leaf" for nested ones) to files or datasets, which replace those of the recipe.
    Their paths are relative to `folder`, those of the recipe to the recipe. `only` reads one expert's text.
    Raises RecipeError for an unknown expert or an expert without text, SourceError for text that cannot be read or is
    shorter than a block.
    """
    named = dict(_named(plan))
    given = dict(data or {})
    for name in given:
        if name not in named:
            raise RecipeError(
                f"data is given for {name!r}, but there is no expert {name!r}", hint=did_you_mean(name, named)
            )
    longest = plan.base.config.get("max_position_embeddings")
    length = min(length, longest) if isinstance(longest, int) else length
    found: list[OwnText] = []
    for name, (path, expert) in named.items():
        if only not in (None, name):
            continue
        names, home = (given[name], folder) if name in given else (expert.data, plan.recipe.folder)
        prompts = () if names else written(expert.positive_prompts)
        if names:
            found.append(data_text(name, path, tuple(names), tokenizer, home or plan.recipe.folder, tokens, length))
        elif prompts:
            found.append(prompts_text(name, path, prompts, tokenizer, length, negative=False))
        elif not expert.experts and path != SHARED:
            raise RecipeError(
                f"expert {name!r} has neither data nor positive_prompts, so no router can be fitted to it",
                hint=f"use --data {name}=FILE, or add data to the recipe",
            )
        negative = written(expert.negative_prompts)
        if negative:
            found.append(prompts_text(name, path, negative, tokenizer, length, negative=True))
    for text in found:
        ids = chain.from_iterable(block.ids for block in (*text.kept, *text.held))
        check_vocabulary(ids, plan.base.config.get("vocab_size"), tokenizer, what=f"the text of {text.name!r}")
    return tuple(found)


def _named(plan: Plan) -> Iterator[tuple[str, tuple[RouterPath, Expert]]]:
    for name, path, expert in named_experts(plan.recipe.experts):
        yield name, (path, expert)
    if plan.gated_shared:
        yield plan.recipe.shared_experts[0].name, (SHARED, plan.recipe.shared_experts[0])


def data_text(
    name: str, path: RouterPath, names: tuple[str, ...], tokenizer: Any, folder: Path, tokens: int, length: int
) -> OwnText:
    """An expert's data as `read_texts` reads it. Raises SourceError for text that cannot be read or is too short."""
    count = max(2, tokens // length)
    try:
        blocks = text_blocks(
            read_documents(names, folder=folder), tokenizer, length=length, limit=POOL * count, whole=True
        )
    except SourceError as error:
        raise SourceError(f"data of expert {name!r}: {error.message}", hint=error.hint) from error
    kept, held = hold_out(blocks, share=HELD_OUT_DATA)
    if len(blocks) > count:
        held = spread(held, max(1, round(count * HELD_OUT_DATA)))
        kept = spread(kept, count - len(held))
    return OwnText(name, path, False, names, tuple(kept), tuple(held))


def prompts_text(
    name: str, path: RouterPath, prompts: tuple[str, ...], tokenizer: Any, length: int, *, negative: bool
) -> OwnText:
    """An expert's prompts as `read_texts` reads them."""
    blocks = []
    for prompt in prompts:
        try:
            blocks += text_blocks([Document(text=prompt, closed=False)], tokenizer, length=length)
        except SourceError as error:
            raise RecipeError(
                f"the prompt {prompt[:40]!r} of expert {name!r} has fewer than two tokens", hint="write a longer prompt"
            ) from error
    kept, held = hold_out(blocks, share=HELD_OUT_PROMPTS)
    return OwnText(name, path, negative, PROMPTS, tuple(kept), tuple(held))


def router_texts(texts: Sequence[OwnText], path: RouterPath, classes: int) -> list[tuple[int, RouterText]]:
    """(index of a text, target) for each text of the router at `path`; a target is a distribution over its experts.

    The text of an expert, and of everything nested in it, goes to that expert. Negative text of an expert goes to its
    siblings in equal parts. SHARED has two classes: the shared expert's own text (0) and all other text (1).
    All classes have equal weight, whatever their number of texts.
    """
    placed = [(index, text, target) for index, text in enumerate(texts) if (target := _target(text, path, classes))]
    members = {
        target: sum(other == target and not text.negative for _, text, other in placed) for _, _, target in placed
    }
    return [
        (index, RouterText(text.title, target, 1.0 if text.negative else 1 / members[target]))
        for index, text, target in placed
    ]


def _target(text: OwnText, path: RouterPath, classes: int) -> tuple[float, ...] | None:
    if path == SHARED:
        own = text.path == SHARED and not text.negative
        return (1.0, 0.0) if own else (0.0, 1.0)
    depth = len(path)
    if text.path == SHARED or text.path[:depth] != path or len(text.path) <= depth:
        return None
    own_class = text.path[depth]
    if not text.negative:
        return tuple(float(index == own_class) for index in range(classes))
    if len(text.path) > depth + 1 or classes == 1:
        return None
    return tuple(float(index != own_class) / (classes - 1) for index in range(classes))


def unseen(text: OwnText) -> list[Block]:
    """Held-out prompts, to which the final gates are fitted as well; without a lone prompt, which is also kept."""
    return [block for block in text.held if text.from_prompts and block not in text.kept]


def fitted_blocks(text: OwnText) -> list[Block]:
    """The blocks that the final gates are fitted to."""
    return [*text.kept, *unseen(text)]


def searched_blocks(text: OwnText) -> Sequence[Block]:
    """One in SEARCHED of the held-out blocks, or the start of the first one if there are fewer."""
    if len(text.held) >= SEARCHED:
        return text.held[::SEARCHED]
    first = text.held[0]
    length = searched_length(sum(len(block.ids) for block in text.held))
    start = Block(first.ids[:length], first.learn[:length])
    return [start if start.targets else first]


def size_of(text: OwnText, *, bos: int | None = None) -> TextSize:
    """The tokens of a text, for a forecast. `bos` is that of `mixed_cuts`."""
    kept, held, rest = ([len(block.ids) for block in blocks] for blocks in (text.kept, text.held, unseen(text)))
    head = int(text.kept[0].ids[0] == bos)
    return text_size(text.path, kept, held, rest, head=head, negative=text.negative)


def mixed_cuts(blocks: Sequence[Block], *, bos: int | None) -> list[tuple[Block, ...]]:
    """The text of the blocks, every token once: a third of the blocks as they are, a third cut into pieces of a quarter
    and a third of a sixteenth of the longest block's length (see `piece_lengths`).

    Most wrong choices are made at the start of a text, where little tells its domain. Short blocks have more starts.
    Each begins with `bos` if the original block does.
    """
    lengths = piece_lengths(max((len(block.ids) for block in blocks), default=0))
    return [
        tuple(piece for block in blocks[first :: len(lengths)] for piece in _pieces(block, length, bos))
        for first, length in enumerate(lengths)
    ]


def _pieces(block: Block, length: int, bos: int | None) -> Iterator[Block]:
    head = int(block.ids[0] == bos)
    for start, end in pairwise([head, *piece_ends(len(block.ids), length, head=head)]):
        part, learn = block.ids[start:end], block.learn[start:end]
        yield Block((*block.ids[:head], *part), (*block.learn[:head], *learn))
