"""Parents whose embeddings have more or fewer rows than the base's: the base's stand in.

Does not import torch.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from frankenmoe.checkpoint.header import parse_object
from frankenmoe.checkpoint.jsonfile import small_bytes
from frankenmoe.checkpoint.tensors import TensorRef
from frankenmoe.planning.groups import group_of
from frankenmoe.planning.sources import Source, anatomy
from frankenmoe.recipe.backbone import EMBEDDINGS, HEAD

VOCAB = "vocab_size"
ALIKE = 0.95  # share of the smaller vocabulary that must have the same ids in the larger one
FEW = 0.05  # share of the base's rows by which they may differ if a vocabulary cannot be read


def has_other_rows(base: Source, other: Source) -> bool:
    """Whether a source has another number of embedding rows than the base, but the base's tokens."""
    ours, theirs = base.config.get(VOCAB), other.config.get(VOCAB)
    if base.config.get("hidden_size") != other.config.get("hidden_size") or base.part or other.part:
        return False
    if ours == theirs or not isinstance(ours, int) or not isinstance(theirs, int):
        return False
    tables = [token_ids(each.folder) for each in (base, other)]
    if not all(tables):
        return abs(ours - theirs) <= FEW * ours
    small, large = sorted(tables, key=len)
    return sum(large.get(token) == index for token, index in small.items()) >= ALIKE * len(small)


def with_rows_of(base: Source, other: Source) -> Source:
    """The source with the base's embeddings and head in place of its own, where its number of rows differs."""
    if not has_other_rows(base, other):
        return other
    own, rows = other.config[VOCAB], base.config[VOCAB]
    kept = {
        name: ref
        for name, ref in other.checkpoint.tensors.items()
        if group_of(name) not in (EMBEDDINGS, HEAD) or ref.shape[:1] != (own,)
    }
    if other.checkpoint.has_weights:
        kept |= {
            name: ref
            for name, shape in anatomy(base).backbone.items()
            if group_of(name) in (EMBEDDINGS, HEAD) and shape[:1] == (rows,)
            if isinstance(ref := base.tensor(name, shape), TensorRef)
        }
    config = dict(other.config) | {VOCAB: rows}
    if "tie_word_embeddings" in base.config:
        config["tie_word_embeddings"] = base.config["tie_word_embeddings"]
    checkpoint = replace(other.checkpoint, config=config, tensors=kept)
    return replace(other, checkpoint=checkpoint, own_head=base.own_head, own_rows=own)


def rows_warning(base: Source, other: Source) -> str:
    """What `with_rows_of` did to a source, with the tokens that are lost or missing."""
    ours, theirs = token_ids(base.folder), token_ids(other.folder)
    extra = [token for token in theirs if token not in ours]
    rows = f"{other.name} has {other.own_rows} rows of embeddings and the base {base.name} has {base.config[VOCAB]}"
    shown = ", ".join(f"{token!r:.40}" for token in extra[:5])
    more = f" and {len(extra) - 5} more" if len(extra) > 5 else ""
    lost = f", so its tokens {shown}{more} are not used" if extra else ""
    return f"{rows}; its experts are used behind the base's embeddings{lost}"


def token_ids(folder: Path) -> Mapping[str, int]:
    """Token -> id of a folder's tokenizer, by its JSON files; empty if there are none that can be read."""
    found: dict[str, int] = {}
    for name in ("vocab.json", "tokenizer.json", "added_tokens.json"):
        file = folder / name
        if file.is_file():
            status = file.stat()
            found |= _table(file, status.st_size, status.st_mtime_ns)
    return found


@lru_cache(maxsize=8)
def _table(file: Path, size: int, mtime_ns: int) -> Mapping[str, int]:
    try:
        data = parse_object(small_bytes(file))
    except (OSError, ValueError):
        return {}
    if file.name != "tokenizer.json":
        return {token: index for token, index in data.items() if isinstance(index, int)}
    model = data.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    listed = data.get("added_tokens")
    added = [each for each in (listed if isinstance(listed, list) else []) if isinstance(each, dict)]
    found = dict(vocab) if isinstance(vocab, dict) else {}
    if isinstance(vocab, list):  # of a unigram model: pairs of token and score
        found = {str(pair[0]): index for index, pair in enumerate(vocab) if isinstance(pair, list) and pair}
    return found | {str(each.get("content")): each["id"] for each in added if isinstance(each.get("id"), int)}
