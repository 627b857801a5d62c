"""Merges in a recipe: `backbone`, which makes one backbone of all parents, and `merge`, which makes a parent."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, Any, Self

from pydantic import (
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PlainSerializer,
    Tag,
    WithJsonSchema,
    model_validator,
)

from frankenmoe.counted import counted
from frankenmoe.recipe.context import SourceField
from frankenmoe.recipe.fields import LARGEST, Finite, Share, one_of
from frankenmoe.recipe.gatemodes import FIT_MODES
from frankenmoe.recipe.refusals import TAG, found, refusal
from frankenmoe.recipe.settings import Closed
from frankenmoe.recipe.yaml import Location
from frankenmoe.suggest import did_you_mean

ATTENTION, NORMS, EMBEDDINGS, HEAD = GROUPS = ("attention", "norms", "embeddings", "head")
BASE, AVERAGE, SLERP, REGMEAN, AUTO = "base", "average", "slerp", "regmean", "auto"
_DIFFERENCES = ("lambda", "density", "weights")
# the settings that each method has
METHODS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        BASE: (),
        AVERAGE: ("weights",),
        "task_arithmetic": ("lambda", "weights"),
        "ties": _DIFFERENCES,
        "dare_ties": _DIFFERENCES,
        "dare_linear": _DIFFERENCES,
        SLERP: ("t",),
        REGMEAN: ("alpha",),
        AUTO: (),
    }
)
SETTINGS = ("lambda", "density", "t", "weights", "alpha")
# methods that need neither text nor a running model, for experts
CLOSED_METHODS = tuple(name for name in METHODS if name not in (BASE, REGMEAN, AUTO))
# methods that take nothing from the base
WITHOUT_BASE = (AVERAGE, SLERP, REGMEAN)
SMALLEST_SUM = 1e-6

Lambda = Annotated[Share, Field(le=10)]
Density = Annotated[Share, Field(gt=0, le=1)]
Between = Annotated[Share, Field(le=1)]
Weight = Annotated[Finite, Field(ge=-LARGEST, le=LARGEST)]
Method = Annotated[str, BeforeValidator(one_of(*METHODS)), WithJsonSchema({"enum": [*METHODS], "type": "string"})]
ClosedMethod = Annotated[
    str, BeforeValidator(one_of(*CLOSED_METHODS)), WithJsonSchema({"enum": [*CLOSED_METHODS], "type": "string"})
]


class AnyMerge(Closed):
    """The settings that all merges share, with the meanings and defaults of mergekit."""

    model_config = ConfigDict(extra="forbid", frozen=True, serialize_by_alias=True)

    method: Method = Field(description="How the parents' tensors become one.")
    scale: Lambda = Field(1.0, alias="lambda", description="Factor on the merged difference from the base, 0 to 10.")
    density: Density = Field(
        1.0, description="Share of every difference that is kept: the largest (ties) or random ones (dare)."
    )
    t: Between = Field(0.5, description="slerp: 0 is the first parent, 1 the second.")

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as written."""
        written: dict[str, Any] = self.model_dump(mode="json", exclude_unset=True, exclude_none=True)
        return written

    @property
    def words(self) -> str:
        """Method and settings, such as `task_arithmetic, lambda 0.7`."""
        written = {key: value for key, value in self.to_dict().items() if key in SETTINGS and value not in ({}, [])}
        return ", ".join((self.method, *(f"{key} {_spelled(value)}" for key, value in written.items())))

    def refuse_unused(self, method: str) -> None:
        """Rejects settings that the method does not have."""
        written = self.to_dict()
        for key in SETTINGS:
            if key in written and key not in METHODS[method]:
                having = ", ".join(name for name, settings in METHODS.items() if key in settings)
                raise refusal(
                    f"must be absent, as {method} has {' and '.join(METHODS[method]) or 'no settings'}, "
                    f"found {found(written[key])}",
                    hint=f"delete it, or choose a method that has it: {having}",
                    at=(key,),
                )


class MergeSettings(AnyMerge):
    """How the parents' tensors become one. `weights` are by expert, 1 by default."""

    weights: dict[str, Weight] = Field(
        default_factory=dict, description="Weight of each expert's parent, by the expert's name; 1 by default."
    )
    alpha: Between = Field(0.95, description="regmean: factor on the off-diagonal of every parent's Gram matrix.")

    @model_validator(mode="after")
    def _sensible(self) -> Self:
        self.refuse_unused(self.method)
        return self

    def to_data(self) -> str | dict[str, Any]:
        """Plain data: the method's name if nothing else was written."""
        written = self.to_dict()
        return self.method if set(written) == {"method"} else written

    def __str__(self) -> str:
        return self.words


class Groups(Closed):
    """A merge for each group of backbone tensors. Groups that are not named are the base's."""

    attention: "Named | None" = Field(None, description="Projections of the attention, and all that is in no group.")
    norms: "Named | None" = Field(None, description="All norms, those of queries and keys included.")
    embeddings: "Named | None" = Field(None, description="Token embeddings, and with them a tied head.")
    head: "Named | None" = Field(None, description="The output head, if it is not tied to the embeddings.")

    @model_validator(mode="after")
    def _sensible(self) -> Self:
        for group in GROUPS:
            method = self.settings(group).method
            if method == AUTO or (method == REGMEAN and group != ATTENTION):
                raise refusal(
                    f"must be a method without measurements, found {method}"
                    if method == AUTO
                    else "must be another method, found regmean, which merges linear layers by their inputs",
                    hint="write `backbone: auto` for the whole backbone, or name a method"
                    if method == AUTO
                    else "write `average`, which regmean takes there too",
                    at=(group,),
                )
        return self

    def to_data(self) -> dict[str, Any]:
        """Plain data, as written."""
        data: dict[str, Any] = self.model_dump(mode="json", exclude_none=True)
        return data

    def __str__(self) -> str:
        """Such as `attention, norms: average; embeddings, head: base`."""
        return spelled({group: self.settings(group) for group in GROUPS})

    def settings(self, group: str) -> MergeSettings:
        """The merge of one group."""
        given: MergeSettings | None = getattr(self, group)
        return given or MergeSettings(method=BASE)


def _spelled(value: object) -> str:
    if isinstance(value, dict):
        return " ".join(f"{key}={number:g}" for key, number in value.items())
    if isinstance(value, list):
        return " ".join(f"{number:g}" for number in value)
    return f"{value:g}" if isinstance(value, int | float) else str(value)


def spelled(by_group: Mapping[str, MergeSettings]) -> str:
    """How each group is made, in words; the merge alone if all groups have the same."""
    groups: dict[str, list[str]] = {}
    for group, settings in by_group.items():
        groups.setdefault(str(settings), []).append(group)
    if len(groups) == 1:
        return next(iter(groups))
    return "; ".join(f"{', '.join(names)}: {words}" for words, names in groups.items())


def _with_name(value: object) -> object:
    """A method's name stands for its settings."""
    return {"method": one_of(*METHODS)(value)} if isinstance(value, str) else value


def _kind(value: object) -> str:
    """Which of the two forms a value has: a mapping by group has no key of a merge."""
    merge = not isinstance(value, Groups)
    if isinstance(value, dict) and value:
        merge = any(key in ("method", *SETTINGS) for key in value)
    return MERGE if merge else BY_GROUP


Named = Annotated[
    MergeSettings,
    BeforeValidator(_with_name, json_schema_input_type=Method | MergeSettings),
    PlainSerializer(MergeSettings.to_data),
]
MERGE, BY_GROUP = f"{TAG}merge", f"{TAG}groups"
Backbone = Annotated[
    Annotated[MergeSettings, PlainSerializer(MergeSettings.to_data), Tag(MERGE)] | Annotated[Groups, Tag(BY_GROUP)],
    Discriminator(_kind),
    BeforeValidator(_with_name, json_schema_input_type=Method | MergeSettings | Groups),
]
Groups.model_rebuild()


def backbone_of(by_group: Mapping[str, MergeSettings]) -> MergeSettings | Groups:
    """The backbone of a recipe that makes every group so: a single merge if all have the same."""
    first, *others = by_group.values()
    return Groups(**by_group) if any(each != first for each in others) else first


def default_backbone(gate_mode: str) -> str:
    """The method of a recipe without `backbone`: measured if routers are fitted, else the base, as in mergekit."""
    return AUTO if gate_mode in FIT_MODES else BASE


def check_backbone(backbone: MergeSettings | Groups | None, *, experts: Sequence[str]) -> None:
    """Rejects settings that do not fit the `experts`, which are named as in `weights`."""
    if isinstance(backbone, Groups):
        for group in GROUPS:
            _check_parents(backbone.settings(group), experts=experts, at=("backbone", group))
    elif backbone is not None:
        _check_parents(backbone, experts=experts, at=("backbone",))


def _check_parents(settings: MergeSettings, *, experts: Sequence[str], at: Location) -> None:
    for name in settings.weights:
        if name not in experts:
            raise refusal(
                f"is not an expert of this recipe, expected one of {', '.join(experts)}",
                hint=did_you_mean(name, experts),
                at=(*at, "weights", name),
            )
    if settings.method == SLERP and len(experts) != 2:
        raise refusal(
            f"must have exactly two parents for slerp, found {counted(len(experts), 'expert')}",
            hint="choose average or task_arithmetic, which take any number",
            at=at,
        )
    check_sum(settings.method, [settings.weights.get(name, 1.0) for name in experts], at=(*at, "weights"))


def check_sum(method: str, weights: Sequence[float], *, at: Location) -> None:
    """Rejects weights of an average whose sum is not positive."""
    if method == AVERAGE and not sum(weights) > SMALLEST_SUM:
        raise refusal(
            f"must have a positive sum, as an average divides by it, found {sum(weights):g}",
            hint="delete the weights to count all parents alike",
            at=at,
        )


class ExpertMerge(AnyMerge):
    """Several models that are merged into the parent of one expert."""

    method: ClosedMethod = Field(description="How the models are merged.")
    models: Annotated[tuple[SourceField, ...], Field(min_length=1)] = Field(
        description="The models: hub ids or folders, each optionally with @revision and +adapter."
    )
    base: SourceField | None = Field(None, description="The model they were tuned from; default: base_model.")
    weights: tuple[Weight, ...] = Field((), description="Weight of each model, in the same order; 1 by default.")

    @model_validator(mode="after")
    def _sensible(self) -> Self:
        self.refuse_unused(self.method)
        if self.base is not None and self.method in WITHOUT_BASE:
            raise refusal(
                f"must be absent, as {self.method} takes nothing from a base, found {self.base}",
                hint="delete it, or choose task_arithmetic, ties, dare_ties or dare_linear",
                at=("base",),
            )
        if self.method == SLERP and len(self.models) != 2:
            raise refusal(
                f"must be exactly two models for slerp, found {len(self.models)}",
                hint="choose average or task_arithmetic, which take any number",
                at=("models",),
            )
        if self.weights and len(self.weights) != len(self.models):
            raise refusal(
                f"must be one number for each of the {len(self.models)} models, found {len(self.weights)}",
                hint="write them in the order of `models`",
                at=("weights",),
            )
        check_sum(self.method, self.every_weight, at=("weights",))
        return self

    def __str__(self) -> str:
        """Such as `ties, density 0.5 of org/a, org/b`."""
        return f"{self.words} of {', '.join(map(str, self.models))}"

    @property
    def every_weight(self) -> tuple[float, ...]:
        """One weight per model."""
        return self.weights or (1.0,) * len(self.models)
