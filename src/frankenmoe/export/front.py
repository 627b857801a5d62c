"""Tokens that a tokenizer puts before every text, and that a GGUF file has no room for: GLM 4's `[gMASK]<sop>`.

A file can be written if its chat template writes them.
"""

from collections.abc import Mapping

from frankenmoe.data.templates import OverLimitError, render
from frankenmoe.errors import SourceError

USER = {"role": "user", "content": "Hello"}
SYSTEM = {"role": "system", "content": "Be brief."}


def front_note(front: str, template: str | None, marks: Mapping[str, str]) -> str | None:
    """A sentence for the user; None if the template's conversations do not begin with `front`.

    `marks` are the special tokens that it may use. Raises SourceError for a template that cannot be used.
    """
    if template is None or not _begins(template, front, marks):
        return None
    return (
        f"the tokenizer puts {front} before every text, for which a GGUF file has no room: the chat template "
        "has it, other prompts must begin with it"
    )


def _begins(template: str, front: str, marks: Mapping[str, str]) -> bool:
    if not render(template, [USER], add_generation_prompt=True, **marks).startswith(front):
        return False
    try:
        return render(template, [SYSTEM, USER], add_generation_prompt=True, **marks).startswith(front)
    except OverLimitError:
        raise
    except SourceError:  # it takes no system message
        return True
