"""Tokens that a tokenizer puts before every text, and that a GGUF file has no room for: GLM 4's `[gMASK]<sop>`.

A file can be written if its chat template writes them.
"""

from collections.abc import Mapping
from pathlib import Path

from frankenmoe.data.templates import OverLimitError, render
from frankenmoe.errors import SourceError

RUN_IT = "use `frankenmoe chat` or transformers, which run the tokenizer itself"
USER = {"role": "user", "content": "Hello"}
SYSTEM = {"role": "system", "content": "Be brief."}


def front_note(folder: Path, front: str, template: str | None, marks: Mapping[str, str]) -> str:
    """A sentence for the user about the tokenizer in `folder`. SourceError if its template does not write `front`.

    `marks` are the special tokens that the template may use.
    """
    if template is None or not _begins(template, front, marks):
        raise SourceError(
            f"the tokenizer in {folder} puts {front} before a text, but a GGUF file has room for the bos_token alone, "
            "and no chat template begins with it",
            hint=RUN_IT,
        )
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
