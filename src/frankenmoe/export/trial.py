"""Whether llama.cpp can use a chat template, tried in a child process: it renders without limits, and on loading too.

The child is this module as a program. It gives the template to a tiny model.
"""

import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from frankenmoe.child import Worker, serve
from frankenmoe.errors import QUOTED, SourceError, first_line
from frankenmoe.export.small import CONTEXT, write_small
from frankenmoe.export.tokenizer import Vocabulary

SECONDS = 10  # to load the tiny model, or to render a conversation
MEMORY = 2**32  # bytes of address space
OCTETS = 256
BOS, EOS = "<s>", "</s>"
_WORKER = Worker("frankenmoe.export.trial")


def can_read(template: str) -> bool:
    """Whether llama.cpp loads a file with this chat template."""
    answer = _WORKER.ask({"template": template}, seconds=SECONDS)
    return answer is not None and bool(answer["loads"])


def check_renders(template: str, turns: Sequence[Mapping[str, Any]]) -> None:
    """Raises SourceError if llama.cpp takes too long to render a conversation, or if the template refuses it."""
    answer = _WORKER.ask({"template": template, "messages": list(turns)}, seconds=SECONDS)
    if answer is not None and "error" in answer:
        raise SourceError(
            f"the file's chat template refuses this conversation: {answer['error']}",
            hint="most templates want user and assistant in turn, system only in front",
        )
    if answer is None:
        raise SourceError(
            f"the file's chat template takes more than {SECONDS} seconds or {MEMORY // 10**9} GB of memory",
            hint="use a file with another chat template",
        )


def _answer(request: Mapping[str, Any]) -> Mapping[str, Any]:
    server = _loaded(str(request["template"]))
    if server is not None and "messages" in request:
        try:
            server.handle_chat_completions({"messages": request["messages"], "max_tokens": 1})
        except RuntimeError as error:
            return {"loads": True, "error": first_line(error)[:QUOTED]}
    return {"loads": server is not None}


@cache
def _loaded(template: str) -> Any:
    """A server of the tiny model with a chat template; None if llama.cpp cannot load it."""
    import xllamacpp

    letters = tuple(chr(OCTETS + byte) for byte in range(OCTETS))
    vocabulary = Vocabulary(
        model="gpt2", pre="gpt-2", tokens=(*letters, BOS, EOS), types=(*[1] * OCTETS, 3, 3), add_bos=True,
        add_eos=False, merges=("a b",), special={"bos": OCTETS, "eos": OCTETS + 1}, chat_template=template,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trial.gguf"
        write_small(file, vocabulary)
        params = xllamacpp.CommonParams()
        params.model.path, params.n_ctx, params.n_parallel = str(file), CONTEXT, 1
        params.n_gpu_layers, params.warmup = 0, False
        for part in (params.cpuparams, params.cpuparams_batch):
            part.n_threads, part.poll = 1, 0
        try:
            server = xllamacpp.Server(params)
            server.handle_completions({"prompt": [0], "n_predict": 1})
        except RuntimeError:
            return None
    return server


if __name__ == "__main__":
    serve(_answer, seconds=SECONDS, memory=MEMORY)
