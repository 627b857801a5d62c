"""transformers' Trainer with our losses, our checkpoints and our guard; does not know what will be kept of it.

Everything random follows from the step, so a checkpoint holds what learnt, its optimizer's state, and history.
Shape suffixes: T tokens, V vocabulary.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import Trainer, TrainerCallback

from frankenmoe.errors import NumericsError
from frankenmoe.progress import Progress
from frankenmoe.recipetrain import Train
from frankenmoe.train import losses
from frankenmoe.train.checkpoint import History, Moments, load_moments, save_checkpoint, whole
from frankenmoe.train.data import Mixture
from frankenmoe.train.head import summed
from frankenmoe.train.parts import Slots, blocks
from frankenmoe.train.routing import Seen, seen_routings

LOWEST = 0.1  # of the peak learning rate, at the end
BETAS = (0.9, 0.99)


def rate_factor(step: int, *, settings: Train) -> float:
    """The learning rate of a step as a share of its peak: a linear rise, then a cosine down to a tenth."""
    if step < settings.warmup:
        return (step + 1) / (settings.warmup + 1)
    done = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    return LOWEST + (1 - LOWEST) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


class MoETrainer(Trainer):  # type: ignore[misc]
    """One run of training. `slots` are what learns, `on_look` is called where the guard is due.

    `head` is that of `train.head.summed`.
    """

    def __init__(
        self,
        *,
        slots: Slots,
        settings: Train,
        mixture: Mixture,
        history: History,
        on_look: Callable[["MoETrainer", int], None],
        progress: Progress,
        context: Callable[[], AbstractContextManager[Any]],
        head: nn.Module | None,
        sharded: bool = False,
        **options: Any,
    ) -> None:
        self.slots, self.settings, self.mixture, self.history = slots, settings, mixture, history
        self.on_look, self.progress, self.context, self.head = on_look, progress, context, head
        self.step_loss: torch.Tensor | float = 0.0
        super().__init__(train_dataset=mixture, **options)
        self.blocks = blocks(self.model)
        # a sharded model must neither be wrapped in DDP nor sharded again
        self.is_distributed_loading_by_transformers = sharded
        self.model_accepts_loss_kwargs = True  # makes the Trainer count targets over all processes
        self.loss_is_scaled_for_ga = True
        self.add_callback(_Watch(self))

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW; routers have a rate of their own, and only matrices that are not gates decay."""
        groups: dict[tuple[bool, bool], list[str]] = {}
        for name, slot in self.slots.items():
            router = name.startswith("router/")
            groups.setdefault((router, not router and slot.parameter.dim() > 1), []).append(name)
        self.ordered = [name for names in groups.values() for name in names]
        self.optimizer = torch.optim.AdamW(
            [
                {
                    "params": [self.slots[name].parameter for name in names],
                    "lr": self.settings.router_rate if router else self.settings.rate,
                    "weight_decay": self.settings.weight_decay if decays else 0.0,
                }
                for (router, decays), names in groups.items()
            ],
            betas=BETAS,
        )
        return self.optimizer

    @contextmanager
    def _defer_fsdp_gradient_reduction(self) -> Iterator[None]:
        """Between the parts of one batch; transformers' own asks a config that only its own way of loading makes."""
        self.model.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            self.model.set_requires_gradient_sync(True)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer or self.optimizer, lambda step: rate_factor(step, settings=self.settings)
        )
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return torch.utils.data.SequentialSampler(self.mixture)  # the order is the mixture's own

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        seed = (self.settings.seed * 1_000_003 + self.state.global_step) * 4096 + self.args.process_index
        torch.manual_seed(seed % 2**63)  # of dropout, noise and jitter
        loss: torch.Tensor = super().training_step(model, inputs, num_items_in_batch)
        self.step_loss = self.step_loss + loss
        return loss

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """This process's share of the step's loss, scaled so that the mean over processes is the loss of the batch."""
        world, parts = self.args.world_size, self.settings.accumulate
        with seen_routings(self.blocks) as seen, self.context():
            tokens = self._token_loss(model, inputs) * world / num_items_in_batch
        loss = tokens + self._router_loss(seen, inputs) / parts
        if not self._finite(loss):
            raise NumericsError(
                f"the loss is {float(loss.detach())} at step {self.state.global_step + 1}",
                hint="lower --rate and --router-rate, or look for text that is nothing but one repeated token",
            )
        return (loss, None) if return_outputs else loss

    def _finite(self, loss: torch.Tensor) -> bool:
        """Whether the loss is a number in every process, so that all of them stop together."""
        finite = torch.isfinite(loss.detach()).float()
        if self.args.world_size > 1:
            dist.all_reduce(finite, op=dist.ReduceOp.MIN)
        return bool(finite)

    def _token_loss(self, model: nn.Module, inputs: Any) -> torch.Tensor:
        """The sum over targets of the language-model terms."""
        settings, labels_T = self.settings, inputs["labels"][:, 1:].flatten()
        teacher = [inputs[key][:, :-1].flatten(0, 1) for key in ("teacher", "teacher_ids") if key in inputs]

        def terms(logits_TV: torch.Tensor, rows: slice) -> torch.Tensor:
            total = logits_TV.new_zeros((), dtype=torch.float32)
            if settings.next_token:
                total = total + settings.next_token * losses.next_token(logits_TV, labels_T[rows]).sum()
            if settings.distill and teacher:
                kl_T = losses.distill(logits_TV, *(each[rows] for each in teacher))
                total = total + settings.distill * (kl_T * (labels_T[rows] >= 0)).sum()
            return total

        return summed(model, inputs["input_ids"], terms, head=self.head)

    def _router_loss(self, seen: list[Seen], inputs: Any) -> torch.Tensor | float:
        """The mean over routers of the terms that look at gate logits."""
        settings = self.settings
        if not (settings.balance or settings.z or settings.domain):
            return 0.0
        owner_T = inputs["owner"][:, None].expand_as(inputs["input_ids"]).flatten()
        outer = [each.routing for each in seen if each.outer]
        shares = self._shares(outer) if settings.balance else [None] * len(outer)
        terms: list[Any] = []
        for routing, share_E in zip(outer, shares, strict=True):
            if share_E is not None:
                terms.append(settings.balance * losses.switch_balance(routing.logits_TE, share_E))
            if settings.domain:
                terms.append(settings.domain * losses.domain(routing.logits_TE, owner_T))
            if settings.z:
                terms.append(settings.z * losses.router_z(routing.logits_TE))
        mean: torch.Tensor = torch.stack(terms).sum() / len(outer)
        return mean

    def _shares(self, routings: list[Any]) -> list[torch.Tensor]:
        """Each layer's share of choices per expert, over all processes: the loss of a batch, not of its parts."""
        counts_LE = torch.stack(
            [losses.choice_counts(each.ids_TK, experts=each.logits_TE.shape[1]) for each in routings]
        )
        if self.args.world_size > 1:
            dist.all_reduce(counts_LE)
        return list(counts_LE / counts_LE.sum(dim=1, keepdim=True).clamp(min=1))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """What learnt was put back before the model was handed over."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """There is none: every step seeds itself."""

    def _load_scaler(self, checkpoint: str | None) -> None:
        """bfloat16 and float32 need no scaler."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        assert self.optimizer is not None
        moments, step = load_moments(checkpoint), self.history.step
        for (group, index), name in zip(_places(self.optimizer), self.ordered, strict=True):
            parameter = group["params"][index]
            if name in moments:
                self.optimizer.state[parameter] = moments[name].like(parameter)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * rate_factor(step, settings=self.settings)
        self.lr_scheduler.last_epoch = step
        self.lr_scheduler._last_lr = [group["lr"] for group in self.optimizer.param_groups]

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        assert self.optimizer is not None
        state = {
            name: Moments.of(found)
            for (group, index), name in zip(_places(self.optimizer), self.ordered, strict=True)
            if (found := self.optimizer.state.get(group["params"][index]))
        }
        tensors = {name: whole(slot.parameter) for name, slot in self.slots.items()}
        if self.args.should_save:
            save_checkpoint(self.args.output_dir, tensors, state, trainer=self.state, history=self.history)
        if self.args.world_size > 1:
            dist.barrier()


def _places(optimizer: torch.optim.Optimizer) -> Iterable[tuple[dict[str, Any], int]]:
    """Every parameter's group and index in it, in the order in which the optimizer was made."""
    return [(group, index) for group in optimizer.param_groups for index in range(len(group["params"]))]


class _Watch(TrainerCallback):  # type: ignore[misc]
    """Writes the loss down after every step, moves the bar, and calls the guard where it is due."""

    def __init__(self, trainer: MoETrainer) -> None:
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        trainer, settings = self.trainer, self.trainer.settings
        loss = torch.as_tensor(trainer.step_loss).detach().clone()
        if args.world_size > 1:
            dist.all_reduce(loss)
            loss /= args.world_size
        trainer.step_loss = 0.0
        trainer.history.losses.append(float(loss))
        trainer.history.step = state.global_step
        trainer.progress.advance(settings.tokens)
        last = state.global_step == settings.steps
        if last or state.global_step % settings.guard_steps == 0:
            trainer.on_look(trainer, state.global_step)
        control.should_save = last or state.global_step % settings.save_steps == 0
        control.should_log = bool(args.report_to)
        return control
