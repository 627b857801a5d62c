"""YAML -> frozen Recipe. Reads any mergekit-moe file; does not open the sources."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AfterValidator, Field, PrivateAttr, ValidationError, model_validator
from pydantic.json_schema import GenerateJsonSchema

from frankenmoe.recipe.backbone import (
    BASE,
    GROUPS,
    Backbone,
    Groups,
    MergeSettings,
    check_backbone,
    default_backbone,
)
from frankenmoe.recipe.context import Context, SourceField
from frankenmoe.recipe.expert import Expert, Experts, named
from frankenmoe.recipe.fields import Count, Dtype, GateMode, Name, Seed, Text
from frankenmoe.recipe.gatemodes import FIT_MODES, FROM_DATA, FROM_PROMPTS, KEPT, PROMPT_MODES
from frankenmoe.recipe.refusals import recipe_error, refusal, setting_error
from frankenmoe.recipe.sections import (
    SECTIONS,
    AuditSettings,
    BuildSettings,
    CardSettings,
    EvalSettings,
    ExportSettings,
    FitSettings,
    HealSettings,
    Section,
    with_bare_sections,
)
from frankenmoe.recipe.settings import Closed
from frankenmoe.recipe.text import check_prompts, check_text, prompts_of
from frankenmoe.recipe.train import TrainSettings
from frankenmoe.recipe.yaml import Location, YamlFile, parse_yaml, read_text

# keys found in mergekit files; mergekit-moe ignores them too
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


class Recipe(Closed):
    """The sources and settings of a mixture of experts; `load` and `parse` read one from YAML."""

    base_model: SourceField = Field(
        description="The model whose backbone is used: embeddings, attention, norms and head."
    )
    experts: Annotated[tuple[Expert, ...], Field(min_length=1), AfterValidator(named)] = Field(
        description="The experts that the routers choose from."
    )
    shared_experts: Experts = Field(
        (), description="Experts that every token uses, for formats that have shared experts."
    )
    gate_mode: GateMode = Field(
        FROM_PROMPTS,
        description="How the routers' first weights are computed; default: regret if experts have data, else logistic.",
    )
    experts_per_token: Count = Field(2, description="Experts per token in each layer (top-k).")
    dtype: Dtype | None = Field(None, description="Type of the stored weights; default: the base model's.")
    architecture: Text | None = Field(None, description="The MoE format to build, if the base allows several.")
    name: Name | None = Field(None, description="The model's name.")
    seed: Seed = Field(0, description="Seed of noise and random gates.")
    backbone: Backbone | None = Field(
        None,
        description="How the backbone is made of the parents': a method, its settings, or either by group of tensors. "
        "Default: auto, or base with mergekit's gate modes.",
    )
    build: Section[BuildSettings] = Field(None, description="Options of the build in `frankenmoe run`.")
    heal: Section[HealSettings] = Field(
        None, description="`frankenmoe run` refits the experts to the backbone before it fits the routers."
    )
    fit: Section[FitSettings] = Field(None, description="`frankenmoe run` fits the routers before it builds.")
    audit: Section[AuditSettings] = Field(None, description="`frankenmoe run` audits the routing.")
    eval: Section[EvalSettings] = Field(None, description="`frankenmoe run` evaluates the model.")
    export: Section[ExportSettings] = Field(None, description="`frankenmoe run` writes GGUF files.")
    card: Section[CardSettings] = Field(None, description="`frankenmoe run` writes a model card with these settings.")

    routers: Text | None = Field(
        None, description="A safetensors file with the routers, instead of those of gate_mode."
    )
    trained: Text | None = Field(
        None, description="A safetensors file with trained tensors that replace those of the sources."
    )
    train: Section[TrainSettings] = Field(None, description="Settings of `frankenmoe train` for this MoE.")

    _context: Context = PrivateAttr()

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Reads a YAML file. Raises RecipeError if it cannot be read or is not a valid recipe."""
        path = Path(path)
        return cls.parse(read_text(path), folder=path.parent, origin=str(path))

    @classmethod
    def parse(cls, text: str, *, folder: Path, origin: str) -> Self:
        """Reads `text`. Relative paths start at `folder`; messages of RecipeErrors start with `origin`."""
        file = parse_yaml(text, origin=origin)
        context = Context(folder=folder.resolve(), origin=origin, notes=tuple(_notes(file)))
        known = with_bare_sections({key: value for key, value in file.data.items() if key not in IGNORED_KEYS})
        try:
            return cls.model_validate(known, context=context)
        except ValidationError as error:
            raise recipe_error(error, file=file) from None

    @property
    def fit_settings(self) -> FitSettings:
        """How its routers are fitted, by every command."""
        return self.fit or FitSettings()

    @property
    def folder(self) -> Path:
        """The absolute folder at which relative paths start."""
        return self._context.folder

    @property
    def origin(self) -> str:
        """The recipe's file as the user named it, for messages."""
        return self._context.origin

    @property
    def notes(self) -> tuple[str, ...]:
        """One sentence per ignored key."""
        return self._context.notes

    def backbone_for(self, group: str) -> MergeSettings:
        """How a group of backbone tensors is made: attention, norms, embeddings or head."""
        if isinstance(self.backbone, Groups):
            return self.backbone.settings(group)
        return self.backbone or MergeSettings(method=default_backbone(self.gate_mode))

    @property
    def from_base(self) -> bool:
        """Whether the whole backbone is the base's."""
        return all(self.backbone_for(group).method == BASE for group in GROUPS)

    def with_backbone(
        self, backbone: MergeSettings | Groups | Mapping[str, Any] | str, *, trained: Path | None = None
    ) -> Self:
        """The same recipe with this backbone written out, and with another `trained` file if one is given.

        Raises RecipeError if the backbone does not fit the experts.
        """
        plain = backbone.to_data() if isinstance(backbone, MergeSettings | Groups) else backbone
        data = self.to_dict() | {"backbone": plain}
        if trained is not None:
            data["trained"] = str(trained)
        try:
            return type(self).model_validate(data, context=self._context)
        except ValidationError as error:
            raise setting_error(error, where="backbone") from None

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the model's definition: not of layout, comments, folder or the sections of `run`."""
        model = {key: value for key, value in self.to_dict().items() if key not in SECTIONS}
        if self.from_base:  # as in records from before there was a choice
            model.pop("backbone", None)
        return hashlib.sha256(json.dumps(model, sort_keys=True).encode()).hexdigest()

    @staticmethod
    def prompts_of(expert: Expert) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Positive and negative prompts; for nested experts without prompts, those of all inner experts."""
        return prompts_of(expert)

    def to_dict(self) -> dict[str, Any]:
        """Plain data without defaults; written as YAML it reads back as an equal recipe."""
        plain: dict[str, Any] = self.model_dump(mode="json", exclude_unset=True, exclude_defaults=True)
        # defaults that depend on other keys are written out
        if _has_data(plain["experts"]):
            plain["gate_mode"] = self.gate_mode
        usual = default_backbone(self.gate_mode)
        if self.backbone is None and usual != BASE:
            plain["backbone"] = usual
        return plain

    def model_post_init(self, context: Context | None, /) -> None:
        self._context = context or Context()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Recipe) and self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        return hash(self.digest)

    @model_validator(mode="before")
    @classmethod
    def _best_mode(cls, value: object) -> object:
        if not isinstance(value, dict) or value.get("gate_mode") is not None:
            return value
        return {**value, "gate_mode": default_gate_mode(value.get("experts"))}

    @model_validator(mode="after")
    def _routable(self) -> Self:
        _check_shared(self.shared_experts)
        check_backbone(self.backbone, experts=[name for name, _ in leaf_names(self.experts)])
        _check_level(self.experts, recipe=self, top_k=self.experts_per_token, at=())
        return self


def schema() -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of recipes, for completion and checks in editors."""
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
    yield from _blank_notes(file)
    # recipes of mergekit-moe have no data
    if "gate_mode" not in file.data and not _has_data(file.data.get("experts")):
        yield (
            f"{file.origin} has no gate_mode, so routers are fitted by {FROM_PROMPTS} (mergekit-moe would take hidden)"
        )


def _blank_notes(file: YamlFile) -> Iterator[str]:
    """A sentence for every blank prompt that matters."""
    mode = file.data.get("gate_mode") or default_gate_mode(file.data.get("experts"))
    meaning = {
        **dict.fromkeys(PROMPT_MODES, "stands for the begin token alone, as in mergekit-moe"),
        **dict.fromkeys(FIT_MODES, "is left out"),
    }.get(str(mode))
    for location, line in file.lines.items() if meaning else ():
        if len(location) > 1 and location[-2] in ("positive_prompts", "negative_prompts"):
            value: Any = file.data
            for part in location:
                value = value[part]
            if isinstance(value, str) and not value.strip():
                yield f"{file.origin}:{line}: a blank prompt {meaning}"


def default_gate_mode(experts: object) -> str:
    """The default gate mode: the best one in benchmarks/routers.py for this kind of text."""
    return FROM_DATA if _has_data(experts) else FROM_PROMPTS


def _has_data(experts: object) -> bool:
    """Whether any expert has data, at any depth; takes experts as plain data or as objects."""
    listed = experts if isinstance(experts, list | tuple) else ()
    known = [dict(each) for each in listed if isinstance(each, dict | Expert)]
    return any(bool(each.get("data") or _has_data(each.get("experts"))) for each in known)


def leaf_names(experts: Iterable[Expert], prefix: str = "") -> Iterator[tuple[str, Expert]]:
    """(name, expert) of every expert that is not a mixture itself, depth first; a nested one is named "group/leaf"."""
    for expert in experts:
        if expert.experts:
            yield from leaf_names(expert.experts, f"{prefix}{expert.name}/")
        else:
            yield f"{prefix}{expert.name}", expert


def _check_level(experts: tuple[Expert, ...], *, recipe: Recipe, top_k: int, at: Location) -> None:
    """Checks the experts of one router, then those of nested routers; `at` is the location of their parent."""
    if top_k > len(experts):
        raise refusal(
            f"must be at most {len(experts)}, the number of experts there, found {top_k}",
            hint=f"list more experts or write `experts_per_token: {len(experts)}`",
            at=(*at, "experts_per_token"),
        )
    if recipe.gate_mode in PROMPT_MODES:
        check_prompts(experts, gate_mode=recipe.gate_mode, at=(*at, "experts"))
    if recipe.gate_mode == KEPT:
        _check_parts(experts, at=(*at, "experts"))
    if recipe.gate_mode in FIT_MODES:
        check_text(experts, gate_mode=recipe.gate_mode, at=(*at, "experts"))
    for index, expert in enumerate(experts):
        if expert.experts:
            below = expert.experts_per_token or recipe.experts_per_token
            _check_level(expert.experts, recipe=recipe, top_k=below, at=(*at, "experts", index))


def _check_parts(experts: tuple[Expert, ...], *, at: Location) -> None:
    """Gates can be kept only of experts of a mixture."""
    for index, expert in enumerate(experts):
        if expert.source_model is None or expert.source_model.part is None:
            raise refusal(
                f"must be one expert of a mixture with gate_mode {KEPT}, found {expert.source_model or expert.name}",
                hint="write `source_model: folder#0` for the first expert of a mixture, or choose another gate_mode",
                at=(*at, index, "source_model"),
            )


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
