"""AdamW over what learns, and its learning rates by step."""

import math

import torch

from frankenmoe.recipe.train import TrainSettings
from frankenmoe.train.parts import Slots

LOWEST = 0.1  # learning rate at the end, as a share of its peak
BETAS = (0.9, 0.99)


def rate_factor(step: int, *, settings: TrainSettings) -> float:
    """The learning rate of a step as a share of its peak: a linear rise, then a cosine down to a tenth."""
    if step < settings.warmup:
        return (step + 1) / (settings.warmup + 1)
    done = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    return LOWEST + (1 - LOWEST) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def make_optimizer(slots: Slots, settings: TrainSettings) -> torch.optim.AdamW:
    """Routers have a learning rate of their own; only matrices that are not gates decay."""
    groups: dict[tuple[bool, bool], list[torch.nn.Parameter]] = {}
    for name, slot in slots.items():
        router = name.startswith("router/")
        groups.setdefault((router, not router and slot.parameter.dim() > 1), []).append(slot.parameter)
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "name": "router" if router else "decaying" if decays else "other",
                "peak": settings.router_rate if router else settings.rate,
                "weight_decay": settings.weight_decay if decays else 0.0,
            }
            for (router, decays), parameters in groups.items()
        ],
        betas=BETAS,
    )


def set_rates(optimizer: torch.optim.Optimizer, step: int, *, settings: TrainSettings) -> None:
    """Sets the learning rates of a step, counted from 0."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * rate_factor(step, settings=settings)
