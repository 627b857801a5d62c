"""The types of a recipe's plain values, and what each refuses; does not know which key has which type."""

import json
from collections.abc import Callable, Mapping
from typing import Annotated, Final, Literal, get_args

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema
from pydantic_core import PydanticKnownError

from frankenmoe.refusal import found, refusal
from frankenmoe.suggest import did_you_mean
from frankenmoe.yamlfile import Location

RANDOM_MODES = frozenset({"random", "uniform_random"})
PROMPT_MODES = frozenset({"hidden", "hidden_avg", "hidden_last", "cheap_embed"})
FIT_MODES = frozenset({"centroid", "lda", "ridge", "logistic", "regret"})
# the modes that measure best from such text, see benchmarks/routers.py
FROM_PROMPTS: Final = "logistic"
FROM_DATA: Final = "regret"

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


def refuse_blank(prompts: tuple[str, ...], *, at: Location) -> None:
    """Raises a refusal for the first prompt without text; `at` is the way to the list."""
    for index, prompt in enumerate(prompts):
        if not prompt.strip():
            raise refusal(NO_TEXT, hint=WRITE_IT, at=(*at, index))


def _not_blank(value: str) -> str:
    if not value.strip():
        raise refusal(NO_TEXT, hint=WRITE_IT)
    return value


def _not_bool(value: object) -> object:
    # to Python `true` is 1; whoever wrote it meant something else
    if isinstance(value, bool):
        raise PydanticKnownError("float_type")
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


def _one_of(*choices: str) -> Callable[[object], object]:
    def check(value: object) -> object:
        if value not in choices:
            expected = ", ".join(choices)
            raise refusal(f"must be one of {expected}, found {found(value)}", hint=did_you_mean(str(value), choices))
        return value

    return check


Text = Annotated[str, AfterValidator(_not_blank)]
# blank ones are refused where they are used: mergekit's files leave them blank where gates are random
Prompts = Annotated[tuple[str, ...], BeforeValidator(_not_one_string, json_schema_input_type=list[str])]
Strings = Annotated[tuple[Text, ...], BeforeValidator(_string_as_list, json_schema_input_type=str | list[str])]
Finite = Annotated[float, Field(allow_inf_nan=False), BeforeValidator(_not_bool)]
Share = Annotated[float, Field(ge=0, allow_inf_nan=False), BeforeValidator(_not_bool)]
Count = Annotated[int, Field(ge=1), BeforeValidator(_not_bool)]
Seed = Annotated[int, Field(ge=0, lt=2**63), BeforeValidator(_not_bool)]
_Mode = Literal[
    "hidden",
    "hidden_avg",
    "hidden_last",
    "cheap_embed",
    "random",
    "uniform_random",
    "centroid",
    "lda",
    "ridge",
    "logistic",
    "regret",
]
GateMode = Annotated[_Mode, BeforeValidator(_one_of(*get_args(_Mode)))]
_Fit = Literal["centroid", "lda", "ridge", "logistic", "regret"]
FitMode = Annotated[_Fit, BeforeValidator(_one_of(*get_args(_Fit)))]
Dtype = Annotated[
    Literal["float32", "float16", "bfloat16"],
    BeforeValidator(_one_of("float32", "float16", "bfloat16")),
    BeforeValidator(_canonical_dtype),
    WithJsonSchema({"enum": [*_DTYPES, "torch.float32", "torch.float16", "torch.bfloat16"]}),
]
Backbone = Annotated[Literal["base", "average"], BeforeValidator(_one_of("base", "average"))]

# what a run of training may change
PARTS = ("routers", "adapters", "norms", "attention", "experts", "embeddings")


def _listed(value: object) -> object:
    """`routers,norms` as well as a list of them."""
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def _in_order(value: tuple[str, ...]) -> tuple[str, ...]:
    if not value:
        raise refusal("must name at least one part, found none", hint=f"choose from {', '.join(PARTS)}")
    return tuple(part for part in PARTS if part in value)


Rate = Annotated[float, Field(gt=0, allow_inf_nan=False), BeforeValidator(_not_bool)]
LearningRate = Annotated[Rate, Field(le=1e6)]  # far more than helps, far less than AdamW overflows at
Steps = Annotated[int, Field(ge=0), BeforeValidator(_not_bool)]
BlockLength = Annotated[int, Field(ge=4), BeforeValidator(_not_bool)]
HeldShare = Annotated[float, Field(gt=0, le=0.5), BeforeValidator(_not_bool)]
Part = Annotated[
    Literal["routers", "adapters", "norms", "attention", "experts", "embeddings"], BeforeValidator(_one_of(*PARTS))
]
Parts = Annotated[
    tuple[Part, ...], BeforeValidator(_listed, json_schema_input_type=str | list[str]), AfterValidator(_in_order)
]
