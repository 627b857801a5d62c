"""The base of all settings: a recipe's section, the command line and Python use the same model."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from frankenmoe.errors import RecipeError
from frankenmoe.recipe.refusals import found, refuse_unknown_keys, setting_error


class Closed(BaseModel):
    """Part of a recipe: frozen, and without unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, value: object) -> object:
        """Rejects unknown keys by name before anything else seems missing; a key without a value is left out."""
        if not isinstance(value, dict):
            return value
        value = {str(key): item for key, item in value.items()}
        refuse_unknown_keys(value, known=[field.alias or name for name, field in cls.model_fields.items()])
        return {key: item for key, item in value.items() if item is not None}

    def to_dict(self) -> dict[str, Any]:
        """Plain data without defaults."""
        plain: dict[str, Any] = self.model_dump(mode="json", exclude_defaults=True)
        return plain


@dataclass(frozen=True)
class Option:
    """The option of a setting, if it does not follow from the setting's name and type.

    `flag` is by default the name with dashes, `metavar` that of click. A `listed` setting takes one text with commas
    and is not repeated. A `hidden` setting has no option.
    """

    flag: str | None = None
    metavar: str | None = None
    listed: bool = False
    hidden: bool = False


NO_OPTION = Option(hidden=True)


Settings = TypeVar("Settings", bound=Closed)


def settings_with(settings: Settings, changes: Mapping[str, Any]) -> Settings:
    """The same settings with some changed by name; RecipeError for one that is unknown or out of range."""
    if not isinstance(settings, Closed):
        raise RecipeError(
            f"settings must be the settings of a stage, found {found(settings)}", hint="give settings by name instead"
        )
    if not changes:
        return settings
    try:
        return type(settings).model_validate(settings.model_dump(exclude_unset=True) | _plain(changes))
    except ValidationError as error:
        raise setting_error(error, where=type(settings).__name__.removesuffix("Settings").lower()) from None


def _plain(value: Any) -> Any:
    """The same value with paths as text, at any depth."""
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return str(value) if isinstance(value, Path) else value
