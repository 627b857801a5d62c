"""Plan + text -> the backbone with the lowest held-out loss, and what every candidate gave.

Every text is read with its own expert forced, so routers, which are made later, do not matter.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import isfinite
from pathlib import Path
from typing import Any

from frankenmoe.backbone.candidates import own_texts, planned, regmean_tensors, write_trained
from frankenmoe.backbone.measure import TOKENS, Losses, divided, measure
from frankenmoe.errors import NumericsError, RecipeError, SourceError
from frankenmoe.gates.fitted import load_with_zeros
from frankenmoe.gates.texts import OwnText, read_texts
from frankenmoe.moe.dense import load_tokenizer
from frankenmoe.moe.device import AUTO as AUTO_DEVICE
from frankenmoe.planning import Plan
from frankenmoe.planning.candidates import candidates
from frankenmoe.planning.names import named_experts
from frankenmoe.planning.trained import TRAINED
from frankenmoe.progress import SILENT, Progress
from frankenmoe.recipe.backbone import ATTENTION, AVERAGE, GROUPS, REGMEAN, Groups, MergeSettings

READ = 3 * TOKENS  # tokens of data per expert: one third is measured, two thirds are for RegMean
BLOCKS = (256, 32)  # tokens read at once; the shorter ones for data that has not one long block
QUARTER = 4  # of its blocks, after which a candidate may be given up
HOPELESS = 4.0  # standard errors that it must then be behind the best one

ByGroup = Mapping[str, MergeSettings]


@dataclass(frozen=True)
class Tried:
    """A candidate with its losses. `rank` orders candidates from the simplest; its plan is explicit."""

    rank: int
    title: str
    plan: Plan
    losses: Losses
    whole: bool

    def to_dict(self, best: Losses) -> dict[str, Any]:
        """Plain data, as in an artifact's record. `behind` and its standard error `noise` are against `best`."""
        return {
            "backbone": self.title,
            "mean": self.losses.mean,
            "behind": self.losses.behind(best),
            "noise": self.losses.noise(best),
            "held_out_loss": self.losses.by_expert,
            **({} if self.whole else {"given_up": True}),
        }


@dataclass
class Search:
    """Measures candidates one after another on the same text, on `device`."""

    texts: Sequence[OwnText]
    progress: Progress
    device: str = AUTO_DEVICE
    tried: list[Tried] = field(default_factory=list)
    tokens: int = 0  # that were read so far

    def on_tokens(self, count: int) -> None:
        """Counts tokens that were just read."""
        self.tokens += count
        self.progress.advance(count)

    @property
    def best(self) -> Tried:
        """The candidate with the lowest loss. NumericsError if none has a finite one."""
        able = [each for each in self.tried if each.whole and isfinite(each.losses.mean)]
        if not able:
            raise NumericsError(
                "the model computes NaN or infinite losses with every backbone, though its weights are finite",
                hint="convert the parents to float32 first, or write backbone: base",
            )
        return min(able, key=lambda each: each.losses.mean)

    @property
    def simplest(self) -> Tried:
        """The best candidate, or the simplest that is behind it by at most one standard error."""
        best = self.best.losses
        near = (each for each in self.tried if each.whole and each.losses.behind(best) <= each.losses.noise(best))
        return min(near, key=lambda each: each.rank)

    def measure(self, rank: int, title: str, plan: Plan) -> None:
        """Measures a candidate. It is given up after a quarter of the text if it is far behind the best one."""
        self.progress.note(title)
        model = load_with_zeros(plan, device=self.device).model
        quarter = max(2, min(len(text.held) for text in self.texts) // QUARTER)
        losses = measure(model, self.texts, part=slice(0, quarter), on_tokens=self.on_tokens)
        given_up = self._hopeless(losses)
        later = slice(quarter, None)
        if given_up:
            self.progress.advance(sum(len(block.ids) for text in self.texts for block in text.held[later]))
        else:
            losses += measure(model, self.texts, part=later, on_tokens=self.on_tokens)
        self.tried.append(Tried(rank, title, plan, losses, whole=not given_up))

    def _hopeless(self, losses: Losses) -> bool:
        others = [each.losses for each in self.tried if each.whole and isfinite(each.losses.mean)]
        best = min(others, key=lambda each: each.mean, default=losses)
        return losses.behind(best) > HOPELESS * losses.noise(best)


def choose(
    made: Plan, folder: Path, *, device: str = AUTO_DEVICE, progress: Progress = SILENT
) -> tuple[Plan, dict[str, Any]]:
    """The plan with an explicit backbone, and a report as plain data.

    RegMean's tensors are written into `folder` as TRAINED if they are needed. Raises RecipeError or SourceError for
    text that cannot be read, NumericsError if every candidate computes NaN.
    """
    texts = _texts(made)
    search = Search(texts, progress, device)
    if made.recipe.backbone_for(ATTENTION).method == REGMEAN:
        progress.start("reading for regmean", _kept(texts), "tokens")
        return _with_regmean(made, made.choice.by_group, search, folder), _report(search, "regmean")
    listed = list(enumerate(candidates(made)))
    closed = [(rank, each) for rank, each in listed if _method(each) != REGMEAN]
    held = sum(len(block.ids) for text in texts for block in text.held)
    progress.start("choosing the backbone", held * len(listed) + _kept(texts), "tokens")
    # the base's, which is the simplest and seldom the best, last: three quarters of the text need not be read with it
    for rank, each in (*closed[1:], *closed[:1]):
        plan = planned(made, _by_group(each))
        search.measure(rank, str(plan.choice), plan)
    for rank, each in listed:
        if isinstance(each, MergeSettings) and each.method == REGMEAN:
            best = search.best
            plan = _with_regmean(best.plan, _averaged(best.plan.choice.by_group), search, folder)
            search.measure(rank, str(replace(plan.choice, by_group={**plan.choice.by_group, ATTENTION: each})), plan)
    chosen = search.simplest
    if chosen.plan.recipe.trained != str(folder / TRAINED):
        (folder / TRAINED).unlink(missing_ok=True)
    return chosen.plan, _report(search, chosen.title)


def _texts(made: Plan) -> list[OwnText]:
    for name, _, expert in named_experts(made.recipe.experts):
        if not (expert.experts or expert.data or expert.positive_prompts):
            method = made.recipe.backbone_for(ATTENTION).method
            raise RecipeError(
                f"expert {name!r} has neither data nor positive_prompts, but backbone: {method} reads text of every "
                "expert",
                hint="add data to the expert, or write backbone: average",
            )
    tokenizer = load_tokenizer(made.base.folder)
    lengths = (made.recipe.fit.block,) if made.recipe.fit else BLOCKS
    for length in lengths:
        try:
            found = read_texts(made, tokenizer, tokens=READ, length=length)
        except SourceError:
            if length == lengths[-1]:
                raise
        else:
            return [divided(text) for text in own_texts(made, found)]
    raise AssertionError


def _kept(texts: Sequence[OwnText]) -> int:
    return sum(len(block.ids) for text in texts for block in text.kept)


def _with_regmean(running: Plan, by_group: ByGroup, search: Search, folder: Path) -> Plan:
    """The plan with RegMean's tensors, made from what `running` reads."""
    alpha = running.recipe.backbone_for(ATTENTION).alpha
    moe = load_with_zeros(running, device=search.device)
    tensors = regmean_tensors(moe, running, search.texts, alpha=alpha, on_tokens=search.on_tokens)
    write_trained(folder / TRAINED, tensors, running)
    return planned(running, by_group, trained=folder / TRAINED)


def _averaged(by_group: ByGroup) -> ByGroup:
    """The same with the average for the attention; RegMean replaces its linear layers, but not their biases."""
    return {**by_group, ATTENTION: MergeSettings(method=AVERAGE)}


def _by_group(backbone: MergeSettings | Groups) -> ByGroup:
    return {group: backbone.settings(group) if isinstance(backbone, Groups) else backbone for group in GROUPS}


def _method(backbone: MergeSettings | Groups) -> str:
    return _by_group(backbone)[ATTENTION].method


def _report(search: Search, chosen: str) -> dict[str, Any]:
    whole = sum(len(block.ids) for text in search.texts for block in (*text.kept, *text.held))
    return {
        "chosen": chosen,
        "tried": [each.to_dict(search.best.losses) for each in sorted(search.tried, key=lambda each: each.rank)],
        "text": {text.name: sum(len(block.ids) for block in text.held) for text in search.texts},
        "forward_passes": round(search.tokens / whole, 2),
    }
