"""The models of an evaluation and how each is loaded: those that the user names, and the rivals of an MoE."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from frankenmoe.checkpoint.tensors import Merge
from frankenmoe.evaluate.compare import BASE, FORCED, MERGE, MODEL, MOE, PARENT, RANDOM
from frankenmoe.evaluate.parents import dense_model, merged_model, parents, randomize_gates, stock_model
from frankenmoe.planning import Plan
from frankenmoe.planning.buildable import check_parents
from frankenmoe.planning.layout import RouterPath
from frankenmoe.planning.sources import Source
from frankenmoe.progress import Progress
from frankenmoe.subject import Dense, Subject


@dataclass(frozen=True)
class Contestant:
    """A model to evaluate. `load` loads it; `tokenizer` is the folder of its tokenizer.

    With `forcing`, only the losses of these domains are measured, each with the expert at this path in every layer.
    `experts_per_token` is that of a mixture.
    """

    name: str
    kind: str
    origin: str
    load: Callable[[], Any]
    tokenizer: Path
    forcing: Mapping[str, RouterPath] | None = None
    experts_per_token: int | None = None


def contestant(model: Subject | Dense, dtype: str | None, progress: Progress) -> Contestant:
    """The name of a model and how to load it."""
    # abspath gives `.` and `..` the name of the folder
    if isinstance(model, Dense):
        path = Path(model.origin)
        name = Path(os.path.abspath(path)).name if path.exists() else path.name

        def dense() -> Any:
            as_dtype = getattr(torch, dtype) if dtype else None
            return stock_model(model.folder, dtype=as_dtype, trust_remote_code=model.trust_remote_code)

        return Contestant(name, MODEL, model.origin, dense, model.folder)
    name = Path(os.path.abspath(model.origin)).name if model.artifact else Path(model.origin).stem

    def moe() -> Any:
        return model.load(dtype=dtype, progress=progress).model

    used = model.parts.top_k
    if used != model.own_experts_per_token:
        name = f"{name} top-{used}"
    return Contestant(name, MOE, model.origin, moe, model.parts.folder, experts_per_token=used)


def with_unique_names(contestants: Sequence[Contestant]) -> list[Contestant]:
    """The models with unique names: one/model and two/model get the parts of the path that differ."""
    paths = [(*Path(os.path.abspath(each.origin)).parts[1:-1], each.name) for each in contestants]
    found = []
    for each, path in zip(contestants, paths, strict=True):
        others = [other for other in paths if other[-1] == each.name and other != path]
        apart = (at for at in range(1, len(path)) if all(other[-at:] != path[-at:] for other in others))
        depth = next(apart, len(path))
        found.append(replace(each, name="/".join(path[-depth:])))
    return found


def merges(parents: int) -> dict[str, Merge]:
    """The dense merges that an MoE must beat: what people would make of the same parents without an MoE.

    Each parent has the weight 1, as in mergekit's examples.
    """
    ones = (1.0,) * parents
    return {
        "average": Merge("average", ones),
        "task arithmetic 0.7": Merge("task_arithmetic", ones, scale=0.7),
        "ties 0.5": Merge("ties", ones, density=0.5),
    }


def rivals(made: Plan, moe: Contestant, dtype: str | None, skipped: dict[str, str]) -> list[Contestant]:
    """Base, parents, dense merges, and the MoE with random gates and with the own expert forced.

    `skipped` gets the reason why a rival is left out. Raises PlanError if the parents are not known.
    """
    check_parents(
        made, doing="--against-parents", hint=f"name the models: frankenmoe eval {moe.origin} MODEL MODEL ..."
    )
    distinct = list(parents(made))
    return [
        *_dense(made, distinct, dtype),
        *_merged(made, [source for _, source in distinct], dtype, skipped),
        *_routed(made, moe, skipped),
    ]


def _dense(made: Plan, distinct: Sequence[tuple[str, Source]], dtype: str | None) -> Iterator[Contestant]:
    as_dtype = getattr(torch, dtype) if dtype else None

    def loader(source: Source) -> Callable[[], Any]:
        return lambda: dense_model(source, dtype=as_dtype)

    folder = made.base.folder
    yield Contestant("base", BASE, str(made.base.name), loader(made.base), folder)
    for name, source in distinct:
        yield Contestant(name, PARENT, str(source.name), loader(source), folder)


def _merged(made: Plan, sources: Sequence[Source], dtype: str | None, skipped: dict[str, str]) -> Iterator[Contestant]:
    if len(sources) < 2:
        skipped["dense merges"] = "there are fewer than two parents besides the base"
        return
    as_dtype = getattr(torch, dtype) if dtype else None

    def loader(merge: Merge) -> Callable[[], Any]:
        return lambda: merged_model(made.base, sources, merge, dtype=as_dtype)

    origin = ", ".join(str(source.name) for source in sources)
    for name, merge in merges(len(sources)).items():
        yield Contestant(name, MERGE, origin, loader(merge), made.base.folder)


def _routed(made: Plan, moe: Contestant, skipped: dict[str, str]) -> Iterator[Contestant]:
    def random() -> Any:
        return randomize_gates(moe.load(), seed=made.recipe.seed)

    origin = f"{moe.origin}, gates drawn with seed {made.recipe.seed}"
    yield Contestant("random gates", RANDOM, origin, random, made.base.folder)
    own = {leaf.name: leaf.path for node in made.nodes for leaf in node.leaves()}
    if made.experts > 1:
        yield Contestant(FORCED, FORCED, moe.origin, moe.load, made.base.folder, forcing=own)
    else:
        skipped[FORCED] = "there is one expert"


def own_parents(made: Plan) -> dict[str, str]:
    """Expert -> the name of its parent as `rivals` calls it. A domain has the name of its expert."""
    names = {source.key: name for name, source in parents(made)}
    leaves = ((leaf.name, leaf.source) for node in made.nodes for leaf in node.leaves())
    keys = {name: source.key for name, source in leaves if source is not None}
    return {name: names[key] for name, key in keys.items() if key in names}
