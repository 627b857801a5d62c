"""How much each expert adds on text: REAP (arXiv 2510.13999), the router-weighted norm of what an expert puts out.

For expert e of a layer it is the mean of g_e(x) |f_e(x)| over the tokens x that are routed to e: g_e is the gate's
weight, f_e the expert's output. An expert that gets no token has 0.

Shape suffixes: L layers, E experts, T tokens, K top-k, N tokens of one expert, D hidden, B blocks in a batch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from frankenmoe.data.blocks import Block
from frankenmoe.errors import NumericsError
from frankenmoe.gates.states import batches, padded
from frankenmoe.moe.load import MoE
from frankenmoe.moe.trace import LayerTrace, outer_blocks, stream
from frankenmoe.progress import Progress

TINY = 1e-30


@dataclass(frozen=True)
class Saliency:
    """`reap_LE` by layer and expert, `tokens_LE` how many tokens chose it."""

    reap_LE: torch.Tensor
    tokens_LE: torch.Tensor

    def ranked(self, identical: Sequence[Sequence[int]]) -> "Ranking":
        """The experts of all layers alike: by the mean of their shares of a layer's sum, as norms grow with depth."""
        share_LE = self.reap_LE / self.reap_LE.sum(dim=1, keepdim=True).clamp(min=TINY)
        return _ranked(share_LE.mean(dim=0), self.tokens_LE.sum(dim=0), identical)

    def ranked_by_layer(self, identical: Sequence[Sequence[int]]) -> list["Ranking"]:
        """The experts of every layer."""
        return [_ranked(*each, identical) for each in zip(self.reap_LE, self.tokens_LE, strict=True)]


@dataclass(frozen=True)
class Ranking:
    """`order` has the first expert to go first. `scores` are by expert; `copies` maps one of several equal experts to
    the one of them that stays."""

    order: tuple[int, ...]
    scores: tuple[float, ...]
    copies: Mapping[int, int]

    def kept(self, count: int) -> tuple[int, ...]:
        """The `count` experts that stay, in their own order."""
        return tuple(sorted(self.order[len(self.order) - count :]))


@torch.no_grad()
def saliency(moe: MoE, blocks: Sequence[Block], *, progress: Progress) -> Saliency:
    """Reads `blocks` once under the MoE's own routers. Every expert runs a second time on its tokens.

    Raises NumericsError if the model computes numbers that are not finite.
    """
    outer = outer_blocks(moe.model)
    rows = {layer: row for row, layer in enumerate(outer)}
    experts = len(next(iter(outer.values())).experts)
    sum_LE = torch.zeros(len(outer), experts, dtype=torch.float64)
    tokens_LE = torch.zeros(len(outer), experts, dtype=torch.int64)
    decoder = moe.model.get_decoder()
    for batch in batches(blocks):
        ids_BT, mask_BT = padded([block.ids for block in batch], device=moe.model.device)
        real_T = mask_BT.flatten()

        def add(trace: LayerTrace, hidden_TD: torch.Tensor, real_T: torch.Tensor = real_T) -> None:
            if trace.path:
                return
            row, modules = rows[trace.layer], outer[trace.layer].experts
            for index in range(experts):
                token_N, choice_N = torch.where((trace.ids_TK == index) & real_T[:, None])
                if len(token_N):
                    weight_N = trace.weights_TK[token_N, choice_N].double()
                    norm_N = torch.linalg.vector_norm(modules[index](hidden_TD[token_N]).double(), dim=1)
                    sum_LE[row, index] += float((weight_N * norm_N).sum())
                    tokens_LE[row, index] += len(token_N)

        with stream(moe.model, add):
            decoder(input_ids=ids_BT, attention_mask=mask_BT.long(), use_cache=False)
        progress.advance(int(real_T.sum()))
    if not bool(sum_LE.isfinite().all()):
        raise NumericsError(
            "the model computes NaN or infinite states for this text, though its weights are finite",
            hint="compute in another type: --dtype float32",
        )
    return Saliency(sum_LE / tokens_LE.clamp(min=1), tokens_LE)


def _ranked(score_E: torch.Tensor, tokens_E: torch.Tensor, identical: Sequence[Sequence[int]]) -> Ranking:
    """First go experts without a token, then those that equal another one that stays, then the rest by score."""
    scores, tokens = score_E.tolist(), tokens_E.tolist()
    copies: dict[int, int] = {}
    for group in identical:
        best = max(group, key=lambda index: (scores[index], -index))
        copies |= {index: best for index in group if index != best}
    order = sorted(
        range(len(scores)), key=lambda index: (tokens[index] > 0, index not in copies, scores[index], -index)
    )
    return Ranking(tuple(order), tuple(scores), copies)
