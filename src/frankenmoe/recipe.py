"""YAML -> frozen Recipe; reads any mergekit-moe file; does not know whether the sources exist or fit together."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    PrivateAttr,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
    model_validator,
)
from pydantic.json_schema import GenerateJsonSchema

from frankenmoe.recipefields import (
    FIT_MODES,
    FROM_DATA,
    FROM_PROMPTS,
    PROMPT_MODES,
    RANDOM_MODES,
    Backbone,
    Count,
    Dtype,
    Finite,
    GateMode,
    Prompts,
    Seed,
    Share,
    Strings,
    Text,
)
from frankenmoe.recipestages import (
    SECTIONS,
    AuditSection,
    BuildSection,
    CardSection,
    Closed,
    EvalSection,
    ExportSection,
    FitSection,
    TrainSection,
    with_bare_sections,
)
from frankenmoe.recipetext import check_blank, check_prompts, check_text, prompts_of
from frankenmoe.refusal import found, recipe_error, refusal
from frankenmoe.sourcename import SOURCE_SCHEMA, SourceName, parse_source
from frankenmoe.yamlfile import Location, YamlFile, parse_yaml, read_text

__all__ = ["FIT_MODES", "PROMPT_MODES", "RANDOM_MODES", "Expert", "Recipe", "SourceName", "schema"]

# keys found in mergekit files; mergekit-moe does nothing with them either
IGNORED_KEYS: Mapping[str, str] = {
    "chat_template": "the chat template is the base model's",
    "merge_method": "experts are placed side by side, not merged",
    "models": "the parents are those under experts",
    "out_dtype": "dtype alone sets the type on disk",
    "parameters": "they belong to mergekit's merge methods",
    "slices": "every parent is used with all its layers",
    "tokenizer": "the tokenizer is the base model's",
    "tokenizer_source": "the tokenizer is the base model's",
}


@dataclass(frozen=True)
class _Context:
    """What validators and the finished recipe know beyond the YAML."""

    folder: Path = field(default_factory=Path.cwd)
    origin: str = "recipe"
    notes: tuple[str, ...] = ()


def _source(value: object, info: ValidationInfo) -> SourceName:
    return parse_source(value, folder=(info.context or _Context()).folder)


def _lone_adapter(value: str, info: ValidationInfo) -> str:
    if _source(value, info).adapter is not None:
        raise refusal(f"must be one adapter, found {found(value)}", hint="write `folder` or `org/name@revision`")
    return value


def _named(experts: "tuple[Expert, ...]") -> "tuple[Expert, ...]":
    """Names the experts of one level that have no name of their own; refuses a name given twice."""
    taken: set[str] = set()
    for index, expert in enumerate(experts):
        if expert.name and expert.name in taken:
            text = f"must be unique, found {expert.name!r} a second time"
            raise refusal(text, hint="give it another name", at=(index, "name"))
        taken.add(expert.name)
    named = []
    for expert in experts:
        name = expert.name or _free_name(_stem(expert), taken)
        taken.add(name)
        # keeps the set of keys that were written, so that to_dict() leaves a default name out
        named.append(Expert.model_construct(_fields_set=expert.model_fields_set, **{**dict(expert), "name": name}))
    return tuple(named)


def _stem(expert: "Expert") -> str:
    source = expert.source_model
    if source is None:
        return "moe"
    adapter = expert.adapter or source.adapter
    return "+".join(_tail(path) for path in (source.path, adapter) if path)


def _tail(path: str) -> str:
    return re.split(r"[\\/]", path.rstrip("\\/"))[-1] or path


def _free_name(stem: str, taken: set[str]) -> str:
    name, count = stem, 1
    while name in taken:
        count += 1
        name = f"{stem}-{count}"
    return name


Source = Annotated[SourceName, BeforeValidator(_source), WithJsonSchema(SOURCE_SCHEMA)]


class Expert(Closed):
    """One parent whose FFNs become an expert in every layer, or a mixture of such experts."""

    source_model: Source | None = Field(
        None, description="The parent: a hub id or folder, with @revision and +adapter if needed."
    )
    name: Text = Field("", description="What reports call this expert; by default the last part of its source.")
    positive_prompts: Prompts = Field((), description="Prompts that should be routed to this expert.")
    negative_prompts: Prompts = Field((), description="Prompts that should not be routed to this expert.")
    noise_scale: Share | None = Field(None, description="Standard deviation of Gaussian noise added to the weights.")
    noise_relative: Share | None = Field(None, description="The same noise as a share of each tensor's own deviation.")
    residual_scale: Finite | None = Field(None, description="Factor on what this expert adds to the residual stream.")
    data: Strings = Field((), description="Text files, JSONL files or hub datasets on which this expert is good.")
    adapter: Annotated[Text, AfterValidator(_lone_adapter)] | None = Field(
        None, description="A PEFT LoRA on top of the source: a folder or a hub id with @revision."
    )
    experts: "Experts" = Field((), description="Makes this expert a mixture of its own, instead of source_model.")
    experts_per_token: Count | None = Field(
        None, description="How many of the nested experts a token uses; by default as many as in the recipe."
    )

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if self.experts:
            _refuse_weights_of_its_own(self)
        elif self.source_model is None:
            raise refusal(
                "must have a source_model or experts of its own, found neither", hint="add `source_model: org/name`"
            )
        elif self.experts_per_token is not None:
            raise refusal(
                f"must come with nested experts, found {self.experts_per_token} beside a source_model",
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
        return self


Experts = Annotated[tuple[Expert, ...], AfterValidator(_named)]


def _refuse_weights_of_its_own(expert: Expert) -> None:
    for key in ("source_model", "adapter", "noise_scale", "noise_relative", "residual_scale"):
        if getattr(expert, key) is not None:
            raise refusal(
                f"must be absent beside nested experts, found {getattr(expert, key)}",
                hint="delete it, or move it to the experts within",
                at=(key,),
            )


class Recipe(Closed):
    """What a mixture of experts is made of; `load` and `parse` make one from YAML."""

    base_model: Source = Field(description="The model that gives the backbone: embeddings, attention, norms and head.")
    experts: Annotated[tuple[Expert, ...], Field(min_length=1), AfterValidator(_named)] = Field(
        description="The experts between which routers choose."
    )
    shared_experts: Experts = Field((), description="Experts that every token uses, where the format has them.")
    gate_mode: GateMode = Field(
        FROM_PROMPTS, description="How the routers' first weights are computed; where experts have data, by regret."
    )
    experts_per_token: Count = Field(2, description="How many experts a token uses in each layer.")
    dtype: Dtype | None = Field(None, description="The type of the stored weights; by default the base model's.")
    architecture: Text | None = Field(None, description="The MoE format to build, where there is a choice.")
    name: Text | None = Field(None, description="What the model is called.")
    seed: Seed = Field(0, description="Where noise and random gates start.")
    backbone: Backbone = Field(
        "base", description="The base model's backbone, or the average of all parents' backbones."
    )
    build: BuildSection = Field(None, description="How `frankenmoe run` writes the model.")
    fit: FitSection = Field(None, description="Asks `frankenmoe run` to fit the routers in closed form.")
    audit: AuditSection = Field(None, description="Asks `frankenmoe run` for an audit of the routing.")
    eval: EvalSection = Field(None, description="Asks `frankenmoe run` for measurements.")
    export: ExportSection = Field(None, description="Asks `frankenmoe run` for GGUF files.")
    card: CardSection = Field(None, description="Asks `frankenmoe run` for a model card, and says what it says.")

    routers: Text | None = Field(None, description="A safetensors file with the routers, in place of gate_mode's.")
    trained: Text | None = Field(None, description="A safetensors file with tensors that replace the sources'.")
    train: TrainSection = Field(None, description="How `frankenmoe train` trains this MoE.")

    _context: _Context = PrivateAttr()

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """The recipe in a YAML file; RecipeError where it cannot be read or makes no sense."""
        path = Path(path)
        return cls.parse(read_text(path), folder=path.parent, origin=str(path))

    @classmethod
    def parse(cls, text: str, *, folder: Path, origin: str) -> Self:
        """The recipe in `text`; relative paths start at `folder`, and a RecipeError's message starts with `origin`."""
        file = parse_yaml(text, origin=origin)
        context = _Context(folder=folder.resolve(), origin=origin, notes=tuple(_notes(file)))
        known = with_bare_sections({key: value for key, value in file.data.items() if key not in IGNORED_KEYS})
        try:
            return cls.model_validate(known, context=context)
        except ValidationError as error:
            raise recipe_error(error, file=file) from None

    @property
    def folder(self) -> Path:
        """Where relative paths start, absolute."""
        return self._context.folder

    @property
    def origin(self) -> str:
        """The file as it was named, for messages."""
        return self._context.origin

    @property
    def notes(self) -> tuple[str, ...]:
        """One sentence for every key that was read and ignored."""
        return self._context.notes

    @property
    def digest(self) -> str:
        """SHA-256, in hex, of the model the recipe says: not of layout, comments or place, nor of what `run` adds."""
        said = {key: value for key, value in self.to_dict().items() if key not in SECTIONS}
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()

    @staticmethod
    def prompts_of(expert: Expert) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Positive and negative prompts; for nested experts without any of their own, those of all experts within."""
        return prompts_of(expert)

    def to_dict(self) -> dict[str, Any]:
        """Plain data without defaults; as YAML it parses to an equal recipe."""
        plain = _plain_keys(self)
        # which mode is meant where none is given depends on the text
        return plain | {"gate_mode": self.gate_mode} if _has_data(plain["experts"]) else plain

    def model_post_init(self, context: _Context | None, /) -> None:
        self._context = context or _Context()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Recipe) and self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        return hash(self.digest)

    @model_validator(mode="before")
    @classmethod
    def _best_mode(cls, value: object) -> object:
        if not isinstance(value, dict) or value.get("gate_mode") is not None:
            return value
        return {**value, "gate_mode": _mode_for(value.get("experts"))}

    @model_validator(mode="after")
    def _routable(self) -> Self:
        _check_shared(self.shared_experts)
        if self.gate_mode not in RANDOM_MODES:
            check_blank(self.shared_experts, at=("shared_experts",))
            check_blank(self.experts, at=("experts",))
        _check_level(self.experts, recipe=self, top_k=self.experts_per_token, at=())
        return self


def schema() -> dict[str, Any]:
    """The JSON schema (draft 2020-12) with which an editor completes and checks recipes."""
    body = Recipe.model_json_schema(schema_generator=_PlainTitles)
    ignored = {key: {"description": f"Ignored: {reason}."} for key, reason in IGNORED_KEYS.items()}
    body["properties"] |= ignored
    return {"$schema": GenerateJsonSchema.schema_dialect, **body, "title": "frankenmoe recipe"}


class _PlainTitles(GenerateJsonSchema):
    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def _notes(file: YamlFile) -> Iterator[str]:
    for location, line in file.lines.items():
        match location:
            case (str(key),) if key in IGNORED_KEYS:
                reason = IGNORED_KEYS[key]
            case (*_, "base_model" | "source_model", "override_architecture" as key):
                reason = "the architecture is read from the source's own config.json"
            case _:
                continue
        yield f"{file.origin}:{line}: {key} is ignored, because {reason}"
    if "gate_mode" not in file.data:
        yield (
            f"{file.origin} has no gate_mode, so routers are fitted by {_mode_for(file.data.get('experts'))} "
            "(mergekit-moe would take hidden)"
        )


def _mode_for(experts: object) -> str:
    """The gate mode that came closest to every text's own expert in benchmarks/routers.py, from such text."""
    return FROM_DATA if _has_data(experts) else FROM_PROMPTS


def _has_data(experts: object) -> bool:
    """Whether any of a recipe's experts, as they are written or as objects, or any within them has data."""
    listed = experts if isinstance(experts, list | tuple) else ()
    known = [dict(each) for each in listed if isinstance(each, dict | Expert)]
    return any(bool(each.get("data") or _has_data(each.get("experts"))) for each in known)


def _plain_keys(model: BaseModel) -> dict[str, Any]:
    written = [key for key in type(model).model_fields if key in model.model_fields_set]
    return {key: _plain(getattr(model, key)) for key in written if getattr(model, key) != _default(model, key)}


def _default(model: BaseModel, key: str) -> object:
    return type(model).model_fields[key].default


def _plain(value: Any) -> Any:
    match value:
        case SourceName():
            return value.to_data()
        case tuple():
            return [_plain(item) for item in value]
        case BaseModel():
            return _plain_keys(value)
    return value


def _check_level(experts: tuple[Expert, ...], *, recipe: Recipe, top_k: int, at: Location) -> None:
    """What one router needs, then the same for the routers below it; `at` is what the experts belong to."""
    if top_k > len(experts):
        raise refusal(
            f"must be at most {len(experts)}, the number of experts there, found {top_k}",
            hint=f"list more experts or write `experts_per_token: {len(experts)}`",
            at=(*at, "experts_per_token"),
        )
    if recipe.gate_mode in PROMPT_MODES:
        check_prompts(experts, gate_mode=recipe.gate_mode, at=(*at, "experts"))
    if recipe.gate_mode in FIT_MODES:
        check_text(experts, gate_mode=recipe.gate_mode, at=(*at, "experts"))
    for index, expert in enumerate(experts):
        if expert.experts:
            below = expert.experts_per_token or recipe.experts_per_token
            _check_level(expert.experts, recipe=recipe, top_k=below, at=(*at, "experts", index))


def _check_shared(experts: tuple[Expert, ...]) -> None:
    prompted = any(expert.positive_prompts for expert in experts)
    for index, expert in enumerate(experts):
        if expert.experts:
            raise refusal(
                "must be absent from a shared expert, found nested experts",
                hint="only entries of `experts` can nest",
                at=("shared_experts", index, "experts"),
            )
        if prompted and not expert.positive_prompts:
            raise refusal(
                "must be given for all shared experts or for none, found some without",
                hint=f"add prompts for '{expert.name}' or delete the others'",
                at=("shared_experts", index, "positive_prompts"),
            )
