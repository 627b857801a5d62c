"""A conversation in the terminal: streams tokens as they are made, and shows which experts saw each of them."""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from rich.text import Text
from transformers import TextStreamer

from frankenmoe.cli.show import console
from frankenmoe.errors import SourceError
from frankenmoe.moe.load import MoE
from frankenmoe.moe.trace import RoutingTrace, concat, record
from frankenmoe.pipeline import load

# Okabe and Ito's palette, which colour-blind eyes tell apart; experts beyond it share colours but keep their numbers
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999")
DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"
TOKEN_WIDTH = 14


@dataclass(frozen=True)
class Settings:
    """How replies are made. `temperature` 0 is greedy."""

    max_new_tokens: int
    temperature: float
    seed: int
    trace: bool


@dataclass(frozen=True)
class Reply:
    """A reply: its text, prompt and reply tokens [T], what the routers decided for all but the last, and its speed."""

    text: str
    tokens: list[int]
    routing: RoutingTrace
    tokens_per_second: float


def chat(what: Path, *, prompt: str | None, settings: Settings, as_json: bool, trust_remote_code: bool) -> None:
    """One exchange with `prompt`, otherwise a conversation until end of file or Ctrl-C."""
    moe = load(what, trust_remote_code=trust_remote_code)
    tokenizer = moe.tokenizer()
    torch.manual_seed(settings.seed)
    history: list[dict[str, str]] = []
    if prompt is None:
        click.echo("write, then Enter; Ctrl-D ends", err=True)
    while (said := prompt if prompt is not None else _ask()) is not None:
        history.append({"role": "user", "content": said})
        reply = answer(moe, tokenizer, history, settings=settings, stream=not as_json)
        history.append({"role": "assistant", "content": reply.text})
        if as_json:
            click.echo(json.dumps(_as_data(reply, moe, tokenizer), ensure_ascii=False, indent=2))
        elif settings.trace:
            show_trace(reply, moe, tokenizer)
        click.echo(f"{reply.tokens_per_second:.1f} tokens/s", err=True)
        if prompt is not None:
            return


def _ask() -> str | None:
    """A line from the person or the pipe; None at its end. Empty lines are asked for again."""
    while True:
        if sys.stdin.isatty():
            click.echo("> ", nl=False, err=True)
        line = sys.stdin.readline()
        if not line:
            return None
        if line.strip():
            return line.rstrip("\n")


def answer(moe: MoE, tokenizer: Any, history: list[dict[str, str]], *, settings: Settings, stream: bool) -> Reply:
    """Generates a reply with a KV cache: old tokens are neither computed nor routed again."""
    ids = encode(tokenizer, history)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None
    eos = moe.model.generation_config.eos_token_id or tokenizer.eos_token_id
    pad = eos[0] if isinstance(eos, list) else eos
    sampling = (
        {"do_sample": True, "temperature": settings.temperature} if settings.temperature else {"do_sample": False}
    )
    began = time.perf_counter()
    with torch.no_grad(), record(moe.model) as layers:
        out = moe.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=settings.max_new_tokens,
            streamer=streamer,
            eos_token_id=eos,
            pad_token_id=pad,
            **sampling,
        )[0]
    seconds = time.perf_counter() - began
    made = out[ids.shape[1] :].tolist()
    return Reply(tokenizer.decode(made, skip_special_tokens=True), out.tolist(), concat(layers), len(made) / seconds)


def encode(tokenizer: Any, history: list[dict[str, str]]) -> torch.Tensor:
    """The conversation as ids [1, T]: through the chat template where there is one, otherwise the text itself."""
    if tokenizer.chat_template:
        found = tokenizer.apply_chat_template(
            history, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        ids = found["input_ids"]
    else:
        ids = tokenizer("".join(turn["content"] for turn in history), return_tensors="pt")["input_ids"]
    if not ids.shape[-1]:
        raise SourceError("the prompt has no tokens in this tokenizer", hint="write a longer prompt")
    assert isinstance(ids, torch.Tensor)
    return ids


def show_trace(reply: Reply, moe: MoE, tokenizer: Any) -> None:
    """A line per token: its text, the first expert of every layer as a coloured digit, and its main experts' weight."""
    outer = [trace for trace in reply.routing.layers if not trace.path]
    out = console()
    out.print()
    names = "  ".join(f"{digit(index)} {name}" for index, name in enumerate(moe.experts))
    out.print(f"experts: {names}", style="bold", highlight=False)
    out.print(
        f"{'token':<{TOKEN_WIDTH}} {'first expert, layer by layer':<{max(28, len(outer))}} share of weight", style="dim"
    )
    for position in range(len(outer[0].ids_TK)):
        line = Text(f"{shown(tokenizer, reply.tokens[position]):<{TOKEN_WIDTH}.{TOKEN_WIDTH}} ")
        for trace in outer:
            first = int(trace.ids_TK[position, 0])
            line.append(digit(first), style=COLOURS[first % len(COLOURS)])
        line.append(" " * (max(28, len(outer)) - len(outer) + 1))
        shares = weight_shares(outer, position, len(moe.experts))
        best = sorted(range(len(shares)), key=lambda index: -shares[index])[:2]
        line.append("  ".join(f"{moe.experts[index]} {shares[index]:.0%}" for index in best))
        line.truncate(out.width, overflow="ellipsis")
        out.print(line, highlight=False)


def weight_shares(traces: list[Any], position: int, experts: int) -> list[float]:
    """Share of the routing weight each expert has at one token, averaged over layers."""
    total = torch.zeros(experts)
    for trace in traces:
        kept = trace.ids_TK[position] >= 0
        total.index_add_(0, trace.ids_TK[position][kept], trace.weights_TK[position][kept].float())
    return (total / total.sum().clamp(min=1e-9)).tolist()


def digit(index: int) -> str:
    """One character per expert, as far as characters go."""
    return "-" if index < 0 else DIGITS[index] if index < len(DIGITS) else "+"


def shown(tokenizer: Any, token: int) -> str:
    """A token as visible text."""
    return repr(tokenizer.decode([token]))[1:-1]


def _as_data(reply: Reply, moe: MoE, tokenizer: Any) -> dict[str, Any]:
    outer = [trace for trace in reply.routing.layers if not trace.path]
    return {
        "reply": reply.text,
        "tokens_per_second": reply.tokens_per_second,
        "experts": list(moe.experts),
        "trace": [
            {
                "token": tokenizer.decode([token]),
                "layers": [
                    {"ids": trace.ids_TK[at].tolist(), "weights": trace.weights_TK[at].tolist()} for trace in outer
                ],
            }
            for at, token in enumerate(reply.tokens[: len(outer[0].ids_TK)])
        ],
    }
