"""Fits the routers of a recipe again, in memory, from other prompts."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import yaml

from frankenmoe.gates.forcing import set_gates
from frankenmoe.moe.load import MoE, gate_tensors
from frankenmoe.planning.layout import SHARED, gate_paths
from frankenmoe.progress import Progress
from frankenmoe.recipe import Recipe
from frankenmoe.recipe.gatemodes import FIT_MODES, PROMPT_MODES
from frankenmoe.serve.errors import RequestError
from frankenmoe.subject import Subject
from frankenmoe.suggest import did_you_mean

Sides = Mapping[str, Sequence[str]]
"""{"positive": prompts, "negative": prompts}"""


def written(recipe: Recipe) -> str:
    """A recipe as YAML."""
    return yaml.safe_dump(recipe.to_dict(), sort_keys=False, allow_unicode=True)


class Refitter:
    """A recipe whose routers come from the prompts of its experts, and these prompts, as they are now."""

    def __init__(self, subject: Subject, *, device: str) -> None:
        self._device = device
        self._use(subject)

    def _use(self, subject: Subject) -> None:
        self._subject = subject
        self.recipe = written(subject.recipe)  # as YAML, written once: a long one takes a second

    @classmethod
    def of(cls, subject: Subject, *, device: str) -> "Refitter | None":
        """None for an artifact, and for a recipe whose routers do not come from prompts alone."""
        recipe = subject.recipe
        fits = recipe.gate_mode in FIT_MODES | PROMPT_MODES and recipe.routers is None
        prompted = all(each.positive_prompts and not each.data and not each.experts for each in recipe.experts)
        return cls(subject, device=device) if subject.artifact is None and fits and prompted else None

    @property
    def prompts(self) -> dict[str, dict[str, list[str]]]:
        """Expert -> its positive and negative prompts."""
        return {
            each.name: {"positive": list(each.positive_prompts), "negative": list(each.negative_prompts)}
            for each in self._subject.recipe.experts
        }

    def refit(self, moe: MoE, prompts: Mapping[str, Sides], *, check: Callable[..., None]) -> None:
        """Fits routers to these prompts and sets the gates of `moe`. Experts that are not named keep their prompts.

        Raises RequestError for an unknown expert, RecipeError for prompts that no router can be fitted to; nothing is
        changed then. Nor is it if `check` raises, which is called again and again while the gates are made. Writes no
        file.
        """
        known = self.prompts
        for name in prompts:
            if name not in known:
                raise RequestError(f"there is no expert {name!r}; {did_you_mean(name, known)}", param="prompts")
        before = self._subject.recipe
        plain = before.to_dict()
        for each, expert in zip(plain["experts"], before.experts, strict=True):
            sides = prompts.get(expert.name, known[expert.name])
            each |= {"name": expert.name, "positive_prompts": list(sides["positive"])}
            each |= {"negative_prompts": list(sides["negative"])}
        recipe = Recipe.parse(yaml.safe_dump(plain), folder=before.folder, origin=before.origin)
        subject = replace(self._subject, what=recipe, cache=False, known=None)
        gates = gate_tensors(subject.routers(Progress(check, check, check), device=self._device).routers)
        check()
        plan = subject.plan
        paths = [*gate_paths(plan.nodes), *([SHARED] if plan.gated_shared else [])]
        set_gates(
            moe.model,
            {path: [gates[name] for name in plan.router_names(path).values()] for path in paths},
        )
        self._use(subject)
