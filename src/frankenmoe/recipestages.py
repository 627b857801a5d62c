"""The sections of a recipe that ask `frankenmoe run` for more than a model; does not know how a stage does its work."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from frankenmoe.recipefields import Count, FitMode, Prompts, Seed, Share, Strings, Text
from frankenmoe.recipetrain import Train
from frankenmoe.refusal import refuse_unknown_keys


class Closed(BaseModel):
    """Part of a recipe: frozen, and without keys that nobody knows."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, value: object) -> object:
        """Refuses unknown keys by name before anything seems missing; a key with nothing behind it is left out."""
        if not isinstance(value, dict):
            return value
        refuse_unknown_keys(value, known=cls.model_fields)
        return {key: item for key, item in value.items() if item is not None}


class Build(Closed):
    """How the model itself is written; the options of `frankenmoe build`."""

    virtual: bool = Field(False, description="Write the recipe, hashes and routers only (megabytes).")
    allow_identical: bool = Field(False, description="Build even where all experts are the same, to train them later.")


class Fit(Closed):
    """How `frankenmoe fit` fits the routers in closed form before the model is built."""

    method: FitMode | None = Field(None, description="A gate mode that fits; by default the recipe's gate_mode.")
    tokens: Annotated[Count, Field(ge=512)] | None = Field(None, description="Most tokens of data per expert.")
    block: Annotated[Count, Field(ge=8)] | None = Field(None, description="Tokens read at once.")


class Audit(Closed):
    """What `frankenmoe audit` looks at."""

    data: Strings = Field((), description="Texts, as EXPERT=FILE or FILE; by default the experts' own data or prompts.")
    prompt: Text | None = Field(None, description="What is shown token by token; by default each text's beginning.")
    tokens: Count | None = Field(None, description="Most tokens read per domain.")


class Eval(Closed):
    """What `frankenmoe eval` measures; without tasks the loss on held-out text."""

    tasks: Strings = Field((), description="leaderboard-v1, or some of its six, and ppl for the loss on text.")
    data_dir: Text | None = Field(None, description="A folder with the tasks' rows, for work without a network.")
    texts: dict[str, Text] = Field(
        default_factory=dict, description="Files to measure the loss on, by domain; by default the experts' data."
    )
    limit: Count | None = Field(None, description="Rows per task and blocks per text; all of them by default.")
    against_parents: bool = Field(False, description="Measure base, parents and random gates on the same rows.")


class Export(Closed):
    """What `frankenmoe export` writes for llama.cpp."""

    types: Strings = Field((), description="Types such as f16, q8_0, q5_k_m; by default a q4 and a q5 for the shape.")
    imatrix: Strings = Field((), description="Calibration texts that say which weights matter.")
    pad256: bool = Field(False, description="Pad rows to multiples of 256, so that every K-quant fits.")
    check: bool | None = Field(None, description="Run each file in llama.cpp; by default those under 2 GB.")
    texts: Strings = Field((), description="Texts to check on; by default a few short ones that come along.")
    allow_random: bool = Field(False, description="Export even where only chance has set the routers.")


class Card(Closed):
    """What the model card says beyond what was measured."""

    description: Text | None = Field(None, description="A paragraph of the author's own, first in the card.")
    repo: Text | None = Field(None, description="Where the model will be on the hub, as org/name.")
    license: Text | None = Field(
        None, description="The licence the author declares; by default the sources' common one."
    )
    language: Strings = Field((), description="Languages, as codes such as en; by default those the sources declare.")
    base_model: Strings = Field((), description="Hub ids of the parents, where sources are folders.")
    datasets: Strings = Field((), description="Hub ids of training data; by default those the sources declare.")
    tags: Strings = Field((), description="Tags besides merge, moe and frankenmoe.")
    prompts: Prompts = Field((), description="What the model is asked for the card's samples.")
    max_new_tokens: Count = Field(120, description="Longest sample, in tokens.")
    temperature: Share = Field(0.0, description="Of the samples; 0 is greedy.")
    seed: Seed = Field(0, description="Of the samples.")


def _asked_for(value: object) -> object:
    """`audit: true` and a bare `audit:` ask for a stage with its defaults, `audit: false` does not."""
    return {True: {}, False: None}.get(value, value) if isinstance(value, bool) else value


def with_bare_sections(data: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's data in which a section with nothing behind its colon is an empty one."""
    return {key: {} if value is None and key in SECTIONS else value for key, value in data.items()}


BuildSection = Annotated[Build | None, BeforeValidator(_asked_for, json_schema_input_type=Build | bool | None)]
FitSection = Annotated[Fit | None, BeforeValidator(_asked_for, json_schema_input_type=Fit | bool | None)]
TrainSection = Annotated[Train | None, BeforeValidator(_asked_for, json_schema_input_type=Train | bool | None)]
AuditSection = Annotated[Audit | None, BeforeValidator(_asked_for, json_schema_input_type=Audit | bool | None)]
EvalSection = Annotated[Eval | None, BeforeValidator(_asked_for, json_schema_input_type=Eval | bool | None)]
ExportSection = Annotated[Export | None, BeforeValidator(_asked_for, json_schema_input_type=Export | bool | None)]
CardSection = Annotated[Card | None, BeforeValidator(_asked_for, json_schema_input_type=Card | bool | None)]

# the sections that say what is done with a model; the model itself is the same without them
SECTIONS = ("build", "fit", "train", "audit", "eval", "export", "card")
