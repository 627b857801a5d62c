"""Statistics and held-out losses of every text, each read once with its own expert forced in every layer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from frankenmoe.data.blocks import Block
from frankenmoe.errors import NumericsError
from frankenmoe.gates.cost import Meter
from frankenmoe.gates.forcing import forced
from frankenmoe.gates.states import Advance, mean_of, next_losses, silent, watch_inputs
from frankenmoe.gates.statistics import Moments, RouterStatistics, RouterText, start, with_text
from frankenmoe.gates.texts import OwnText, unseen
from frankenmoe.moe.trace import outer_blocks
from frankenmoe.planning.fitting import OWN_LOSS, STATISTICS
from frankenmoe.planning.layout import RouterPath

Statistics = dict[RouterPath, RouterStatistics]
Places = Mapping[RouterPath, Sequence[tuple[int, RouterText]]]
"""Path of a router -> the texts that it is fitted on: their index and its target for each."""


@dataclass(frozen=True)
class OwnStatistics:
    """Statistics of the kept text and of all text (the same object if that is all), and held-out losses by expert."""

    kept: Statistics
    everything: Statistics
    losses: Mapping[str, float]


def read_own(
    model: PreTrainedModel, texts: Sequence[OwnText], places: Places, *, meter: Meter, together: bool = False
) -> OwnStatistics:
    """Reads all texts. Raises NumericsError if states are not finite."""
    layers, hidden = sizes(model)
    kept = {path: start(layers=layers, hidden=hidden) for path in places}
    more = any(map(unseen, texts))
    everything = dict(kept) if more else kept
    losses = {}
    for index, text in enumerate(texts):
        on_tokens = meter.reading(STATISTICS, head=False)
        moments = read_moments(model, text, text.kept, together=together, on_tokens=on_tokens)
        _add(kept, places, index, moments)
        rest, loss = _read_held(model, text, meter=meter, together=together)
        if loss is not None:
            losses[text.name] = loss
        if more:
            moments.merge(rest)
            _add(everything, places, index, moments)
        del moments, rest  # the largest sums there are; the next text has its own
    return OwnStatistics(kept, everything, losses)


def sizes(model: PreTrainedModel) -> tuple[int, int]:
    """(layers, hidden) of the routers."""
    routers = [block.router for block in outer_blocks(model).values()]
    return len(routers), routers[0].weight.shape[1]


def read_moments(
    model: PreTrainedModel,
    text: OwnText,
    blocks: Sequence[Block],
    *,
    together: bool = False,
    on_tokens: Advance = silent,
) -> Moments:
    """The moments of `blocks` of a text, read with its own expert forced, or for negative text with the others.

    Raises NumericsError if states are not finite.
    """
    moments = Moments(*sizes(model))
    with forced(model, text.path, except_for=text.negative):
        watch_inputs(model, blocks, moments.add, together=together, on_tokens=on_tokens)
    return _checked(moments, text, together=together)


def _read_held(
    model: PreTrainedModel, text: OwnText, *, meter: Meter, together: bool
) -> tuple[Moments | None, float | None]:
    """(moments of the held-out blocks that the final gates are fitted to, the loss of all held-out blocks)."""
    blocks = unseen(text)
    if text.negative:
        on_tokens = meter.reading(STATISTICS, head=False)
        return (read_moments(model, text, blocks, together=together, on_tokens=on_tokens) if blocks else None), None
    moments = Moments(*sizes(model)) if len(blocks) == len(text.held) else None
    on_states = moments.add if moments else None
    on_tokens = meter.reading(OWN_LOSS)
    with forced(model, text.path):
        losses_N = next_losses(model, text.held, on_states=on_states, together=together, on_tokens=on_tokens)
    if moments:
        _checked(moments, text, together=together)
    elif blocks:  # some held-out prompts are also kept
        on_tokens = meter.reading(STATISTICS, head=False)
        moments = read_moments(model, text, blocks, together=together, on_tokens=on_tokens)
    return moments, mean_of(losses_N, text.held)


def _checked(moments: Moments, text: OwnText, *, together: bool) -> Moments:
    if together:
        moments.all_reduce()
    if not bool(moments.second_LDD.isfinite().all()):
        raise NumericsError(
            f"the model computes NaN or infinite states for the text of {text.title!r}, though its weights are finite",
            hint="convert the parents to float32 first, or use gate_mode: random",
        )
    return moments


def _add(found: Statistics, places: Places, index: int, moments: Moments) -> None:
    for path, placed in places.items():
        for target in (target for place, target in placed if place == index):
            found[path] = with_text(found[path], target, moments)
