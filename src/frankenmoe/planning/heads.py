"""Sources whose config ties the head to the embeddings although the file holds a different head."""

from dataclasses import replace

from frankenmoe.checkpoint.fingerprint import same_values
from frankenmoe.planning.sources import Source

HEAD, EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"


def with_own_head(source: Source, *, limit: int | None) -> Source:
    """The source, with an untied config if its stored head differs from its embeddings.

    As in transformers 5 (`PreTrainedModel.tie_weights`). `limit` is the number of bytes compared in full, None for all.
    A part of a mixture gets the mixture's head, which all formats call by the dense name.
    """
    family, tensors = source.family, source.checkpoint.tensors
    if family is None or not family.read(source.config, "tie_word_embeddings"):
        return source
    if HEAD not in tensors or EMBEDDINGS not in tensors or same_values(tensors[HEAD], tensors[EMBEDDINGS], limit=limit):
        return source
    untied = dict(source.config) | {"tie_word_embeddings": False}
    part = source.part and replace(source.part, tensors={**source.part.tensors, HEAD: tensors[HEAD]})
    return replace(source, checkpoint=replace(source.checkpoint, config=untied), part=part, own_head=True)
