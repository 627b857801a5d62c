"""The settings of quantizers: each function reads one that can be used, or raises SourceError. No torch."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from frankenmoe.checkpoint.patterns import MOST_STEPS, plain_pattern, steps
from frankenmoe.errors import SourceError

Settings = Mapping[str, Any]

AGAIN = "quantize it again, or fetch it again"
MOST = 2**31 - 1
SKIPPED = ("llm_int8_skip_modules", "modules_to_not_convert", "ignore")  # settings that name modules left as they are
PATTERN = "re:"  # what begins a name that is a regular expression


def whole_number(
    settings: Settings, key: str, *, where: str, least: int = 1, most: int = MOST, default: int | None = None
) -> int:
    """A whole number from `least` to `most`; 128.0 is one too, as JSON does not tell it from 128."""
    value = _whole(settings.get(key, default))
    if value is None or not least <= value <= most:
        upper = f"at least {least}" if most == MOST else f"from {least} to {most}"
        raise _odd(settings, key, where=where, expected=f"a whole number, {upper}")
    return value


def number(settings: Settings, key: str, *, where: str) -> float:
    """A number."""
    value = settings.get(key)
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise _odd(settings, key, where=where, expected="a number")
    return float(value)


def group_size(settings: Settings, *, where: str, default: int | None = None) -> int | None:
    """How many columns share a scale; None if a whole row does, which some files write as -1."""
    value = settings.get("group_size", default)
    if value == -1 or (value is None and default is None):
        return None
    return whole_number(settings, "group_size", where=where, default=default)


def sizes(settings: Settings, key: str, *, where: str, count: int | None = None) -> tuple[int, ...]:
    """A list of `count` whole numbers, or of any number of them."""
    value = settings.get(key)
    found = [_whole(each) for each in value] if isinstance(value, list) else []
    wanted = [each for each in found if each is not None and each > 0]
    if not isinstance(value, list) or len(value) != len(wanted) or count not in (None, len(wanted)):
        raise _odd(settings, key, where=where, expected=f"a list of {f'{count} ' if count else ''}sizes")
    return tuple(wanted)


def written_settings(raw: bytes, *, where: str) -> Settings:
    """Settings that are stored as the JSON of a tensor."""
    try:
        found = json.loads(raw)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, Mapping):
        raise SourceError(f"{where} has bytes that are no settings, expected a mapping in JSON", hint=AGAIN)
    return found


def weight_rules(settings: Settings, *, where: str) -> list[Settings]:
    """What compressed-tensors says of the weights of each of its groups that has any."""
    groups = settings.get("config_groups")
    found = list(groups.values()) if isinstance(groups, Mapping) else []
    rules: list[Any] = [group.get("weights") for group in found if isinstance(group, Mapping)]
    rules = [rule for rule in rules if rule is not None]
    if not rules or not all(isinstance(rule, Mapping) for rule in rules):
        raise _odd(settings, "config_groups", where=where, expected="groups of which one at least has weights")
    return rules


def kept_modules(settings: Settings, *, where: str) -> Callable[[str], bool]:
    """Whether the settings leave the module of a tensor as it was."""
    names = [name for key in SKIPPED for name in _names(settings, key, where)]
    plain = [name for name in names if not name.startswith(PATTERN)]
    patterns = [name.removeprefix(PATTERN) for name in names if name.startswith(PATTERN)]
    found = [plain_pattern(pattern) for pattern in patterns]
    expressions = [each for each in found if each is not None]
    if len(expressions) < len(found) or steps(patterns) > MOST_STEPS:
        odd = next((pattern for pattern, each in zip(patterns, found, strict=True) if each is None), patterns[0])
        raise SourceError(
            f"{where} leaves modules out of its quantization by the pattern {odd!r:.80}, expected names, or a few "
            "plain regular expressions",
            hint="write the names of the modules into config.json",
        )

    def kept(name: str) -> bool:
        module = name.removesuffix(".weight")
        return any(each in name for each in plain) or any(each.match(module) for each in expressions)

    return kept


def _names(settings: Settings, key: str, where: str) -> Sequence[str]:
    value = settings.get(key) or []
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise _odd(settings, key, where=where, expected="a list of names of modules")
    return value


def _whole(value: object) -> int | None:
    return int(value) if type(value) is int or (isinstance(value, float) and value.is_integer()) else None


def _odd(settings: Settings, key: str, *, where: str, expected: str) -> SourceError:
    found = f"{key} {settings[key]!r:.60}" if key in settings else f"no {key}"
    return SourceError(f"{where} has {found} among its quantization settings, expected {expected}", hint=AGAIN)
