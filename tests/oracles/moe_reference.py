"""The slow, obvious way to mix experts, and small modules to mix; shares no code with frankenmoe."""

from collections.abc import Sequence

import torch
from torch import nn

# T tokens, D hidden, F ffn, K top-k

HIDDEN, FFN = 8, 12


class SwiGLU(nn.Module):
    """A random llama-style MLP (..., D) -> (..., D) that counts its calls."""

    def __init__(self, hidden: int = HIDDEN, ffn: int = FFN) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, ffn, bias=False)
        self.up_proj = nn.Linear(hidden, ffn, bias=False)
        self.down_proj = nn.Linear(ffn, hidden, bias=False)
        self.calls = 0

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.down_proj(nn.functional.silu(self.gate_proj(hidden)) * self.up_proj(hidden))


def naive(
    hidden_TD: torch.Tensor, weights_TK: torch.Tensor, ids_TK: torch.Tensor, experts: Sequence[nn.Module]
) -> torch.Tensor:
    """One token and one choice at a time; the id -1 adds nothing."""
    rows = []
    for token, ids in enumerate(ids_TK.tolist()):
        row_D = torch.zeros_like(hidden_TD[token])
        for choice, expert in enumerate(ids):
            if expert != -1:
                row_D = row_D + weights_TK[token, choice] * experts[expert](hidden_TD[token : token + 1])[0]
        rows.append(row_D)
    return torch.stack(rows)


def choices(scores_TE: list[list[float]], top_k: int) -> list[list[int]]:
    """The k experts of highest score per token, best first."""
    return [sorted(range(len(row)), key=lambda expert: -row[expert])[:top_k] for row in scores_TE]
