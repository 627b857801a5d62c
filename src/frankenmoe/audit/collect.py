"""One pass over text that adds up what every router does. Memory does not grow with the length of the text.

Shape suffixes: C domains, T tokens, D hidden, E experts, K top-k.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from frankenmoe.audit.measures import CAPACITIES
from frankenmoe.audit.stats import overflow
from frankenmoe.moe.device import where_float64_is
from frankenmoe.moe.experts import DROPPED
from frankenmoe.moe.load import MoE
from frankenmoe.moe.trace import LayerTrace, blocks, stream
from frankenmoe.progress import SILENT, Progress

BATCH_TOKENS = 1024
CLOSE = 0.1  # a margin in nats: the last chosen expert is at most 10 % more likely than the next

Blocks = Iterable[Sequence[int]]


@dataclass
class RouterSums:
    """What one router did, added up. Counts are of assignments (K per token) unless their name says tokens.

    `counts_CE` are the choices before any is dropped. `over` are the assignments above each of CAPACITIES, counted per
    batch. `margin` and `close` compare the k-th logit with the next one; they stay zero if every expert is chosen.
    """

    layer: int
    path: str
    experts: int
    top_k: int
    domains: int
    tokens: int = 0
    counts_CE: torch.Tensor = field(init=False)
    first_CE: torch.Tensor = field(init=False)
    weight_E: torch.Tensor = field(init=False)
    prob_E: torch.Tensor = field(init=False)
    entropy: float = 0.0
    margin: float = 0.0
    close: int = 0
    spread: float = 0.0
    norm: float = 0.0
    dropped: int = 0
    over: list[int] = field(default_factory=lambda: [0] * len(CAPACITIES))

    def __post_init__(self) -> None:
        self.counts_CE = torch.zeros(self.domains, self.experts, dtype=torch.int64)
        self.first_CE = torch.zeros(self.domains, self.experts, dtype=torch.int64)
        self.weight_E = torch.zeros(self.experts, dtype=torch.float64)
        self.prob_E = torch.zeros(self.experts, dtype=torch.float64)

    @property
    def has_margin(self) -> bool:
        return self.experts > self.top_k

    def add(self, trace: LayerTrace, hidden_TD: torch.Tensor, *, domain: int) -> None:
        """Adds a batch of one domain's tokens."""
        # sums are in float64
        ids_TK, weights_TK, logits_TE = map(where_float64_is, (trace.ids_TK, trace.weights_TK, trace.logits_TE))
        hidden_TD, logits_TE = where_float64_is(hidden_TD), logits_TE.float()
        tokens, experts = logits_TE.shape
        if not tokens:
            return
        log_TE = logits_TE.log_softmax(dim=-1)
        prob_TE = log_TE.exp()
        kept_TK = ids_TK != DROPPED
        lost = ids_TK.numel() - int(kept_TK.sum())
        # the ids do not say which expert was dropped, the logits do
        chosen_TK = logits_TE.topk(self.top_k, dim=-1).indices if lost else ids_TK
        counts_E = torch.bincount(chosen_TK.flatten(), minlength=experts).cpu()
        self.tokens += tokens
        self.dropped += lost
        self.counts_CE[domain] += counts_E
        self.first_CE[domain] += torch.bincount(chosen_TK[:, 0], minlength=experts).cpu()
        self.weight_E += torch.bincount(ids_TK[kept_TK], weights=weights_TK[kept_TK].double(), minlength=experts).cpu()
        self.prob_E += prob_TE.sum(dim=0, dtype=torch.float64).cpu()
        self.entropy -= float((prob_TE * log_TE).sum(dtype=torch.float64))
        self.spread += float(logits_TE.std(dim=-1, unbiased=False).sum(dtype=torch.float64))
        self.norm += float(torch.linalg.vector_norm(hidden_TD.float(), dim=-1).sum(dtype=torch.float64))
        if self.has_margin:
            best_TK = logits_TE.topk(self.top_k + 1, dim=-1).values
            margin_T = best_TK[:, -2] - best_TK[:, -1]
            self.margin += float(margin_T.sum(dtype=torch.float64))
            self.close += int((margin_T < CLOSE).sum())
        self.over = [
            total + overflow(counts_E, factor=factor) for total, factor in zip(self.over, CAPACITIES, strict=True)
        ]


@torch.inference_mode()
def collect(
    moe: MoE, texts: Mapping[str, Blocks], *, limit: int, progress: Progress = SILENT
) -> tuple[tuple[RouterSums, ...], dict[str, int]]:
    """The sums of every router, and the number of tokens read per domain: at most `limit` of each.

    `texts` is domain -> blocks of token ids, read in order. A batch holds blocks of one domain and one length, so there
    is no padding.
    """
    domains = list(texts)
    sums = {
        (layer, path): RouterSums(layer, path, block.router.weight.shape[0], block.router.top_k, len(domains))
        for layer, path, block in blocks(moe.model)
    }
    read = dict.fromkeys(domains, 0)
    current = 0

    def sink(trace: LayerTrace, hidden_TD: torch.Tensor) -> None:
        sums[trace.layer, trace.path].add(trace, hidden_TD, domain=current)

    decoder, device = moe.model.get_decoder(), moe.model.device
    progress.start("reading text", limit * len(domains), "tokens")
    with stream(moe.model, sink):
        for number, domain in enumerate(domains):
            current = number
            for batch in batches(texts[domain], limit=limit):
                ids_BT = torch.tensor(batch, device=device)
                decoder(input_ids=ids_BT, use_cache=False)
                read[domain] += ids_BT.numel()
                progress.advance(ids_BT.numel())
            progress.advance(max(0, limit - read[domain]))
    return tuple(sums.values()), read


def batches(texts: Blocks, *, limit: int) -> Iterator[list[list[int]]]:
    """Batches of blocks of equal length, about BATCH_TOKENS tokens each, up to `limit` tokens; skips empty blocks."""
    held: list[list[int]] = []
    left = limit
    for block in texts:
        ids = list(block)[:left]
        if held and (len(held[0]) != len(ids) or (len(held) + 1) * len(ids) > BATCH_TOKENS):
            yield held
            held = []
        if ids:
            held.append(ids)
        left -= len(ids)
        if left <= 0:
            break
    if held:
        yield held
