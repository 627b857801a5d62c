"""The errors a user can meet, each one sentence with a way out; knows nothing of what raises them."""


class FrankenMoEError(Exception):
    """Something the user can act on: `message` says what, where, expected and found; `hint` says what to do."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  hint: {self.hint}" if self.hint else self.message


class RecipeError(FrankenMoEError):
    """The recipe file cannot be read or does not say something that can be built."""


class SourceError(FrankenMoEError):
    """A source checkpoint is missing, malformed, unsafe or unlike its siblings."""


class PlanError(FrankenMoEError):
    """The recipe and its sources are sound, but what they ask for cannot be done."""


class ArtifactError(FrankenMoEError):
    """An artifact folder is unfinished, changed, in the way, or not one of ours."""


class NumericsError(FrankenMoEError):
    """A value is NaN, infinite, or overflows the type it is to be stored in."""
