"""Heads that a config ties to the embeddings although the file holds a head of its own; knows nothing of experts."""

from dataclasses import replace

from frankenmoe.checkpoint.fingerprint import same_values
from frankenmoe.planning.sources import Source

HEAD, EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"


def with_own_head(source: Source, *, limit: int | None) -> Source:
    """The source with an untied config where its stored head differs from its embeddings, else as it is.

    So does transformers 5 (`PreTrainedModel.tie_weights`): where both are stored and differ, the config is wrong and
    nothing is tied. `limit` is how many bytes are compared in full, None for all.
    """
    family, tensors = source.family, source.checkpoint.tensors
    if family is None or not family.value(source.config, "tie_word_embeddings"):
        return source
    if HEAD not in tensors or EMBEDDINGS not in tensors or same_values(tensors[HEAD], tensors[EMBEDDINGS], limit=limit):
        return source
    untied = dict(source.config) | {"tie_word_embeddings": False}
    return replace(source, checkpoint=replace(source.checkpoint, config=untied), own_head=True)
