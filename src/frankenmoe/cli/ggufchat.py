"""Chats with a GGUF file in the terminal, through llama.cpp and the file's chat template."""

from pathlib import Path

import click

from frankenmoe.cli.ask import ask, is_terminal
from frankenmoe.cli.show import warn
from frankenmoe.cli.text import json_text, spelled_out
from frankenmoe.export.llama import Engine


def chat_gguf(
    file: Path, *, prompt: str | None, max_new_tokens: int, temperature: float, seed: int, as_json: bool
) -> None:
    """Answers `prompt`; without one, a conversation until end of input or Ctrl-C."""
    engine = Engine(file, exact_cache=False)
    if not engine.reads_template:
        warn(["llama.cpp cannot read the file's chat template, so the model continues your text"])
    history: list[dict[str, str]] = []
    if prompt is None and is_terminal():
        click.echo("type a message and press Enter; Ctrl-D ends", err=True)
    while (message := ask() if prompt is None else prompt) is not None:
        history.append({"role": "user", "content": message})
        text = engine.chat(
            history,
            tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            on_text=lambda piece: None if as_json else click.echo(spelled_out(piece), nl=False),
        )
        history.append({"role": "assistant", "content": text})
        click.echo(json_text({"reply": text}, indent=None) if as_json else "")
        if prompt is not None:
            return
