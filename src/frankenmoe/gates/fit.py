"""The stage that fits routers in closed form: an MoE and its experts' texts -> gates, statistics, and what they gain.

Reads top to bottom: held-out loss before, statistics with every expert forced, gates, their scale, held-out loss after.
Does not know recipes, artifacts or files.
Shape suffixes: C classes (a router's experts), L layers, N states, D hidden.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from frankenmoe.data.blocks import Block
from frankenmoe.errors import NumericsError
from frankenmoe.gates.closed import CLOSED, spread, sums_of
from frankenmoe.gates.forcing import forced, moe_blocks, set_gates
from frankenmoe.gates.logistic import States, logistic
from frankenmoe.gates.regret import regret
from frankenmoe.gates.scale import search
from frankenmoe.gates.states import Advance, OnStates, mean_loss, next_losses, silent, watch_inputs
from frankenmoe.gates.statistics import Moments, RouterStatistics, Text, start, with_text
from frankenmoe.gates.texts import OwnText, Path, cut_again, router_texts
from frankenmoe.planning.layout import SHARED
from frankenmoe.progress import SILENT, Progress

Gates = dict[Path, list[torch.Tensor]]
"""A router's path -> its gate [C, D] per layer (of SHARED: [1, D])."""
Statistics = dict[Path, RouterStatistics]
Places = Mapping[Path, Sequence[tuple[int, Text]]]
"""A router's path -> the texts it is fitted on, by index, and what it should make of each."""
Lost = Mapping[tuple[Path, int], torch.Tensor]
"""A router's path and a chunk's number -> what each of its experts would lose on each token, [N, C]."""
BY_STATES = ("logistic", "regret")
TINY = 1e-12
CLOSED_START, LOGISTIC_START, REGRET_START = 4.0, 1.5, 1.0  # where the search for the scale starts
TRIES = 6  # how many scales it usually looks at, for the progress bar
STATES_BYTES = 2 * 2**30  # states that are held in memory; more text than fits is thinned out evenly


@dataclass(frozen=True)
class Losses:
    """Held-out nats per token by expert: under the routers as they are, or with every text's own expert forced."""

    by_expert: Mapping[str, float]

    @property
    def mean(self) -> float:
        return sum(self.by_expert.values()) / len(self.by_expert)


@dataclass(frozen=True)
class Fit:
    """Fitted gates, and what they were made from.

    `before`, `after` and `own` are measured on the same held-out text: the old gates, gates fitted without that text,
    and every text's own expert forced in every layer. Held-out data is never fitted to; prompts are few, so that
    `gates` have in the end seen all of them (`seen_held_out`). `scale` is the factor on the method's own gates,
    `closed_scale` that on closed-form ones of unit spread, which a larger router may take over.
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
        """Whether the new gates lower the mean held-out loss; True where there were none before."""
        return self.before is None or self.after.mean < self.before.mean


def fit_gates(
    model: PreTrainedModel,
    texts: Sequence[OwnText],
    classes: Mapping[Path, int],
    *,
    method: str,
    bos: int | None,
    compare: bool = True,
    progress: Progress = SILENT,
) -> Fit:
    """Fits every router in `classes` (path -> how many experts it chooses among) and leaves the model with the result.

    `compare` measures the routers that are there first. Raises NumericsError where states are not finite.
    """
    own_texts = [text for text in texts if not text.negative]
    held = _count(own_texts, lambda text: text.held)
    progress.start("measuring", held * (2 if compare else 1), "tokens")
    before = _losses(model, own_texts, progress.advance) if compare else None
    own = _own_losses(model, own_texts, progress.advance)

    places = {path: router_texts(texts, path, count) for path, count in classes.items()}
    progress.start("reading", _count(texts, _fitted_blocks), "tokens")
    kept, everything = _statistics(model, texts, places, progress.advance)
    first = method if method in CLOSED else "ridge"
    progress.start("choosing the scale", TRIES, "tries")
    closed_scale, gates = _scaled(model, own_texts, closed_gates(kept, first), progress, at=CLOSED_START)
    scale, made = closed_scale, closed_gates(everything, first)
    if method in BY_STATES:
        set_gates(model, gates)
        chunks = _states(model, texts, bos, progress)
        kept_chunks = [chunk for chunk in chunks if not chunk.held]
        steps = 2 * len(moe_blocks(model)) * len(places)
        progress.start("fitting", steps, "gates")
        unscaled, made = (_logistic(some, places, progress.advance) for some in (kept_chunks, chunks))
        progress.start("choosing the scale", TRIES, "tries")
        scale, gates = _scaled(model, own_texts, unscaled, progress, at=LOGISTIC_START)
    if method == "regret":
        lost = _lost(model, texts, chunks, places, classes, progress)
        progress.start("fitting to what experts lose", steps, "gates")
        unscaled = _regret(kept_chunks, places, lost, gates, progress.advance)
        made = _regret(chunks, places, lost, times(made, scale), progress.advance)
        progress.start("choosing the scale", TRIES, "tries")
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
    """Of the kept text, and of all of it, each text read once with its own expert forced."""
    layers, hidden = len(moe_blocks(model)), moe_blocks(model)[0].router.weight.shape[1]
    kept = {path: start(layers=layers, hidden=hidden) for path in places}
    everything = dict(kept)
    for index, text in enumerate(texts):
        moments = Moments(layers=layers, hidden=hidden)
        with forced(model, text.path, except_for=text.negative):
            for blocks, found in ((text.kept, kept), (unseen(text), everything)):
                watch_inputs(model, blocks, moments.add, on_tokens=on_tokens)
                check_states(moments, text)
                for path, placed in places.items():
                    for what in (what for place, what in placed if place == index):
                        found[path] = with_text(found[path], what, moments)
    return kept, everything


def unseen(text: OwnText) -> list[Block]:
    """The held-out prompts, which are fitted to in the end, unless they are kept as well, as a lone one is."""
    return [block for block in text.held if text.from_prompts and block not in text.kept]


def check_states(moments: Moments, text: OwnText) -> None:
    """NumericsError where the model's states are not finite."""
    if not bool(moments.second_LDD.isfinite().all()):
        raise NumericsError(
            f"the model computes NaN or infinite states for the text of {text.title!r}, though its weights are finite",
            hint="convert the parents to float32 first, or use gate_mode: random",
        )


def closed_gates(statistics: Statistics, method: str) -> Gates:
    """Gates whose logits have a standard deviation of one over the states they were made from."""
    made: Gates = {}
    for path, found in statistics.items():
        made[path] = []
        for layer in range(found.second_LDD.shape[0]):
            sums = sums_of(found, layer)
            rows_CD = CLOSED[method](sums)
            made[path].append(_gate(path, rows_CD / max(spread(rows_CD, sums), TINY)))
    return made


def _gate(path: Path, rows_CD: torch.Tensor) -> torch.Tensor:
    """The rows as a gate: a shared expert's sigmoid wants one row, the difference of its two classes."""
    return (rows_CD[:1] - rows_CD[1:] if path == SHARED else rows_CD).float()


@dataclass(frozen=True)
class Chunk:
    """States of one text, per layer [N, D]; the tokens of one `share` of a text together weigh as much as another."""

    number: int
    text: int
    share: int
    held: bool
    blocks: Sequence[Block]
    states: tuple[torch.Tensor, ...]


def _states(model: PreTrainedModel, texts: Sequence[OwnText], bos: int | None, progress: Progress) -> list[Chunk]:
    """Every text's states under the routers as they are, the text cut into blocks of several lengths."""
    layers, hidden = len(moe_blocks(model)), moe_blocks(model)[0].router.weight.shape[1]
    parts = [
        (index, share, held, blocks)
        for index, text in enumerate(texts)
        for held, whole in ((False, text.kept), (True, unseen(text)))
        for share, blocks in enumerate(cut_again(whole, bos=bos) if whole else ())
    ]
    total = sum(len(block.ids) for *_, blocks in parts for block in blocks)
    every = max(1, math.ceil(total * layers * hidden * 4 / STATES_BYTES))
    progress.start("reading under those routers", total // every, "tokens")
    chunks = []
    for number, (index, share, held, blocks) in enumerate(parts):
        seen: list[list[torch.Tensor]] = [[] for _ in range(layers)]
        watch_inputs(model, blocks[::every], _collector(seen), on_tokens=progress.advance)
        chunks.append(Chunk(number, index, share, held, blocks[::every], tuple(map(torch.cat, seen))))
    return chunks


def _collector(seen: list[list[torch.Tensor]]) -> OnStates:
    return lambda layer, states_ND: seen[layer].append(states_ND)


def _lost(
    model: PreTrainedModel,
    texts: Sequence[OwnText],
    chunks: Sequence[Chunk],
    places: Places,
    classes: Mapping[Path, int],
    progress: Progress,
) -> Lost:
    """Every text read once with each expert of each router forced; nothing where text only says whose it is not."""
    wanted = [
        (path, chunk)
        for path, placed in places.items()
        for chunk in chunks
        if path != SHARED and any(place == chunk.text for place, _ in placed)
    ]
    total = sum(classes[path] * len(chunk.states[0]) for path, chunk in wanted)
    progress.start("reading with every expert", total, "tokens")
    found: dict[tuple[Path, int], torch.Tensor] = {}
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


def _logistic(chunks: Sequence[Chunk], places: Places, on_gate: Advance) -> Gates:
    made: Gates = {}
    for path, placed in places.items():
        made[path] = []
        for data in _by_layer(chunks, placed):
            made[path].append(_gate(path, logistic(data)))
            on_gate(1)
    return made


def _regret(chunks: Sequence[Chunk], places: Places, lost: Lost, begun: Gates, on_gate: Advance) -> Gates:
    """From the gates in `begun`; those of a shared expert, to which nothing is an alternative, stay."""
    made: Gates = {}
    for path, placed in places.items():
        made[path] = []
        for layer, data in enumerate(_by_layer(chunks, placed)):
            gate_CD = begun[path][layer]
            if path != SHARED:
                loss_NC = torch.cat([lost[path, chunk.number] for chunk, _ in _mine(chunks, placed)])
                gate_CD = regret(data, loss_NC, gate_CD).float()
            made[path].append(gate_CD)
            on_gate(1)
    return made


def _mine(chunks: Sequence[Chunk], placed: Sequence[tuple[int, Text]]) -> list[tuple[Chunk, Text]]:
    return [(chunk, what) for place, what in placed for chunk in chunks if chunk.text == place]


def _by_layer(chunks: Sequence[Chunk], placed: Sequence[tuple[int, Text]]) -> Iterator[States]:
    """What one router is fitted to, layer by layer."""
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
    """The factor, one for all gates, with the lowest mean held-out loss, and the gates times it."""

    def loss(scale: float) -> float:
        set_gates(model, times(gates, scale))
        progress.advance(1)
        return _losses(model, texts, silent).mean

    tokens = sum(block.targets for text in texts for block in text.held)
    scale, _ = search(loss, start=at, tokens=tokens)
    return scale, times(gates, scale)


def times(gates: Gates, scale: float) -> Gates:
    """All gates times one factor."""
    return {path: [scale * gate_CD for gate_CD in rows] for path, rows in gates.items()}


def _count(texts: Sequence[OwnText], blocks: Callable[[OwnText], Sequence[Block]]) -> int:
    return sum(len(block.ids) for text in texts for block in blocks(text))


def _fitted_blocks(text: OwnText) -> list[Block]:
    return [*text.kept, *unseen(text)]
