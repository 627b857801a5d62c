"""Gate rows from captured states: pure functions, one per gate mode, as mergekit-moe computes them.

Shape suffixes: L layers, T tokens, D hidden, V vocabulary, N all prompt tokens of an expert.
"""

from collections.abc import Callable, Iterable, Mapping

import torch

TINY = 1e-8  # mergekit's lower limit for a norm that it divides by


def last_token(states_LTD: torch.Tensor) -> torch.Tensor:
    """`hidden` and `hidden_last`: the residual stream entering each layer at the prompt's last token, [L, D]."""
    return states_LTD[:, -1].float()


def token_mean(states_LTD: torch.Tensor) -> torch.Tensor:
    """`hidden_avg`: the residual stream entering each layer, averaged over the prompt's own tokens, [L, D].

    mergekit-moe also averages over padding. This does not.
    """
    return states_LTD.float().mean(dim=1)


STATE_MODES: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "hidden": last_token,
    "hidden_last": last_token,
    "hidden_avg": token_mean,
}


def prompt_mean(states: Iterable[torch.Tensor]) -> torch.Tensor:
    """Mean of the [L, D] states of an expert's prompts."""
    return torch.stack(list(states)).mean(dim=0)


def embedding_sum(ids_N: list[int], embeddings_VD: torch.Tensor) -> torch.Tensor:
    """`cheap_embed`: the normalized sum of all prompt tokens' embeddings, [1, D], the same for every layer."""
    return unit(embeddings_VD[torch.tensor(ids_N)].float().sum(dim=0, keepdim=True))


def direction(positive_LD: torch.Tensor, negative_LD: torch.Tensor | None) -> torch.Tensor:
    """A gate row per layer: positive minus negative, normalized, [L, D]."""
    return unit(positive_LD if negative_LD is None else positive_LD - negative_LD)


def unit(rows_LD: torch.Tensor) -> torch.Tensor:
    """Rows divided by their Euclidean length."""
    length_L1: torch.Tensor = torch.linalg.vector_norm(rows_LD, dim=-1, keepdim=True)
    return rows_LD / length_L1.clamp(min=TINY)
