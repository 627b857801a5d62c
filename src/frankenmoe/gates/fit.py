"""Fits the routers of an MoE to its experts' texts: gates, their statistics, and held-out losses before and after.

In order: held-out loss before, statistics with every expert forced, gates, their scale, held-out loss after.
Shape suffixes: C classes (a router's experts), L layers, N states, D hidden.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from types import MappingProxyType

import torch
from transformers import PreTrainedModel

from frankenmoe.data.blocks import Block
from frankenmoe.gates.closed import CLOSED, level, spread, sums_of
from frankenmoe.gates.cost import Cost, Meter
from frankenmoe.gates.forcing import set_gates
from frankenmoe.gates.logistic import States, logistic
from frankenmoe.gates.own import Places, Statistics, read_own
from frankenmoe.gates.regret import regret
from frankenmoe.gates.samples import Lost, Samples, read_losses, read_samples, solved
from frankenmoe.gates.scale import search
from frankenmoe.gates.states import mean_loss
from frankenmoe.gates.texts import OwnText, router_texts, searched_blocks, size_of, unseen
from frankenmoe.moe.trace import outer_blocks
from frankenmoe.planning.fitting import AFTER, BEFORE, SCALE, SOLVING, fit_steps
from frankenmoe.planning.layout import SHARED, RouterPath
from frankenmoe.progress import SILENT, Progress

Gates = dict[RouterPath, list[torch.Tensor]]
"""Path of a router -> its gate [C, D] per layer; at SHARED [1, D]."""
Make = Callable[[RouterPath, int, States, torch.Tensor], torch.Tensor]
"""(path of a router, layer, its states, their rows among all) -> its gate."""
# the methods that need single states; `regret` starts from logistic gates
BY_STATES: Mapping[str, Callable[[States], torch.Tensor]] = MappingProxyType({"logistic": logistic})
TINY = 1e-12
LOW = 6.0  # how far below zero sigmoid routers' scores are
CLOSED_START, LOGISTIC_START, REGRET_START = 4.0, 2.4, 1.0  # where the search for the scale starts


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
    `cost` are the tokens of all text and, by step, those that the model read (see `Meter`).
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
    cost: Cost

    @property
    def better(self) -> bool:
        """Whether the new gates lower the mean held-out loss; True if there were none before."""
        return self.before is None or self.after.mean < self.before.mean


@dataclass(frozen=True)
class Job:
    """What every step of a fit needs."""

    model: PreTrainedModel
    texts: Sequence[OwnText]
    places: Places
    meter: Meter
    together: bool
    lowering: Gates = field(default_factory=dict)

    def set_gates(self, gates: Gates) -> None:
        """Gives the routers these gates, as they need them."""
        set_gates(self.model, lowered(gates, self.lowering))

    @property
    def own_texts(self) -> list[OwnText]:
        """The texts that are not negative."""
        return [text for text in self.texts if not text.negative]


def fit_gates(
    model: PreTrainedModel,
    texts: Sequence[OwnText],
    classes: Mapping[RouterPath, int],
    *,
    method: str,
    bos: int | None,
    compare: bool = True,
    together: bool = False,
    progress: Progress = SILENT,
) -> Fit:
    """Fits every router in `classes` (path -> number of its experts). The model keeps the new gates.

    `compare` measures the existing routers first. With `together`, the processes of a launcher share the work; all of
    them call this, and get the gates that one process would. Raises NumericsError if states are not finite.
    """
    places = {path: router_texts(texts, path, count) for path, count in classes.items()}
    sizes = [size_of(text, bos=bos) for text in texts]
    meter = Meter(model, text=round(sum(size.kept + size.held for size in sizes)), progress=progress)
    steps = fit_steps(method, sizes, classes, layers=meter.layers, compare=compare)
    progress.start("fitting", round(sum(steps.values())), "tokens")
    job = Job(model, texts, places, meter, together)
    before = _losses(job, BEFORE) if compare else None
    own = read_own(model, texts, places, meter=meter, together=together)
    job = replace(job, lowering=lowering(own.kept, model))
    first, closed_only = (method, True) if method in CLOSED else ("ridge", False)
    unscaled = made = closed_gates(own.kept, first)
    if own.everything is not own.kept:
        made = closed_gates(own.everything, first)
    closed_scale, gates = _scaled(job, unscaled, at=CLOSED_START)
    scale = closed_scale
    if not closed_only:
        job.set_gates(gates)
        samples = read_samples(model, texts, bos=bos, meter=meter, together=together)
        unscaled, made = _by_states(job, samples, own.kept, BY_STATES.get(method, logistic))
        scale, gates = _scaled(job, unscaled, at=LOGISTIC_START)
    if method == "regret":
        job.set_gates(gates)
        lost = read_losses(model, texts, samples, places, classes, meter=meter)
        unscaled, made = _regret(job, samples, own.kept, lost, begun=(gates, times(made, scale)))
        scale, gates = _scaled(job, unscaled, at=REGRET_START)
    job.set_gates(gates)
    after = _losses(job, AFTER)
    terms = job.lowering if own.everything is own.kept else lowering(own.everything, model)
    final = lowered(times(made, scale), terms)
    set_gates(model, final)
    return Fit(
        gates=final,
        statistics=own.everything,
        method=method,
        scale=scale,
        closed_scale=closed_scale,
        before=before,
        after=after,
        own=Losses(own.losses),
        seen_held_out=any(map(unseen, texts)),
        cost=meter.cost(together=together),
    )


def _losses(job: Job, step: str, held: Mapping[str, Sequence[Block]] | None = None) -> Losses:
    """The loss on each text's blocks in `held`, by default on all of its held-out ones."""
    on_tokens = job.meter.reading(step)
    held = held or {text.name: text.held for text in job.own_texts}
    return Losses(
        {
            name: mean_loss(job.model, blocks, together=job.together, on_tokens=on_tokens)
            for name, blocks in held.items()
        }
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


def _by_states(
    job: Job, samples: Samples, statistics: Statistics, method: Callable[[States], torch.Tensor]
) -> tuple[Gates, Gates]:
    """Gates by a method for single states, fitted to the kept text and to all text (see `_twice`)."""

    def make(path: RouterPath, layer: int, data: States, _rows_N: torch.Tensor) -> torch.Tensor:
        return _gate(path, method(replace(data, moment_DD=statistics[path].second_LDD[layer])))

    return _twice(job, samples, make, make)


def _regret(
    job: Job, samples: Samples, statistics: Statistics, lost: Mapping[RouterPath, Lost], *, begun: tuple[Gates, Gates]
) -> tuple[Gates, Gates]:
    """Starts from the gates in `begun`. The gate of a shared expert stays, because it has no alternative."""

    def make(begun: Gates, path: RouterPath, layer: int, data: States, rows_N: torch.Tensor) -> torch.Tensor:
        gate_CD = begun[path][layer]
        if path == SHARED:
            return gate_CD
        loss_NC, known_N = lost[path].loss_NC[rows_N], lost[path].known_N[rows_N]
        data = replace(data, moment_DD=statistics[path].second_LDD[layer])
        return regret(data, loss_NC, gate_CD, known_N=known_N).float()

    return _twice(job, samples, *(partial(make, each) for each in begun))


def _twice(job: Job, samples: Samples, make_kept: Make, make_all: Make) -> tuple[Gates, Gates]:
    """Gates fitted to the kept text, and to all text; the same ones if that is all."""
    job.meter.note(SOLVING)
    kept = [chunk for chunk in samples.chunks if not chunk.held]
    wanted = [(make_kept, kept)] + ([(make_all, samples.chunks)] if len(kept) < len(samples.chunks) else [])
    made = [
        {path: solved(samples, chunks, placed, partial(make, path)) for path, placed in job.places.items()}
        for make, chunks in wanted
    ]
    return made[0], made[-1]


def _scaled(job: Job, gates: Gates, *, at: float) -> tuple[float, Gates]:
    """The factor for all gates with the lowest mean loss on a part of the held-out text, and the gates times it."""
    held = {text.name: searched_blocks(text) for text in job.own_texts}

    def loss(scale: float) -> float:
        job.set_gates(times(gates, scale))
        return _losses(job, SCALE, held).mean

    scale = search(loss, start=at, tokens=sum(block.targets for blocks in held.values() for block in blocks))
    return scale, times(gates, scale)


def times(gates: Gates, scale: float) -> Gates:
    """All gates multiplied by one factor."""
    return {path: [scale * gate_CD for gate_CD in rows] for path, rows in gates.items()}


def lowering(statistics: Statistics, model: PreTrainedModel) -> Gates:
    """What `lowered` subtracts from every row of a gate: a row [D] for each layer. Empty if scores are no sigmoids.

    All methods fit gates for a softmax, and a term that is common to all experts does not change a softmax. Here this
    term moves the scores of a sigmoid far below zero, where it is nearly the exponential function. So the weights,
    divided by their sum, are those of the softmax.
    """
    if {block.router.rule.score for block in outer_blocks(model).values()} != {"sigmoid"}:
        return {}
    return {
        path: [(LOW * level(sums_of(found, layer))).float() for layer in range(len(found.second_LDD))]
        for path, found in statistics.items()
        if path != SHARED
    }


def lowered(gates: Gates, terms: Gates) -> Gates:
    """Gates for the scores that the model's routers take; `terms` are those of `lowering`."""
    return {
        path: [gate_CD - term_D for gate_CD, term_D in zip(rows, terms[path], strict=True)] if path in terms else rows
        for path, rows in gates.items()
    }
