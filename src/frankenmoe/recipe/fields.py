"""The types of a recipe's values: bounds, choices, and the error for anything else."""

import json
from collections.abc import Callable, Mapping
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema
from pydantic_core import PydanticKnownError

from frankenmoe.recipe.gatemodes import FIT_MODES, GATE_MODES
from frankenmoe.recipe.refusals import found, refusal
from frankenmoe.suggest import did_you_mean

MODES = list(GATE_MODES)
FITS = [mode for mode in MODES if mode in FIT_MODES]
LARGEST = 10**6  # far above any useful rate, weight or deviation
MOST = 2**31 - 1  # of anything that is counted
LONGEST_NAME = 200
COLDEST, HOTTEST = 0.001, 1000

NO_TEXT, WRITE_IT = "must not be empty, found no text", "write the text or delete the entry"
# the spellings that mergekit, torch and the trainers use
_DTYPES: Mapping[str, str] = {
    "float32": "float32",
    "fp32": "float32",
    "float16": "float16",
    "fp16": "float16",
    "half": "float16",
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
}


def _not_blank(value: str) -> str:
    if not value.strip():
        raise refusal(NO_TEXT, hint=WRITE_IT)
    return value


def _not_long(value: str) -> str:
    if len(value) > LONGEST_NAME:
        text = f"must have at most {LONGEST_NAME} characters, found {len(value):,}"
        raise refusal(text, hint="give a shorter name; tables, pages and file names have it in them")
    return value


def _not_bool(value: object) -> object:
    # Python takes `true` for 1
    if isinstance(value, bool):
        raise PydanticKnownError("float_type")
    return value


def _divides_logits(value: float) -> float:
    # smaller and larger ones overflow or round all logits to the same number
    if value and not COLDEST <= value <= HOTTEST:
        raise refusal(f"must be 0 or from {COLDEST} to {HOTTEST}, found {value}", hint="0 is greedy, 1 is usual")
    return value


def _not_one_string(value: object) -> object:
    if isinstance(value, str):
        raise refusal(
            f"must be a list of strings, found {found(value)}", hint=f"write it as a list: [{json.dumps(value[:40])}]"
        )
    return value


def _string_as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _canonical_dtype(value: object) -> object:
    return _DTYPES.get(value.lower().removeprefix("torch."), value) if isinstance(value, str) else value


def one_of(*choices: str) -> Callable[[object], object]:
    """A validator that rejects anything but these texts."""

    def check(value: object) -> object:
        if value not in choices:
            expected = ", ".join(choices)
            raise refusal(f"must be one of {expected}, found {found(value)}", hint=did_you_mean(str(value), choices))
        return value

    return check


Text = Annotated[str, AfterValidator(_not_blank)]
Name = Annotated[Text, AfterValidator(_not_long)]
# a blank prompt is no mistake: mergekit files have them for random gates, or beside negative prompts
Prompts = Annotated[tuple[str, ...], BeforeValidator(_not_one_string, json_schema_input_type=list[str])]
Strings = Annotated[tuple[Text, ...], BeforeValidator(_string_as_list, json_schema_input_type=str | list[str])]
Finite = Annotated[float, Field(allow_inf_nan=False), BeforeValidator(_not_bool)]
Share = Annotated[float, Field(ge=0, le=LARGEST, allow_inf_nan=False), BeforeValidator(_not_bool)]
Count = Annotated[int, Field(ge=1, le=MOST), BeforeValidator(_not_bool)]
FitTokens = Annotated[Count, Field(ge=512)]
FitBlock = Annotated[Count, Field(ge=8)]
Temperature = Annotated[Share, AfterValidator(_divides_logits)]
Seed = Annotated[int, Field(ge=0, lt=2**63), BeforeValidator(_not_bool)]
GateMode = Annotated[str, BeforeValidator(one_of(*MODES)), WithJsonSchema({"enum": MODES, "type": "string"})]
FitMode = Annotated[str, BeforeValidator(one_of(*FITS)), WithJsonSchema({"enum": FITS, "type": "string"})]
Dtype = Annotated[
    str,
    BeforeValidator(one_of("float32", "float16", "bfloat16")),
    BeforeValidator(_canonical_dtype),
    WithJsonSchema({"enum": [*_DTYPES, "torch.float32", "torch.float16", "torch.bfloat16"]}),
]

# the parts of an MoE that training may change
PARTS = ("routers", "adapters", "norms", "attention", "experts", "embeddings")


def _listed(value: object) -> object:
    """A text with commas as a list."""
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def _some(value: object) -> object:
    """A text with commas as a list of at least one name."""
    if isinstance(value, str) and not _listed(value):
        raise refusal(f"must name at least one, found {found(value)}", hint="leave it out to use the default")
    return _listed(value)


def _in_order(value: tuple[str, ...]) -> tuple[str, ...]:
    if not value:
        raise refusal("must name at least one part, found none", hint=f"choose from {', '.join(PARTS)}")
    return tuple(part for part in PARTS if part in value)


Rate = Annotated[float, Field(gt=0, le=LARGEST, allow_inf_nan=False), BeforeValidator(_not_bool)]
Steps = Annotated[int, Field(ge=0, le=MOST), BeforeValidator(_not_bool)]
BlockLength = Annotated[int, Field(ge=4, le=MOST), BeforeValidator(_not_bool)]
HeldShare = Annotated[float, Field(gt=0, le=0.5), BeforeValidator(_not_bool)]
Names = Annotated[tuple[str, ...], BeforeValidator(_some, json_schema_input_type=str | list[str])]
"""A list of names, or one text with commas between them."""
Part = Annotated[str, BeforeValidator(one_of(*PARTS)), WithJsonSchema({"enum": list(PARTS), "type": "string"})]
Parts = Annotated[
    tuple[Part, ...], BeforeValidator(_listed, json_schema_input_type=str | list[str]), AfterValidator(_in_order)
]
