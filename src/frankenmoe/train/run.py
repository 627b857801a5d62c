"""Artifact or recipe -> a trained artifact. If killed, the same call continues from the last checkpoint."""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from frankenmoe.artifact.folder import (
    RECORD,
    ROUTERS,
    Artifact,
    Routers,
    finish,
    open_artifact,
    partial_folder,
    refuse_occupied,
    small_hashes,
    write_routers,
)
from frankenmoe.artifact.reports import TrainingReport, versions
from frankenmoe.build.derived import growing_once, virtual_record
from frankenmoe.build.record import backbone_stage
from frankenmoe.checkpoint.fingerprint import fingerprint
from frankenmoe.counted import counted
from frankenmoe.data.given import Texts, located, user_path
from frankenmoe.errors import ArtifactError, FrankenMoEError, NumericsError, PlanError
from frankenmoe.moe.device import AUTO, check_room, resolve
from frankenmoe.moe.load import weights_of
from frankenmoe.moe.processes import is_main, wait
from frankenmoe.moe.trace import outer_blocks
from frankenmoe.planning.buildable import check_buildable
from frankenmoe.progress import SILENT, Progress
from frankenmoe.recipe import Expert, Recipe
from frankenmoe.recipe.settings import settings_with
from frankenmoe.recipe.train import TrainSettings
from frankenmoe.subject import Subject, open_subject
from frankenmoe.train import traps
from frankenmoe.train.checkpoint import remove_scaffold
from frankenmoe.train.data import read_domains
from frankenmoe.train.loop import Run, RunResult, train_loop
from frankenmoe.train.save import new_routers, write_parts

REPORT = "training.json"


@dataclass(frozen=True)
class Trained:
    """A finished training: the artifact, and the report as plain data (losses, held-out measurements, speed)."""

    artifact: Artifact
    report: Mapping[str, Any]


def train(
    what: Subject | Recipe | Artifact | str | Path,
    out: str | Path,
    *,
    data: Texts | None = None,
    settings: TrainSettings | None = None,
    keep_anyway: bool = False,
    device: str = AUTO,
    dtype: str | None = None,
    report_to: Sequence[str] = (),
    shard: bool = False,
    progress: Progress = SILENT,
    **changes: Any,
) -> Trained:
    """Trains an MoE on text and writes it to `out` in the same form (a recipe becomes a virtual artifact).

    `data` maps domains, preferably named after their experts, to files or hub datasets with paths from the working
    directory; by default it is the recipe's. `settings` is by default the recipe's `train`; `changes` are settings by
    name. `device` is where it trains; a launcher gives each process its own. `dtype` is the type of frozen weights in
    memory, by default as stored. `shard` shards weights over the launcher's processes (FSDP2). Keeps the state with the
    lowest held-out loss. Raises PlanError if that is the first one, unless `keep_anyway`.
    """
    out = Path(os.path.realpath(out))
    main, place = is_main(), resolve(device)
    if main:
        refuse_occupied(out)
    subject = open_subject(what)
    settings = settings_with(settings or subject.recipe.train or TrainSettings(), changes)
    data = located(data) if data else _recipes_data(subject.recipe.experts)
    body = _prints(subject.artifact.folder) if subject.artifact and subject.built else ()
    if subject.artifact is None:
        check_buildable(subject.planned, virtual=True, allow_identical=True)
    plan = None if subject.built else subject.resolved(progress, device=device).plan
    parts = subject.parts
    traps.check(settings, plan=plan, top_k=parts.top_k, renormalize=parts.renormalizes, experts=parts.experts)
    if not shard:  # the loop moves the weights, or a shard of them
        check_room(weights_of(parts), place, dtype=getattr(torch, dtype) if dtype else None)
    routers = subject.routers(progress, device=device).routers
    moe = subject.load(dtype=dtype)
    if plan is None:
        traps.check_experts(block.experts for block in outer_blocks(moe.model).values())
    domains = read_domains(
        data,
        moe.tokenizer(),
        folder=subject.recipe.folder,
        settings=settings,
        experts=parts.experts,
        vocab=moe.model.config.vocab_size,
    )
    traps.check_domains(settings, domains, experts=parts.experts)
    origin = plan.digest if plan else list(body)
    digest = _digest(origin, routers, settings, data, folder=subject.recipe.folder, dtype=dtype)
    with growing_once(out, digest=digest) as partial:
        run = Run(moe, plan, parts.router_names, domains, settings, partial, tuple(report_to), shard, place)
        try:
            result: RunResult | FrankenMoEError = train_loop(run, progress=progress)
        except ArtifactError as error:  # a checkpoint could not be written; the folder is kept for the next try
            result = error
        # the last state of a stopped run is never kept
        if isinstance(result, RunResult) and main and (result.improved or (keep_anyway and not result.stopped)):
            weights = result.weights if result.improved else result.last
            report = _report(subject, settings, data, result)
            _write(subject, routers, weights, report, partial, body=body, out=out, progress=progress)
    if isinstance(result, FrankenMoEError):
        raise result
    if result.stopped:
        raise _stopped(result, out)
    if not (result.improved or keep_anyway):
        raise _worse(result, out)
    wait()
    artifact = open_artifact(out)
    return Trained(artifact, TrainingReport.read(out / REPORT).to_dict())


def _recipes_data(experts: tuple[Expert, ...]) -> Texts:
    return {expert.name: expert.data for expert in experts if expert.data}


def _digest(
    origin: str | list[str], routers: Routers, settings: TrainSettings, data: Texts, *, folder: Path, dtype: str | None
) -> str:
    """Identifies the run: the starting weights, the settings and the text files with their size and time."""
    gates = hashlib.sha256(b"".join(raw.tobytes() for _, _, raw in routers.values())).hexdigest()
    texts = []
    for name in sorted(data):
        for text in data[name]:
            file = Path(user_path(text, folder=folder))
            stat = file.stat() if file.is_file() else None
            texts.append([name, text, stat and [stat.st_size, stat.st_mtime_ns]])
    facts = [origin, gates, settings.model_dump(mode="json"), texts, dtype]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest() + "/train"


def _prints(folder: Path) -> tuple[str, ...]:
    """Fingerprints of a built artifact's weight files."""
    return tuple(fingerprint(file) for file in sorted(folder.glob("model-0*.safetensors")))


def _report(subject: Subject, settings: TrainSettings, data: Texts, result: RunResult) -> TrainingReport:
    history = result.history
    first, best, last = history.looks[0], result.best, history.looks[-1]
    found = {
        "from": subject.origin,
        "settings": settings.to_dict(),
        "data": {name: list(files) for name, files in data.items()},
        "parameters": result.parameters,
        "steps": history.step,
        "best_step": history.best,
        "improved": result.improved,
        "held_out_loss": {"before": first.loss, "best": best.loss, "after": last.loss},
        "mean_held_out_loss": {"before": first.mean, "best": best.mean, "after": last.mean},
        "largest_load": {"before": first.largest, "best": best.largest, "after": last.largest},
        "looks": [each.to_dict() for each in history.looks],
        "losses": history.losses,
    }
    return TrainingReport.model_validate(found)


def _write(
    subject: Subject,
    routers: Routers,
    weights: Mapping[str, torch.Tensor],
    report: TrainingReport,
    partial: Path,
    *,
    body: tuple[str, ...],
    out: Path,
    progress: Progress,
) -> None:
    """Turns the partial folder into the finished artifact."""
    write_routers(partial, new_routers(routers, weights))
    report.write(partial / REPORT)
    facts = report.to_dict()
    stage = {
        "stage": "train",
        **{key: facts[key] for key in ("from", "settings", "data", "best_step", "mean_held_out_loss")},
        "versions": versions(),
    }
    source = subject.artifact
    if source and subject.built:
        _link_body(source.folder, partial)
        record = dict(source.record)
        if _prints(partial) != body:  # taken before the first step
            raise ArtifactError(f"the weights of {source.folder} changed during training", hint="build it again")
    else:
        record = virtual_record(
            subject, write_parts(subject.plan, weights, partial, out=out), partial, out=out, progress=progress
        )
    made_first = {"stage": "routers", "gate_mode": subject.recipe.gate_mode}
    earlier = source.record["stages"] if source else [*backbone_stage(subject.plan), made_first]
    record["stages"] = [*earlier, stage]
    record.pop("version", None)
    remove_scaffold(partial)
    finish(partial, out, record=record | {"files": small_hashes(partial)})


def _link_body(source: Path, folder: Path) -> None:
    """Hard links (or copies) of all files except record, routers and report."""
    for file in source.iterdir():
        target = folder / file.name
        if file.name in (RECORD, ROUTERS, REPORT) or target.exists() or not file.is_file():
            continue
        try:
            os.link(file, target)
        except OSError:
            shutil.copy2(file, target)


def _stopped(result: RunResult, out: Path) -> NumericsError:
    assert result.stopped is not None
    kept = (
        f"{out} has the best earlier state, of step {result.history.best}"
        if result.improved
        else "no earlier state was better than the first, so nothing was written"
    )
    hint = result.stopped.hint if result.improved else f"{result.stopped.hint}; {_other_settings(out)}"
    return NumericsError(f"{result.stopped.message}, so training stopped; {kept}", hint=hint)


def _worse(result: RunResult, out: Path) -> PlanError:
    first, last = result.history.looks[0], result.history.looks[-1]
    worst = max(last.loss, key=lambda name: last.loss[name] - first.loss[name])
    return PlanError(
        f"training made the model worse: mean held-out loss {first.mean:.4f} before, {last.mean:.4f} after "
        f"{counted(result.history.step, 'step')} (most on {worst}, {first.loss[worst]:.4f} to "
        f"{last.loss[worst]:.4f}), and no state in between was better; {out} was not written",
        hint="lower --rate and --router-rate or give more text; --keep-anyway writes the last state anyway; "
        + _other_settings(out),
    )


def _other_settings(out: Path) -> str:
    return f"{partial_folder(out)} holds the run, so remove it before you try other settings"
