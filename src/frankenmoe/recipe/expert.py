"""An expert of a recipe: its source, its text, its name; or a nested mixture of experts."""

import re
from typing import Annotated, Self

from pydantic import AfterValidator, Field, ValidationInfo, model_validator

from frankenmoe.errors import brief
from frankenmoe.recipe.asadapter import AdapterSettings
from frankenmoe.recipe.backbone import ExpertMerge
from frankenmoe.recipe.context import SourceField, read_source
from frankenmoe.recipe.fields import LONGEST_NAME, Count, Finite, Name, Prompts, Share, Strings, Text
from frankenmoe.recipe.refusals import found, refusal
from frankenmoe.recipe.sections import Section
from frankenmoe.recipe.settings import Closed


def _lone_adapter(value: str, info: ValidationInfo) -> str:
    if read_source(value, info).adapter is not None:
        raise refusal(f"must be one adapter, found {found(value)}", hint="write `folder` or `org/name@revision`")
    return value


def named(experts: "tuple[Expert, ...]") -> "tuple[Expert, ...]":
    """Gives unnamed experts of one level a name; rejects a name that is given twice."""
    taken: set[str] = set()
    for index, expert in enumerate(experts):
        if expert.name and expert.name in taken:
            text = f"must be unique, found {expert.name!r} a second time"
            raise refusal(text, hint="give it another name", at=(index, "name"))
        taken.add(expert.name)
    renamed = []
    for expert in experts:
        name = expert.name or _free_name(_stem(expert), taken)
        taken.add(name)
        # keeps the set of written keys, so that to_dict() leaves default names out
        renamed.append(Expert.model_construct(_fields_set=expert.model_fields_set, **{**dict(expert), "name": name}))
    return tuple(renamed)


def _stem(expert: "Expert") -> str:
    return brief(_named_after(expert), LONGEST_NAME)


def _named_after(expert: "Expert") -> str:
    if expert.merge is not None:
        return "-".join(_tail(source.path) for source in expert.merge.models)
    source = expert.source_model
    if source is None:
        return "moe"
    adapter = expert.adapter or source.adapter
    own = _tail(source.path) if source.part is None else f"{_tail(source.path)}-{source.part}"
    return "+".join((own, _tail(adapter)) if adapter else (own,))


def _tail(path: str) -> str:
    return re.split(r"[\\/]", path.rstrip("\\/"))[-1] or path


def _free_name(stem: str, taken: set[str]) -> str:
    name, count = stem, 1
    while name in taken:
        count += 1
        name = f"{stem}-{count}"
    return name


class Expert(Closed):
    """A parent whose FFNs become an expert in every layer, or a nested mixture of experts."""

    source_model: SourceField | None = Field(
        None,
        description="The parent: a hub id or folder, optionally with @revision and +adapter; of a mixture, #0 is the "
        "first expert.",
    )
    name: Name = Field("", description="The expert's name in reports; default: the last part of its source.")
    positive_prompts: Prompts = Field((), description="Prompts that should be routed to this expert.")
    negative_prompts: Prompts = Field((), description="Prompts that should not be routed to this expert.")
    noise_scale: Share | None = Field(None, description="Standard deviation of Gaussian noise added to the weights.")
    noise_relative: Share | None = Field(
        None, description="The same noise, relative to each tensor's own standard deviation."
    )
    residual_scale: Finite | None = Field(None, description="Factor on the expert's output to the residual stream.")
    data: Strings = Field((), description="Text of this expert's domain: text files, JSONL files or hub datasets.")
    adapter: Annotated[Text, AfterValidator(_lone_adapter)] | None = Field(
        None, description="A PEFT LoRA on top of the source: a folder, or a hub id with @revision."
    )
    as_adapter: Section[AdapterSettings] = Field(
        None,
        description="Use the base's FFN plus a low-rank adapter of what the source's FFN has learnt, to save memory.",
    )
    merge: ExpertMerge | None = Field(
        None, description="Several models whose merge is the parent, instead of source_model."
    )
    experts: "Experts" = Field(
        (), description="Nested experts, instead of source_model: this expert is a mixture of its own."
    )
    experts_per_token: Count | None = Field(
        None, description="Nested experts per token; default: the recipe's experts_per_token."
    )

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if self.experts:
            _refuse_weights_of_its_own(self)
        elif self.merge is not None:
            _refuse_beside_merge(self)
        elif self.source_model is None:
            raise refusal(
                "must have a source_model or experts of its own, found neither", hint="add `source_model: org/name`"
            )
        if not self.experts and self.experts_per_token is not None:
            raise refusal(
                f"must come with nested experts, found {self.experts_per_token} without any",
                hint="the number for the whole recipe belongs at its top level",
                at=("experts_per_token",),
            )
        return self

    @model_validator(mode="after")
    def _no_contradiction(self) -> Self:
        if self.noise_scale is not None and self.noise_relative is not None:
            raise refusal(
                "must stand alone, found noise_scale beside it",
                hint="keep noise_scale (absolute) or noise_relative (share of each tensor's deviation)",
                at=("noise_relative",),
            )
        if self.adapter and self.source_model and self.source_model.adapter:
            raise refusal(
                f"must be the only adapter, found '+{self.source_model.adapter}' in source_model as well",
                hint="keep one of the two",
                at=("adapter",),
            )
        if self.as_adapter is not None and self.source_model and self.source_model.adapter:
            raise refusal(
                f"must come with a whole model, found '+{self.source_model.adapter}' in source_model",
                hint="delete as_adapter: an adapter stays low-rank anyway",
                at=("as_adapter",),
            )
        return self


Experts = Annotated[tuple[Expert, ...], AfterValidator(named)]


def _refuse_weights_of_its_own(expert: Expert) -> None:
    for key in ("source_model", "merge", "adapter", "as_adapter", "noise_scale", "noise_relative", "residual_scale"):
        if getattr(expert, key) is not None:
            raise refusal(
                f"must be absent beside nested experts, found {getattr(expert, key)}",
                hint="delete it, or move it to the experts within",
                at=(key,),
            )


def _refuse_beside_merge(expert: Expert) -> None:
    for key in ("source_model", "adapter", "as_adapter"):
        if getattr(expert, key) is not None:
            raise refusal(
                f"must be absent beside merge, found {getattr(expert, key)}",
                hint="delete it; adapters go into the list of models: `models: [org/name+adapter]`",
                at=(key,),
            )
