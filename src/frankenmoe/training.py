"""Artifact or recipe -> an artifact that was trained; the library's and the CLI's way to train.

Reads the text, hands a running MoE to `train.run`, and writes what came of it. Killed at any moment, the same call goes
on from the last checkpoint.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml

from frankenmoe.artifact import (
    RECORD,
    ROUTERS,
    Artifact,
    Routers,
    finish,
    growing,
    open_artifact,
    partial_folder,
    refuse_occupied,
    small_hashes,
    write_json,
    write_routers,
)
from frankenmoe.building import (
    check_buildable,
    is_recipe,
    load_recipe,
    make_routers,
    record_of,
    stored_routers,
    versions,
)
from frankenmoe.checkpoint.fingerprint import fingerprint
from frankenmoe.checkpoint.reader import map_bytes
from frankenmoe.checkpoint.tensors import DTYPES
from frankenmoe.checkpoint.writer import write_atomic
from frankenmoe.compose import copy_small_files
from frankenmoe.errors import ArtifactError, FrankenMoEError, NumericsError, PlanError
from frankenmoe.families import FORMATS
from frankenmoe.moe.load import MoE, load_built, load_plan
from frankenmoe.planning import Plan, plan
from frankenmoe.planning.layout import router_names
from frankenmoe.planning.recall import plan_of
from frankenmoe.progress import SILENT, Progress
from frankenmoe.recipe import Expert, Recipe
from frankenmoe.recipetrain import Train
from frankenmoe.train import traps
from frankenmoe.train.checkpoint import remove_scaffold
from frankenmoe.train.data import read_domains
from frankenmoe.train.parts import blocks
from frankenmoe.train.run import Job, Outcome, run
from frankenmoe.train.save import new_routers, write_parts

REPORT = "training.json"
Data = Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class Trained:
    """A finished run: the artifact, and what training found, as plain data (losses, looks of the guard, speed)."""

    artifact: Artifact
    report: Mapping[str, Any]


@dataclass(frozen=True)
class Start:
    """What training starts from. `plan` is None for a built artifact, `artifact` is None for a recipe."""

    recipe: Recipe
    plan: Plan | None
    artifact: Artifact | None
    routers: Routers
    gate_names: Callable[[tuple[int, ...]], tuple[str, ...]]
    top_k: int
    renormalize: bool
    experts: tuple[str, ...]
    body: tuple[str, ...] = ()  # fingerprints of a built artifact's files


def train(
    what: Recipe | Artifact | str | Path,
    out: str | Path,
    *,
    data: Data | None = None,
    settings: Train | None = None,
    keep_anyway: bool = False,
    dtype: str | None = None,
    report_to: Sequence[str] = (),
    shard: bool = False,
    trust_remote_code: bool = False,
    progress: Progress = SILENT,
) -> Trained:
    """Trains an MoE on text and writes it to `out`, in the form it had (a recipe becomes a virtual artifact).

    `data` maps the name of a domain, best that of the expert it belongs to, to files or hub datasets; by default it is
    that of the recipe's experts. `settings` is by default the recipe's `train`. `dtype` is what frozen weights compute
    in, by default as they are stored. `shard` spreads weights over the processes of a launcher (FSDP2). The result is
    what the guard measured best on text held out; raises PlanError where that is where it began, unless `keep_anyway`.
    """
    out = Path(os.path.realpath(out))
    main = int(os.environ.get("RANK", "0")) == 0
    if main:
        refuse_occupied(out)
    start = _start(what, progress, trust_remote_code=trust_remote_code)
    settings = settings or start.recipe.train or Train.model_validate({})
    data = data or _recipes_data(start.recipe.experts)
    traps.check(settings, plan=start.plan, top_k=start.top_k, renormalize=start.renormalize, experts=start.experts)
    moe = _load(start, dtype=dtype, trust_remote_code=trust_remote_code)
    if start.plan is None:
        traps.check_experts(block.experts for block in blocks(moe.model).values())
    domains = read_domains(
        data,
        moe.tokenizer(),
        folder=start.recipe.folder,
        settings=settings,
        experts=start.experts,
        vocab=moe.model.config.vocab_size,
    )
    traps.check_domains(settings, domains, experts=start.experts)
    digest = _digest(start, settings, data, dtype=dtype)
    with _folder(out, digest=digest, main=main) as partial:
        job = Job(moe, start.plan, start.gate_names, domains, settings, partial, tuple(report_to), shard)
        try:
            outcome: Outcome | FrankenMoEError = run(job, progress=progress)
        except ArtifactError as error:  # a checkpoint could not be written: what there is stays for the next try
            outcome = error
        # what a run stopped at is no state to keep, whoever asks
        if isinstance(outcome, Outcome) and main and (outcome.improved or (keep_anyway and not outcome.stopped)):
            weights = outcome.weights if outcome.improved else outcome.last
            report = _report(start, settings, data, outcome)
            _write(start, weights, report, partial, out=out, progress=progress)
    if isinstance(outcome, FrankenMoEError):
        raise outcome
    if outcome.stopped:
        raise _stopped(outcome, out)
    if not (outcome.improved or keep_anyway):
        raise _worse(outcome, out)
    if dist.is_initialized():
        dist.barrier()
    artifact = open_artifact(out)
    return Trained(artifact, json.loads((out / REPORT).read_bytes()))


def _start(what: Recipe | Artifact | str | Path, progress: Progress, *, trust_remote_code: bool) -> Start:
    if isinstance(what, str | Path) and not is_recipe(what):
        what = open_artifact(Path(what))
    if not isinstance(what, Artifact):
        made = plan(load_recipe(what), weights=True, trust_remote_code=trust_remote_code)
        check_buildable(made, virtual=True, allow_identical=True)
        return _planned(made, make_routers(made, progress, trust_remote_code=trust_remote_code).routers, None)
    if what.form == "virtual":
        made = plan_of(what, trust_remote_code=trust_remote_code)
        return _planned(made, stored_routers(made, what.folder / ROUTERS), what)
    fmt, top_k = FORMATS[what.record["format"]], what.record["experts_per_token"]
    layers = len({name for name in what.routers if "shared" not in name})
    return Start(
        recipe=Recipe.parse(
            yaml.safe_dump(what.record["recipe"]),
            folder=Path(what.record["recipe_folder"]),
            origin=str(what.folder / "recipe.yml"),
        ),
        plan=None,
        artifact=what,
        routers={name: (ref.dtype, ref.shape, map_bytes(ref).copy()) for name, ref in what.routers.items()},
        gate_names=lambda path: router_names(fmt, layers=layers, path=path),
        top_k=top_k,
        renormalize=top_k > 1 or fmt.renormalizes_top1,
        experts=tuple(what.record["experts"]),
        body=_prints(what.folder),
    )


def _planned(made: Plan, routers: Routers, artifact: Artifact | None) -> Start:
    top_k = made.recipe.experts_per_token
    return Start(
        recipe=made.recipe,
        plan=made,
        artifact=artifact,
        routers=routers,
        gate_names=made.router_names,
        top_k=top_k,
        renormalize=top_k > 1 or made.fmt is None or made.fmt.renormalizes_top1,
        experts=tuple(node.name for node in made.nodes),
    )


def _load(start: Start, *, dtype: str | None, trust_remote_code: bool) -> MoE:
    as_dtype = getattr(torch, dtype) if dtype else None
    if start.plan is None:
        assert start.artifact is not None
        return load_built(start.artifact, dtype=as_dtype)
    gates = {
        name: torch.from_numpy(raw.copy()).view(getattr(torch, DTYPES[kind].name)).view(shape)
        for name, (kind, shape, raw) in start.routers.items()
    }
    return load_plan(start.plan, gates, dtype=as_dtype, trust_remote_code=trust_remote_code)


def _recipes_data(experts: tuple[Expert, ...]) -> Data:
    return {expert.name: expert.data for expert in experts if expert.data}


def _digest(start: Start, settings: Train, data: Data, *, dtype: str | None) -> str:
    """Names the run: what it starts from, the settings, and the files of text as they are now."""
    routers = hashlib.sha256(b"".join(raw.tobytes() for _, _, raw in start.routers.values())).hexdigest()
    origin = start.plan.digest if start.plan else list(start.body)
    texts = []
    for name in sorted(data):
        for text in data[name]:
            file = start.recipe.folder / text
            stat = file.stat() if file.is_file() else None
            texts.append([name, text, stat and [stat.st_size, stat.st_mtime_ns]])
    facts = [origin, routers, settings.model_dump(mode="json"), texts, dtype]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest() + "/train"


def _prints(folder: Path) -> tuple[str, ...]:
    """Fingerprints of a built body's files."""
    return tuple(fingerprint(file) for file in sorted(folder.glob("model-0*.safetensors")))


@contextmanager
def _folder(out: Path, *, digest: str, main: bool) -> Iterator[Path]:
    """Where the artifact grows; only the first process of several holds it."""
    if main:
        with growing(out, digest=digest) as partial:
            yield partial
    else:
        yield partial_folder(out)


def _report(start: Start, settings: Train, data: Data, outcome: Outcome) -> dict[str, Any]:
    history = outcome.history
    first, best, last = history.looks[0], outcome.best, history.looks[-1]
    return {
        "from": str(start.artifact.folder) if start.artifact else start.recipe.origin,
        "settings": settings.to_dict(),
        "data": {name: list(files) for name, files in data.items()},
        "parameters": outcome.parameters,
        "steps": history.step,
        "best_step": history.best,
        "improved": outcome.improved,
        "held_out_loss": {"before": first.loss, "best": best.loss, "after": last.loss},
        "mean_held_out_loss": {"before": first.mean, "best": best.mean, "after": last.mean},
        "largest_load": {"before": first.largest, "best": best.largest, "after": last.largest},
        "looks": [each.to_dict() for each in history.looks],
        "losses": history.losses,
    }


def _write(
    start: Start,
    weights: Mapping[str, torch.Tensor],
    report: dict[str, Any],
    partial: Path,
    *,
    out: Path,
    progress: Progress,
) -> None:
    """Turns the partial folder into the finished artifact."""
    write_routers(partial, new_routers(start.routers, weights))
    write_json(partial / REPORT, report)
    stage = {
        "stage": "train",
        **{key: report[key] for key in ("from", "settings", "data", "best_step", "mean_held_out_loss")},
        "versions": versions(),
    }
    if start.plan is None:
        assert start.artifact is not None
        _link_body(start.artifact.folder, partial)
        record = dict(start.artifact.record)
        if _prints(partial) != start.body:  # those of before the first step
            raise ArtifactError(
                f"the body of {start.artifact.folder} changed while it was trained", hint="build it again"
            )
    else:
        record = _virtual_record(start, weights, partial, out=out, progress=progress)
    earlier = (
        start.artifact.record["stages"]
        if start.artifact
        else [{"stage": "routers", "gate_mode": start.recipe.gate_mode}]
    )
    record["stages"] = [*earlier, stage]
    record.pop("version", None)
    remove_scaffold(partial)
    finish(partial, out, record=record | {"files": small_hashes(partial)})


def _virtual_record(
    start: Start, weights: Mapping[str, torch.Tensor], partial: Path, *, out: Path, progress: Progress
) -> dict[str, Any]:
    assert start.plan is not None
    table = write_parts(start.plan, weights, partial, out=out)
    text = yaml.safe_dump(table, sort_keys=False, allow_unicode=True)
    write_atomic(partial / "recipe.yml", text.encode())
    copy_small_files(start.plan, partial)
    # planned where it lies now, beside where it will lie: relative paths mean the same from both
    made = plan(Recipe.load(partial / "recipe.yml"), dtype=start.plan.dtype, weights=True)
    known = start.artifact.record["sources"] if start.artifact else []
    record = record_of(
        made,
        out,
        folder=partial,
        virtual=True,
        progress=progress,
        known={each["fingerprint"]: each["sha256"] for each in known},
    )
    inside, final = f"{partial}{os.sep}", f"{out}{os.sep}"
    for each in (*record["sources"], *record["configs"]):
        each["file"] = final + each["file"].removeprefix(inside) if each["file"].startswith(inside) else each["file"]
    return record | {"recipe_folder": str(out), "recipe_folder_from_here": "."}


def _link_body(source: Path, folder: Path) -> None:
    """Everything but record, routers and report, by hard link where the disk allows it, else as a copy."""
    for file in source.iterdir():
        target = folder / file.name
        if file.name in (RECORD, ROUTERS, REPORT) or target.exists() or not file.is_file():
            continue
        try:
            os.link(file, target)
        except OSError:
            shutil.copy2(file, target)


def _stopped(outcome: Outcome, out: Path) -> NumericsError:
    assert outcome.stopped is not None
    kept = (
        f"{out} holds the best state before it, of step {outcome.history.best}"
        if outcome.improved
        else "nothing before it was better than the beginning, so nothing was written"
    )
    hint = outcome.stopped.hint if outcome.improved else f"{outcome.stopped.hint}; {_other_settings(out)}"
    return NumericsError(f"{outcome.stopped.message}, so training stopped there; {kept}", hint=hint)


def _worse(outcome: Outcome, out: Path) -> PlanError:
    first, last = outcome.history.looks[0], outcome.history.looks[-1]
    worst = max(last.loss, key=lambda name: last.loss[name] - first.loss[name])
    return PlanError(
        f"the run ended worse than it began: mean held-out loss {first.mean:.4f} before, {last.mean:.4f} after "
        f"{outcome.history.step} steps (most on {worst}, {first.loss[worst]:.4f} to {last.loss[worst]:.4f}), and no "
        f"look in between was better; {out} was not written",
        hint="lower --rate and --router-rate or give more text; --keep-anyway writes the last state all the same; "
        + _other_settings(out),
    )


def _other_settings(out: Path) -> str:
    return f"{partial_folder(out)} holds the run, so remove it before you try other settings"
