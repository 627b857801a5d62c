"""Artifact or recipe -> an artifact that was trained; the library's and the CLI's way to train.

Reads the text, hands a running MoE to `train.run`, and writes what came of it. Killed at any moment, the same call goes
on from the last checkpoint.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml

from frankenmoe.artifact.folder import (
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
    write_routers,
)
from frankenmoe.artifact.reports import TrainingReport, versions
from frankenmoe.build.body import copy_small_files
from frankenmoe.build.record import record_of
from frankenmoe.checkpoint.fingerprint import fingerprint
from frankenmoe.checkpoint.writer import write_atomic
from frankenmoe.data.given import user_path
from frankenmoe.errors import ArtifactError, FrankenMoEError, NumericsError, PlanError
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
from frankenmoe.train.parts import blocks
from frankenmoe.train.save import new_routers, write_parts

REPORT = "training.json"
Data = Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class Trained:
    """A finished run: the artifact, and what training found, as plain data (losses, looks of the guard, speed)."""

    artifact: Artifact
    report: Mapping[str, Any]


def train(
    what: Subject | Recipe | Artifact | str | Path,
    out: str | Path,
    *,
    data: Data | None = None,
    settings: TrainSettings | None = None,
    keep_anyway: bool = False,
    dtype: str | None = None,
    report_to: Sequence[str] = (),
    shard: bool = False,
    progress: Progress = SILENT,
    **changes: Any,
) -> Trained:
    """Trains an MoE on text and writes it to `out`, in the form it had (a recipe becomes a virtual artifact).

    `data` maps the name of a domain, best that of the expert it belongs to, to files or hub datasets; by default it is
    that of the recipe's experts. `settings` is by default the recipe's `train`, `changes` are settings by name. `dtype`
    is what frozen weights compute in, by default as they are stored. `shard` spreads weights over the processes of a
    launcher (FSDP2). The result is what the guard measured best on text held out; raises PlanError where that is where
    it began, unless `keep_anyway`.
    """
    out = Path(os.path.realpath(out))
    main = int(os.environ.get("RANK", "0")) == 0
    if main:
        refuse_occupied(out)
    subject = open_subject(what)
    settings = settings_with(settings or subject.recipe.train or TrainSettings(), changes)
    data = data or _recipes_data(subject.recipe.experts)
    body = _prints(subject.artifact.folder) if subject.artifact and subject.built else ()
    plan = None if subject.built else subject.plan
    if subject.artifact is None:
        check_buildable(subject.plan, virtual=True, allow_identical=True)
    parts = subject.parts
    traps.check(settings, plan=plan, top_k=parts.top_k, renormalize=parts.renormalizes, experts=parts.experts)
    routers = subject.routers(progress).routers
    moe = subject.load(dtype=dtype)
    if plan is None:
        traps.check_experts(block.experts for block in blocks(moe.model).values())
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
    with _folder(out, digest=digest, main=main) as partial:
        job = Run(moe, plan, parts.router_names, domains, settings, partial, tuple(report_to), shard)
        try:
            outcome: RunResult | FrankenMoEError = train_loop(job, progress=progress)
        except ArtifactError as error:  # a checkpoint could not be written: what there is stays for the next try
            outcome = error
        # what a run stopped at is no state to keep, whoever asks
        if isinstance(outcome, RunResult) and main and (outcome.improved or (keep_anyway and not outcome.stopped)):
            weights = outcome.weights if outcome.improved else outcome.last
            report = _report(subject, settings, data, outcome)
            _write(subject, routers, weights, report, partial, body=body, out=out, progress=progress)
    if isinstance(outcome, FrankenMoEError):
        raise outcome
    if outcome.stopped:
        raise _stopped(outcome, out)
    if not (outcome.improved or keep_anyway):
        raise _worse(outcome, out)
    if dist.is_initialized():
        dist.barrier()
    artifact = open_artifact(out)
    return Trained(artifact, TrainingReport.read(out / REPORT).to_dict())


def _recipes_data(experts: tuple[Expert, ...]) -> Data:
    return {expert.name: expert.data for expert in experts if expert.data}


def _digest(
    origin: str | list[str], routers: Routers, settings: TrainSettings, data: Data, *, folder: Path, dtype: str | None
) -> str:
    """Names the run: what it starts from, the settings, and the files of text as they are now."""
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


def _report(subject: Subject, settings: TrainSettings, data: Data, outcome: RunResult) -> TrainingReport:
    history = outcome.history
    first, best, last = history.looks[0], outcome.best, history.looks[-1]
    found = {
        "from": subject.origin,
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
    said = report.to_dict()
    stage = {
        "stage": "train",
        **{key: said[key] for key in ("from", "settings", "data", "best_step", "mean_held_out_loss")},
        "versions": versions(),
    }
    source = subject.artifact
    if source and subject.built:
        _link_body(source.folder, partial)
        record = dict(source.record)
        if _prints(partial) != body:  # those of before the first step
            raise ArtifactError(f"the body of {source.folder} changed while it was trained", hint="build it again")
    else:
        record = _virtual_record(subject, weights, partial, out=out, progress=progress)
    earlier = source.record["stages"] if source else [{"stage": "routers", "gate_mode": subject.recipe.gate_mode}]
    record["stages"] = [*earlier, stage]
    record.pop("version", None)
    remove_scaffold(partial)
    finish(partial, out, record=record | {"files": small_hashes(partial)})


def _virtual_record(
    subject: Subject, weights: Mapping[str, torch.Tensor], partial: Path, *, out: Path, progress: Progress
) -> dict[str, Any]:
    table = write_parts(subject.plan, weights, partial, out=out)
    text = yaml.safe_dump(table, sort_keys=False, allow_unicode=True)
    write_atomic(partial / "recipe.yml", text.encode())
    copy_small_files(subject.plan, partial)
    # planned where it lies now, beside where it will lie: relative paths mean the same from both
    trained = Recipe.load(partial / "recipe.yml")
    made = Subject(trained, dtype=subject.plan.dtype, trust_remote_code=subject.trust_remote_code).plan
    known = subject.artifact.record["sources"] if subject.artifact else []
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


def _stopped(outcome: RunResult, out: Path) -> NumericsError:
    assert outcome.stopped is not None
    kept = (
        f"{out} holds the best state before it, of step {outcome.history.best}"
        if outcome.improved
        else "nothing before it was better than the beginning, so nothing was written"
    )
    hint = outcome.stopped.hint if outcome.improved else f"{outcome.stopped.hint}; {_other_settings(out)}"
    return NumericsError(f"{outcome.stopped.message}, so training stopped there; {kept}", hint=hint)


def _worse(outcome: RunResult, out: Path) -> PlanError:
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
