"""Plan -> the sizes of its GGUF files by type. Does not import torch or gguf."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from frankenmoe.checkpoint.jsonfile import small_bytes
from frankenmoe.errors import PlanError
from frankenmoe.families.llamacpp import FILE_TYPES
from frankenmoe.planning.gguf import layout, suggestion
from frankenmoe.planning.layout import misfits
from frankenmoe.planning.parts import Parts, parts_of_plan
from frankenmoe.planning.plan import Plan


@dataclass(frozen=True, slots=True)
class Forecast:
    """A possible file: its size, bits per weight, number of weights by type, and its size with --pad256."""

    type: str
    bytes: int
    bits_per_weight: float
    holds: Mapping[str, int]
    padded_bytes: int | None
    advice: str | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Outlook:
    """What becomes of an MoE in llama.cpp: its possible files and what they lack, or why there are none."""

    files: tuple[Forecast, ...] = ()
    notes: tuple[str, ...] = ()
    impossible: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return {
            "files": [file.to_dict() for file in self.files],
            "notes": list(self.notes),
            "impossible": self.impossible,
        }


def forecast(made: Plan) -> Outlook:
    """The outlook of a plan, with a file of each type."""
    try:
        model = gguf_parts(made)
        plain = layout(model)
    except PlanError as error:
        return Outlook(impossible=error.message)
    try:
        padded = layout(model, pad256=True)
    except PlanError:
        padded = plain
    head = metadata_bytes(model.folder, tensors=len(plain.tensors), vocab=int(model.config["vocab_size"]))
    widened = (padded.hidden, padded.ffn) != (plain.hidden, plain.ffn)
    rows = []
    for kind in FILE_TYPES.values():
        size = plain.tensor_bytes(kind) + head
        rows.append(
            Forecast(
                type=kind.name,
                bytes=size,
                bits_per_weight=size * 8 / plain.weights,
                holds=plain.weights_by_type(plain.types(kind)),
                padded_bytes=padded.tensor_bytes(kind) + head if widened else None,
                advice=suggestion(plain, kind),
            )
        )
    return Outlook(tuple(rows), plain.notes)


def gguf_parts(made: Plan) -> Parts:
    """The parts of a plan for a GGUF file. PlanError with the reasons if llama.cpp does not support it.

    The sources may lack weights, which sizes do not need.
    """
    problems = misfits(made.problems)
    if made.fmt is None or made.base.family is None or problems:
        raise PlanError(
            f"llama.cpp does not support this MoE: {'; '.join(problems) or 'it fits no stock format'}",
            hint="chat, audit and eval run it; only GGUF needs a stock format",
        )
    return parts_of_plan(made)


def metadata_bytes(folder: Path, *, tensors: int, vocab: int) -> int:
    """The approximate size of a GGUF file's metadata: vocabulary and merges in `folder`, and an entry per tensor.

    A tokenizer that cannot be read counts as empty; export reports it.
    """
    try:
        words, rest = _vocabulary(json.loads(small_bytes(folder / "tokenizer.json"))["model"], vocab)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        words, rest = [], 0
    size = sum(8 + len(word.encode(errors="replace")) for word in words) + 10 * max(0, vocab - len(words)) + 4 * vocab
    return size + rest + 64 * tensors + 2000


def _vocabulary(model: Mapping[str, Any], vocab: int) -> tuple[list[str], int]:
    """The tokens, and the bytes of their scores or merges."""
    tokens = model.get("vocab") or {}
    words = [str(word) for word in tokens] if isinstance(tokens, dict) else [str(piece[0]) for piece in tokens]
    if model.get("byte_fallback"):
        return words, 4 * vocab
    pairs = [merge if isinstance(merge, str) else " ".join(merge) for merge in model.get("merges") or []]
    return words, sum(8 + len(pair.encode(errors="replace")) for pair in pairs)
