"""Single states of every text under the current routers, within a limit of memory, and the losses that follow them.

Shape suffixes: C classes (a router's experts), L layers, N states, D hidden.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from frankenmoe.data.blocks import Block
from frankenmoe.gates.cost import Meter
from frankenmoe.gates.forcing import forced
from frankenmoe.gates.logistic import GOLDEN, States
from frankenmoe.gates.own import Places, sizes
from frankenmoe.gates.states import OnStates, next_losses, own_batches, watch_inputs
from frankenmoe.gates.statistics import RouterText
from frankenmoe.gates.texts import OwnText, mixed_cuts, unseen
from frankenmoe.moe.processes import gather, gather_rows, rank, world
from frankenmoe.planning.fitting import LOSSES, ONE_IN, STATES
from frankenmoe.planning.layout import SHARED, RouterPath

Make = Callable[[int, States, torch.Tensor], torch.Tensor]
"""(layer, one router's states, their rows among all) -> its gate."""
STATES_BYTES = 320 * 2**20  # of all states in memory


@dataclass(frozen=True)
class Chunk:
    """The part of a text that is cut into blocks of one length. All shares of a text have the same total weight.

    `blocks` are sorted by length, as they are read. `keep_N` are the tokens whose states are in memory, at `rows`.
    """

    text: int
    share: int
    held: bool
    blocks: Sequence[Block]
    keep_N: torch.Tensor
    rows: slice

    @property
    def size(self) -> int:
        """The number of states."""
        return int(self.rows.stop - self.rows.start)


@dataclass(frozen=True)
class Samples:
    """The chunks of all texts, and the states that this process read: per layer [N, D], and their rows."""

    chunks: Sequence[Chunk]
    own_rows_N: torch.Tensor
    states: Sequence[torch.Tensor]
    together: bool

    def layer(self, layer: int) -> torch.Tensor:
        """states_ND of all processes at one layer, which all of them must ask for."""
        if not self.together:
            return self.states[layer]
        rows_N, states_ND = gather_rows(self.own_rows_N), gather_rows(self.states[layer])
        return states_ND[rows_N.argsort()]


def read_samples(
    model: PreTrainedModel, texts: Sequence[OwnText], *, bos: int | None, meter: Meter, together: bool = False
) -> Samples:
    """Reads every text once, a third of it in blocks of each of three lengths, and keeps the states.

    States stay in the model's type if they fit into STATES_BYTES, else in 16 bits, and beyond that an even choice of
    the tokens is kept, the same for any number of processes.
    """
    layers, hidden = sizes(model)
    parts = [
        (index, share, held, sorted(blocks, key=lambda block: len(block.ids)))
        for index, text in enumerate(texts)
        for held, whole in ((False, text.kept), (True, unseen(text)))
        for share, blocks in enumerate(mixed_cuts(whole, bos=bos))
        if blocks
    ]
    total = sum(len(block.ids) for *_, blocks in parts for block in blocks)
    dtype, kept = affordable(total, layers=layers, hidden=hidden, dtype=model.dtype)
    chunks, at, seen = [], 0, 0
    for index, share, held, blocks in parts:
        count = sum(len(block.ids) for block in blocks)
        number_N = torch.arange(seen, seen + count, dtype=torch.float64)
        keep_N = (number_N * GOLDEN) % 1 < kept
        chunks.append(Chunk(index, share, held, blocks, keep_N, slice(at, at := at + int(keep_N.sum()))))
        seen += count
    own = [_own_rows(chunk, together=together) for chunk in chunks]
    rows_N = torch.cat(own)
    states = [torch.empty(len(rows_N), hidden, dtype=dtype) for _ in range(layers)]
    on_tokens, filled = meter.reading(STATES, head=False), 0
    for chunk, mine in zip(chunks, own, strict=True):
        into = _collector(states, filled)
        watch_inputs(model, chunk.blocks, into, keep_N=chunk.keep_N, together=together, on_tokens=on_tokens)
        filled += len(mine)
    return Samples(chunks, rows_N, states, together)


def affordable(tokens: int, *, layers: int, hidden: int, dtype: torch.dtype) -> tuple[torch.dtype, float]:
    """(type, share of the tokens) in which states take at most STATES_BYTES: rounded first, then thinned out."""
    numbers = tokens * layers * hidden
    if numbers * dtype.itemsize <= STATES_BYTES:
        return dtype, 1.0
    small = torch.bfloat16 if dtype.itemsize > 2 else dtype
    return small, min(1.0, STATES_BYTES / (numbers * small.itemsize))


def _own_rows(chunk: Chunk, *, together: bool) -> torch.Tensor:
    """The rows of the states that this process reads, in the order in which it reads them."""
    row_N = chunk.rows.start + chunk.keep_N.cumsum(0) - 1
    found = [torch.zeros(0, dtype=torch.int64)]
    for start, batch in own_batches(chunk.blocks, together=together):
        part = slice(start, start + sum(len(block.ids) for block in batch))
        found.append(row_N[part][chunk.keep_N[part]])
    return torch.cat(found)


def _collector(states: Sequence[torch.Tensor], start: int) -> OnStates:
    """Copies states of one layer after another into `states`, from row `start` on."""
    at = [start] * len(states)

    def collect(layer: int, states_ND: torch.Tensor) -> None:
        states[layer][at[layer] : at[layer] + len(states_ND)] = states_ND
        at[layer] += len(states_ND)

    return collect


@dataclass(frozen=True)
class Lost:
    """The loss of the next token with each expert of one router, [N, C], for the states `known_N`; elsewhere zero."""

    loss_NC: torch.Tensor
    known_N: torch.Tensor


def read_losses(
    model: PreTrainedModel, texts: Sequence[OwnText], samples: Samples, places: Places,
    classes: Mapping[RouterPath, int], *, meter: Meter,
) -> Mapping[RouterPath, Lost]:  # fmt: skip
    """Reads one block in ONE_IN of every text with each expert of each router forced. Negative text loses nothing."""
    on_tokens = meter.reading(LOSSES)
    count = sum(chunk.size for chunk in samples.chunks)
    found = {}
    for path, placed in places.items():
        if path == SHARED:
            continue
        lost = found[path] = Lost(torch.zeros(count, classes[path]), torch.zeros(count, dtype=torch.bool))
        for chunk, _ in mine(samples.chunks, placed):
            read_N, blocks = _some(chunk)
            lost.known_N[chunk.rows] = read_N[chunk.keep_N]
            for index in range(0 if texts[chunk.text].negative else classes[path]):
                with forced(model, (*path, index)):
                    losses_N = next_losses(model, blocks, together=samples.together, on_tokens=on_tokens)
                lost.loss_NC[chunk.rows, index][read_N[chunk.keep_N]] = losses_N[chunk.keep_N[read_N]]
    return found


def _some(chunk: Chunk) -> tuple[torch.Tensor, list[Block]]:
    """(which tokens of a chunk are in one block of ONE_IN, these blocks)."""
    read_N = torch.cat([torch.full((len(block.ids),), at % ONE_IN == 0) for at, block in enumerate(chunk.blocks)])
    return read_N, list(chunk.blocks[::ONE_IN])


def mine(chunks: Sequence[Chunk], placed: Sequence[tuple[int, RouterText]]) -> list[tuple[Chunk, RouterText]]:
    """The chunks of one router's texts, with the target of each."""
    return [(chunk, what) for place, what in placed for chunk in chunks if chunk.text == place]


def solved(
    samples: Samples, chunks: Sequence[Chunk], placed: Sequence[tuple[int, RouterText]], make: Make
) -> list[torch.Tensor]:
    """`make` called for every layer with one router's states from `chunks`. Processes share the layers."""
    own: list[torch.Tensor] = []
    count, every = len(samples.states), world() if samples.together else 1
    target_NC, weight_N, rows_N = _described(chunks, placed)
    for first in range(0, count, every):
        taken = None
        for layer in range(first, min(first + every, count)):
            states_ND = samples.layer(layer)
            if layer % every == (rank() if samples.together else 0):
                taken = layer, States(states_ND[rows_N].float(), target_NC, weight_N)
        if taken:
            own.append(make(*taken, rows_N))
    return gather(own) if samples.together else own


def _described(
    chunks: Sequence[Chunk], placed: Sequence[tuple[int, RouterText]]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(target_NC, weight_N, rows_N) of one router's states."""
    tokens = Counter[tuple[int, int]]()
    for chunk in chunks:
        tokens[chunk.text, chunk.share] += chunk.size
    shares = Counter(text for text, _ in tokens)
    parts = [
        (
            torch.tensor(what.target_C).expand(chunk.size, -1),
            torch.full((chunk.size,), what.weight / max(tokens[chunk.text, chunk.share], 1) / shares[chunk.text]),
            torch.arange(chunk.rows.start, chunk.rows.stop),
        )
        for chunk, what in mine(chunks, placed)
    ]
    target_NC, weight_N, rows_N = map(torch.cat, zip(*parts, strict=True))
    return target_NC, weight_N, rows_N
