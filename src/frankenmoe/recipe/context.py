"""What validators need beyond the YAML, and the type of a source's name."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator, PlainSerializer, ValidationInfo, WithJsonSchema

from frankenmoe.recipe.sourcename import SOURCE_SCHEMA, SourceName, parse_source


@dataclass(frozen=True)
class Context:
    """What validators and the recipe need beyond the YAML."""

    folder: Path = field(default_factory=Path.cwd)
    origin: str = "recipe"
    notes: tuple[str, ...] = ()


def read_source(value: object, info: ValidationInfo) -> SourceName:
    """A source's name, with relative paths from the recipe's folder."""
    return parse_source(value, folder=(info.context or Context()).folder)


SourceField = Annotated[
    SourceName,
    BeforeValidator(read_source),
    PlainSerializer(SourceName.to_data),
    WithJsonSchema(SOURCE_SCHEMA),
]
