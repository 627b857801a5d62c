"""Counts what a fit costs, in forward passes over its text."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from frankenmoe.gates.states import Advance
from frankenmoe.moe.block import MoEBlock
from frankenmoe.moe.processes import all_reduce, world
from frankenmoe.moe.trace import outer_blocks
from frankenmoe.progress import Progress


@dataclass(frozen=True)
class Cost:
    """What a fit read: `tokens` of text, and by step the tokens through the whole model (see `Meter`)."""

    tokens: int
    steps: Mapping[str, float]

    @property
    def forward_passes(self) -> float:
        return sum(self.steps.values()) / self.tokens

    def to_dict(self) -> dict[str, Any]:
        """Plain data, in forward passes over the text."""
        steps = {step: round(tokens / self.tokens, 3) for step, tokens in self.steps.items()}
        return {"tokens": self.tokens, "forward_passes": round(self.forward_passes, 3), "by_step": steps}


class Meter:
    """Adds up the tokens that a model reads, by step, and reports them as progress.

    `planning.fitting` defines a forward pass. `layers` is the share of the layers, which a reading without head costs.
    """

    def __init__(self, model: PreTrainedModel, *, text: int, progress: Progress) -> None:
        self.text = text
        self.layers = 1 - head_share(model)
        self._progress = progress
        self._steps: dict[str, float] = {}

    def reading(self, step: str, *, head: bool = True) -> Advance:
        """A callback for the readings of `states`: counts the tokens of a step, which are read with or without head."""
        self.note(step)
        self._steps.setdefault(step, 0.0)  # also if all of its batches are read by other processes
        part = 1.0 if head else self.layers

        def advance(tokens: int) -> None:
            self._steps[step] += part * tokens
            self._progress.advance(round(part * tokens) * world())

        return advance

    def note(self, step: str) -> None:
        """Shows a step that reads nothing."""
        self._progress.note(step)

    def cost(self, *, together: bool = False) -> Cost:
        """What all processes of a launcher read, if they read `together`, else this one."""
        if together:
            all_steps = all_reduce(torch.tensor(list(self._steps.values()), dtype=torch.float64)).tolist()
            return Cost(self.text, dict(zip(self._steps, all_steps, strict=True)))
        return Cost(self.text, dict(self._steps))


def head_share(model: PreTrainedModel) -> float:
    """The share of the head among the weights that one token is multiplied with; embeddings are only looked up."""
    head = model.get_output_embeddings()
    if head is None:
        return 0.0
    decoder = model.get_decoder()
    looked_up = decoder.get_input_embeddings()
    outer = list(outer_blocks(decoder).values())
    inside = {id(part) for block in outer for part in block.parameters()} | {
        id(part) for part in looked_up.parameters()
    }
    rest = sum(part.numel() for part in decoder.parameters() if id(part) not in inside)
    layers = rest + sum(map(_active, outer))
    own = sum(part.numel() for part in head.parameters())
    return float(own / (own + layers))


def _active(module: nn.Module) -> float:
    """The weights of a block or an expert that one token is multiplied with."""
    if not isinstance(module, MoEBlock):
        return sum(part.numel() for part in module.parameters())
    chosen = module.router.top_k / len(module.experts) if hasattr(module.router, "top_k") else 1.0
    shared = 0.0 if module.shared is None else _active(module.shared)
    return chosen * sum(map(_active, module.experts)) + shared + module.router.weight.numel()
