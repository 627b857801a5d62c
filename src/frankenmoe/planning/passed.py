"""What is around a base's language model and passes through into the built MoE. Does not import torch."""

from frankenmoe.checkpoint.tensors import TensorWrite
from frankenmoe.errors import PlanError, SourceError
from frankenmoe.families import MoEFormat
from frankenmoe.families.towers import Tower
from frankenmoe.families.wrapped import PEFT, WRAPPERS, check_passed
from frankenmoe.planning.configs import WRONG_FILE
from frankenmoe.planning.sources import Source, check_held
from frankenmoe.planning.tree import stored_as


def passed_writes(fmt: MoEFormat, base: Source, *, dtype: str) -> tuple[TensorWrite, ...]:
    """The base's tensors around its language model, stored as `dtype`; none for a format of text alone.

    Raises SourceError for impossible sizes and token ids, and for tensors that are missing or have other shapes;
    PlanError for an adapter that changes them.
    """
    outer = base.checkpoint.outer
    wrapper = WRAPPERS[fmt.inside.wrapper] if fmt.inside else None
    if wrapper is None or wrapper.tower is None or outer is None:
        return ()
    _refuse_adapted(wrapper.tower, base)
    try:
        check_passed(wrapper, outer)
        shapes = wrapper.tower.shapes(outer)
    except (TypeError, ValueError) as error:
        raise SourceError(f"{base.folder / 'config.json'} has {error}", hint=WRONG_FILE) from None
    if base.checkpoint.has_weights:
        check_held(base.name, base.tensors, shapes, floats=shapes)
    refs = {name: base.tensor(name, shape) for name, shape in shapes.items()}
    return tuple(TensorWrite(name, stored_as(ref, dtype), shapes[name], (ref,)) for name, ref in refs.items())


def _refuse_adapted(tower: Tower, base: Source) -> None:
    """Raises PlanError if the base's adapter changes what passes through, as that would be lost."""
    names = base.adapter.tensors if base.adapter else ()
    lost = next((name for name in names if name.removeprefix(PEFT).startswith(tower.prefix)), None)
    if lost is not None:
        raise PlanError(
            f"the adapter on base_model changes {lost.removeprefix(PEFT)}, and what reads pictures passes through "
            "unchanged",
            hint="merge the adapter into its model first: merge_and_unload() of PEFT, then save_pretrained",
        )
