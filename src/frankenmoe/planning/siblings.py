"""Checks that the sources of a recipe fit beside its base: sizes, FFN matrices, and backbones that are merged."""

from collections.abc import Callable, Collection, Iterable, Mapping

from frankenmoe.errors import SourceError
from frankenmoe.families.mixtures import WIDTH
from frankenmoe.planning.groups import group_of
from frankenmoe.planning.sources import Anatomy, Source
from frankenmoe.recipe.sourcename import SHARED_PART

# config fields in which parents must agree -> their name in messages
MUST_AGREE: Mapping[str, str] = {
    "model_type": "family",
    "hidden_size": "hidden size",
    "num_hidden_layers": "layer count",
    "intermediate_size": "FFN width",
    "num_attention_heads": "head count",
    "vocab_size": "vocabulary",
}


def check_siblings(base: Source, others: Iterable[Source]) -> None:
    """Raises SourceError if a parent's config does not fit the base's; the message names every field that differs."""
    for other in others:
        differ = {
            words: (base.config.get(key), other.config.get(key))
            for key, words in MUST_AGREE.items()
            if base.config.get(key) != other.config.get(key) and not _may_differ(key, base, other)
        }
        if set(differ) == {"vocabulary"}:
            raise _other_vocabulary(base, other)
        if differ:
            sides = "; ".join(f"{words} {ours} against {theirs}" for words, (ours, theirs) in differ.items())
            raise SourceError(
                f"{other.name} does not fit beside the base {base.name}: {sides}",
                hint="experts must be fine-tunes of one architecture; choose parents of the base's family and size",
            )


def _may_differ(key: str, base: Source, other: Source) -> bool:
    """Whether a field may differ because one of the two is a part of a mixture.

    A Mixtral is read as a Mistral, also if its experts were Llamas: what must agree is how an FFN is written.
    """
    if key == WIDTH:
        return is_shared(other)
    if key != "model_type" or not (base.part or other.part):
        return False
    ours, theirs = (
        {row.name for row in each.family.ffn if len(row.shape) > 1} if each.family else None for each in (base, other)
    )
    return ours is not None and ours == theirs


def _other_vocabulary(base: Source, other: Source) -> SourceError:
    """The error for a parent with another vocabulary."""
    ours, theirs = base.config.get("vocab_size"), other.config.get("vocab_size")
    return SourceError(
        f"{other.name} does not fit beside the base {base.name}: vocabulary {ours} against {theirs}, and most of their "
        "tokens have other ids, so its FFNs know other tokens than the base's tokenizer makes",
        hint="choose parents that were fine-tuned from the base or from a model with its tokenizer",
    )


def check_ffns(base: tuple[Source, Anatomy], others: Iterable[tuple[Source, Anatomy]]) -> None:
    """Raises SourceError if an FFN matrix of another source does not fit the base's."""
    _check_shapes(base, (each for each in others if not is_shared(each[0])), shapes=_matrices)


def is_shared(source: Source) -> bool:
    """Whether a source is the shared expert of a mixture, which may be wider or narrower than the routed ones."""
    return source.part is not None and source.part.name == SHARED_PART


def check_backbones(
    base: tuple[Source, Anatomy], others: Iterable[tuple[Source, Anatomy]], *, groups: Collection[str]
) -> None:
    """Raises SourceError if a backbone tensor of another source, in groups that are merged, does not fit the base's."""
    merged = ", or take the base's own with backbone: base"
    _check_shapes(base, others, shapes=lambda parts: backbone_shapes(parts, groups), hint=merged)


def backbone_shapes(parts: Anatomy, groups: Collection[str]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the backbone tensors in these groups."""
    return {name: shape for name, shape in parts.backbone.items() if group_of(name) in groups}


def _check_shapes(
    base: tuple[Source, Anatomy],
    others: Iterable[tuple[Source, Anatomy]],
    *,
    shapes: Callable[[Anatomy], Mapping[str, tuple[int, ...]]],
    hint: str = "",
) -> None:
    ours = shapes(base[1])
    for source, parts in others:
        theirs = shapes(parts)
        odd = next((name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)), None)
        if odd is not None:
            sides = (f"{list(side[odd])}" if odd in side else "nothing" for side in (ours, theirs))
            raise SourceError(
                f"{source.name} does not fit beside the base {base[0].name}: {odd} is {' against '.join(sides)}",
                hint=f"choose parents of the base's family and size{hint}",
            )


def _matrices(parts: Anatomy) -> dict[str, tuple[int, ...]]:
    return {name: shape for name, shape in parts.ffn_shapes.items() if len(shape) > 1}
