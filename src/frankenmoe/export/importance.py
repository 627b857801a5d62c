"""The importance of each column of each matrix, measured on text: llama.cpp's importance matrix, per expert.

The importance of a column is the mean square of its inputs. An expert that routers hardly choose would be measured on
very few tokens, so its importance comes from text that all experts read.

Shape suffixes: N tokens of one expert, T tokens, D hidden, C columns, P parts (experts) of a tensor, K top-k.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from frankenmoe.checkpoint.cast import Floats
from frankenmoe.families import FAMILIES
from frankenmoe.moe.block import MoEBlock
from frankenmoe.moe.dense import layer_modules, mlp_modules
from frankenmoe.moe.load import MoE
from frankenmoe.planning.gguf import GgufLayout

MIXED = ("experts", "down")  # inputs of every expert of its own
DOWN = frozenset(name for family in FAMILIES.values() for name in family.down)  # modules that an FFN ends with
FORCED = 512  # tokens that every expert reads
ENOUGH = 64  # own tokens from which an expert is measured on those

Key = tuple[int, str, int]
"""(layer, what reads the input: a module of the layer, experts, down, shared or shared_down; expert)."""

Q, LINEAR = ("self_attn.q_proj", "self_attn.qkv_proj", "mixer.q_proj"), ("linear_attn.in_proj_qkv",)
# matrix in the file -> the modules that read its input, one for each family. Two are left out: the output of linear
# attention, whose columns are in another order in the file, and Mamba, whose code reads its weights itself
INPUTS: Mapping[str, tuple[str, ...]] = {
    "attn_q": Q,
    "attn_k": Q,
    "attn_v": Q,
    "attn_output": ("self_attn.o_proj", "self_attn.out_proj", "mixer.o_proj"),
    "attn_qkv": LINEAR,
    "attn_gate": LINEAR,
    "ssm_alpha": LINEAR,
    "ssm_beta": LINEAR,
    "shortconv.in_proj": ("conv.in_proj",),
    "shortconv.out_proj": ("conv.out_proj",),
}


@dataclass
class _Sums:
    """Sums of squares per column, and their numbers of tokens."""

    squares: dict[Key, Any] = field(default_factory=dict)
    tokens: dict[Key, int] = field(default_factory=dict)

    def add(self, key: Key, x_NC: torch.Tensor) -> None:
        flat_NC = x_NC.reshape(-1, x_NC.shape[-1]).double()
        self.squares[key] = self.squares.get(key, 0) + flat_NC.square().sum(0)
        self.tokens[key] = self.tokens.get(key, 0) + len(flat_NC)

    def mean(self, key: Key) -> Any:
        return (self.squares[key] / max(1, self.tokens[key])).float().numpy()


@dataclass(frozen=True)
class Measured:
    """`importance` is [P, C] by tensor name, `starved` are (layer, expert, own tokens), `tokens` is the total."""

    importance: Mapping[str, Floats]
    starved: tuple[tuple[int, int, int], ...]
    tokens: int


def measure(
    moe: MoE,
    layout: GgufLayout,
    blocks: Sequence[Sequence[int]],
    *,
    on_step: Callable[[int], None] = lambda amount: None,
) -> Measured:
    """Reads every block of tokens, the first ones also with all experts, and measures the inputs of each matrix.

    Embedding and head are left out, as in llama.cpp.
    """
    own, forced = _Sums(), _Sums()
    read = 0
    with torch.no_grad():
        for ids in blocks:
            with _listening(moe, own, forced if read < FORCED else None):
                moe.model(input_ids=torch.tensor([list(ids)]))
            read += len(ids)
            on_step(1)
    experts = layout.facts.experts
    starved = tuple(
        (layer, expert, own.tokens.get((layer, "experts", expert), 0))
        for layer in mlp_modules(moe.model)
        for expert in range(experts)
        if own.tokens.get((layer, "experts", expert), 0) < min(ENOUGH, read)
    )
    hungry = {(layer, expert) for layer, expert, _ in starved}
    importance = {}
    for tensor in layout.tensors:
        place = _place(tensor.name)
        if place is None:
            continue
        layer, choices = place
        what = next((each for each in choices if (layer, each, 0) in own.tokens or each in MIXED), None)
        if what is None:
            continue
        parts = range(experts) if what in MIXED else range(1)
        rows = [(forced if (layer, part) in hungry and what in MIXED else own).mean((layer, what, part))
                for part in parts]  # fmt: skip
        importance[tensor.name] = _widened(np.stack(rows), tensor.shape[-1])
    return Measured(importance, starved, read)


def _place(name: str) -> tuple[int, tuple[str, ...]] | None:
    """blk.3.ffn_up_exps.weight -> (3, ("experts",)): its layer, and the names that what reads its input may have.

    None for a tensor that is not measured.
    """
    found = re.fullmatch(r"blk\.(\d+)\.(.+)\.weight", name)
    if found is None:
        return None
    layer, what = int(found[1]), found[2]
    if what in INPUTS:
        return layer, INPUTS[what]
    expert = re.fullmatch(r"ffn_(gate|up|down)_(exps|shexp)", what)
    if expert is None:
        return None
    down = expert[1] == "down"
    if expert[2] == "exps":
        return layer, ("down" if down else "experts",)
    return layer, ("shared_down" if down else "shared",)


def _widened(rows_PC: Floats, columns: int) -> Floats:
    """Padding columns hold zeros, so any importance will do: they get the mean."""
    missing = columns - rows_PC.shape[1]
    mean_P1 = rows_PC.mean(axis=1, keepdims=True)
    return np.concatenate([rows_PC, np.repeat(mean_P1, missing, axis=1)], axis=1) if missing else rows_PC


@contextmanager
def _listening(moe: MoE, own: _Sums, forced: _Sums | None) -> Iterator[None]:
    """Hooks on every attention and MoE block while one text is read."""
    hooks = []
    for layer, holder in layer_modules(moe.model).items():
        inside = dict(holder.named_modules())
        for what in {name for names in INPUTS.values() for name in names if name in inside}:
            hooks.append(inside[what].register_forward_pre_hook(partial(_add_input, own, (layer, what, 0))))
    for layer, (_, block) in mlp_modules(moe.model).items():
        hooks.append(block.register_forward_pre_hook(partial(_add_experts, layer, own, forced)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _add_input(sums: _Sums, key: Key, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
    sums.add(key, args[0])


def _add_experts(
    layer: int, own: _Sums, forced: _Sums | None, block: nn.Module, args: tuple[torch.Tensor, ...]
) -> None:
    """Adds the inputs of every expert of a block: of its own tokens, and for `forced` of all tokens."""
    assert isinstance(block, MoEBlock)
    hidden_TD = args[0].reshape(-1, args[0].shape[-1])
    _, ids_TK, _ = block.router(hidden_TD)
    for number, expert in enumerate(block.experts):
        chosen_ND = hidden_TD[(ids_TK == number).any(dim=1)]
        if len(chosen_ND):
            _expert(own, layer, ("experts", "down"), number, expert, chosen_ND)
        if forced is not None:
            _expert(forced, layer, ("experts", "down"), number, expert, hidden_TD)
    if block.shared is not None:
        _expert(own, layer, ("shared", "shared_down"), 0, block.shared, hidden_TD)


def _expert(
    sums: _Sums, layer: int, names: tuple[str, str], number: int, expert: nn.Module, x_ND: torch.Tensor
) -> None:
    """Adds the inputs of an expert and of its down projection."""
    sums.add((layer, names[0], number), x_ND)
    down = next(module for name, module in expert.named_modules() if name.rpartition(".")[2] in DOWN)
    hook = down.register_forward_pre_hook(partial(_add_input, sums, (layer, names[1], number)))
    try:
        expert(x_ND)
    finally:
        hook.remove()
