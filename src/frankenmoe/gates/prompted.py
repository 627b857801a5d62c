"""Plan -> routers computed from the experts' prompts.

Shape suffixes: L layers, D hidden.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from frankenmoe.artifact.folder import Routers
from frankenmoe.checkpoint.tensors import TensorWrite
from frankenmoe.checkpoint.values import check_finite
from frankenmoe.data.blocks import check_vocabulary
from frankenmoe.errors import NumericsError, RecipeError, SourceError
from frankenmoe.gates.capture import encode, layer_inputs
from frankenmoe.gates.chance import encoded
from frankenmoe.gates.methods import STATE_MODES, direction, embedding_sum, prompt_mean
from frankenmoe.moe.dense import as_tensor, load_dense, load_tokenizer, source_config
from frankenmoe.moe.device import AUTO, Weights, check_room, place, resolve
from frankenmoe.planning import Plan
from frankenmoe.planning.layout import SHARED
from frankenmoe.planning.names import named_experts
from frankenmoe.planning.sources import anatomy
from frankenmoe.planning.tree import dense_writes
from frankenmoe.progress import SILENT, Progress
from frankenmoe.recipe import Expert

EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "model.embeddings.weight")
Prompts = tuple[tuple[str, ...], tuple[str, ...]]
Side = Callable[[tuple[str, ...]], torch.Tensor]
"""Prompts -> their representation in each layer, [L, D]; counts them as progress."""

SHOWN = 40  # characters of a prompt in a message


def prompted_routers(plan: Plan, progress: Progress = SILENT, *, device: str = AUTO) -> Routers:
    """Every gate, nested and shared ones included, by the recipe's gate mode (one of PROMPT_MODES).

    The base reads the prompts on `device`.
    Raises RecipeError for a prompt with no or too many tokens, NumericsError if the base computes states that are not
    finite.
    """
    if plan.recipe.gate_mode == "cheap_embed":
        side = _embedding_sides(plan, progress)
    else:
        side = _state_sides(plan, device, progress)
    return encoded(plan, _prompted_gates(plan, side, progress))


def _prompted_gates(plan: Plan, side: Side, progress: Progress) -> Mapping[str, NDArray[np.float32]]:
    # the path of a router -> the experts that it chooses among
    levels: dict[tuple[int, ...], list[Expert]] = {}
    for _, path, expert in named_experts(plan.recipe.experts):
        levels.setdefault(path[:-1], []).append(expert)
    if plan.gated_shared:
        levels[SHARED] = list(plan.recipe.shared_experts)
    wanted = [plan.recipe.prompts_of(expert) for experts in levels.values() for expert in experts]
    directions = _directions(plan, side, list(dict.fromkeys(wanted)), progress)
    rows: dict[str, NDArray[np.float32]] = {}
    for path, experts in levels.items():
        stack_LED = torch.stack([directions[plan.recipe.prompts_of(expert)] for expert in experts], dim=1)
        names = plan.router_names(path).values()
        rows |= {name: gate_ED.numpy() for name, gate_ED in zip(names, stack_LED, strict=True)}
    return rows


def _directions(plan: Plan, side: Side, wanted: list[Prompts], progress: Progress) -> dict[Prompts, torch.Tensor]:
    """A unit row per layer, [L, D], for every distinct set of positive and negative prompts."""
    found = {}
    progress.start("routers", sum(len(side) for sides in wanted for side in sides), "prompts")
    for positive, negative in wanted:
        row_LD = direction(side(positive), side(negative) if negative else None)
        if not torch.isfinite(row_LD).all():
            raise _no_direction(plan, positive)
        found[positive, negative] = row_LD
    return found


def _no_direction(plan: Plan, positive: tuple[str, ...]) -> NumericsError:
    """Explains states that are not finite: raises the error of a tensor that is not finite, or returns an overflow."""
    for ref in (ref for write in _base_writes(plan) for ref in write.sources):
        check_finite(ref)
    return NumericsError(
        f"the base {plan.base.name} computes NaN or infinite states for the prompt {positive[0][:SHOWN]!r}, though its "
        "weights are finite",
        hint="convert the base to float32 first, or use gate_mode: random",
    )


def _base_writes(plan: Plan) -> tuple[TensorWrite, ...]:
    # the dtype of a weight, because the first tensor of the file may be a buffer of another type
    stored = plan.backbone[0].sources[0].dtype
    return dense_writes(plan.base, anatomy(plan.base), dtype=stored)


def _state_sides(plan: Plan, device: str, progress: Progress) -> Side:
    tokenizer, reduce = load_tokenizer(plan.base.folder), STATE_MODES[plan.recipe.gate_mode]
    tensors = {write.name: as_tensor(write) for write in _base_writes(plan)}
    dtype = next(iter(tensors.values())).dtype
    config = source_config(plan.base)
    chosen = resolve(device)
    check_room(Weights(sum(tensor.nbytes for tensor in tensors.values()), dtype), chosen)
    model = place(load_dense(config, tensors, dtype=dtype), chosen)
    longest = getattr(config, "max_position_embeddings", None)

    def side(prompts: tuple[str, ...]) -> torch.Tensor:
        ids = _ids(plan, tokenizer, prompts, longest=longest)
        progress.advance(len(prompts) - len(ids))

        def reduced(states_LTD: torch.Tensor) -> torch.Tensor:
            progress.advance(1)
            return reduce(states_LTD)

        return prompt_mean(map(reduced, layer_inputs(model, ids)))

    return side


def _embedding_sides(plan: Plan, progress: Progress) -> Side:
    tokenizer = load_tokenizer(plan.base.folder)
    name = next((write for write in plan.backbone if write.name.endswith(EMBEDDINGS)), None)
    if name is None:
        raise SourceError(
            f"{plan.base.name} has no embed_tokens.weight, which gate_mode cheap_embed reads",
            hint="use gate_mode: hidden",
        )
    embeddings_VD = as_tensor(name)

    def side(prompts: tuple[str, ...]) -> torch.Tensor:
        tokens = [token for ids in _ids(plan, tokenizer, prompts) for token in ids]
        progress.advance(len(prompts))
        return embedding_sum(tokens, embeddings_VD).expand(len(plan.expert_layers), -1)

    return side


def _ids(plan: Plan, tokenizer: Any, prompts: tuple[str, ...], *, longest: int | None = None) -> list[list[int]]:
    """Token ids per prompt. Raises an error for no tokens, more than `longest`, or tokens outside the vocabulary.

    A blank prompt without a begin token is left out, if it is not the only one.
    """
    found = encode(tokenizer, prompts)
    if any(found):
        kept = [bool(prompt.strip() or ids) for prompt, ids in zip(prompts, found, strict=True)]
        prompts = tuple(prompt for prompt, keep in zip(prompts, kept, strict=True) if keep)
        found = [ids for ids, keep in zip(found, kept, strict=True) if keep]
    for prompt, ids in zip(prompts, found, strict=True):
        if not ids or (longest and len(ids) > longest):
            raise RecipeError(
                f"the prompt {prompt[:SHOWN]!r} has {len(ids)} tokens in the base's tokenizer, expected 1 to "
                f"{longest or 'any number'}",
                hint="write another prompt",
            )
        check_vocabulary(ids, plan.base.config.get("vocab_size"), tokenizer, what=f"the prompt {prompt[:SHOWN]!r}")
    return found
