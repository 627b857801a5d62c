"""`frankenmoe extract-lora`: its options and output."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.table import Table

from frankenmoe.cli.options import JSON, REMOTE, example
from frankenmoe.cli.progress import bars
from frankenmoe.cli.settings import given, settings_options
from frankenmoe.cli.show import console, gib
from frankenmoe.cli.text import cell, json_text
from frankenmoe.planning.difference import by_group
from frankenmoe.recipe.asadapter import AdapterSettings

if TYPE_CHECKING:
    from frankenmoe.build.lora import ExtractedLora


@click.command(
    "extract-lora",
    epilog=example(
        "frankenmoe extract-lora ../law-3b law-lora/ --base ../base-3b --rank 32\n"
        "frankenmoe extract-lora ../law-3b law-lora/ --base ../base-3b --energy 0.9 --text law.txt"
    ),
)
@click.argument("model", metavar="MODEL")
@click.argument("out", metavar="OUT", type=click.Path(path_type=Path))
@click.option("--base", required=True, help="The model that MODEL was tuned from: a folder or hub id.")
@settings_options(AdapterSettings)
@click.option(
    "--text", "texts", metavar="DATA", multiple=True,
    help="Held-out text to compare base, MODEL and base + LoRA on (repeatable).",
)  # fmt: skip
@JSON
@REMOTE
def extract_lora_command(
    model: str, out: Path, base: str, texts: tuple[str, ...], as_json: bool, trust_remote_code: bool, **options: Any
) -> None:
    """Write what MODEL has learnt beyond its base as a PEFT LoRA.

    The adapter is on all linear layers of attention and FFN. Embeddings, head, norms and biases are left out; their
    relative difference is shown. OUT is loaded by PEFT, and by a recipe as `source_model: base+OUT`.
    """
    settings = given(options)
    if len(settings) > 1:
        raise click.UsageError("give --rank or --energy, not both")

    from frankenmoe.build.lora import extract_lora

    with bars() as progress:
        made = extract_lora(
            model, out, base=base, texts=texts, trust_remote_code=trust_remote_code, progress=progress, **settings
        )
    if as_json:
        click.echo(json_text(made.to_dict()))
    else:
        show(made)


def show(made: "ExtractedLora") -> None:
    """Prints a row per group, the losses by text, and where the adapter is."""
    table = _table("group", "layers", "rank", "size", "difference", "energy kept")
    for group, row in by_group(made.layers).items():
        low, middle, high = row["rank"]
        rank = f"{low}" if low == high else f"{low} to {high}, median {middle}"
        table.add_row(
            group, str(row["layers"]), rank, gib(row["bytes"]), f"{row['relative_difference']:.2%}",
            f"{row['energy_kept']:.1%}",
        )  # fmt: skip
    for group, relative in made.left_out.items():
        table.add_row(group, "", "left out", "", f"{relative:.2%}", "")
    out = console()
    out.print(table)
    if made.losses:
        losses = _table("held-out loss of", "base", "model", "base + LoRA", "advantage kept")
        for text, loss in made.losses.items():
            kept = made.advantage_kept(text)
            losses.add_row(
                cell(Path(text).name), *(f"{loss[key]:.3f}" for key in ("base", "model", "adapter")),
                "no advantage" if kept is None else f"{kept:.0%}",
            )  # fmt: skip
        out.print()
        out.print(losses)
    click.echo(f"LoRA in {made.folder} ({gib(made.bytes)}), {made.energy_kept:.1%} of the energy")
    click.echo(f"in a recipe: source_model: {made.base}+{made.folder}")


def _table(first: str, *others: str) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column(first, overflow="fold")
    for name in others:
        table.add_column(name, justify="right")
    return table
