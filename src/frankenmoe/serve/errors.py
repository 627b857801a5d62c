"""What goes wrong with a request, in the form of OpenAI's API."""

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from frankenmoe.errors import FrankenMoEError, bounded, brief
from frankenmoe.recipe.refusals import in_words

BUSY, GONE, UNAVAILABLE, TOO_LARGE, LATE = 429, 499, 503, 413, 408
# fields of several types, for which pydantic reports a problem with each type
_SEVERAL: Mapping[tuple[str, ...], str] = {
    ("prompt",): "a text, a list of token ids, or a list of up to 64 of either",
    ("stop",): "a text or a list of up to 64 texts, each of 1 to 1000 characters",
    ("messages", "content"): 'a text, or a list of {"type": "text", "text": ...}',
}


class RequestError(Exception):
    """A refused request or a failed answer. `status` is that of HTTP, `param` the field that is wrong."""

    def __init__(self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None) -> None:
        super().__init__(bounded(message))
        self.status, self.param, self.code = status, param, code

    def body(self) -> dict[str, Any]:
        """The answer as OpenAI's API words it."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def of_error(error: FrankenMoEError) -> RequestError:
    """An error that the user can fix."""
    return RequestError(f"{error.message}; {error.hint}" if error.hint else error.message)


def of_body(error: ValidationError) -> RequestError:
    """The first problem of a body that is not what it must be."""
    first = error.errors(include_url=False)[0]
    place = [part for part in first["loc"] if part != "[key]"]
    if not place:
        return RequestError(f"the body is not what it must be: {brief(first['msg'])}")
    names = [part for part in place if isinstance(part, str)]
    several = next((field for field in _SEVERAL if names[: len(field)] == list(field)), None)
    if several is not None:
        where = _named(place[: place.index(several[-1]) + 1])  # behind it is one of the types
        return RequestError(f"{where} must be {_SEVERAL[several]}", param=where)
    where = _named(place)
    if first["type"] == "extra_forbidden":
        return RequestError(f"{where} is not supported here", param=where, code="unsupported_parameter")
    return RequestError(f"{where} {brief(in_words(first)[0])}", param=where)


def _named(place: Sequence[int | str]) -> str:
    """A place in a body, such as messages.0.role; a name with other characters is quoted."""
    parts = (str(part) if isinstance(part, int) or part.isidentifier() else repr(part) for part in place)
    return brief(".".join(parts))
