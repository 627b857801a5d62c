"""Fits the routers of an MoE to its experts' texts: gates, their statistics, and held-out losses before and after.

In order: held-out loss before, statistics with every expert forced, gates, their scale, held-out loss after.
Shape suffixes: C classes (a router's experts), L layers, N states, D hidden.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from transformers import PreTrainedModel

from frankenmoe.data.blocks import Block
from frankenmoe.errors import NumericsError
from frankenmoe.gates.closed import CLOSED, spread, sums_of
from frankenmoe.gates.forcing import forced, set_gates
from frankenmoe.gates.logistic import States, logistic
from frankenmoe.gates.regret import regret
from frankenmoe.gates.scale import search
from frankenmoe.gates.states import Advance, OnStates, mean_loss, next_losses, silent, watch_inputs
from frankenmoe.gates.statistics import Moments, RouterStatistics, RouterText, start, with_text
from frankenmoe.gates.texts import OwnText, cut_again, router_texts
from frankenmoe.moe.trace import outer_blocks
from frankenmoe.planning.layout import SHARED, RouterPath
from frankenmoe.progress import SILENT, Progress

Gates = dict[RouterPath, list[torch.Tensor]]
"""Path of a router -> its gate [C, D] per layer; at SHARED [1, D]."""
Statistics = dict[RouterPath, RouterStatistics]
Places = Mapping[RouterPath, Sequence[tuple[int, RouterText]]]
"""Path of a router -> the texts that it is fitted on: their index and its target for each."""
Lost = Mapping[tuple[RouterPath, int], torch.Tensor]
"""(path of a router, number of a chunk) -> the loss of each token with each of its experts, [N, C]."""
# the methods that need single states; `regret` starts from logistic gates
BY_STATES: Mapping[str, Callable[[States], torch.Tensor]] = MappingProxyType({"logistic": logistic})
TINY = 1e-12
CLOSED_START, LOGISTIC_START, REGRET_START = 4.0, 1.5, 1.0  # where the search for the scale starts
TRIES = 6  # scales that the search usually tries, for the progress bar
STATES_BYTES = 2 * 2**30  # of states in memory; text beyond it is thinned out evenly


@dataclass(frozen=True)
class Losses:
    """Held-out loss by expert, nats per token."""

    by_expert: Mapping[str, float]

    @property
    def mean(self) -> float:
        return sum(self.by_expert.values()) / len(self.by_expert)


@dataclass(frozen=True)
class Fit:
    """Fitted gates, and what they were made from.

    `before`, `after` and `own` are losses on the same held-out text: with the old gates, with gates fitted without that
    text, and with every text's own expert forced in every layer. Gates are never fitted to held-out data. Prompts are
    few, so the final `gates` are fitted to all of them (`seen_held_out`). `scale` is the factor on the method's gates.
    `closed_scale` is the factor on closed-form gates of unit spread, which a router with one more expert can reuse.
    """

    gates: Gates
    statistics: Statistics
    method: str
    scale: float
    closed_scale: float
    before: Losses | None
    after: Losses
    own: Losses
    seen_held_out: bool

    @property
    def better(self) -> bool:
        """Whether the new gates lower the mean held-out loss; True if there were none before."""
        return self.before is None or self.after.mean < self.before.mean


def fit_gates(
    model: PreTrainedModel,
    texts: Sequence[OwnText],
    classes: Mapping[RouterPath, int],
    *,
    method: str,
    bos: int | None,
    compare: bool = True,
    progress: Progress = SILENT,
) -> Fit:
    """Fits every router in `classes` (path -> number of its experts). The model keeps the new gates.

    `compare` measures the existing routers first. Raises NumericsError if states are not finite.
    """
    own_texts = [text for text in texts if not text.negative]
    held = _tokens(block for text in own_texts for block in text.held)
    progress.start("measuring", held * (2 if compare else 1), "tokens")
    before = _losses(model, own_texts, progress.advance) if compare else None
    own = _own_losses(model, own_texts, progress.advance)

    places = {path: router_texts(texts, path, count) for path, count in classes.items()}
    progress.start("reading", _tokens(block for text in texts for block in fitted_blocks(text)), "tokens")
    kept, everything = _statistics(model, texts, places, progress.advance)
    first = method if method in CLOSED else "ridge"
    closed_scale, gates = _scaled(model, own_texts, closed_gates(kept, first), progress, at=CLOSED_START)
    scale, made = closed_scale, closed_gates(everything, first)
    if method not in CLOSED:
        by_states = BY_STATES.get(method, logistic)
        set_gates(model, gates)
        chunks = _states(model, texts, bos, progress)
        kept_chunks = [chunk for chunk in chunks if not chunk.held]
        steps = 2 * len(outer_blocks(model)) * len(places)
        progress.start("fitting", steps, "gates")
        unscaled, made = (
            _gates_by_states(some, places, lambda path, _, data: _gate(path, by_states(data)), progress.advance)
            for some in (kept_chunks, chunks)
        )
        scale, gates = _scaled(model, own_texts, unscaled, progress, at=LOGISTIC_START)
    if method == "regret":
        lost = _lost(model, texts, chunks, places, classes, progress)
        progress.start("fitting to what experts lose", steps, "gates")
        unscaled = _regret(kept_chunks, places, lost, gates, progress.advance)
        made = _regret(chunks, places, lost, times(made, scale), progress.advance)
        scale, gates = _scaled(model, own_texts, unscaled, progress, at=REGRET_START)
    set_gates(model, gates)
    progress.start("measuring", held, "tokens")
    after = _losses(model, own_texts, progress.advance)
    final = times(made, scale)
    set_gates(model, final)
    return Fit(final, everything, method, scale, closed_scale, before, after, own, any(map(unseen, texts)))


def _losses(model: PreTrainedModel, texts: Sequence[OwnText], on_tokens: Advance) -> Losses:
    return Losses({text.name: mean_loss(model, text.held, on_tokens=on_tokens) for text in texts})


def _own_losses(model: PreTrainedModel, texts: Sequence[OwnText], on_tokens: Advance) -> Losses:
    found = {}
    for text in texts:
        with forced(model, text.path):
            found[text.name] = mean_loss(model, text.held, on_tokens=on_tokens)
    return Losses(found)


def _statistics(
    model: PreTrainedModel, texts: Sequence[OwnText], places: Places, on_tokens: Advance
) -> tuple[Statistics, Statistics]:
    """Statistics of the kept text, and of all text. Each text is read once, with its own expert forced."""
    layers, hidden = sizes(model)
    kept = {path: start(layers=layers, hidden=hidden) for path in places}
    everything = dict(kept)
    for index, text in enumerate(texts):
        moments = Moments(layers=layers, hidden=hidden)
        for blocks, found in ((text.kept, kept), (unseen(text), everything)):
            add_moments(moments, model, text, blocks, on_tokens)
            for path, placed in places.items():
                for target in (target for place, target in placed if place == index):
                    found[path] = with_text(found[path], target, moments)
    return kept, everything


def sizes(model: PreTrainedModel) -> tuple[int, int]:
    """(layers, hidden) of the routers."""
    routers = [block.router for block in outer_blocks(model).values()]
    return len(routers), routers[0].weight.shape[1]


def unseen(text: OwnText) -> list[Block]:
    """Held-out prompts, to which the final gates are fitted as well; without a lone prompt, which is also kept."""
    return [block for block in text.held if text.from_prompts and block not in text.kept]


def fitted_blocks(text: OwnText) -> list[Block]:
    """The blocks that the final gates are fitted to."""
    return [*text.kept, *unseen(text)]


def add_moments(
    moments: Moments, model: PreTrainedModel, text: OwnText, blocks: Sequence[Block], on_tokens: Advance
) -> None:
    """Adds the states of `blocks` of a text, read with its own expert forced, or for negative text with the others.

    Raises NumericsError if states are not finite.
    """
    with forced(model, text.path, except_for=text.negative):
        watch_inputs(model, blocks, moments.add, on_tokens=on_tokens)
    if not bool(moments.second_LDD.isfinite().all()):
        raise NumericsError(
            f"the model computes NaN or infinite states for the text of {text.title!r}, though its weights are finite",
            hint="convert the parents to float32 first, or use gate_mode: random",
        )


def closed_gates(statistics: Statistics, method: str) -> Gates:
    """Gates by a closed form, scaled so that logits have a standard deviation of one over the states."""
    made: Gates = {}
    for path, found in statistics.items():
        made[path] = []
        for layer in range(found.second_LDD.shape[0]):
            sums = sums_of(found, layer)
            rows_CD = CLOSED[method](sums)
            made[path].append(_gate(path, rows_CD / max(spread(rows_CD, sums), TINY)))
    return made


def _gate(path: RouterPath, rows_CD: torch.Tensor) -> torch.Tensor:
    """The rows as a gate. The sigmoid of a shared expert needs one row: the difference of its two classes."""
    return (rows_CD[:1] - rows_CD[1:] if path == SHARED else rows_CD).float()


@dataclass(frozen=True)
class Chunk:
    """States of a text, per layer [N, D]. All shares of a text have the same total weight, whatever their length."""

    number: int
    text: int
    share: int
    held: bool
    blocks: Sequence[Block]
    states: tuple[torch.Tensor, ...]


def _states(model: PreTrainedModel, texts: Sequence[OwnText], bos: int | None, progress: Progress) -> list[Chunk]:
    """Every text's states under the current routers, with the text cut into blocks of several lengths."""
    layers, hidden = sizes(model)
    parts = [
        (index, share, held, blocks)
        for index, text in enumerate(texts)
        for held, whole in ((False, text.kept), (True, unseen(text)))
        for share, blocks in enumerate(cut_again(whole, bos=bos) if whole else ())
    ]
    total = _tokens(block for *_, blocks in parts for block in blocks)
    every = max(1, math.ceil(total * layers * hidden * 4 / STATES_BYTES))
    progress.start("reading with closed-form routers", total // every, "tokens")
    chunks = []
    for number, (index, share, held, blocks) in enumerate(parts):
        seen: list[list[torch.Tensor]] = [[] for _ in range(layers)]
        watch_inputs(model, blocks[::every], _collector(seen), on_tokens=progress.advance)
        chunks.append(Chunk(number, index, share, held, blocks[::every], tuple(map(torch.cat, seen))))
    return chunks


def _collector(seen: list[list[torch.Tensor]]) -> OnStates:
    return lambda layer, states_ND: seen[layer].append(states_ND.cpu())


def _lost(
    model: PreTrainedModel,
    texts: Sequence[OwnText],
    chunks: Sequence[Chunk],
    places: Places,
    classes: Mapping[RouterPath, int],
    progress: Progress,
) -> Lost:
    """Losses with each expert of each router forced, for every text; zero for negative text."""
    wanted = [
        (path, chunk)
        for path, placed in places.items()
        for chunk in chunks
        if path != SHARED and any(place == chunk.text for place, _ in placed)
    ]
    total = sum(classes[path] * len(chunk.states[0]) for path, chunk in wanted)
    progress.start("reading with every expert", total, "tokens")
    found: dict[tuple[RouterPath, int], torch.Tensor] = {}
    for path, chunk in wanted:
        columns = []
        for index in range(classes[path]):
            if texts[chunk.text].negative:
                columns.append(torch.zeros(len(chunk.states[0])))
                continue
            with forced(model, (*path, index)):
                columns.append(next_losses(model, chunk.blocks, on_tokens=progress.advance))
        found[path, chunk.number] = torch.stack(columns, dim=1)
    return found


def _gates_by_states(
    chunks: Sequence[Chunk], places: Places, make: Callable[[RouterPath, int, States], torch.Tensor], on_gate: Advance
) -> Gates:
    """`make` called with every router's path, layer and states."""
    made: Gates = {}
    for path, placed in places.items():
        made[path] = []
        for layer, data in enumerate(_by_layer(chunks, placed)):
            made[path].append(make(path, layer, data))
            on_gate(1)
    return made


def _regret(chunks: Sequence[Chunk], places: Places, lost: Lost, begun: Gates, on_gate: Advance) -> Gates:
    """Starts from the gates in `begun`. The gate of a shared expert stays, because it has no alternative."""

    def make(path: RouterPath, layer: int, data: States) -> torch.Tensor:
        if path == SHARED:
            return begun[path][layer]
        loss_NC = torch.cat([lost[path, chunk.number] for chunk, _ in _mine(chunks, places[path])])
        return regret(data, loss_NC, begun[path][layer]).float()

    return _gates_by_states(chunks, places, make, on_gate)


def _mine(chunks: Sequence[Chunk], placed: Sequence[tuple[int, RouterText]]) -> list[tuple[Chunk, RouterText]]:
    return [(chunk, what) for place, what in placed for chunk in chunks if chunk.text == place]


def _by_layer(chunks: Sequence[Chunk], placed: Sequence[tuple[int, RouterText]]) -> Iterator[States]:
    """What one router is fitted to, for each layer."""
    tokens = Counter[tuple[int, int]]()
    for chunk in chunks:
        tokens[chunk.text, chunk.share] += len(chunk.states[0])
    shares = Counter(text for text, _ in tokens)
    mine = _mine(chunks, placed)
    sizes = [len(chunk.states[0]) for chunk, _ in mine]
    target_NC = torch.cat(
        [torch.tensor(what.target_C).expand(size, -1) for (_, what), size in zip(mine, sizes, strict=True)]
    )
    weight_N = torch.cat(
        [
            torch.full((size,), what.weight / tokens[chunk.text, chunk.share] / shares[chunk.text])
            for (chunk, what), size in zip(mine, sizes, strict=True)
        ]
    )
    for layer in range(len(chunks[0].states)):
        yield States(torch.cat([chunk.states[layer] for chunk, _ in mine]), target_NC, weight_N)


def _scaled(
    model: PreTrainedModel, texts: Sequence[OwnText], gates: Gates, progress: Progress, *, at: float
) -> tuple[float, Gates]:
    """The factor for all gates with the lowest mean held-out loss, and the gates times this factor."""

    def loss(scale: float) -> float:
        set_gates(model, times(gates, scale))
        progress.advance(1)
        return _losses(model, texts, silent).mean

    progress.start("choosing the scale", TRIES, "tries")
    tokens = sum(block.targets for text in texts for block in text.held)
    scale, _ = search(loss, start=at, tokens=tokens)
    return scale, times(gates, scale)


def times(gates: Gates, scale: float) -> Gates:
    """All gates multiplied by one factor."""
    return {path: [scale * gate_CD for gate_CD in rows] for path, rows in gates.items()}


def _tokens(blocks: Iterable[Block]) -> int:
    return sum(len(block.ids) for block in blocks)
