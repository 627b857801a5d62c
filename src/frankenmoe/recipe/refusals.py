"""Validation errors as one sentence with a line number and a hint."""

from collections.abc import Iterable, Mapping

from pydantic import ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

from frankenmoe.errors import RecipeError, brief
from frankenmoe.recipe.yaml import Location, YamlFile
from frankenmoe.suggest import did_you_mean

# pydantic's error types -> what was expected, in our words
_EXPECTED: Mapping[str, str] = {
    "string_type": "text",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "a mapping of keys to values",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "model_type": "a mapping of keys to values",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_parsing_size": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "greater_than_equal": "at least {ge:g}",
    "greater_than": "more than {gt:g}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "too_short": "a list with at least one entry",
    "literal_error": "{expected}",
}
_HINTS: Mapping[str, str] = {
    "string_type": "put quotes around a value that YAML takes for something else",
    "tuple_type": "write one entry per line, each after '- '",
    "model_type": "write `key: value` lines, indented below it",
    "too_short": "write one entry per line, each after '- '",
}
# pydantic adds the kind of a value to its location; names of kinds start with this mark, which no key does
TAG = "<kind>"
_ANY_LINE = "write such a value on this line, or delete the line to use the default"


def refusal(text: str, *, hint: str, at: Location = ()) -> PydanticCustomError:
    """An error for validators to raise. `text` continues after the key's name; `at` is the location of that key."""
    return PydanticCustomError("recipe", "{text}", {"text": text, "hint": hint, "at": at})


def refuse_unknown_keys(table: Mapping[str, object], *, known: Iterable[str], at: Location = ()) -> None:
    """Rejects the first unknown key of `table`, with a suggestion."""
    keys = tuple(known)
    for key in table:
        if key not in keys:
            text = f"is not a known key, expected one of {', '.join(keys)}"
            raise refusal(text, hint=did_you_mean(key, keys), at=(*at, key))


def found(value: object) -> str:
    """A short description of a value, on one line."""
    match value:
        case None:
            return "nothing"
        case bool():
            return str(value).lower()
        case str():
            return f"the text {value[:40]!r}"
        case Mapping():
            return f"a mapping with the keys {brief(', '.join(map(str, value)))}" if value else "an empty mapping"
        case list() | tuple():
            return f"a list of {len(value)}" if value else "an empty list"
    return str(value)[:40]


def recipe_error(error: ValidationError, *, file: YamlFile) -> RecipeError:
    """The first error of the file, by line. Errors that only follow from an error inside the same key are left out."""
    problems = error.errors(include_url=False)
    places = [_location(each) for each in problems]
    causes = [
        each
        for each, place in zip(problems, places, strict=True)
        if not any(len(other) > len(place) and other[: len(place)] == place for other in places)
    ]
    problem = min(causes, key=lambda each: file.line(_location(each)))
    location = _location(problem)
    text, hint = in_words(problem)
    return RecipeError(f"{file.origin}:{file.line(location)}: {_label(location)} {text}", hint=hint)


def first_problem(error: ValidationError) -> str:
    """The first thing that is wrong in data without lines, such as "experts[1] must be text, found 3"."""
    problem = error.errors(include_url=False)[0]
    return f"{_label(_location(problem))} {in_words(problem)[0]}"


def setting_error(error: ValidationError, *, where: str) -> RecipeError:
    """The first thing wrong with settings that came from the command line or from Python; `where` is the stage."""
    problem = error.errors(include_url=False)[0]
    hint = in_words(problem)[1]
    return RecipeError(
        f"{where}: {first_problem(error)}", hint="leave it out to use the default" if hint == _ANY_LINE else hint
    )


def _label(location: Location) -> str:
    """A location as text: ("experts", 1, "name") -> experts[1].name."""
    joined = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)
    return brief(joined.removeprefix(".")) or "the recipe"


def _location(problem: ErrorDetails) -> Location:
    loc = (part for part in problem["loc"] if not str(part).startswith(TAG))
    return (*loc, *problem.get("ctx", {}).get("at", ()))


def in_words(problem: ErrorDetails) -> tuple[str, str]:
    """(what was expected and found, hint)"""
    kind, context = problem["type"], problem.get("ctx", {})
    if kind == "recipe":
        return context["text"], context["hint"]
    if kind == "missing":
        return "is missing, expected a value, found none", "add a line with this key"
    # pydantic has a hundred more error types; for those its own message is used
    expected = _EXPECTED[kind].format(**context) if kind in _EXPECTED else f"valid ({problem['msg']})"
    return f"must be {expected}, found {found(problem['input'])}", _HINTS.get(kind, _ANY_LINE)
