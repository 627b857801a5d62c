"""A request as every kind of model takes it: checked prompts, and how to write what follows them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from frankenmoe.moe.steering import NEVER, UNCHANGED, Steering
from frankenmoe.recipe.fields import COLDEST
from frankenmoe.serve.bodies import Asked
from frankenmoe.serve.errors import RequestError
from frankenmoe.suggest import did_you_mean

ROUTING = ("experts_per_token", "disable_experts", "expert_bias", "trace")  # fields that need experts
PENALTIES = ("presence_penalty", "frequency_penalty")


@dataclass(frozen=True)
class Task:
    """`prompts` are token ids, or for llama.cpp texts or lists of turns; each gets `n` answers of `most` tokens.

    `temperature` 0 is greedy. `top` is None to report no probabilities.
    """

    prompts: tuple[Any, ...]
    most: int
    n: int = 1
    temperature: float = 0.0
    top_p: float | None = None
    seed: int | None = None
    stops: tuple[str, ...] = ()
    top: int | None = None
    echo: bool = False
    trace: bool = False
    penalties: dict[str, float] = field(default_factory=dict)
    steering: Steering = UNCHANGED

    @property
    def scored(self) -> bool:
        """Whether the probabilities of the prompt's tokens are told, too."""
        return self.echo and self.top is not None


def task(body: Asked, prompts: Sequence[Any], *, most: int, steering: Steering = UNCHANGED) -> Task:
    """What a body asks for. `most` is the server's limit, which is also the default."""
    return Task(
        prompts=tuple(prompts),
        most=min(most, most if body.most is None else body.most),
        n=body.n,
        temperature=body.temperature if body.temperature >= COLDEST else 0.0,  # a smaller one overflows
        top_p=body.top_p,
        seed=body.seed,
        stops=body.stops,
        top=body.top,
        echo=bool(getattr(body, "echo", False)),
        trace=body.trace,
        penalties={name: getattr(body, name) for name in PENALTIES if getattr(body, name)},
        steering=steering,
    )


def refuse(body: Asked, fields: Sequence[str], *, why: str) -> None:
    """Raises RequestError if one of these fields asks for something."""
    for name in fields:
        if getattr(body, name):
            raise RequestError(
                f"{name} is not supported by this model: {why}", param=name, code="unsupported_parameter"
            )


def steering(body: Asked, experts: Sequence[str], *, top_k: int) -> Steering:
    """How a body changes the choice among these experts, of which a token usually gets `top_k`.

    Raises RequestError for an unknown expert, and if more experts are asked for than are left.
    """
    for name, found in (("disable_experts", body.disable_experts), ("expert_bias", body.expert_bias)):
        for expert in found:
            if expert not in experts:
                raise RequestError(f"there is no expert {expert!r}; {did_you_mean(expert, experts)}", param=name)
    left = [expert for expert in experts if expert not in body.disable_experts]
    wanted = body.experts_per_token
    if not left:
        raise RequestError("all experts are disabled, expected at least one that is not", param="disable_experts")
    if wanted is not None and wanted > len(left):
        raise RequestError(
            f"experts_per_token must be from 1 to {len(left)}, the number of experts that are not disabled, "
            f"found {wanted}",
            param="experts_per_token",
        )
    bias = tuple(NEVER if name not in left else body.expert_bias.get(name, 0.0) for name in experts)
    chosen = min(top_k, len(left)) if wanted is None else wanted
    return Steering(top_k=None if chosen == top_k else chosen, bias_E=bias if any(bias) else None)
