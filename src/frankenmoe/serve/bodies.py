"""The bodies of requests: OpenAI's fields that are supported, and the fields that change the routing."""

from abc import abstractmethod
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from frankenmoe.serve.errors import RequestError, of_body

MOST_CHOICES, MOST_PROMPTS, MOST_STOPS, MOST_TOP = 16, 64, 64, 20
MOST_BIAS = 100.0  # of an expert's logit; larger ones would only round the other logits away
SEEDS = 2**63

# a list is refused at its first bad entry, because a body could have a hundred thousand of them
Text = Annotated[str, Field(max_length=2**20)]
Stop = Annotated[str, Field(min_length=1, max_length=1000)]
Stops = Annotated[list[Stop], Field(fail_fast=True, max_length=MOST_STOPS)]
Id = Annotated[int, Field(ge=0, lt=2**31)]
Ids = Annotated[list[Id], Field(fail_fast=True, min_length=1)]
Count = Annotated[int, Field(ge=1, lt=2**31)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Bias = Annotated[float, Field(ge=-MOST_BIAS, le=MOST_BIAS)]
Name = Annotated[str, Field(max_length=1000)]


class Body(BaseModel):
    """Unknown fields are refused, null is as if it was not given, and a text is not taken for a number."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: Any) -> Any:
        return {key: value for key, value in data.items() if value is not None} if isinstance(data, dict) else data


class StreamOptions(Body):
    """What a stream has beside the answer."""

    include_usage: bool = Field(False, description="End with a chunk that counts the tokens.")


class Part(Body):
    """A piece of a message; only text."""

    type: Literal["text"]
    text: Text


class Message(Body):
    """A turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[Part], Field(fail_fast=True)]
    name: str | None = Field(None, description="Ignored.")

    def turn(self) -> dict[str, str]:
        """The turn as chat templates take it."""
        said = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": said}


class Asked(Body):
    """What both kinds of completion can ask for."""

    model: Name = Field(description="A name that /v1/models lists.")
    temperature: Annotated[float, Field(ge=0, le=2)] = Field(1.0, description="0 is greedy.")
    top_p: Annotated[float, Field(gt=0, le=1)] | None = Field(None, description="Default: as the model's own settings.")
    stop: Stop | Stops | None = Field(None, description="Texts at which the answer ends; they are not part of it.")
    seed: Annotated[int, Field(ge=-SEEDS, lt=SEEDS)] | None = Field(None, description="Equal seeds give equal answers.")
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] = Field(1, description="Answers to make.")
    presence_penalty: Penalty = Field(0.0, description="For GGUF files only.")
    frequency_penalty: Penalty = Field(0.0, description="For GGUF files only.")
    stream: bool = Field(False, description="Send the answer as server-sent events while it is made.")
    stream_options: StreamOptions = Field(default_factory=StreamOptions)
    user: str | None = Field(None, description="Ignored.")
    experts_per_token: Count | None = Field(None, description="Experts that each token gets, in every layer.")
    disable_experts: Annotated[list[Name], Field(fail_fast=True)] = Field([], description="Experts to do without.")
    expert_bias: dict[Name, Bias] = Field({}, description="Numbers that are added to the router's logits.")
    trace: bool = Field(False, description="Also tell which experts each token got.")

    @property
    def stops(self) -> tuple[str, ...]:
        return tuple([self.stop] if isinstance(self.stop, str) else self.stop or ())

    @property
    @abstractmethod
    def most(self) -> int | None:
        """The number of tokens that was asked for."""

    @property
    @abstractmethod
    def top(self) -> int | None:
        """The number of likely tokens to report for each token; None to report no probabilities."""


class Chat(Asked):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1)]
    max_tokens: Count | None = Field(None, description="Longest answer; the server has a limit, too.")
    max_completion_tokens: Count | None = Field(None, description="The same.")
    logprobs: bool = Field(False, description="Also tell how likely each token was.")
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_TOP)] | None = Field(None, description="And the likeliest ones.")

    @model_validator(mode="after")
    def _together(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError("top_logprobs needs logprobs: true", param="top_logprobs")
        return self

    @property
    def most(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def top(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class Complete(Asked):
    """The body of /v1/completions."""

    prompt: (
        Text
        | Annotated[list[Text], Field(fail_fast=True, min_length=1, max_length=MOST_PROMPTS)]
        | Ids
        | Annotated[list[Ids], Field(fail_fast=True, min_length=1, max_length=MOST_PROMPTS)]
    )
    max_tokens: Annotated[int, Field(ge=0, lt=2**31)] = 16
    logprobs: Annotated[int, Field(ge=0, le=MOST_TOP)] | None = Field(
        None, description="Also tell how likely each token was, and this many of the likeliest ones."
    )
    echo: bool = Field(False, description="Begin the answer with the prompt.")

    @property
    def prompts(self) -> list[str | list[int]]:
        """Every prompt, as text or as token ids."""
        one = isinstance(self.prompt, str) or isinstance(self.prompt[0], int)
        return [self.prompt] if one else list(self.prompt)  # type: ignore[list-item, arg-type]

    @property
    def most(self) -> int | None:
        return self.max_tokens

    @property
    def top(self) -> int | None:
        return self.logprobs


class Prompts(Body):
    """The prompts of one expert."""

    positive: Annotated[list[Text], Field(fail_fast=True, min_length=1)]
    negative: Annotated[list[Text], Field(fail_fast=True)] = []


class Refit(Body):
    """The body of /v1/frankenmoe/refit."""

    model: Name
    prompts: dict[Name, Prompts]


Kind = TypeVar("Kind", bound=Body)


def read(kind: type[Kind], body: bytes) -> Kind:
    """The body of a request. Raises RequestError if it is not JSON, or not what it must be."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise of_body(error) from None
