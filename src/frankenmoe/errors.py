"""The errors that users see: one sentence each, and a hint."""


class FrankenMoEError(Exception):
    """An error that the user can fix. `message`: what, where, expected, found. `hint`: what to do."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  hint: {self.hint}" if self.hint else self.message


class FrankenMoEWarning(UserWarning):
    """Something was left out or done in another way; the result can be used."""


class RecipeError(FrankenMoEError):
    """The recipe cannot be read or is not valid."""


class SourceError(FrankenMoEError):
    """A source is missing, malformed, unsafe or does not fit the others."""


class PlanError(FrankenMoEError):
    """The recipe and its sources are valid, but the request cannot be fulfilled."""


class ArtifactError(FrankenMoEError):
    """An artifact folder is unfinished, changed, in the way, or not an artifact."""


class NumericsError(FrankenMoEError):
    """A value is NaN, infinite, or out of range of the type it is stored in."""


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or the name of its class if it has none."""
    return next(iter(str(error).splitlines()), type(error).__name__)
