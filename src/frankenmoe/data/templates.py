"""Renders chat templates with limits on time, memory and output: they are programs from downloaded models.

transformers renders them, in a child process without torch, which is this module as a program. Jinja's sandbox keeps a
template from the files of this machine, but not from loops and products that never end.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from frankenmoe.child import Worker, serve
from frankenmoe.errors import SourceError, first_line

SECONDS = 5  # for one conversation; usual templates take milliseconds
MEMORY = 2**31  # bytes of address space
MORE, TIMES = 2**20, 8  # a template may write so many characters, and so many for each one that it was given
TOO_MUCH = f"it takes more than {SECONDS} seconds or {MEMORY // 10**9} GB of memory"
SHOWN = 200  # characters of an error
HINT = (
    "most templates want user and assistant in turn, system only in front; if the template itself is wrong, repair "
    "or remove chat_template.jinja (or the one in tokenizer_config.json)"
)

_WORKER = Worker("frankenmoe.data.templates")
Turns = Sequence[Mapping[str, Any]]


def rendered(turns: Turns, tokenizer: Any, *, tools: Sequence[Any] = (), add_generation_prompt: bool = False) -> str:
    """The conversation as text: what `apply_chat_template` of transformers gives with `tokenize=False`.

    Raises SourceError if the template fails, OverLimitError if it exceeds the limits.
    """
    given = list(tools) or None
    try:
        template = tokenizer.get_chat_template(None, given)
    except ValueError as error:  # several, and none is the default
        raise _refusal(turns, first_line(error)) from error
    options = {"tools": given, "add_generation_prompt": add_generation_prompt, **tokenizer.special_tokens_map}
    return render(template, turns, **options)


def render(template: str, turns: Turns, **options: Any) -> str:
    """The conversation by a template's text; `options` are what the template may use beside it. See `rendered`."""
    if not turns:
        raise _refusal(turns, "it has no turns")
    said = [{key: value for key, value in turn.items() if value is not None} for turn in turns]
    request = {"chat_template": template, "conversations": [said], **options}
    answer = _WORKER.ask(request, seconds=SECONDS) or {"over": TOO_MUCH}
    if "over" in answer:
        raise OverLimitError(f"the chat template is not used: {answer['over']}", hint=HINT)
    if "error" in answer:
        raise _refusal(turns, answer["error"])
    return str(answer["text"])


def _refusal(turns: Turns, why: str) -> SourceError:
    roles = ", ".join(str(turn.get("role")) for turn in turns)
    return SourceError(f"the chat template refuses a conversation of {roles[:SHOWN]}: {why[:SHOWN]}", hint=HINT)


class OverLimitError(SourceError):
    """A chat template takes too much time or memory, or writes too much."""


def _answer(request: Mapping[str, Any]) -> Mapping[str, Any]:
    """In the child process: the text of a conversation, the template's error, or the limit that it went over."""
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        (text,), _ = render_jinja_template(**request)
    except MemoryError:
        return {"over": TOO_MUCH}
    except OverflowError as error:  # of a range
        return {"over": first_line(error)[:SHOWN]}
    except Exception as error:  # a template is a program and may raise anything
        return {"error": first_line(error)[:SHOWN]}
    if len(text) > MORE + TIMES * len(json.dumps(request)):
        return {"over": f"it writes {len(text):,} characters"}
    return {"text": text}


if __name__ == "__main__":
    _answer({"chat_template": "", "conversations": [[]]})  # imports before the clock runs
    serve(_answer, seconds=SECONDS, memory=MEMORY)
