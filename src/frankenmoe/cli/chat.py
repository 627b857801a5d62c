"""Chats with an MoE in the terminal: prints tokens as they are generated, and the experts of each token."""

from dataclasses import dataclass
from typing import Any

import click
import torch
from rich.text import Text
from transformers import TextStreamer

from frankenmoe.cli.ask import ask, is_terminal
from frankenmoe.cli.progress import bars
from frankenmoe.cli.show import console, expert_style
from frankenmoe.cli.text import in_cells, json_text, printable, spelled_out
from frankenmoe.moe.generate import Reply, reply, weight_shares
from frankenmoe.moe.joining import turns
from frankenmoe.moe.linear import prepare_kernels
from frankenmoe.moe.promptcache import PromptCache
from frankenmoe.palette import mark
from frankenmoe.subject import Subject

TOKEN_WIDTH = 12
LAYERS_TITLE = "first choice by layer"
ROOMY = 60  # columns; a narrower terminal gets a shorter title


class SafeStreamer(TextStreamer):  # type: ignore[misc]  # transformers has no types
    """Prints a reply as it is made, with control characters escaped."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        click.echo(spelled_out(text), nl=stream_end)


@dataclass(frozen=True)
class Settings:
    """How replies are generated and shown. `temperature` 0 is greedy; `device` and `dtype` are where it computes."""

    max_new_tokens: int
    temperature: float
    seed: int
    trace: bool
    int8: bool = False
    device: str = "auto"
    dtype: str | None = None


def chat(subject: Subject, *, prompt: str | None, settings: Settings, as_json: bool) -> None:
    """Answers `prompt`; without one, a conversation until end of input or Ctrl-C."""
    with bars() as progress:
        moe = subject.load(dtype=settings.dtype, device=settings.device, int8=settings.int8, progress=progress)
        fast = prepare_kernels(moe.model, progress)
    if not fast:
        click.secho("warning: no fast CPU kernels; pip install 'frankenmoe[cpu]'", fg="yellow", err=True)
    tokenizer = moe.tokenizer()
    torch.manual_seed(settings.seed)
    history: list[dict[str, str]] = []
    cache = PromptCache(sequences=1, turns=turns(moe.model.config))
    if prompt is None and is_terminal():
        click.echo("type a message and press Enter; Ctrl-D ends", err=True)
    while (message := ask() if prompt is None else prompt) is not None:
        history.append({"role": "user", "content": message})
        made = reply(
            moe,
            tokenizer,
            history,
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            cache=cache,
            streamer=None if as_json else SafeStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        )
        history.append({"role": "assistant", "content": made.text})
        if as_json:
            click.echo(json_text(_as_data(made, moe.experts, tokenizer)))
        elif settings.trace:
            show_trace(made, moe.experts, tokenizer)
        click.echo(f"{made.tokens_per_second:.1f} tokens/s", err=True)
        if prompt is not None:
            return


def show_trace(made: Reply, experts: tuple[str, ...], tokenizer: Any) -> None:
    """Prints a line per token: text, first expert of every layer as a coloured digit, experts with most weight."""
    out = console()
    title = LAYERS_TITLE if out.width >= ROOMY else "layers"
    width = max(len(title), len(made.layers))
    legend = Text("experts: ", style="bold")
    for index, name in enumerate(experts):
        legend.append(f"{mark(index).digit} {printable(name)}  ", style=expert_style(index))
    out.print(legend)
    out.print(Text(f"{'token':<{TOKEN_WIDTH}} {title:<{width}} share of weight", style="dim"))
    for position, token in enumerate(made.read):
        line = Text(f"{in_cells(_shown(tokenizer, token), TOKEN_WIDTH)} ")
        for trace in made.layers:
            first = int(trace.ids_TK[position, 0])
            line.append(mark(first).digit, style=expert_style(first))
        line.append(" " * (width - len(made.layers) + 1))
        shares = weight_shares(made.layers, position)
        best = sorted(range(len(shares)), key=lambda index: -shares[index])[:2]
        line.append(
            "  ".join(f"{shares[index]:.0%} {printable(experts[index])}" for index in best if shares[index] > 0)
        )
        line.truncate(out.width, overflow="ellipsis")
        out.print(line)


def _shown(tokenizer: Any, token: int) -> str:
    """A token's text, escaped."""
    return repr(tokenizer.decode([token]))[1:-1]


def _as_data(made: Reply, experts: tuple[str, ...], tokenizer: Any) -> dict[str, Any]:
    return {
        "reply": made.text,
        "tokens_per_second": made.tokens_per_second,
        "experts": list(experts),
        "trace": [
            {
                "token": tokenizer.decode([token]),
                "layers": [
                    {"ids": trace.ids_TK[at].tolist(), "weights": trace.weights_TK[at].tolist()}
                    for trace in made.layers
                ],
            }
            for at, token in enumerate(made.read)
        ],
    }
