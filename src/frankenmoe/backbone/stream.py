"""Runs a transformers decoder one layer at a time over many blocks of tokens, so that a layer may change in between.

Shape suffixes: N blocks, B blocks of a batch, T tokens of a block, D hidden, F inputs of the observed linear layer.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from frankenmoe.errors import PlanError
from frankenmoe.moe.dense import layer_modules
from frankenmoe.moe.processes import split

BATCH_TOKENS = 2048
PROBE = 0.05  # most relative error of a layer's answer to a change of its FFN's output, in 16 bits


@dataclass(frozen=True)
class _Call:
    """How a decoder calls one of its layers, except for the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _ReachedError(Exception):
    """The first layer was reached."""


class Stream:
    """The hidden states of blocks of equal length on their way through the layers of a model.

    `states` are the batches [B, T, D] that enter the next layer, `starts` the numbers of their first blocks. The
    decoder's own call of each layer (masks, rotary embeddings) is recorded once per batch size, so models need no code
    here. With `together`, each process of a launcher has its share of the same batches. Raises PlanError for a model
    whose layers do more than follow one another. `layers` are the numbers of all layers, with an FFN or without.
    """

    def __init__(self, model: PreTrainedModel, ids_NT: torch.Tensor, *, together: bool = False) -> None:
        self._layers = layer_modules(model)
        self.layers = tuple(self._layers)
        size = max(1, BATCH_TOKENS // ids_NT.shape[1])
        self.device = model.device
        ids_NT = ids_NT.to(self.device)
        starts = range(0, len(ids_NT), size)
        self.starts = split(starts) if together else list(starts)
        batches = [ids_NT[start : start + size] for start in self.starts]
        self._calls: dict[int, dict[int, _Call]] = {}
        for ids_BT in {len(ids_BT): ids_BT for ids_BT in (ids_NT[:size], *batches)}.values():
            self._calls[len(ids_BT)] = _calls(model, self._layers, ids_BT)
        self._first = _entering(model, self._layers[0], ids_NT[:size])  # also where another process has this batch
        self.states = [_entering(model, self._layers[0], ids_BT) for ids_BT in batches]

    @torch.no_grad()
    def run(self, layer: int, *, observed: nn.Module | None = None) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yields, batch by batch, what leaves a layer [B, T, D], and what enters the module `observed` [B, T, F].

        Without `observed` the second is empty. The states stay those that enter the layer.
        """
        for states_BTD in self.states:
            yield self._run(layer, states_BTD, observed)

    @torch.no_grad()
    def advance(self, layer: int) -> None:
        """Replaces the states by those that leave the layer."""
        for index, states_BTD in enumerate(self.states):
            self.states[index], _ = self._run(layer, states_BTD, None)

    def _run(
        self, layer: int, states_BTD: torch.Tensor, observed: nn.Module | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        seen = [states_BTD.new_empty(0)]
        hook = observed.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])) if observed else None
        try:
            out_BTD = self._call(layer, states_BTD)
        finally:
            if hook is not None:
                hook.remove()
        inputs = seen[-1]
        return out_BTD, inputs.reshape(*states_BTD.shape[:2], -1) if observed else inputs

    def _call(self, layer: int, states_BTD: torch.Tensor) -> torch.Tensor:
        call = self._calls[len(states_BTD)][layer]
        out = self._layers[layer](states_BTD, *call.args, **call.kwargs)
        found = out[0] if isinstance(out, tuple) else out
        assert isinstance(found, torch.Tensor)
        return found

    @torch.no_grad()
    def gain(self, layer: int, mlp: nn.Module) -> float:
        """How much a change of the output of a layer's FFN changes what leaves it: 1, or the family's multiplier.

        Raises PlanError for a layer that normalises the FFN's output: the change is then not proportional.
        """
        states_BTD = self._first
        for before in self.layers[: self.layers.index(layer)]:
            states_BTD = self._call(before, states_BTD)
        plain_BTD = self._call(layer, states_BTD)
        noise_BTD = torch.randn(plain_BTD.shape, generator=torch.Generator().manual_seed(0)).to(plain_BTD.device)
        delta_BTD = (noise_BTD * plain_BTD.float().pow(2).mean().sqrt()).to(plain_BTD.dtype)
        hook = mlp.register_forward_hook(lambda _, inputs, out: out + delta_BTD)
        try:
            moved_BTD = self._call(layer, states_BTD)
        finally:
            hook.remove()
        answer, change = moved_BTD.float() - plain_BTD.float(), delta_BTD.float()
        gain = float((answer * change).sum() / change.pow(2).sum())
        if float((answer - gain * change).norm()) > PROBE * float(answer.norm()):
            raise PlanError(
                f"{type(self._layers[layer]).__name__} does not add its FFN's output to the residual stream as it is, "
                "so experts of this family cannot be healed",
                hint="leave healing out",
            )
        return gain


@torch.no_grad()
def _entering(model: PreTrainedModel, first: nn.Module, ids_BT: torch.Tensor) -> torch.Tensor:
    """What enters the first layer, [B, T, D]."""
    found: list[torch.Tensor] = []

    def listen(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(_split(args, kwargs)[0])
        raise _ReachedError

    hook = first.register_forward_pre_hook(listen, with_kwargs=True)
    try:
        model.get_decoder()(input_ids=ids_BT, use_cache=False)
    except _ReachedError:
        pass
    finally:
        hook.remove()
    return found[0]


@torch.no_grad()
def _calls(model: PreTrainedModel, layers: dict[int, nn.Module], ids_BT: torch.Tensor) -> dict[int, _Call]:
    """How the decoder calls each layer for a batch of this shape."""
    found: dict[int, _Call] = {}
    left: dict[int, torch.Tensor] = {}

    def listen(layer: int) -> Callable[..., None]:
        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            states_BTD, found[layer] = _split(args, kwargs)
            if layer - 1 in left and not torch.equal(states_BTD, left.pop(layer - 1)):
                raise PlanError(
                    f"{type(model).__name__} changes the hidden states between two layers, so its experts cannot be "
                    "healed layer by layer",
                    hint="leave healing out for this family",
                )

        return before

    def keep(layer: int) -> Callable[..., None]:
        def after(_: nn.Module, inputs: object, out: Any) -> None:
            left[layer] = out[0] if isinstance(out, tuple) else out

        return after

    hooks = [holder.register_forward_pre_hook(listen(layer), with_kwargs=True) for layer, holder in layers.items()]
    hooks += [holder.register_forward_hook(keep(layer)) for layer, holder in layers.items()]
    try:
        model.get_decoder()(input_ids=ids_BT, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.Tensor, _Call]:
    """The hidden states of a layer's call, and the rest of the call."""
    if args:
        return args[0], _Call(args[1:], kwargs)
    rest = {key: value for key, value in kwargs.items() if key != "hidden_states"}
    return kwargs["hidden_states"], _Call((), rest)
