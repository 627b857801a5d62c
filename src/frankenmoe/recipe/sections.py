"""The settings of every stage: sections of a recipe, options of a command and arguments in Python alike."""

from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import Field, GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

from frankenmoe.recipe.fields import (
    Count,
    FitBlock,
    FitMode,
    FitTokens,
    Names,
    Prompts,
    Rate,
    Seed,
    Share,
    Strings,
    Temperature,
    Text,
)
from frankenmoe.recipe.gatemodes import FIT_MODES
from frankenmoe.recipe.settings import NO_OPTION, Closed, Option

SHARD_SIZE = 4 * 10**9  # bytes of one weight file at most; it does not change the model, so it is no setting


class BuildSettings(Closed):
    """How the model itself is written."""

    virtual: bool = Field(False, description="Write only recipe, hashes and routers (megabytes).")
    allow_identical: bool = Field(False, description="Build even if all experts are equal, to train them later.")


class FitSettings(Closed):
    """How routers are fitted."""

    method: Annotated[FitMode | None, Option(metavar="METHOD")] = Field(
        None, description=f"{', '.join(sorted(FIT_MODES))}; default: the recipe's gate_mode."
    )
    tokens: FitTokens = Field(32768, description="Most tokens of data per expert.")
    block: FitBlock = Field(256, description="Tokens read at once.")


class HealSettings(Closed):
    """How experts are refitted to the backbone."""

    tokens: FitTokens = Field(32768, description="Most tokens of data per expert.")
    block: FitBlock = Field(256, description="Tokens read at once.")
    ridge: Rate | None = Field(
        None, description="Ridge, times the mean square of an input; default: chosen for each layer on held-out text."
    )
    rank: Count | None = Field(None, description="Store the changes as adapters of this rank; default: whole matrices.")


class PruneSettings(Closed):
    """What decides which experts go, and what that may cost."""

    tokens: FitTokens = Field(32768, description="Most tokens of each text.")
    block: FitBlock = Field(256, description="Tokens read at once.")
    rise: Share = Field(
        0.05, description="Most that the mean held-out loss may rise, in nats per token; otherwise nothing is written."
    )


class AuditSettings(Closed):
    """What an audit reads and shows."""

    data: Annotated[Strings, NO_OPTION] = Field(
        (), description="Texts, as EXPERT=FILE or FILE; default: the experts' data, else their prompts."
    )
    prompt: Text | None = Field(None, description="Show these tokens one by one; default: the start of each text.")
    tokens: Count = Field(8192, description="Most tokens of each text.")


class EvalSettings(Closed):
    """What is measured; by default the loss on held-out text."""

    tasks: Annotated[Names, Option(listed=True, metavar="TASK,...")] = Field(
        (), description="Tasks: leaderboard-v1, arc_challenge, mmlu, ppl (loss on text) ..."
    )
    data_dir: Text | None = Field(None, description="Folder with the tasks' rows as JSONL; default: the hub.")
    texts: Annotated[dict[str, Text], NO_OPTION] = Field(
        default_factory=dict, description="Domain -> text file to measure the loss on; default: the experts' data."
    )
    limit: Count | None = Field(None, description="Most documents of a task and blocks of a text; default: all.")
    against_parents: bool = Field(False, description="Compare an MoE with its base, its parents and their merges.")
    general_text: Annotated[Text | None, Option(metavar="FILE")] = Field(
        None, description="Text that no parent was tuned on, for --against-parents; default: a built-in one."
    )


class ExportSettings(Closed):
    """What is written for llama.cpp."""

    types: Annotated[Names, Option(listed=True, metavar="TYPE,...")] = Field(
        (), description="Types such as f16, q8_0, q5_k_m, q4_0; default: a q4 and a q5 for the shape."
    )
    imatrix: Annotated[Strings, Option(metavar="DATA")] = Field(
        (), description="Calibration text for the importance of columns."
    )
    pad256: bool = Field(False, description="Pad rows with zeros to multiples of 256 for K-quants; exact.")
    check: bool | None = Field(None, description="Compare each file with its source; default: files under 2 GB.")
    texts: Annotated[Strings, Option("--text", metavar="DATA")] = Field(
        (), description="Text to compare on; default: a few short ones."
    )
    ollama: bool = Field(False, description="Write a Modelfile for Ollama beside each file.")
    allow_random: bool = Field(False, description="Export even if the routers are random.")


class CardSettings(Closed):
    """What the model card says beyond what was measured."""

    description: Text | None = Field(None, description="First paragraph of the card, in the author's words.")
    repo: Annotated[Text | None, Option(metavar="ORG/NAME")] = Field(None, description="The model's name on the hub.")
    license: Text | None = Field(None, description="Licence; default: the one that all sources share.")
    language: Strings = Field((), description="Language codes such as en; default: those of the sources.")
    base_model: Strings = Field((), description="Hub ids of the parents, if the sources are folders.")
    datasets: Strings = Field((), description="Hub ids of the training data; default: those of the sources.")
    tags: Strings = Field((), description="Tags besides merge, moe and frankenmoe.")
    prompts: Annotated[Prompts, Option("--prompt")] = Field((), description="Prompt for the card's samples.")
    max_new_tokens: Count = Field(120, description="Longest sample, in tokens.")
    temperature: Temperature = Field(0.0, description="Temperature of the samples; 0 is greedy.")
    seed: Seed = Field(0, description="Seed of the samples.")


def with_bare_sections(data: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's data, with an empty section for a key without a value."""
    return {key: {} if value is None and key in SECTIONS else value for key, value in data.items()}


def _switch(value: object) -> object:
    """`audit: true` means defaults, `audit: false` no such stage."""
    return {True: {}, False: None}.get(value, value) if isinstance(value, bool) else value


class _OrYesOrNo:
    """Makes a section's type accept true and false as well, also in the JSON schema."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        settings = handler(source)
        given = core_schema.union_schema([settings, core_schema.bool_schema()])
        return core_schema.no_info_before_validator_function(_switch, settings, json_schema_input_schema=given)


Settings = TypeVar("Settings")
Section = Annotated[Settings | None, _OrYesOrNo()]

# the sections for stages; they do not change the model itself
SECTIONS = ("build", "heal", "fit", "train", "audit", "eval", "export", "card")
