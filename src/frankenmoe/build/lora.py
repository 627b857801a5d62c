"""Two models -> a PEFT LoRA of their difference, and how much of the difference and of the advantage it keeps."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic_core import PydanticCustomError

from frankenmoe.artifact.folder import become, check_disk, growing, refuse_occupied, write_json
from frankenmoe.checkpoint.peft import PREFIX, adapter_bytes
from frankenmoe.checkpoint.reader import open_adapter
from frankenmoe.data.given import user_path
from frankenmoe.errors import RecipeError, SourceError
from frankenmoe.planning.difference import (
    Layer,
    by_group,
    checked_pair,
    left_out,
    linear_layers,
    write_adapter,
)
from frankenmoe.planning.files import states
from frankenmoe.planning.sources import Source, open_source
from frankenmoe.progress import SILENT, Progress
from frankenmoe.recipe.asadapter import AdapterSettings
from frankenmoe.recipe.settings import settings_with
from frankenmoe.recipe.sourcename import parse_source

if TYPE_CHECKING:
    from frankenmoe.data.blocks import Block

REPORT = "extraction.json"
BLOCK = 256  # tokens of text that are read together
LIMIT = 128  # blocks of a text at most
LEAST = 64  # tokens of a text


@dataclass(frozen=True)
class ExtractedLora:
    """A finished adapter in `folder`.

    `left_out` is the relative difference of each group that the adapter cannot hold. `losses` are those of base, model
    and base + adapter per text, in nats per token.
    """

    folder: Path
    model: str
    base: str
    layers: tuple[Layer, ...] = field(repr=False)
    left_out: Mapping[str, float]
    losses: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        return sum(layer.bytes for layer in self.layers)

    @property
    def energy_kept(self) -> float:
        """The adapter's share of the squared norm of the difference, over all its layers."""
        return sum(layer.kept for layer in self.layers) / sum(layer.energy for layer in self.layers)

    def advantage_kept(self, text: str) -> float | None:
        """The adapter's share of what the model is better than the base on a text; None if it is not better."""
        row = self.losses[text]
        advantage = row["base"] - row["model"]
        return (row["base"] - row["adapter"]) / advantage if advantage > 0 else None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as in extraction.json and as `--json` prints it."""
        return {
            "model": self.model,
            "base": self.base,
            "bytes": self.bytes,
            "energy_kept": self.energy_kept,
            "groups": by_group(self.layers),
            "left_out": dict(self.left_out),
            "losses": {text: {**row, "advantage_kept": self.advantage_kept(text)} for text, row in self.losses.items()},
            "layers": [layer.to_dict() for layer in self.layers],
        }


def extract_lora(
    model: str | Path,
    out: str | Path,
    *,
    base: str | Path,
    texts: Sequence[str | Path] = (),
    settings: AdapterSettings | None = None,
    seed: int = 0,
    trust_remote_code: bool = False,
    progress: Progress = SILENT,
    **changes: Any,
) -> ExtractedLora:
    """Writes `model` minus `base` as a PEFT LoRA to `out`, completely or not at all.

    `model` and `base` are folders or hub ids (with @revision); `changes` are settings: rank=32 or energy=0.9. With
    `texts` (files or hub datasets), the losses of base, model and base + adapter are measured, one model at a time, on
    the first 32,768 tokens of each. Holds one layer's factors in memory. Raises subclasses of FrankenMoEError.
    """
    settings = settings_with(settings or AdapterSettings(), changes)
    out = Path(os.path.realpath(out))
    refuse_occupied(out)
    ours, theirs = (_opened(name, what, trust=trust_remote_code) for name, what in ((model, "model"), (base, "base")))
    parts, _ = checked_pair(ours, theirs)
    names = linear_layers(parts)
    files = states([*ours.checkpoint.files, *theirs.checkpoint.files], [])
    facts = [settings.model_dump(mode="json"), seed, files]
    digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    blocks = _blocks(theirs.folder, texts) if texts else {}
    with growing(out, digest=f"{digest}/extract-lora") as partial:
        # twice, because the factors are spooled before their file is written
        need = 2 * adapter_bytes(list(names.values()), rank=settings.every_rank or 1, dtype="BF16")
        check_disk(partial, need=need, hint="choose a folder on another disk, or a smaller rank")
        layers = write_adapter(ours, theirs, names, partial, settings=settings, seed=seed, progress=progress)
        losses = _losses(ours, theirs, partial, blocks, progress) if blocks else {}
        made = ExtractedLora(out, str(ours.name), str(theirs.name), layers, left_out(ours, theirs, parts), losses)
        write_json(partial / REPORT, made.to_dict())
        become(partial, out)
    return made


def _opened(name: str | Path, what: str, *, trust: bool) -> Source:
    try:
        parsed = parse_source(str(name), folder=Path.cwd())
    except PydanticCustomError as error:
        context = error.context or {}
        raise RecipeError(f"{what} {context.get('text', error)}", hint=context.get("hint")) from None
    return open_source(parsed, folder=Path.cwd(), weights=True, trust_remote_code=trust)


def _blocks(folder: Path, texts: Sequence[str | Path]) -> dict[str, "list[Block]"]:
    """Text -> its blocks, read before anything is computed, so that a missing or short text is reported early."""
    from frankenmoe.data.blocks import text_blocks
    from frankenmoe.data.documents import read_documents
    from frankenmoe.moe.dense import load_tokenizer

    tokenizer = load_tokenizer(folder)
    named = [user_path(str(text), folder=Path.cwd()) for text in texts]
    found = {}
    for name in named:
        documents = read_documents([name], folder=Path.cwd())
        found[name] = text_blocks(documents, tokenizer, length=BLOCK, limit=LIMIT)
        tokens = sum(block.targets for block in found[name])
        if tokens < LEAST:
            raise SourceError(
                f"{name} has too few tokens to compare models on: {tokens}, expected at least {LEAST}",
                hint="give more text",
            )
    return found


def _losses(
    model: Source, base: Source, folder: Path, blocks: Mapping[str, "list[Block]"], progress: Progress
) -> dict[str, dict[str, float]]:
    """Text -> mean loss of base, model and base + adapter. The adapter is not folded in, so it is not rounded."""
    import torch

    from frankenmoe.checkpoint.values import values
    from frankenmoe.gates.states import mean_loss
    from frankenmoe.moe.adapter import wrap_linear
    from frankenmoe.moe.dense import load_source

    found: dict[str, dict[str, float]] = {text: {} for text in blocks}
    adapter = open_adapter(folder)
    tokens = sum(len(block.ids) for rows in blocks.values() for block in rows)
    progress.start("measuring", 3 * tokens, "tokens")
    for name, source in (("model", model), ("base", base), ("adapter", base)):
        stored = next(iter(source.checkpoint.tensors.values())).dtype
        running = load_source(source, stored=stored)
        if name == "adapter":
            for key, ref in adapter.tensors.items():
                if ".lora_A." in key:
                    module = key.removeprefix(PREFIX).removesuffix(".lora_A.weight")
                    other = adapter.tensors[key.replace(".lora_A.", ".lora_B.")]
                    a_RI, b_OR = (torch.from_numpy(values(each)) for each in (ref, other))
                    wrap_linear(running, module, a_RI, b_OR, 1.0)
        for text, rows in blocks.items():
            found[text][name] = mean_loss(running, rows, on_tokens=progress.advance)
        del running
    return found
