"""The training loop: steps, measurements on held-out text, the best weights, and checkpoints to resume from.

Takes a running MoE and a folder for checkpoints. Does not read or write artifacts.
"""

import math
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from frankenmoe.counted import counted
from frankenmoe.errors import NumericsError
from frankenmoe.moe.dense import quiet_transformers
from frankenmoe.moe.device import CPU
from frankenmoe.moe.load import MoE
from frankenmoe.moe.trace import outer_blocks
from frankenmoe.planning import Plan
from frankenmoe.progress import Progress
from frankenmoe.recipe.train import TrainSettings
from frankenmoe.train.checkpoint import (
    History,
    last_checkpoint,
    load_best,
    restore,
    save_best,
    save_checkpoint,
    state_of,
    whole_weights,
)
from frankenmoe.train.data import Domain, Mixture
from frankenmoe.train.guard import Look, look
from frankenmoe.train.head import is_direct
from frankenmoe.train.objective import part_loss
from frankenmoe.train.optimizer import make_optimizer, set_rates
from frankenmoe.train.parts import Slots, gate_modules, make_learnable
from frankenmoe.train.processes import reducing, spread, start_accelerator
from frankenmoe.train.routing import prepare_routers
from frankenmoe.train.teachers import Teachers, cache_teachers, open_teachers
from frankenmoe.train.traps import check_gradient

LONGEST = 1.0  # largest norm of the whole gradient; above it, the gradient is scaled down
RECENT = 20  # steps whose mean loss is shown

Context = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Run:
    """The input of a run. `folder` is for checkpoints, `gate_names` are the plan's; `plan` is None if built."""

    moe: MoE
    plan: Plan | None
    gate_names: Callable[[tuple[int, ...]], Mapping[int, str]]
    domains: tuple[Domain, ...]
    settings: TrainSettings
    folder: Path
    report_to: tuple[str, ...] = ()
    shard: bool = False
    device: torch.device = CPU


@dataclass(frozen=True)
class RunResult:
    """The result of a run: the best weights by name, the history, and the error that stopped it early, if any.

    `weights` are those of the look with the lowest mean held-out loss, `last` those at the end; `improved` is whether
    training lowered that loss at all.
    """

    weights: Mapping[str, torch.Tensor]
    last: Mapping[str, torch.Tensor]
    history: History
    stopped: NumericsError | None = None

    @property
    def improved(self) -> bool:
        return self.history.best > 0

    @property
    def best(self) -> Look:
        return next(each for each in self.history.looks if each.step == self.history.best)

    @property
    def parameters(self) -> int:
        """The number of trained parameters."""
        return sum(tensor.numel() for tensor in self.weights.values())


def train_loop(run: Run, *, progress: Progress) -> RunResult:
    """Trains; resumes from the last checkpoint in the folder, if there is one, to the same losses.

    Raises PlanError for a trap, ArtifactError when a checkpoint cannot be written.
    """
    with quiet_transformers(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="accelerate|torch")
        return _Loop(run, progress).train()


class _Loop:
    """The model spread over its devices, the optimizer, and the history."""

    def __init__(self, run: Run, progress: Progress) -> None:
        settings, model = run.settings, run.moe.model
        self.run, self.settings, self.model, self.progress = run, settings, model, progress
        self.accelerator = start_accelerator(settings, run.device, folder=run.folder, report_to=run.report_to)
        self.slots = _prepare(run)
        self.head = model.get_output_embeddings() if is_direct(model, context=precision(model, model.device)) else None
        self.context = precision(model, self.accelerator.device)
        self.mixture = Mixture(
            run.domains,
            items=settings.steps * settings.batch,
            seed=settings.seed,
            teachers=self._teachers() if settings.distill else None,
        )
        self.loss = partial(
            part_loss,
            settings=settings,
            blocks=outer_blocks(model),
            context=self.context,
            head=self.head,
            processes=self.accelerator.num_processes,
        )
        self.sharded = run.shard and self.accelerator.num_processes > 1
        self.wrapped = spread(model, self.accelerator, shard=self.sharded)
        self.optimizer = make_optimizer(self.slots, settings)
        self.history = History()
        if kept := last_checkpoint(run.folder):
            restore(kept[1], self.slots, self.optimizer)
            self.history = History.read(kept[1])

    def train(self) -> RunResult:
        settings, history, progress = self.settings, self.history, self.progress
        if not history.looks:
            progress.start("first look", sum(len(domain.held) for domain in self.run.domains), "blocks")
            self.look()
            self.check_gradient()
        progress.start("training", settings.steps * settings.tokens, "tokens")
        progress.advance(history.step * settings.tokens)
        stopped = None
        try:
            while history.step < settings.steps:
                history.losses.append(self.step())
                history.step += 1
                progress.advance(settings.tokens)
                last = history.step == settings.steps
                if last or history.step % settings.guard_steps == 0:
                    self.look()
                if last or history.step % settings.save_steps == 0:
                    self.save()
        except NumericsError as error:
            stopped = error
        for tracker in self.accelerator.trackers:
            tracker.finish()
        self.accelerator.wait_for_everyone()
        return RunResult(load_best(self.run.folder), whole_weights(self.slots), history, stopped)

    def step(self) -> float:
        """One step of the optimizer; returns the loss of its batch over all processes.

        Everything random follows from the number of the step. Raises NumericsError if the loss is not finite; the
        weights are then as before.
        """
        settings, accelerator, index = self.settings, self.accelerator, self.history.step
        processes, process = accelerator.num_processes, accelerator.process_index
        torch.manual_seed(((settings.seed * 1_000_003 + index) * 4096 + process) % 2**63)  # dropout, noise and jitter
        set_rates(self.optimizer, index, settings=settings)
        batch = range(index * settings.batch, (index + 1) * settings.batch)
        size = settings.batch // settings.accumulate // processes
        targets = self.mixture.targets(batch)
        total = torch.zeros((), device=accelerator.device)
        self.model.train()
        for part in range(settings.accumulate):
            start = (part * processes + process) * size
            inputs = self.mixture.batch(batch[start : start + size], device=accelerator.device)
            with reducing(self.wrapped, accelerator, now=part + 1 == settings.accumulate):
                loss = self.loss(self.wrapped, inputs, targets=targets)
                accelerator.backward(loss)
            total += loss.detach()
        found = float(accelerator.reduce(total, reduction="mean"))
        if not math.isfinite(found):
            raise NumericsError(
                f"the loss is {found} at step {index + 1}",
                hint="lower --rate and --router-rate, or look for text that is nothing but one repeated token",
            )
        norm = accelerator.clip_grad_norm_(self.model.parameters(), LONGEST)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if accelerator.trackers:
            rates = {f"rate_{group['name']}": group["lr"] for group in self.optimizer.param_groups}
            accelerator.log({"loss": found, "gradient_norm": float(norm), **rates}, step=index + 1)
        return found

    def look(self) -> None:
        """Measures held-out loss and load; keeps the weights if they are the best so far."""
        history = self.history
        found = look(
            self.model,
            self.run.domains,
            step=history.step,
            device=self.accelerator.device,
            context=self.context,
            head=self.head,
            on_block=self.progress.advance if not history.looks else lambda count: None,
        )
        if self.sharded:  # a forward leaves the outermost group whole, and its weights would be taken for what learns
            self.model.reshard()
        history.looks.append(found)
        recent = history.losses[-RECENT:]
        mean = sum(recent) / len(recent) if recent else math.nan
        self.progress.note(f"loss {mean:.3f}, held out {found.mean:.3f}")
        self.accelerator.log({f"held_out/{name}": loss for name, loss in found.loss.items()}, step=history.step)
        if found is min(history.looks, key=lambda each: (each.mean, each.step)):
            history.best = history.step
            weights = whole_weights(self.slots)
            if self.accelerator.is_main_process:
                save_best(self.run.folder, weights)

    def save(self) -> None:
        """Writes a checkpoint."""
        state = state_of(self.slots, self.optimizer)
        if self.accelerator.is_main_process:
            save_checkpoint(self.run.folder, state, self.history)
        self.accelerator.wait_for_everyone()

    def check_gradient(self) -> None:
        """One backward pass on the first items, thrown away: gates without a gradient are a trap."""
        gates = [slot.parameter for name, slot in self.slots.items() if name.startswith("router/")]
        # fresh adapters are zero, so the first gradient may be
        if not gates or {"adapters", "experts"} & set(self.settings.what) or self.accelerator.num_processes > 1:
            return
        items = range(min(2, len(self.mixture)))
        inputs = self.mixture.batch(items, device=self.accelerator.device)
        self.model.train()
        loss = self.loss(self.model, inputs, targets=self.mixture.targets(items))
        grads = torch.autograd.grad(loss, gates, allow_unused=True)
        largest = max((float(grad.abs().max()) for grad in grads if grad is not None), default=0.0)
        check_gradient(largest, of=counted(len(gates), "gate"))

    def _teachers(self) -> Teachers:
        run, folder = self.run, self.run.folder / "teachers"
        assert run.plan is not None
        self.progress.start("parents' predictions", sum(len(domain.blocks) for domain in run.domains), "blocks")
        with self.accelerator.main_process_first():
            cache_teachers(
                folder,
                run.domains,
                run.plan,
                dtype=self.model.dtype,
                device=self.accelerator.device,
                context=self.context,
                on_block=self.progress.advance,
            )
        return open_teachers(folder, run.domains)


def _prepare(run: Run) -> Slots:
    """Routers that learn, and weights of its own for everything else that does."""
    settings, model = run.settings, run.moe.model
    prepare_routers(
        outer_blocks(model),
        top_k=settings.experts_per_token,
        noise=settings.noise,
        jitter=settings.jitter,
        straight_through=settings.straight_through,
        capacity_factor=settings.capacity_factor,
    )
    gates = gate_modules(model, run.gate_names)
    return make_learnable(model, settings.what, plan=run.plan, gate_names=gates, rank=settings.rank, seed=settings.seed)


def precision(model: Any, device: torch.device) -> Context:
    """What learns is float32; if the frozen weights have 16 bits, torch computes in bfloat16."""
    frozen = {parameter.dtype for parameter in model.parameters() if not parameter.requires_grad}
    low = frozen & {torch.bfloat16, torch.float16}
    return (lambda: torch.autocast(device.type, dtype=torch.bfloat16)) if low else nullcontext
