"""The settings of every stage: sections of a recipe, options of a command and arguments in Python alike."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from frankenmoe.recipe.fields import Count, FitBlock, FitMode, FitTokens, Prompts, Seed, Strings, Temperature, Text
from frankenmoe.recipe.settings import NO_OPTION, Closed, Names, Option
from frankenmoe.recipe.train import TrainSettings


class BuildSettings(Closed):
    """How the model itself is written."""

    virtual: bool = Field(False, description="Write recipe, hashes and routers only (megabytes).")
    allow_identical: bool = Field(False, description="Build even if all experts are equal, to train them later.")


class FitSettings(Closed):
    """How routers are fitted in closed form."""

    method: FitMode | None = Field(None, description="Fitting method. Default: the recipe's gate_mode.")
    tokens: FitTokens = Field(32768, description="Most tokens of data per expert.")
    block: FitBlock = Field(256, description="Tokens read at once.")


class AuditSettings(Closed):
    """What an audit reads and shows."""

    data: Annotated[Strings, NO_OPTION] = Field(
        (), description="Texts, as EXPERT=FILE or FILE. Default: the experts' data, else their prompts."
    )
    prompt: Text | None = Field(None, description="Show these tokens one by one. Default: the start of each text.")
    tokens: Count = Field(8192, description="Most tokens of each text.")


class EvalSettings(Closed):
    """What is measured; without tasks the loss on held-out text."""

    tasks: Annotated[Names, Option(listed=True, metavar="TASK,...")] = Field(
        (), description="leaderboard-v1, or names such as arc_challenge, mmlu; ppl is the loss on text."
    )
    data_dir: Text | None = Field(None, description="Folder with the tasks' rows as JSONL. Default: the hub.")
    texts: Annotated[dict[str, Text], NO_OPTION] = Field(
        default_factory=dict, description="Domain -> text file to measure the loss on. Default: the experts' data."
    )
    limit: Count | None = Field(None, description="Most documents of a task and blocks of a text. Default: all.")
    against_parents: bool = Field(False, description="Compare an MoE with its base, parents and their average.")


class ExportSettings(Closed):
    """What is written for llama.cpp."""

    types: Annotated[Names, Option(listed=True, metavar="TYPE,...")] = Field(
        (), description="Types such as f16, q8_0, q5_k_m, q4_0. Default: a q4 and a q5 for the shape."
    )
    imatrix: Annotated[Strings, Option(metavar="DATA")] = Field(
        (), description="Calibration text: weighs columns by their activations."
    )
    pad256: bool = Field(False, description="Pad rows with zeros to multiples of 256, so that K-quants fit. Exact.")
    check: bool | None = Field(None, description="Compare each file with its source. Default: files under 2 GB.")
    texts: Annotated[Strings, Option("--text", metavar="DATA")] = Field(
        (), description="Text to compare on. Default: a few short ones."
    )
    allow_random: bool = Field(False, description="Export even if only chance has set the routers.")


class CardSettings(Closed):
    """What the model card says beyond what was measured."""

    description: Text | None = Field(None, description="First paragraph of the card, in the author's words.")
    repo: Annotated[Text | None, Option(metavar="ORG/NAME")] = Field(
        None, description="Where the model will be on the hub."
    )
    license: Text | None = Field(None, description="Licence. Default: the one that all sources share.")
    language: Strings = Field((), description="Language codes such as en. Default: those of the sources.")
    base_model: Strings = Field((), description="Hub ids of the parents, if the sources are folders.")
    datasets: Strings = Field((), description="Hub ids of the training data. Default: those of the sources.")
    tags: Strings = Field((), description="Tags besides merge, moe and frankenmoe.")
    prompts: Annotated[Prompts, Option("--prompt")] = Field((), description="Prompt for the card's samples.")
    max_new_tokens: Count = Field(120, description="Longest sample, in tokens.")
    temperature: Temperature = Field(0.0, description="Temperature of the samples; 0 is greedy.")
    seed: Seed = Field(0, description="Seed of the samples.")


def _asked_for(value: object) -> object:
    """`audit: true` and a bare `audit:` ask for a stage with its defaults, `audit: false` does not."""
    return {True: {}, False: None}.get(value, value) if isinstance(value, bool) else value


def with_bare_sections(data: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's data in which a section with nothing behind its colon is an empty one."""
    return {key: {} if value is None and key in SECTIONS else value for key, value in data.items()}


BuildSection = Annotated[
    BuildSettings | None, BeforeValidator(_asked_for, json_schema_input_type=BuildSettings | bool | None)
]
FitSection = Annotated[
    FitSettings | None, BeforeValidator(_asked_for, json_schema_input_type=FitSettings | bool | None)
]
TrainSection = Annotated[
    TrainSettings | None, BeforeValidator(_asked_for, json_schema_input_type=TrainSettings | bool | None)
]
AuditSection = Annotated[
    AuditSettings | None, BeforeValidator(_asked_for, json_schema_input_type=AuditSettings | bool | None)
]
EvalSection = Annotated[
    EvalSettings | None, BeforeValidator(_asked_for, json_schema_input_type=EvalSettings | bool | None)
]
ExportSection = Annotated[
    ExportSettings | None, BeforeValidator(_asked_for, json_schema_input_type=ExportSettings | bool | None)
]
CardSection = Annotated[
    CardSettings | None, BeforeValidator(_asked_for, json_schema_input_type=CardSettings | bool | None)
]

# the sections that say what is done with a model; the model itself is the same without them
SECTIONS = ("build", "fit", "train", "audit", "eval", "export", "card")
