"""Prints plans, checks and artifacts as tables of at most 80 columns."""

import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from frankenmoe.artifact.folder import Artifact
from frankenmoe.cli.text import cell, printable
from frankenmoe.counted import counted
from frankenmoe.palette import mark
from frankenmoe.planning import Plan
from frankenmoe.planning.bill import billions
from frankenmoe.planning.candidates import candidates
from frankenmoe.planning.distance import ALL_GROUPS, Distance
from frankenmoe.planning.fitting import fit_forecast
from frankenmoe.planning.forecast import forecast
from frankenmoe.planning.groups import FFN
from frankenmoe.planning.healing import heal_bytes
from frankenmoe.planning.layout import misfits

WIDTH = 80
GGUF_SHOWN = ("q4_0", "q5_0", "q4_k_m", "q8_0")
SHOWN_UNUSED = 3
SHOWN_DISTANCES = 16
NAME_WIDTH = 30  # columns of an expert's name beside its distances
MINUTE = 1e-4  # a share that percents with two digits still show


def console() -> Console:
    """stdout, at most 80 columns wide, so that tables are the same in files and terminals."""
    out = Console()
    return Console(width=min(out.width, WIDTH)) if out.width > WIDTH else out


def show_plan(made: Plan) -> None:
    """Prints a plan as a table, then unused tensors, warnings and problems."""
    facts = made.to_dict()
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in _plan_rows(made, facts):
        table.add_row(name, cell(value))
    out = console()
    out.print(table)
    show_distances(made.distances)
    reasons = _unused_by_reason(facts["unused"])
    for reason, names in reasons.items():
        more = f" and {len(names) - SHOWN_UNUSED} more" if len(names) > SHOWN_UNUSED else ""
        out.print(
            printable(f"unused: {', '.join(names[:SHOWN_UNUSED])}{more}: {reason}"),
            style="dim",
            highlight=False,
            markup=False,
        )
    warn(made.warnings)
    for problem in made.problems:
        click.secho(f"cannot be built: {printable(problem)}", fg="red", err=True)
    if misfits(made.problems) == made.problems != ():
        click.secho("  hint: use `frankenmoe build --virtual`, or change the recipe", err=True)


def _plan_rows(made: Plan, facts: dict[str, Any]) -> list[tuple[str, str]]:
    counts, memory = facts["parameters"], facts["memory"]
    need, free = facts["disk"]["need"], facts["disk"]["free"]
    some = len(made.expert_layers)  # in a few families not every layer has an FFN
    layers = counted(made.layers, "layer") if some == made.layers else f"{some} of {counted(made.layers, 'layer')}"
    licences = sorted({str(source["licence"]) for source in facts["sources"] if source["licence"]})
    return [
        ("name", made.recipe.name or made.recipe.origin),
        ("format", f"{made.fmt.title if made.fmt else 'virtual only'}, {made.dtype_name}"),
        ("shape", f"{layers} x {counted(made.experts, 'expert')}, {made.recipe.experts_per_token} per token"),
        (
            "routers",
            f"{made.recipe.routers or f'gate_mode {made.recipe.gate_mode}'}, {counted(len(made.routers), 'gate')}",
        ),
        *_fit_lines(made),
        ("backbone", _backbone(made)),
        ("parameters", f"{counts['total']:,} ({billions(counts['total'])})"),
        ("  active per token", f"{counts['active']:,} ({billions(counts['active'])})"),
        ("  shared by all", f"{counts['shared']:,}"),
        ("  per expert", f"{counts['per_expert']:,}"),
        *(("" if at else "as adapters", line) for at, line in enumerate(_adapter_lines(facts["as_adapter"]))),
        ("on disk", _sizes(facts["bytes"])),
        *_heal_lines(made),
        ("memory to load", _sizes(memory)),
        *(("" if at else "  as GGUF", line) for at, line in enumerate(_gguf_lines(made))),
        ("  KV cache", f"{memory['kv_per_token'] / 2**10:.1f} KiB per token (16 bit)"),
        ("tensors", f"{facts['writes']:,} to write, {len(facts['unused']):,} left unused in the sources"),
        ("disk here", f"{gib(free)} free{'' if free >= need else f', {gib(need - free)} short'}"),
        ("licences", ", ".join(licences) or "none declared"),
    ]


def _sizes(sizes: Mapping[str, int | None]) -> str:
    built = sizes["built"]
    return (
        f"{'not possible as built' if built is None else f'{gib(built)} built'}, {gib(sizes['virtual'] or 0)} virtual"
    )


def _adapter_lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Per expert that is a low-rank adapter on the base's FFNs: its rank and what it saves in the virtual form."""
    lines = []
    for row in rows:
        low, high = row["rank"]
        rank = f"{low}" if low == high else f"{low} to {high}"
        about = "" if row["certain"] else "at most "
        lines.append(f"{row['expert']}: rank {rank}, {about}{gib(row['bytes'])} instead of {gib(row['instead_of'])}")
    return lines


def _backbone(made: Plan) -> str:
    if not made.backbone_open:
        return f"{made.choice} ({made.choice.why})"
    tried = candidates(made)
    among = f"; candidates: {'; '.join(map(str, tried))}" if len(tried) > 1 else ""
    return f"{made.choice.why}{among}"


def show_distances(distances: Sequence[Distance]) -> None:
    """Prints how far every parent is from the base, group by group; nothing if none differs."""
    rows = list({each.source: each for each in reversed(distances)}.values())[::-1]
    if not any(each.differs or each.groups.get(FFN) for each in rows):
        return
    groups = [group for group in ALL_GROUPS if any(group in each.groups for each in rows)]
    sampled = ", from blocks of large tensors" if any(each.sampled for each in rows) else ""
    table = Table(box=None, pad_edge=False)
    table.add_column("expert", overflow="ellipsis", no_wrap=True, max_width=NAME_WIDTH)
    for group in groups:
        table.add_column("FFN" if group == FFN else group, justify="right", no_wrap=True)
    for each in rows[:SHOWN_DISTANCES]:
        table.add_row(cell(each.expert), *(_percent(each.groups.get(group)) for group in groups))
    out = console()
    out.print(f"distance of the parents to the base, of its norm{sampled}", style="bold", highlight=False)
    out.print(table)
    if len(rows) > SHOWN_DISTANCES:
        out.print(f"and {len(rows) - SHOWN_DISTANCES} more", style="dim")


def _percent(share: float | None) -> str:
    return "?" if share is None else "0" if not share else f"{share:.2%}" if share >= MINUTE else f"{share:.0e}"


def _fit_lines(made: Plan) -> list[tuple[str, str]]:
    cost = fit_forecast(made, made.recipe.fit_settings)
    if cost is None:
        return []
    return [("  fit", f"{cost.method}: {cost.forward_passes:.1f} forward passes over about {cost.tokens:,} tokens")]


def _heal_lines(made: Plan) -> list[tuple[str, str]]:
    """What `heal:` adds to the virtual form; a built model has the same size either way."""
    most = heal_bytes(made, made.recipe.heal) if made.recipe.heal else 0
    same = "" if made.bill.built is None else ", the same built"
    return [("  healed", f"at most {gib(most)} more virtual{same}")] if most else []


def _gguf_lines(made: Plan) -> list[str]:
    """Sizes of common file types, with the actual type of the weights if the shape does not allow a K-quant."""
    outlook = forecast(made)
    if outlook.impossible is not None:
        return [f"not possible: {outlook.impossible}"]
    shown = []
    for row in (row for row in outlook.files if row.type in GGUF_SHOWN):
        padded = f", {gib(row.padded_bytes)} with --pad256" if row.advice and row.padded_bytes else ""
        really = f": mostly {next(iter(row.holds))}{padded}" if row.advice else ""
        shown.append(f"{gib(row.bytes)} {row.type} ({row.bits_per_weight:.2f} bits{really})")
    return [*shown, *outlook.notes]


def _unused_by_reason(rows: Sequence[dict[str, str]]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for row in rows:
        found.setdefault(row["reason"], []).append(row["tensor"])
    return found


def warn(warnings: Sequence[str]) -> None:
    """Prints warnings to stderr, one per line."""
    for text in warnings:
        click.secho(f"warning: {printable(text)}", fg="yellow", err=True)


def show_built(artifact: Artifact) -> None:
    """Prints an artifact's folder and size, and a command to run next."""
    size = sum(file.stat().st_size for file in artifact.folder.iterdir())
    click.echo(f"{artifact.form} artifact in {artifact.folder} ({gib(size)})")
    click.echo(f"next: {command('chat', artifact.folder)}")


def command(*words: object) -> str:
    """A command of this program, quoted for a shell."""
    return f"{program()} {shlex.join(map(str, words))}"


def program() -> str:
    """How this program was called, so that printed commands can be run unchanged."""
    if shutil.which("frankenmoe"):
        return "frankenmoe"
    name = Path(sys.argv[0]).name
    return f"{shlex.quote(sys.executable)} -m frankenmoe.cli" if name == "__main__.py" else shlex.quote(sys.argv[0])


def expert_style(expert: int) -> str:
    """rich's style for an expert's digit, with the colours of the audit page."""
    own = mark(expert)
    return f"bold {own.ink} on {own.colour}" if expert >= 0 else "dim"


def gib(count: int) -> str:
    """A number of bytes with a unit."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} B"
