"""Runs a GGUF file with llama.cpp in this process, on the CPU: tokens, probabilities, chat.

Uses the public API of xllamacpp. llama.cpp aborts the process on some broken files; those are rejected first.
"""

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from frankenmoe import system
from frankenmoe.checkpoint.gguffile import AGAIN, VALUES, facts_of, open_gguf, whole
from frankenmoe.checkpoint.quantize import INSTALL
from frankenmoe.counted import counted
from frankenmoe.errors import ArtifactError, SourceError
from frankenmoe.export.trial import can_read, check_renders
from frankenmoe.families.archs import ARCHS, MAX_EXPERTS

STAND_IN = "chatml"  # a chat template that llama.cpp knows by name
QUIET = -1  # verbosity
NORMAL = 1  # type of a token that is neither special nor a byte
MOST_CONTEXT = 8192  # tokens, unless more are asked for: the cache grows with them
SMALL = 2**29  # bytes; for smaller files one thread is faster than several
REPACKED = 0.5  # of the free memory that a second copy of the weights may take


@dataclass(frozen=True)
class Distribution:
    """The most likely next tokens, best first, with the logarithms of their probabilities. `after` is the number of
    tokens in the prompt."""

    ids: NDArray[np.int64]
    logprobs: NDArray[np.float64]
    after: int


class Engine:
    """A loaded file. Requests are greedy by default, and reuse the prefix they share with the previous one."""

    def __init__(
        self, file: Path, *, context: int | None = None, threads: int | None = None, exact_cache: bool = True
    ) -> None:
        """Loads a file. Raises ArtifactError if llama.cpp cannot load it or is not installed.

        `context` is in tokens, by default what the file allows and at most MOST_CONTEXT. `exact_cache` keeps keys and
        values in float32, so that only the weights are rounded; else they are in float16, or in the type that the file
        asks for. Afterwards `reads_template` is false if llama.cpp cannot read the file's chat template, or must not.
        """
        facts = check_loadable(file)
        self._whole_token = int(facts["whole_token"])
        self._template = str(facts["chat_template"])
        try:
            import xllamacpp
        except ImportError as error:
            raise ArtifactError("running a GGUF file needs llama.cpp, which is not installed", hint=INSTALL) from error
        params = xllamacpp.CommonParams()
        params.model.path = str(file)
        allowed = int(facts.get(f"{facts.get('general.architecture')}.context_length", 4096))
        params.n_ctx = context or min(allowed, MOST_CONTEXT)
        params.n_parallel = 1
        params.n_gpu_layers = 0
        params.warmup = False
        params.no_extra_bufts = not can_repack(file.stat().st_size)
        params.verbosity = QUIET
        params.endpoint_metrics = True
        count = threads or (system.cores() if file.stat().st_size > SMALL else 1)
        for part in (params.cpuparams, params.cpuparams_batch):
            part.n_threads = count
            part.poll = 0
        if exact_cache:
            params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
            params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        elif facts.get(VALUES) == "bf16":
            params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_BF16
        self.reads_template = not self._template or can_read(self._template)
        if not self.reads_template:
            params.chat_template = STAND_IN
        try:
            with _silence():
                self._server = xllamacpp.Server(params)
                # A server that is destroyed before its thread runs never ends. This answer comes from that thread.
                self._server.handle_metrics()
        except Exception as error:
            raise ArtifactError(
                f"llama.cpp cannot load {file}: {error}",
                hint="the file is damaged, or this version of xllamacpp does not know its architecture",
            ) from error

    def next_token(self, prompt: str | Sequence[int], *, top: int) -> Distribution:
        """The `top` most likely tokens after a text, which llama.cpp tokenizes, or after ids."""
        said = prompt if isinstance(prompt, str) else list(prompt)
        # llama.cpp reports no probabilities after part of a character, so the bias forces a whole token. The
        # probabilities are those without the bias.
        bias = [[self._whole_token, 1000.0]]
        answer = self._complete({"prompt": said, "n_predict": 1, "n_probs": top, "logit_bias": bias})
        entries = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        return Distribution(
            np.array([entry["id"] for entry in entries], np.int64),
            np.array([entry["logprob"] for entry in entries], np.float64),
            answer["usage"]["prompt_tokens"],
        )

    def greedy(self, ids: Sequence[int], *, tokens: int) -> tuple[int, ...]:
        """The `tokens` most likely tokens after `ids`, one after the other."""
        found: list[int] = []
        for _ in range(tokens):
            found.append(int(self.next_token((*ids, *found), top=1).ids[0]))
        return tuple(found)

    def ends_at(self, token: int) -> bool:
        """Whether a reply ends at this token, which a bias forces."""
        answer = self._complete({"prompt": [0], "n_predict": 2, "logit_bias": [[token, 1e6]]})
        return bool(answer["choices"][0]["finish_reason"] == "stop")

    def begins(self) -> bool:
        """Whether llama.cpp puts a token before every text, so that it can write after an empty one."""
        return int(self._complete({"prompt": "", "n_predict": 1})["usage"]["prompt_tokens"]) > 0

    def tokens_per_second(self, ids: Sequence[int], *, tokens: int) -> float:
        """Speed of generation after `ids`."""
        answer = self._complete({"prompt": list(ids), "n_predict": tokens, "ignore_eos": True})
        return float(answer["timings"].get("predicted_per_second") or 0)

    def chat(
        self,
        history: Sequence[Mapping[str, str]],
        *,
        tokens: int,
        temperature: float,
        seed: int,
        on_text: Callable[[str], None],
    ) -> str:
        """A reply, streamed to `on_text`."""
        made: list[str] = []

        def hear(piece: Mapping[str, Any]) -> bool:
            for choice in piece.get("choices") or []:
                text = (choice.get("delta") or {}).get("content") or choice.get("text") or ""
                if text:
                    made.append(text)
                    on_text(text)
            return False

        options = {"n_predict": tokens, "max_tokens": tokens, "temperature": temperature, "seed": seed}
        self.stream(self.said(history), options, hear)
        return "".join(made)

    def said(self, turns: Sequence[Mapping[str, str]]) -> str | list[Mapping[str, str]]:
        """What `stream` reads of a conversation: the turns, or their plain text if there is no template to use."""
        if self._template and self.reads_template:
            return list(turns)
        return "".join(turn["content"] for turn in turns)

    def stream(
        self,
        said: str | Sequence[int] | Sequence[Mapping[str, str]],
        options: Mapping[str, Any],
        hear: Callable[[Mapping[str, Any]], bool],
    ) -> None:
        """Gives what follows a text, ids, or turns to `hear`, as the chunks of OpenAI's API, until that is true.

        `options` are llama.cpp's. Turns are formatted by the file's chat template. Raises SourceError if that refuses
        them, or llama.cpp the request.
        """
        failed: list[str] = []

        def listen(piece: Mapping[str, Any]) -> bool:
            if "error" in piece:
                failed.append(str(piece["error"].get("message", piece["error"])))
                return True
            return hear(piece)

        turns = [each for each in said if isinstance(each, Mapping)]
        if turns:
            check_renders(self._template, turns)
            self._server.handle_chat_completions({"messages": turns, **options, "stream": True}, listen)
        else:
            prompt = said if isinstance(said, str) else list(said)
            self._server.handle_completions({"prompt": prompt, **options, "stream": True}, listen)
        if failed:
            raise SourceError(
                f"llama.cpp rejects this conversation: {failed[0]}", hint="shorten it, or start a new one"
            )

    def _complete(self, request: dict[str, Any]) -> dict[str, Any]:
        answer = self._server.handle_completions({"temperature": 0, "cache_prompt": True, **request})
        if "choices" not in answer:
            raise SourceError(f"llama.cpp answers {str(answer)[:200]}", hint="ask for fewer tokens")
        return dict(answer)


def check_loadable(file: Path) -> dict[str, Any]:
    """The metadata of a file. Raises ArtifactError if it is not GGUF, is truncated, or would abort the process.

    llama.cpp aborts on an MoE whose metadata lack a valid number of experts per token.
    """
    reader = open_gguf(file)
    with whole(file):
        facts = facts_of(reader)
        template = reader.fields.get("tokenizer.chat_template")
        facts["chat_template"] = template.contents() if template else ""
        words, kinds = (reader.fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "token_type"))
        facts["whole_token"] = next(
            (at for at, word in enumerate(words) if word.isascii() and word.isalnum() and kinds[at] == NORMAL), 0
        )
    if len(set(words)) < len(words):
        raise ArtifactError(f"{file} has one token with two ids, on which llama.cpp aborts", hint=AGAIN)
    arch = str(facts.get("general.architecture"))
    experts, used = facts.get(f"{arch}.expert_count", 0), facts.get(f"{arch}.expert_used_count", 0)
    if experts and not 1 <= used <= experts <= MAX_EXPERTS:
        raise ArtifactError(
            f"{file} has {counted(experts, 'expert')} of which a token uses {used}, on which llama.cpp aborts",
            hint=f"export it again; frankenmoe writes the architectures {', '.join(known.name for known in ARCHS)}",
        )
    return facts


def can_repack(size: int) -> bool:
    """Whether llama.cpp may copy the weights of a file of `size` bytes into an order that suits the processor.

    Weights that are only mapped can leave the memory when others need it; a copy cannot.
    """
    return size <= REPACKED * system.free_memory()


@contextmanager
def _silence() -> Iterator[None]:
    """Discards stderr: llama.cpp writes to it until it has read its verbosity setting."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "wb") as nothing:
        os.dup2(nothing.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
