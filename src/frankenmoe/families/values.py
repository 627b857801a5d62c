"""Which values a dense config.json may have: of the kind of their defaults, and such that tables can be read."""

from collections.abc import Callable, Mapping
from typing import Any

from frankenmoe.errors import first_line
from frankenmoe.families.config import COPIED
from frankenmoe.families.known import NEUTRAL
from frankenmoe.families.rotary import rope, with_nested, written_rope
from frankenmoe.families.spec import FULL, Config, Family

MOST_LAYERS = 10_000  # tables are expanded per layer
LARGEST = 1e30  # far above every number of a config that a model can compute with
# what reading a table raises for a value of another kind, or for one that does not fit the others
_UNREADABLE = (TypeError, ValueError, ArithmeticError, LookupError, AttributeError)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < LARGEST


def _is_count(value: object) -> bool:
    return type(value) is int and abs(value) < 2**31


def _are_ids(value: object) -> bool:
    return _is_count(value) or (isinstance(value, list) and all(map(_is_count, value)))


def _are_plain(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) or _is_count(each) for each in value)


def _is_rotary(value: object) -> bool:
    if isinstance(value, list):
        return all(map(_is_number, value))
    return isinstance(value, str | bool | Mapping) or _is_number(value)


Check = tuple[Callable[[Any], bool], str]
_NUMBER: Check = (_is_number, "a finite number")
_WORD: Check = (lambda value: isinstance(value, str), "text")
# the kind of a default -> what a value of that field must be; `bool` comes before `int`, which Python takes it for
_LIKE_DEFAULT: Mapping[type, Check] = {
    bool: (lambda value: isinstance(value, bool), "true or false"),
    int: (_is_count, "a whole number"),
    float: _NUMBER,
    str: _WORD,
}
_IDS: Check = (_are_ids, "a token id or a list of them")
_PLAIN: Check = (_are_plain, "a list of words or whole numbers")
# fields without a default, or with defaults of several kinds
_NAMED: Mapping[str, Check] = {
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), _IDS),
    **dict.fromkeys(("layer_types", "no_rope_layers", "full_attn_idxs"), _PLAIN),
}
_SIZES = {
    **dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads"), 2**31 - 1),
    "num_hidden_layers": MOST_LAYERS,
}
_NUMBERS: Check = (lambda value: isinstance(value, list) and all(map(_is_number, value)), "a list of finite numbers")
# rotary settings of which the kind is known, and all others
_OF_ROTARY: Mapping[str, Check] = {
    **dict.fromkeys(("rope_type", "type"), _WORD),
    **dict.fromkeys(("short_factor", "long_factor"), _NUMBERS),
    **dict.fromkeys(
        (
            *("factor", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings"),
            *("low_freq_factor", "high_freq_factor", "attention_factor", "beta_fast", "beta_slow"),
        ),
        _NUMBER,
    ),
}
_ROTARY: Check = (_is_rotary, "a number, a list of numbers or a word")
# rotary type -> the settings without which transformers and llama.cpp cannot compute it
_NEEDED: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("linear", "dynamic", "yarn"), ("factor",)),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "longrope": ("short_factor", "long_factor"),
}


def odd_value(family: Family, config: Config) -> str | None:
    """What is wrong with the values of a config, such as "has rope_theta 'x', expected a finite number"; else None."""
    usual = {name: type(value) for name, value in family.defaults.items()}
    checks = {name: _LIKE_DEFAULT[kind] for name, kind in usual.items() if kind in _LIKE_DEFAULT}
    for name, (holds, expected) in {**checks, **_NAMED}.items():
        value = config.get(name)
        if value is not None and not holds(value):
            return f"has {name} {value!r:.40}, expected {expected}"
    # a size that the family derives from other fields is read below
    for name, most in ((name, most) for name, most in _SIZES.items() if name not in family.reads):
        value = config.get(name)
        if type(value) is not int or not 1 <= value <= most:
            return f"has {name} {value!r:.40}, expected a whole number from 1 to {most}"
    rotary = written_rope(config)
    if not isinstance(rotary, Mapping):
        return f"has rotary settings {rotary!r:.40}, expected a mapping such as {{'rope_type': 'default'}}"
    for name, value in (setting for settings in with_nested(rotary) for setting in settings.items()):
        holds, expected = _OF_ROTARY.get(name, _ROTARY)
        if value is not None and not holds(value):
            return f"has {name:.40} {value!r:.40} among its rotary settings, expected {expected}"
    try:
        for name in (*NEUTRAL, *COPIED):
            family.read(config, name)
        family.shapes(family.backbone, config)
        if not family.layered(config) and not family.read(config, "own_experts"):
            return "has no layer with an FFN, expected at least one"
        return _incomplete_rope(family, config)
    except _UNREADABLE as error:
        return f"has settings that do not fit together ({type(error).__name__} {first_line(error):.100})"


def _incomplete_rope(family: Family, config: Config) -> str | None:
    """What its rotary settings lack, or those of a kind of layer."""
    every = family.rope_by_kind(family.filled(config)) if family.rope_by_kind else {FULL: rope(family, config)}
    for rotary in every.values():
        kind = str(rotary.get("rope_type"))
        lacking = [name for name in _NEEDED.get(kind, ()) if rotary.get(name) is None]
        if lacking:
            return f"has rotary settings of type {kind} without {', '.join(lacking)}"
    return None
