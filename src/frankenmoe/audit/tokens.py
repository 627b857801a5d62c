"""The routing of each token of a few passages, layer by layer, also as compact bytes for the page.

Shape suffixes: L layers, T tokens, E experts, K top-k, M best experts kept.
"""

import base64
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from frankenmoe.moe.load import MoE
from frankenmoe.moe.trace import concat, record

SAMPLE = 500  # tokens from which the size of all is estimated


@dataclass(frozen=True)
class Passage:
    """A text as tokens: its label (a domain, or "prompt"), ids, and each token's text."""

    label: str
    ids: tuple[int, ...]
    shown: tuple[str, ...]


@dataclass(frozen=True)
class TokenTrace:
    """The outer routers' decisions for the tokens of all passages in order."""

    passages: tuple[Passage, ...]
    layers: tuple[int, ...]
    ids_LTK: torch.Tensor
    weights_LTK: torch.Tensor
    logits_LTE: torch.Tensor

    @property
    def tokens(self) -> int:
        return self.ids_LTK.shape[1]


@torch.inference_mode()
def trace_tokens(moe: MoE, passages: Sequence[Passage], *, window: int) -> TokenTrace:
    """Runs each passage through the model alone, in windows of at most `window` tokens."""
    decoder = moe.model.get_decoder()
    with record(moe.model) as traces:
        for passage in passages:
            for start in range(0, len(passage.ids), window):
                ids_1T = torch.tensor([passage.ids[start : start + window]], device=moe.model.device)
                decoder(input_ids=ids_1T, use_cache=False)
    outer = [trace for trace in concat(traces).layers if not trace.path]
    return TokenTrace(
        passages=tuple(passages),
        layers=tuple(trace.layer for trace in outer),
        ids_LTK=torch.stack([trace.ids_TK for trace in outer]).cpu(),
        weights_LTK=torch.stack([trace.weights_TK for trace in outer]).float().cpu(),
        logits_LTE=torch.stack([trace.logits_TE for trace in outer]).float().cpu(),
    )


def as_data(trace: TokenTrace) -> list[dict[str, Any]]:
    """The passages as plain data: tokens, and per layer the chosen experts with their weights, largest first."""
    found, start = [], 0
    for passage in trace.passages:
        stop = start + len(passage.ids)
        layers = [
            {
                "layer": layer,
                "experts": trace.ids_LTK[row, start:stop].tolist(),
                "weights": [
                    [round(weight, 4) for weight in each] for each in trace.weights_LTK[row, start:stop].tolist()
                ],
            }
            for row, layer in enumerate(trace.layers)
        ]
        found.append(
            {"label": passage.label, "tokens": list(passage.shown), "ids": list(passage.ids), "layers": layers}
        )
        start = stop
    return found


def encoded(trace: TokenTrace, *, budget: int) -> dict[str, Any]:
    """The trace as base64 texts of deflated arrays, within `budget` bytes if possible. `page.js` reads them.

    For each token and layer the best M experts are kept in order, the chosen ones first. M is all experts if there is
    room, and at least one more than are chosen. Logits are stored in 65535 or 255 steps of the layer's range, weights
    in steps of 1/255. If weights sum to one, the last one is left out.
    """
    experts, top_k = trace.logits_LTE.shape[2], trace.ids_LTK.shape[2]
    least = min(experts, top_k + 1)
    order_LTE, dropped_LTK = _ranked(trace)
    whole = bool((trace.weights_LTK.sum(dim=-1) - 1).abs().max() < 1e-3)
    stored_LTK = trace.weights_LTK[..., : top_k - 1] if whole else trace.weights_LTK
    fixed = {
        "weights": _packed((stored_LTK.clamp(0, 1) * 255).round().numpy().astype(np.uint8)),
        "dropped": _packed(dropped_LTK.numpy().astype(np.uint8)) if bool(dropped_LTK.any()) else "",
    }
    left = budget - _size(fixed)
    for kept, steps in ((experts, 65535), (experts, 255), (min(experts, top_k + 4), 255), (least, 255)):
        few = slice(0, SAMPLE)
        guess = _size(_logits(trace.logits_LTE[:, few], order_LTE[:, few, :kept], steps=steps))
        if guess * max(1.0, trace.tokens / SAMPLE) > left and kept > least:
            continue  # the sample says that it will not fit
        logits = _logits(trace.logits_LTE, order_LTE[..., :kept], steps=steps)
        if _size(logits) <= left:
            break
    return {
        "layers": list(trace.layers),
        "tokens": trace.tokens,
        "top_k": top_k,
        "experts": experts,
        "weights_sum_to_one": whole,
        **fixed,
        **logits,
    }


def _ranked(trace: TokenTrace) -> tuple[torch.Tensor, torch.Tensor]:
    """(order_LTE, dropped_LTK): experts by descending logit, the chosen first, and which choices were dropped."""
    dropped_LTK = trace.ids_LTK < 0
    order_LTE = trace.logits_LTE.argsort(dim=-1, descending=True, stable=True)
    if not bool(dropped_LTK.any()):  # between equal logits the router may have chosen either
        rest_LTE = trace.logits_LTE.scatter(-1, trace.ids_LTK, -torch.inf)
        order_LTE = rest_LTE.argsort(dim=-1, descending=True, stable=True)
        order_LTE = torch.cat([trace.ids_LTK, order_LTE[..., : order_LTE.shape[-1] - trace.ids_LTK.shape[-1]]], dim=-1)
    return order_LTE, dropped_LTK


def _size(logits: Mapping[str, Any]) -> int:
    return sum(len(text) for text in logits.values() if isinstance(text, str))


def _logits(logits_LTE: torch.Tensor, best_LTM: torch.Tensor, *, steps: int) -> Mapping[str, Any]:
    kept_LTM = logits_LTE.gather(-1, best_LTM)
    low_L, high_L = kept_LTM.flatten(1).amin(dim=1), kept_LTM.flatten(1).amax(dim=1)
    unit_L = ((high_L - low_L) / steps).clamp(min=1e-12)
    kind = np.uint16 if steps > 255 else np.uint8
    codes_LTM = ((kept_LTM - low_L[:, None, None]) / unit_L[:, None, None]).round().clamp(0, steps).numpy().astype(kind)
    return {
        "kept": best_LTM.shape[-1],
        "bytes": kind().itemsize,
        "low": [round(value, 5) for value in low_L.tolist()],
        "unit": unit_L.tolist(),
        "best": _packed(best_LTM.numpy().astype(np.uint8)),
        "logits": _packed(codes_LTM),
    }


def _packed(array: NDArray[Any]) -> str:
    """Deflated little-endian bytes as base64. Column by column, because values of one rank are similar."""
    columns = np.ascontiguousarray(np.moveaxis(array, -1, 0)).astype(array.dtype.newbyteorder("<"), copy=False)
    return base64.b64encode(zlib.compress(columns.tobytes(), 6)).decode()
