"""How far PEFT's models of the same LoRAs are from the MoE: the base, each LoRA alone, and Arrow."""

import gc
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from frankenmoe.errors import PlanError
from frankenmoe.export.check import Expected, Reference
from frankenmoe.export.peft import PeftFolder
from frankenmoe.planning import Plan

ARROW = "Arrow"


@dataclass(frozen=True)
class Compared:
    """A model beside the MoE: mean KL divergence from the MoE in nats, share of equal best tokens, loss in nats."""

    name: str
    kl: float
    top1: float
    loss: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def require() -> None:
    """Raises PlanError if PEFT is not installed or has no Arrow."""
    try:
        import peft.tuners.lora.arrow  # noqa: F401
    except ImportError as error:
        raise PlanError(
            "comparing with PEFT's Arrow needs peft 0.18 or later, which is not installed",
            hint="pip install 'peft>=0.18', or add --no-check",
        ) from error


def compare(
    made: PeftFolder, plan: Plan, source: Reference, *, on_step: Callable[[int], None] = lambda amount: None
) -> list[Compared]:
    """The MoE itself (with a divergence of 0), then the base, each LoRA alone, and Arrow with as many LoRAs per token.

    `source` is what the MoE computes.
    """
    from peft import PeftModel
    from peft.tuners.lora import ArrowConfig, create_arrow_model

    loss = math.log(source.perplexity)
    found = [Compared("this MoE", 0.0, 1.0, loss)]
    paths = list(map(str, made.experts.values()))
    config = ArrowConfig(top_k=made.arrow_top_k, rng_seed=0)
    contestants: dict[str, Callable[[Any], Any]] = {"base": lambda base: base}
    for name, path in made.experts.items():
        contestants[name] = partial(PeftModel.from_pretrained, model_id=str(path))
    contestants[ARROW] = lambda base: create_arrow_model(base, paths, config)
    for name, wrapped in contestants.items():
        model = wrapped(_base(made, plan)).eval()
        found.append(_compared(name, model, source.passages))
        on_step(1)
        del model
        gc.collect()
    return found


def _base(made: PeftFolder, plan: Plan) -> Any:
    """The base in float32, with the adapter of the backbone merged in."""
    base = AutoModelForCausalLM.from_pretrained(
        plan.base.folder, dtype=torch.float32, trust_remote_code=plan.trust_remote_code
    )
    if made.backbone is None:
        return base
    from peft import PeftModel

    return PeftModel.from_pretrained(base, str(made.backbone)).merge_and_unload()


def _compared(name: str, model: Any, passages: Sequence[Expected]) -> Compared:
    rows = list(_rows(model, passages))
    kl, same, losses = (float(np.mean(column)) for column in zip(*rows, strict=True))
    return Compared(name, kl, same, losses)


def _rows(model: Any, passages: Sequence[Expected]) -> Iterator[tuple[float, float, float]]:
    """(divergence, whether the best token is the same, loss) at every compared position."""
    for passage in passages:
        with torch.no_grad():
            logits_TV = model(input_ids=torch.tensor([list(passage.ids)])).logits[0].float()
        found_PV = logits_TV[list(passage.positions)].log_softmax(-1).numpy().astype(np.float64)
        for place, theirs_V, found_V in zip(passage.positions, passage.logprobs, found_PV, strict=True):
            wanted_V = theirs_V.astype(np.float64)
            kl = float(np.sum(np.exp(wanted_V) * (wanted_V - found_V)))
            yield kl, float(wanted_V.argmax() == found_V.argmax()), -float(found_V[passage.ids[place + 1]])
