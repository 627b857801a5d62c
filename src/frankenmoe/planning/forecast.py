"""How large an MoE will be as GGUF, type by type, and what each type becomes on its shape; writes nothing.

Reads the tokenizer's file for its part of the size; knows nothing of torch or of the gguf package.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from frankenmoe.errors import PlanError
from frankenmoe.families.llamacpp import FILE_TYPES
from frankenmoe.planning.gguf import layout, suggestion
from frankenmoe.planning.parts import Parts, parts_of_plan
from frankenmoe.planning.plan import Plan


@dataclass(frozen=True, slots=True)
class Forecast:
    """A file that could be written: bytes, bits per weight of the model, weights by type, bytes with --pad256."""

    type: str
    bytes: int
    bits_per_weight: float
    holds: Mapping[str, int]
    padded_bytes: int | None
    advice: str | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def forecast(made: Plan) -> tuple[tuple[Forecast, ...], str | None]:
    """(a forecast per type, None), or (nothing, why llama.cpp cannot say this MoE)."""
    try:
        model = gguf_parts(made)
        plain = layout(model)
    except PlanError as error:
        return (), error.message
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
    return tuple(rows), None


def gguf_parts(made: Plan) -> Parts:
    """The parts of a plan that can become a GGUF file; PlanError where llama.cpp cannot express it, with the reasons.

    Missing weights are no reason: sizes need none.
    """
    problems = [problem for problem in made.problems if not problem.startswith("no weights in")]
    if made.fmt is None or made.base.family is None or problems:
        raise PlanError(
            f"llama.cpp cannot say this MoE: {'; '.join(problems) or 'no stock format holds it'}",
            hint="chat, audit and evaluation run it as it is; only GGUF needs a stock format",
        )
    return parts_of_plan(made)


def metadata_bytes(folder: Path, *, tensors: int, vocab: int) -> int:
    """About how large the head of a GGUF file is: the vocabulary and merges of `folder`, and a line per tensor.

    A tokenizer that cannot be read counts for nothing: whoever needs it will say so.
    """
    try:
        words, rest = _vocabulary(json.loads((folder / "tokenizer.json").read_bytes())["model"], vocab)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        words, rest = [], 0
    size = sum(8 + len(word.encode(errors="replace")) for word in words) + 10 * max(0, vocab - len(words)) + 4 * vocab
    return size + rest + 64 * tensors + 2000


def _vocabulary(model: Mapping[str, Any], vocab: int) -> tuple[list[str], int]:
    """The tokens, and the bytes of what stands beside them: scores, or else merges."""
    tokens = model.get("vocab") or {}
    words = [str(word) for word in tokens] if isinstance(tokens, dict) else [str(piece[0]) for piece in tokens]
    if model.get("byte_fallback"):
        return words, 4 * vocab
    pairs = [merge if isinstance(merge, str) else " ".join(merge) for merge in model.get("merges") or []]
    return words, sum(8 + len(pair.encode(errors="replace")) for pair in pairs)
