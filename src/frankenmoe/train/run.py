"""The story of one run: prepare, check for traps, look, step, look again, keep the best; writes only scaffolding.

Knows nothing of artifacts: it is given a running MoE and a folder to work in, and gives back what was learnt.
"""

import os
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from safetensors.torch import load_file
from torch import nn
from transformers import TrainingArguments
from transformers.trainer_callback import DefaultFlowCallback, PrinterCallback, ProgressCallback

from frankenmoe.errors import NumericsError
from frankenmoe.moe.dense import quiet_transformers
from frankenmoe.moe.load import MoE
from frankenmoe.planning import Plan
from frankenmoe.progress import Progress
from frankenmoe.recipetrain import Train
from frankenmoe.train.checkpoint import (
    BEST,
    HISTORY,
    History,
    last_checkpoint,
    load_weights,
    put_back,
    save_best,
    whole,
)
from frankenmoe.train.data import Domain, Mixture
from frankenmoe.train.guard import Look, look
from frankenmoe.train.head import is_direct
from frankenmoe.train.parts import Slots, blocks, gate_modules, make_learnable
from frankenmoe.train.routing import prepare_routers
from frankenmoe.train.sharding import shard
from frankenmoe.train.teachers import cache_teachers, open_teachers
from frankenmoe.train.trainer import MoETrainer
from frankenmoe.train.traps import check_gradient


@dataclass(frozen=True)
class Job:
    """What a run is given. `folder` is for checkpoints, `gate_names` are the plan's; `plan` is None if built."""

    moe: MoE
    plan: Plan | None
    gate_names: Callable[[tuple[int, ...]], tuple[str, ...]]
    domains: tuple[Domain, ...]
    settings: Train
    folder: Path
    report_to: tuple[str, ...] = ()
    shard: bool = False


@dataclass(frozen=True)
class Outcome:
    """What a run found: the best weights by name, what happened, and what stopped it early, if anything did.

    `weights` are those of the look with the lowest mean held-out loss, `last` those at the end; `improved` is whether
    training lowered that loss at all.
    """

    weights: Mapping[str, torch.Tensor]
    last: Mapping[str, torch.Tensor]
    history: History
    parameters: int
    stopped: NumericsError | None = None

    @property
    def improved(self) -> bool:
        return self.history.best > 0

    @property
    def best(self) -> Look:
        return next(each for each in self.history.looks if each.step == self.history.best)


def run(job: Job, *, progress: Progress) -> Outcome:
    """Trains; goes on from the last checkpoint in the folder where there is one, to the same losses.

    Raises PlanError for a trap, ArtifactError when a checkpoint cannot be written.
    """
    with quiet_transformers(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="accelerate|torch")
        return _run(job, progress=progress)


def _run(job: Job, *, progress: Progress) -> Outcome:
    settings, model = job.settings, job.moe.model
    arguments = _arguments(job)
    slots = _prepare(job)
    kept = last_checkpoint(job.folder)
    history = History.read(kept[1] / HISTORY) if kept else History()
    if kept:
        put_back(slots, load_weights(kept[1]))
    context = precision(model, arguments.device)
    mixture = Mixture(
        job.domains,
        items=settings.steps * settings.batch,
        seed=settings.seed,
        teachers=_teachers(job, arguments, context, progress) if settings.distill else None,
    )
    sharded = job.shard and arguments.world_size > 1
    head = model.get_output_embeddings() if is_direct(model, context=precision(model, model.device)) else None
    held = sum(len(domain.held) for domain in job.domains)

    def on_look(trainer: Any, step: int) -> None:
        found = look(trainer.model, job.domains, step=step, device=arguments.device, context=context, head=head)
        if sharded:  # a forward leaves the outermost group whole, and its weights would be taken for what learns
            model.reshard()
        history.looks.append(found)
        best = min(history.looks, key=lambda each: (each.mean, each.step))
        progress.note(f"loss {_recent(history):.3f}, held out {found.mean:.3f}")
        if best is not found:
            return
        history.best = step
        weights = {name: whole(slot.parameter) for name, slot in slots.items()}
        if trainer.args.should_save:
            save_best(job.folder, weights)

    if sharded:
        shard(model, arguments.device)
    trainer = MoETrainer(
        slots=slots,
        settings=settings,
        mixture=mixture,
        history=history,
        on_look=on_look,
        progress=progress,
        context=context,
        head=head,
        sharded=sharded,
        model=model,
        args=arguments,
        data_collator=_stack,
    )
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    assert any(isinstance(each, DefaultFlowCallback) for each in trainer.callback_handler.callbacks)
    if not kept:
        progress.start("first look", held, "blocks")
        on_look(trainer, 0)
        if not {"adapters", "experts"} & set(settings.what):  # fresh adapters are zero, so the first gradient may be
            _check_gradient(trainer, slots)
    progress.start("training", settings.steps * settings.tokens, "tokens")
    progress.advance(history.step * settings.tokens)
    stopped = None
    try:
        trainer.train(resume_from_checkpoint=str(kept[1]) if kept else None)
    except NumericsError as error:
        stopped = error
    if dist.is_initialized():
        dist.barrier()
    weights = load_file(job.folder / BEST)
    count = sum(tensor.numel() for tensor in weights.values())
    last = {name: whole(slot.parameter) for name, slot in slots.items()}
    return Outcome(weights, last, history, count, stopped)


def _prepare(job: Job) -> Slots:
    settings, model = job.settings, job.moe.model
    prepare_routers(
        blocks(model),
        top_k=settings.experts_per_token,
        noise=settings.noise,
        jitter=settings.jitter,
        straight_through=settings.straight_through,
        capacity_factor=settings.capacity_factor,
    )
    gates: Mapping[nn.Module, str] = gate_modules(model, job.gate_names)
    return make_learnable(model, settings.what, plan=job.plan, gate_names=gates, rank=settings.rank, seed=settings.seed)


def _arguments(job: Job) -> TrainingArguments:
    settings = job.settings
    world = int(os.environ.get("WORLD_SIZE", "1"))
    return TrainingArguments(
        output_dir=str(job.folder),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch // settings.accumulate // world,
        gradient_accumulation_steps=settings.accumulate,
        max_grad_norm=1.0,
        save_strategy="no",
        logging_strategy="no" if not job.report_to else "steps",
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to=list(job.report_to) or "none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_num_workers=0,
        dataloader_pin_memory=torch.cuda.is_available(),
        ddp_find_unused_parameters=any(part in settings.what for part in ("adapters", "experts")),
        # without these accelerate would let every process of a CPU run train alone
        use_cpu=not torch.accelerator.is_available(),
        ddp_backend="gloo" if world > 1 and not torch.accelerator.is_available() else None,
        seed=settings.seed % 2**32,
        average_tokens_across_devices=True,
    )


def precision(model: Any, device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    """What learns is float32; where the frozen rest is not, torch casts to bfloat16 as it goes."""
    frozen = {parameter.dtype for parameter in model.parameters() if not parameter.requires_grad}
    low = frozen & {torch.bfloat16, torch.float16}
    return (lambda: torch.autocast(device.type, dtype=torch.bfloat16)) if low else nullcontext


def _teachers(job: Job, arguments: TrainingArguments, context: Any, progress: Progress) -> Any:
    folder = job.folder / "teachers"
    assert job.plan is not None
    progress.start("parents' predictions", sum(len(domain.blocks) for domain in job.domains), "blocks")
    with PartialState().main_process_first():
        cache_teachers(
            folder,
            job.domains,
            job.plan,
            dtype=job.moe.model.dtype,
            device=arguments.device,
            context=context,
            on_block=progress.advance,
        )
    return open_teachers(folder, job.domains)


def _check_gradient(trainer: MoETrainer, slots: Slots) -> None:
    """One backward pass on the first items, thrown away: gates without a gradient are a trap."""
    gates = [slot.parameter for name, slot in slots.items() if name.startswith("router/")]
    if not gates or trainer.args.world_size > 1:
        return
    inputs = trainer._prepare_inputs(_stack([trainer.mixture[item] for item in range(min(2, len(trainer.mixture)))]))
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, inputs, num_items_in_batch=(inputs["labels"][:, 1:] >= 0).sum())
    grads = torch.autograd.grad(loss, gates, allow_unused=True)
    check_gradient(
        max((float(grad.abs().max()) for grad in grads if grad is not None), default=0.0),
        of=f"{len(gates)} gates",
    )


def _stack(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def _recent(history: History, *, over: int = 20) -> float:
    recent = history.losses[-over:]
    return sum(recent) / len(recent) if recent else float("nan")
