"""Plan -> routers: fills every gate of an MoE by the recipe's gate mode; does not know where routers are kept.

Shape suffixes: L layers, D hidden.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoTokenizer

from frankenmoe.artifact import Routers
from frankenmoe.checkpoint.values import encode as encode_values
from frankenmoe.errors import NumericsError, RecipeError, SourceError
from frankenmoe.gates.capture import encode, layer_inputs
from frankenmoe.gates.methods import RANDOM_ROWS, STATE_MODES, direction, embedding_sum, prompt_mean
from frankenmoe.moe.dense import as_tensor, load_dense, quiet_transformers, read_config
from frankenmoe.planning import Plan
from frankenmoe.planning.layout import SHARED
from frankenmoe.planning.sources import anatomy
from frankenmoe.planning.tree import dense_writes, tensor_seed
from frankenmoe.recipe import Expert

Prompts = tuple[tuple[str, ...], tuple[str, ...]]
Progress = Callable[[int, int], None]


def make_routers(plan: Plan, *, on_progress: Progress = lambda done, total: None) -> Routers:
    """Name -> (dtype, shape, bytes) of every gate, nested and shared ones too; progress counts sets of prompts.

    Raises RecipeError for a prompt without tokens, NumericsError when the base computes no finite states.
    """
    mode = plan.recipe.gate_mode
    rows = _random_gates(plan) if mode in RANDOM_ROWS else _prompted_gates(plan, on_progress=on_progress)
    return {
        name: (plan.dtype, shape, encode_values(np.ascontiguousarray(rows[name]).reshape(-1), dtype=plan.dtype))
        for name, shape in plan.routers.items()
    }


def _random_gates(plan: Plan) -> Mapping[str, NDArray[np.float32]]:
    draw = RANDOM_ROWS[plan.recipe.gate_mode]
    return {
        name: draw(np.random.Generator(np.random.Philox(tensor_seed(plan.recipe.seed, (), name))), *shape)
        for name, shape in plan.routers.items()
    }


def _prompted_gates(plan: Plan, *, on_progress: Progress) -> Mapping[str, NDArray[np.float32]]:
    shared = plan.recipe.shared_experts if plan.gated_shared else ()
    levels = dict(_levels(plan.recipe.experts))
    wanted = [plan.recipe.prompts_of(expert) for experts in (*levels.values(), shared) for expert in experts]
    directions = _directions(plan, list(dict.fromkeys(wanted)), on_progress=on_progress)
    rows: dict[str, NDArray[np.float32]] = {}
    for path, experts in [*levels.items(), *([(SHARED, shared)] if shared else [])]:
        stack_LED = torch.stack([directions[plan.recipe.prompts_of(expert)] for expert in experts], dim=1)
        names = plan.router_names(path)
        rows |= {name: gate_ED.numpy() for name, gate_ED in zip(names, stack_LED, strict=True)}
    return rows


def _levels(
    experts: tuple[Expert, ...], path: tuple[int, ...] = ()
) -> list[tuple[tuple[int, ...], tuple[Expert, ...]]]:
    """Every router's path with the experts it chooses among."""
    inner = [_levels(expert.experts, (*path, index)) for index, expert in enumerate(experts) if expert.experts]
    return [(path, experts), *(level for levels in inner for level in levels)]


def _directions(plan: Plan, wanted: list[Prompts], *, on_progress: Progress) -> dict[Prompts, torch.Tensor]:
    """A unit row per layer, [L, D], for every distinct set of positive and negative prompts."""
    side = _embedding_sides(plan) if plan.recipe.gate_mode == "cheap_embed" else _state_sides(plan)
    found = {}
    for done, (positive, negative) in enumerate(wanted):
        on_progress(done, len(wanted))
        row_LD = direction(side(positive), side(negative) if negative else None)
        if not torch.isfinite(row_LD).all():
            raise NumericsError(
                f"the base {plan.base.name} computes NaN or infinite states for the prompts {positive[:1]} ...",
                hint="load it in float32 (dtype: float32), or check the base model",
            )
        found[positive, negative] = row_LD
    on_progress(len(wanted), len(wanted))
    return found


def _state_sides(plan: Plan) -> Callable[[tuple[str, ...]], torch.Tensor]:
    tokenizer, reduce = load_tokenizer(plan), STATE_MODES[plan.recipe.gate_mode]
    stored = next(iter(plan.base.checkpoint.tensors.values())).dtype
    writes = dense_writes(plan.base, anatomy(plan.base), dtype=stored)
    tensors = {write.name: as_tensor(write) for write in writes}
    dtype = next(iter(tensors.values())).dtype
    model = load_dense(read_config(plan.base.folder), tensors, dtype=dtype)
    return lambda prompts: prompt_mean(map(reduce, layer_inputs(model, _ids(tokenizer, prompts))))


def _embedding_sides(plan: Plan) -> Callable[[tuple[str, ...]], torch.Tensor]:
    tokenizer = load_tokenizer(plan)
    name = next((write for write in plan.backbone if write.name.endswith(("embed_tokens.weight", "wte.weight"))), None)
    if name is None:
        raise SourceError(
            f"{plan.base.name} has no embed_tokens.weight, which gate_mode cheap_embed reads",
            hint="use gate_mode: hidden",
        )
    embeddings_VD = as_tensor(name)
    return lambda prompts: embedding_sum(
        [token for ids in _ids(tokenizer, prompts) for token in ids], embeddings_VD
    ).expand(plan.layers, -1)


def _ids(tokenizer: Any, prompts: tuple[str, ...]) -> list[list[int]]:
    found = encode(tokenizer, prompts)
    for prompt, ids in zip(prompts, found, strict=True):
        if not ids:
            raise RecipeError(
                f"the prompt {prompt!r} has no tokens in the base's tokenizer", hint="write another prompt"
            )
    return found


def load_tokenizer(plan: Plan) -> Any:
    """The base's tokenizer; SourceError where the base has none."""
    try:
        with quiet_transformers():
            return AutoTokenizer.from_pretrained(plan.base.folder)
    except (ValueError, OSError, KeyError) as error:
        raise SourceError(
            f"{plan.base.folder} has no tokenizer that transformers can load, and gate_mode "
            f"{plan.recipe.gate_mode} needs one for its prompts",
            hint="put the tokenizer's files beside the base's weights, or use gate_mode: random",
        ) from error
