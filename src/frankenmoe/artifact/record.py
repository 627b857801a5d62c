"""frankenmoe.json, the record of an artifact: what it must say, and how it is read. Does not import torch."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, ValidationError, model_validator

from frankenmoe.checkpoint.header import parse_object
from frankenmoe.checkpoint.jsonfile import small_bytes
from frankenmoe.errors import ArtifactError
from frankenmoe.recipe.refusals import first_problem, found, refusal

RECORD_VERSION = 1
MODEL_TYPE = "frankenmoe"  # in the config.json of a virtual artifact, by which transformers finds its class
FORMS = ("virtual", "built")
BACKBONE = "backbone"  # the stage that says how the backbone was chosen; it comes first
ADOPT = "adopt"  # the stage that says where a mixture of another program comes from
HEAL = "heal"  # the stage that refitted experts to the backbone
BODY_STAGES = frozenset({BACKBONE, HEAL})  # these say nothing about routers

Form = Literal["virtual", "built"]


def _text(value: object) -> str:
    if not isinstance(value, str) or "\0" in value:
        raise refusal(f"must be text, found {found(value)}", hint="write text")
    return value


# pydantic's own text refuses names with bytes that are no UTF-8, which Linux allows
AnyText = Annotated[str, PlainValidator(_text)]


class _Row(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)

    file: AnyText


class SourceFile(_Row):
    """A file of weights that the artifact was made from. `sha256` is None for a built artifact."""

    bytes: int
    fingerprint: str
    sha256: str | None


class ConfigFile(_Row):
    """A config or tokenizer file that the artifact was made from."""

    sha256: str | None


class Record(BaseModel):
    """What a record must say. Other keys are allowed and kept."""

    model_config = ConfigDict(extra="allow", strict=True)

    form: Form
    recipe: dict[str, Any]
    recipe_folder: AnyText
    recipe_folder_from_here: AnyText
    dtype: AnyText
    base_config: dict[str, Any]
    experts: Annotated[list[AnyText], Field(min_length=1)]
    shared_experts: list[AnyText]
    experts_per_token: int
    sources: list[SourceFile]
    configs: list[ConfigFile]
    files: dict[str, Any]
    format: AnyText | None = None

    @model_validator(mode="after")
    def _built_has_a_format(self) -> "Record":
        if self.form == "built" and self.format is None:
            raise refusal("is missing, expected text, found none", hint="build the artifact again", at=("format",))
        return self


def read_record(file: Path) -> dict[str, Any]:
    """The record in `file` as plain data; ArtifactError if it cannot be read or is not complete."""
    try:
        record = parse_object(small_bytes(file))
    except OSError as error:
        raise ArtifactError(f"{file} cannot be read: {error.strerror}", hint="check its permissions") from error
    except ValueError as error:
        raise ArtifactError(f"{file} is not JSON: {error}", hint="build the artifact again") from error
    if record.get("form") not in FORMS:
        raise ArtifactError(f"{file} does not describe an artifact", hint="build the artifact again")
    if record.get("version") != RECORD_VERSION:
        raise ArtifactError(
            f"{file} is of version {record.get('version')}, this frankenmoe reads version {RECORD_VERSION}",
            hint="update frankenmoe, or build the artifact again",
        )
    try:
        Record.model_validate(record)
    except ValidationError as error:
        raise ArtifactError(
            f"{file}: {first_problem(error)}",
            hint="it was edited, or an earlier frankenmoe made it: build the artifact again",
        ) from None
    return record
