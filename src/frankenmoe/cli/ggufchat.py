"""A conversation with a GGUF file, by llama.cpp; the file's own chat template decides how it is addressed."""

import json
from pathlib import Path

import click

from frankenmoe.cli.ask import ask, is_terminal
from frankenmoe.cli.show import warn
from frankenmoe.export.llama import Engine, check_loadable


def chat_gguf(
    file: Path, *, prompt: str | None, max_new_tokens: int, temperature: float, seed: int, as_json: bool
) -> None:
    """One exchange with `prompt`, otherwise a conversation until end of file or Ctrl-C."""
    facts = check_loadable(file)
    arch = str(facts["general.architecture"])
    context = int(facts.get(f"{arch}.context_length", 4096))
    engine = Engine(file, context=min(context, 8192), exact_cache=False)
    templated = bool(facts["chat_template"])
    if templated and not engine.reads_template:
        warn(["llama.cpp cannot read the file's chat template: it goes on from what you write, as without one"])
        templated = False
    history: list[dict[str, str]] = []
    if prompt is None and is_terminal():
        click.echo("write, then Enter; Ctrl-D ends", err=True)
    while (said := ask() if prompt is None else prompt) is not None:
        history.append({"role": "user", "content": said})
        text = engine.chat(
            history,
            templated=templated,
            tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            on_text=lambda piece: None if as_json else click.echo(piece, nl=False),
        )
        history.append({"role": "assistant", "content": text})
        click.echo(json.dumps({"reply": text}, ensure_ascii=False) if as_json else "")
        if prompt is not None:
            return
