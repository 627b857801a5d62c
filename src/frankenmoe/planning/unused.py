"""The tensors of the sources that are not used, with a reason for each."""

import re
from collections.abc import Collection, Iterable, Mapping

from frankenmoe.checkpoint.tensors import TensorWrite
from frankenmoe.planning.groups import group_of
from frankenmoe.planning.sources import BUFFER, Anatomy, Source
from frankenmoe.planning.tree import FFN_ADAPTER, ExpertNode
from frankenmoe.recipe.backbone import AVERAGE, BASE, MergeSettings

# what is around a language model
OUTSIDE = re.compile(r"^(model\.)?(visual|vision_tower|multi_modal_projector|embed_vision|audio_tower|embed_audio)\.")
OF_TEXT = "it reads pictures or sound, and the MoE is one of text"
OF_BASE = "what reads pictures comes from the base"
UnusedTensor = tuple[str, str, str]
"""(source, tensor, reason)."""


def unused_tensors(
    parts: Iterable[tuple[Source, Anatomy]],
    *,
    base: Source,
    by_group: Mapping[str, MergeSettings],
    trained: bool,
    nodes: tuple[ExpertNode, ...],
    backbone: tuple[TensorWrite, ...],
    passed: tuple[TensorWrite, ...],
) -> tuple[UnusedTensor, ...]:
    """Every unused tensor of every source; `nodes` include the shared experts."""
    writes = [*backbone, *passed, *(write for node in nodes for write in node.folded_writes())]
    used = {ref for write in writes for ref in write.sources}
    rows: list[UnusedTensor] = []
    for source, found in parts:
        inside_ffn = found.ffn_shapes.keys()
        for name, ref in source.tensors.items():
            if ref not in used:
                why = _reason(name, found, inside_ffn, by_group=by_group, is_base=source is base, passed=bool(passed))
                rows.append((str(source.name), name, f"{why}, or training replaced it" if trained else why))
        for name, ref in source.adapter.tensors.items() if source.adapter else ():
            if ref not in used:
                rows.append((str(source.name), name, _adapter_reason(name, is_base=source is base)))
    return tuple(dict.fromkeys(rows))


def _reason(
    name: str,
    found: Anatomy,
    inside_ffn: Collection[str],
    *,
    by_group: Mapping[str, MergeSettings],
    is_base: bool,
    passed: bool,
) -> str:
    if name in inside_ffn:
        return (
            "the base's own FFN is not among the experts"
            if is_base
            else "a low-rank adapter on the base's FFN stands for it"
        )
    if name in found.backbone:
        settings = by_group[group_of(name)]
        if settings.method == BASE:
            return "the backbone comes from the base"
        return (
            "the backbone is the experts' average"
            if settings.method == AVERAGE
            else "the experts' backbones are merged"
        )
    if BUFFER.search(name):
        return "a buffer that is recomputed from the config"
    if name == "lm_head.weight":
        return "the head is tied to the embeddings, and holds the same numbers"
    if OUTSIDE.search(name):
        return OF_BASE if passed else OF_TEXT
    return "not a tensor of this family"


def _adapter_reason(name: str, *, is_base: bool) -> str:
    if is_base and FFN_ADAPTER.search(name):
        return "the base's own FFN is not among the experts"
    return "the adapter changes the backbone, and an expert is an FFN only"
