"""`frankenmoe verify`: its options and output."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.table import Table

from frankenmoe.after.compare import percent
from frankenmoe.cli.options import DEVICE, JSON, REMOTE, example
from frankenmoe.cli.progress import bars
from frankenmoe.cli.show import console
from frankenmoe.cli.text import cell, json_text, printable
from frankenmoe.counted import counted
from frankenmoe.data.given import Pair, pairs
from frankenmoe.subject import open_subject

if TYPE_CHECKING:
    from frankenmoe.after.experts import ExpertSeen
    from frankenmoe.after.run import After
    from frankenmoe.after.text import OnText

OWN = "own"  # the text that the recipe names
NOT_AS_IT_SHOULD_BE = 1
SHOWN_EXPERTS = 16


@click.command(
    "verify", epilog=example("frankenmoe verify out/\nfrankenmoe verify out/ --after out-q4_k_m.gguf --text notes.txt")
)
@click.argument("folder", metavar="ARTIFACT", type=click.Path(path_type=Path))
@click.option(
    "--after", metavar="OTHER", type=click.Path(path_type=Path),
    help="Compare with what another tool made of it: a transformers folder or a GGUF file.",
)  # fmt: skip
@click.option(
    "--text", "texts", metavar="[NAME=]FILE", multiple=True,
    help=f"With --after: also run both models on this text; `{OWN}` is the data that the recipe names. Repeatable.",
)  # fmt: skip
@DEVICE
@JSON
@REMOTE
def verify_command(
    folder: Path, after: Path | None, texts: tuple[str, ...], device: str, as_json: bool, trust_remote_code: bool
) -> None:
    """Compare an MoE with its sources, or with OTHER.

    Every byte of ARTIFACT is compared with what its sources give. Names, shapes and types are compared with the model
    class, and all values must be finite. Exits with code 2 at the first difference.

    With --after, pairs every expert of OTHER with one of ARTIFACT by content. Exits with code 1 if an expert, a router
    or the rest is not as it should be.
    """
    if after is None and texts:
        raise click.UsageError("--text needs --after")
    subject = open_subject(folder, trust_remote_code=trust_remote_code)
    if after is not None:
        from frankenmoe.after.run import verify_after

        with bars() as progress:
            found = verify_after(subject, after, text=_pairs(texts), device=device, progress=progress)
        if as_json:
            click.echo(json_text(found.to_dict()))
        else:
            show_after(found)
        if not found.ok:
            sys.exit(NOT_AS_IT_SHOULD_BE)
        return

    from frankenmoe.build.proof import verify

    with bars() as progress:
        checks = verify(subject, progress=progress)
    if as_json:
        click.echo(json_text({check.what: check.found for check in checks}))
    else:
        show_checks(folder, checks)


def _pairs(texts: Sequence[str]) -> list[Pair] | None:
    """The texts by name; empty for the recipe's own, None without text."""
    if OWN in texts and set(texts) != {OWN}:
        raise click.UsageError(f"--text {OWN} stands alone; name the other files in the recipe's data")
    if OWN in texts or not texts:
        return [] if texts else None
    return pairs(texts, flag="--text", unlabelled=True, folder=Path.cwd(), form="NAME=FILE")


def show_checks(folder: Path, checks: Sequence[Any]) -> None:
    """Prints one line per passed check."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="green", no_wrap=True)
    table.add_column(overflow="fold")
    for check in checks:
        table.add_row(cell(f"ok  {check.what}"), cell(check.found))
    console().print(table)
    click.echo(f"{folder} matches its recipe")


def show_after(found: "After") -> None:
    """Prints the parts, the experts, the text and what was found; the last line is the verdict."""
    table = _table("part", "stored as", ">distance", ">worst", ">rounding", ">moved")
    for part in found.parts:
        numbers = (part.far, part.worst, part.rounding, part.moved)
        table.add_row(cell(part.part), cell(", ".join(part.kinds)), *map(_number, numbers))
    console().print(table)
    compared = found.compared
    rows: dict[int, list[ExpertSeen]] = {}
    for each in compared.experts:
        rows.setdefault(each.index, []).append(each)
    table = _table("expert", "holds", ">distance", ">worst", "in")
    for index, some in list(rows.items())[:SHOWN_EXPERTS]:
        able = [(seen.far, each.layer, name) for each in some for name, seen in each.matrices.items()]
        worst, layer, name = max(able, default=(float("nan"), 0, ""))
        held = {"-" if each.expert is None else compared.names[each.expert] for each in some}
        far = _number(sum(row[0] for row in able) / len(able) if able else float("nan"))
        where = f"{name.partition('.')[0]} of layer {layer}" if worst > 0 else ""
        table.add_row(cell(compared.name(index)), cell(", ".join(sorted(held))), far, _number(worst), where)
    console().print(table)
    if len(rows) > SHOWN_EXPERTS:
        click.echo(f"and {counted(len(rows) - SHOWN_EXPERTS, 'more expert')}, in --json")
    if found.text is not None:
        show_text(found.text)
    for finding in found.findings:
        word, colour = ("wrong", "red") if finding.fault else ("note", None)
        click.secho(printable(f"{word}: {finding.text}"), fg=colour)
    click.echo(printable(f"{compared.other.where}: {found.verdict}"))


def show_text(text: "OnText") -> None:
    """Prints both models on every domain."""
    if text.reason is not None:
        click.echo(printable(f"not run on text: {text.reason}"))
        return
    table = _table("text", ">tokens", ">KL", ">same word", ">same experts", ">loss before", ">after")
    for row in text.domains:
        shares = (f"{share:.1%}" for share in (row.same_token, row.same_experts))
        losses = (f"{loss:.3f}" for loss in (row.loss, row.other_loss))
        table.add_row(cell(row.domain), str(row.tokens), f"{row.kl:.3g}", *shares, *losses)
    console().print(table)


def _table(*headings: str) -> Table:
    """A table whose columns are to the right where the heading starts with >."""
    table = Table(box=None, pad_edge=False)
    for heading in headings:
        table.add_column(heading.lstrip(">"), justify="right" if heading.startswith(">") else "left", overflow="fold")
    return table


def _number(value: Any) -> str:
    """A distance in percent."""
    return percent(value) if value == value and value < float("inf") else "-"
