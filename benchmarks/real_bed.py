"""What the rows of benchmarks/real.py share: parents, held-out text, losses by block, merges, recipes."""

import json
import re
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from common import REPOSITORY
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

import frankenmoe as fm
from frankenmoe.data.blocks import Block, text_blocks
from frankenmoe.data.documents import Document
from frankenmoe.evaluate.bootstrap import Interval, minus, weighted
from frankenmoe.gates.forcing import forced
from frankenmoe.gates.states import padded
from frankenmoe.moe.dense import quiet_transformers

SHARED = REPOSITORY.parent / "shared"
PROMPTS, PROMPT_TOKENS = 2, 48  # per expert, as in recipes that people publish
Losses = dict[str, list[float]]
"""Nats of every block of held-out text, by domain."""


@dataclass(frozen=True)
class Scale:
    """How much is read: tokens of held-out text and of text to fit or heal, by domain; `block` tokens at a time."""

    held_out: int
    fit: int
    heal: int
    general: int
    block: int = 256


SCALES: Mapping[str, Scale] = {
    "smoke": Scale(held_out=512, fit=512, heal=512, general=512),
    "quick": Scale(held_out=2048, fit=2048, heal=4096, general=2048),
    "whole": Scale(held_out=4096, fit=4096, heal=16_384, general=4096),
}


@dataclass(frozen=True)
class Parents:
    """A base and its fine-tunes by domain. `dtype` is the type to merge and to run in."""

    name: str
    base: Path
    folders: Mapping[str, Path]
    texts: Mapping[str, Path]  # domain -> the folder of its texts
    dtype: str = "bfloat16"

    def text(self, domain: str, part: str) -> str:
        """`part`: "train" or "heldout"."""
        return (self.texts[domain] / f"{domain}.{part}.txt").read_text(encoding="utf-8")


class Bed:
    """Measures models on the held-out text of a set of parents. Losses are measured once and kept in `kept_in`."""

    def __init__(self, parents: Parents, scale: Scale, work: Path, kept_in: Path, device: str = "cpu") -> None:
        self.parents, self.scale, self.work, self.kept_in, self.device = parents, scale, work, kept_in, device
        self.domains = tuple(parents.folders)
        with quiet_transformers():
            self.tokenizer = AutoTokenizer.from_pretrained(parents.base)
        self.blocks = {domain: self.read(parents.text(domain, "heldout"), scale.held_out) for domain in self.domains}

    def read(self, text: str, tokens: int) -> list[Block]:
        """The first `tokens` tokens of a text, in whole blocks."""
        most = max(1, tokens // self.scale.block)
        return text_blocks([Document(text=text, closed=False)], self.tokenizer, length=self.scale.block, limit=most)

    def dense(self, folder: Path) -> Any:
        """A parent or the base, in the type to run in; of an adapter's folder, the base with the adapter merged."""
        return dense(folder, self.parents.dtype, base=self.parents.base).to(self.device)

    def load(self, what: fm.Recipe | Path) -> Any:
        """A running MoE."""
        return fm.load(what, device=self.device)

    # ---- losses ------------------------------------------------------------------------------------------------------

    def losses(self, model: Any, domains: Sequence[str] | None = None) -> Losses:
        """Nats per block of each domain's held-out text."""
        return {domain: nats(model, self.blocks[domain]) for domain in domains or self.domains}

    def forced(self, moe: Any) -> Losses:
        """As `losses`, every domain with its own expert alone."""
        found: Losses = {}
        for domain in self.domains:
            with forced(moe.model, (moe.experts.index(domain),)):
                found |= self.losses(moe.model, (domain,))
        return found

    def known(self, name: str, measure: Callable[[], Losses]) -> Losses:
        """What `measure` gives; kept as a file, so that a killed run does not measure it again."""
        file = self.kept_in / f"{re.sub(r'[^A-Za-z0-9.]+', '-', name)}.json"
        if not file.exists():
            found = measure()
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(found))
        kept: Losses = json.loads(file.read_text())
        return kept

    @property
    def base(self) -> Losses:
        return self.known("base", lambda: self.losses(self.dense(self.parents.base)))

    @property
    def own(self) -> Losses:
        """Every parent on its own domain."""

        def one(domain: str, folder: Path) -> Losses:
            return self.losses(self.dense(folder), (domain,))

        return {
            domain: self.known(f"parent {domain}", partial(one, domain, folder))[domain]
            for domain, folder in self.parents.folders.items()
        }

    def mean(self, losses: Losses) -> dict[str, float]:
        """Nats per token by domain."""
        return {
            domain: sum(values) / sum(block.targets for block in self.blocks[domain])
            for domain, values in losses.items()
        }

    def kept(self, losses: Losses) -> dict[str, float]:
        """The share of each parent's advantage over the base that is kept, in percent; and their mean."""
        base, own, ours = self.mean(self.base), self.mean(self.own), self.mean(losses)
        shares = {domain: 100 * (base[domain] - ours[domain]) / (base[domain] - own[domain]) for domain in ours}
        return {**shares, "mean": statistics.fmean(shares.values())}

    def against(self, ours: Losses, theirs: Losses) -> dict[str, Interval]:
        """Nats per token by which our loss is lower, by domain, with paired 95 % intervals over blocks."""
        return {
            domain: weighted(
                [
                    (
                        minus(theirs[domain], ours[domain]),
                        [float(block.targets) for block in self.blocks[domain]],
                        1.0,
                    )
                ]
            )
            for domain in ours
        }

    # ---- dense merges, written out here so that they are a check of the product's ------------------------------------

    def dense_merge(self, method: str) -> Losses:
        """The losses of a dense merge of all parents: a key of MERGES."""
        return self.known(f"dense {method}", lambda: self.losses(self._merged(method)))

    @torch.no_grad()
    def _merged(self, method: str) -> Any:
        """The merge, one tensor after the other: only one model is in memory."""
        model = dense(self.parents.base, self.parents.dtype)
        with ExitStack() as stack:
            files = [
                stack.enter_context(safe_open(folder / "model.safetensors", "pt"))
                for folder in (self.parents.base, *self.parents.folders.values())
            ]
            for name, parameter in model.named_parameters():
                base, *parents = (file.get_tensor(name).float() for file in files)
                parameter.copy_(MERGES[method](base, parents))
        return model.to(self.device)

    def best_merge(self) -> tuple[str, Losses]:
        """The dense merge with the lowest mean loss."""
        found = {method: self.dense_merge(method) for method in MERGES}
        best = min(found, key=lambda method: statistics.fmean(self.mean(found[method]).values()))
        return best, found[best]

    # ---- recipes -----------------------------------------------------------------------------------------------------

    def recipe(self, more: Mapping[str, Mapping[str, Any]] | None = None, /, **keys: Any) -> fm.Recipe:
        """An MoE of the parents, top-2. `more` adds keys to each expert; `keys` are the recipe's."""
        rows = [
            {"source_model": str(folder), "name": domain, **(more or {}).get(domain, {})}
            for domain, folder in self.parents.folders.items()
        ]
        table = {
            "base_model": str(self.parents.base),
            "dtype": self.parents.dtype,
            "gate_mode": "random",
            "experts_per_token": 2,
            "experts": rows,
        } | keys
        return fm.Recipe.parse(yaml.safe_dump(table), folder=self.work, origin="real.py")

    def prompts(self) -> dict[str, dict[str, list[str]]]:
        """Two prompts per expert, from the training text."""
        found = {}
        for domain in self.domains:
            ids = self.tokenizer(self.parents.text(domain, "train")[:40_000], add_special_tokens=False)["input_ids"]
            starts = torch.randint(len(ids) - PROMPT_TOKENS, (PROMPTS,), generator=torch.Generator().manual_seed(0))
            texts = [self.tokenizer.decode(ids[start : start + PROMPT_TOKENS]) for start in starts.tolist()]
            found[domain] = {"positive_prompts": texts}
        return found

    def data(self) -> dict[str, list[str]]:
        """Every expert's training text."""
        return {domain: [str(folder / f"{domain}.train.txt")] for domain, folder in self.parents.texts.items()}

    def with_texts(self) -> dict[str, dict[str, Any]]:
        """The same as keys of a recipe's experts."""
        return {domain: {"data": files} for domain, files in self.data().items()}


@torch.no_grad()
def nats(model: Any, blocks: Sequence[Block], batch: int = 8) -> list[float]:
    """The summed loss of every block, in nats, in float32 logits."""
    found: list[float] = []
    for start in range(0, len(blocks), batch):
        part = blocks[start : start + batch]
        ids_BT, mask_BT = padded([block.ids for block in part], device=model.device)
        logits_BTV = model(input_ids=ids_BT, attention_mask=mask_BT.long(), use_cache=False).logits
        for row, block in enumerate(part):
            last = len(block.ids)
            losses = torch.nn.functional.cross_entropy(
                logits_BTV[row, : last - 1].float(), ids_BT[row, 1:last], reduction="none"
            )
            found.append(float((losses.cpu() * torch.tensor(block.learn[1:])).sum()))
    return found


def dense(folder: Path, dtype: str, *, base: Path | None = None) -> Any:
    """A dense model of transformers; of an adapter's folder, `base` with the adapter merged in float32."""
    with quiet_transformers():
        if not (folder / "adapter_config.json").is_file():
            return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
        from peft import PeftModel

        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        return PeftModel.from_pretrained(model, folder).merge_and_unload().to(getattr(torch, dtype)).eval()


# ---- merges of one tensor --------------------------------------------------------------------------------------------


def _average(base: torch.Tensor, parents: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.stack([*parents]).mean(dim=0)


def _task(scale: float) -> Callable[[torch.Tensor, Sequence[torch.Tensor]], torch.Tensor]:
    return lambda base, parents: base + scale * sum(parent - base for parent in parents)


def _ties(base: torch.Tensor, parents: Sequence[torch.Tensor], density: float = 0.5) -> torch.Tensor:
    """TIES (2306.01708): trim small changes, elect a sign by mass, average the changes that have it."""
    trimmed = []
    for parent in parents:
        change = parent - base
        least = change.abs().flatten().kthvalue(max(1, round((1 - density) * change.numel()))).values
        trimmed.append(change * (change.abs() > least))
    stacked = torch.stack(trimmed)
    agree = (stacked.sign() == stacked.sum(dim=0).sign()) & (stacked != 0)
    return base + (stacked * agree).sum(dim=0) / agree.sum(dim=0).clamp(min=1)


MERGES: Mapping[str, Callable[[torch.Tensor, Sequence[torch.Tensor]], torch.Tensor]] = {
    "average": _average,
    "task arithmetic 0.7": _task(0.7),
    "task arithmetic 1.0": _task(1.0),
    "ties 0.5": _ties,
}


@contextmanager
def folder_for(bed: Bed, name: str) -> Iterator[Path]:
    """An empty place in the bed's work folder, emptied afterwards."""
    import shutil

    path = bed.work / name
    shutil.rmtree(path, ignore_errors=True)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
