"""Checks what a plan can become and what can be done with it. Does not import torch."""

from frankenmoe.errors import PlanError
from frankenmoe.planning.plan import Plan


def check_buildable(made: Plan, *, virtual: bool, allow_identical: bool) -> None:
    """Raises PlanError if the plan cannot be built (or be virtual), or if routers would make no difference."""
    lacking = [str(source.name) for source in made.sources if not source.checkpoint.has_weights]
    if lacking:
        raise PlanError(
            f"{', '.join(lacking)} has a config but no weights: enough for a plan, not for a model",
            hint="put the safetensors files next to config.json, or use the source's hub id",
        )
    if made.problems and not virtual:
        target = made.fmt.title if made.fmt else "a checkpoint"
        raise PlanError(
            f"this recipe cannot be built as {target}: {'; '.join(made.problems)}",
            hint="use --virtual: frankenmoe runs the virtual form",
        )
    if made.all_identical and not allow_identical:
        raise PlanError(
            f"all {made.experts} experts hold the same weights"
            f"{' in every block compared' if made.identical_sampled else ''}, so routers make no difference",
            hint="set noise_relative (such as 0.01) or add adapters; --allow-identical builds it anyway, for training",
        )


def check_parents(made: Plan, *, doing: str, hint: str) -> None:
    """Raises PlanError if an expert is that of a finished mixture, whose parents are not known."""
    leaves = (leaf for node in made.nodes for leaf in node.leaves())
    lone = next((leaf for leaf in leaves if leaf.source is not None and leaf.source.part is not None), None)
    if lone is not None:
        raise PlanError(
            f"{doing} needs the parents of the experts, and those of {lone.name} are not known: it was taken from a "
            "finished mixture",
            hint=hint,
        )
