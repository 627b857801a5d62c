"""A server over small models, as a process, and what it streams."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import gguftools
import tiny

TEMPLATE = (
    "{% for turn in messages %}<{{ turn.role }}>{{ turn.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
WAIT = 120  # seconds for a server to start on a busy machine


@dataclass(frozen=True)
class Server:
    """A running `frankenmoe serve`, and the recipe that is its first model."""

    process: subprocess.Popen[str]
    url: str
    folder: Path

    @property
    def recipe(self) -> Path:
        return self.folder / "moe.yml"

    @property
    def base(self) -> Path:
        return self.folder / "llama0"

    def end(self, sent: int = signal.SIGTERM) -> str:
        """Ends the process; what it wrote to stderr."""
        self.process.send_signal(sent)
        return self.process.communicate(timeout=WAIT)[1]


def make_models(folder: Path, *, bos: bool = False) -> None:
    """Three parents whose answers go on until their length is reached, and a recipe over them.

    With `bos`, their tokenizer begins every text with a token.
    """
    tokenizer = gguftools.bpe("gpt-2", bos=bos)
    tokenizer.chat_template = TEMPLATE
    parents = gguftools.parents(folder, "llama", tokenizer=tokenizer, max_position_embeddings=16384)
    for parent in parents:
        (parent / "generation_config.json").write_text(json.dumps({"eos_token_id": []}))
    tiny.write_recipe(folder / "moe.yml", parents[0], parents, prompts=True, gate_mode="hidden")


def start(folder: Path, *options: str, **environment: str) -> Server:
    """Starts a server in a folder of `make_models`, on a free port."""
    command = [sys.executable, "-m", "frankenmoe", "serve", "moe.yml", "--port", "0", *options]
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line.startswith("serving on "):
        pytest.fail(f"{line}{process.communicate()[1]}")
    return Server(process, line.split()[-1], folder)


def chunks(lines: Iterator[bytes]) -> Iterator[Any]:
    """The data of server-sent events; comments as text."""
    for line in lines:
        if line.startswith(b":"):
            yield line.decode().strip()
        elif line.startswith(b"data: ") and line.strip() != b"data: [DONE]":
            yield json.loads(line.removeprefix(b"data: "))
