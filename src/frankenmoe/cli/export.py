"""`frankenmoe export`: its options, what it says while it works and the table at the end."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from frankenmoe.export.check import Checked
    from frankenmoe.export.run import GgufFile

CHECKED_BY_ITSELF = 2 * 10**9  # bytes of a file


@click.command(
    "export",
    epilog="\b\nExample:\n  frankenmoe export out/ gguf/ --types q4_k_m,q8_0\n"
    "  frankenmoe export recipe.yml gguf/ --imatrix text.txt",
)
@click.argument("what", metavar="ARTIFACT|RECIPE", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--types", help="Comma-separated, such as f16,q8_0,q5_k_m,q4_0. Default: a q4 and a q5 for the shape.")
@click.option("--imatrix", multiple=True, metavar="DATA", help="Text to weigh columns by; may be given again.")
@click.option("--check/--no-check", default=None, help="Run the files beside the source. Default: those under 2 GB.")
@click.option("--text", "texts", multiple=True, metavar="DATA", help="Text to check on; may be given again.")
@click.option("--pad256", is_flag=True, help="Pad with zeros so that K-quants fit: exact, but no longer this shape.")
@click.option("--threads", type=click.IntRange(min=1), help="Default: all cores.")
@click.option("--allow-random", is_flag=True, help="Export even where only chance has set the routers.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@click.option("--trust-remote-code", is_flag=True, help="Run Python code that a source brings along. Read it first.")
def export_command(
    what: Path,
    out: Path,
    types: str | None,
    imatrix: tuple[str, ...],
    check: bool | None,
    texts: tuple[str, ...],
    pad256: bool,
    threads: int | None,
    allow_random: bool,
    as_json: bool,
    trust_remote_code: bool,
) -> None:
    """Write GGUF files for llama.cpp in the folder OUT.

    Straight from an artifact of either form, or from a recipe: no large file in between. Types: f32, f16, bf16, q8_0,
    q6_k, q5_k_m, q5_k_s, q5_1, q5_0, q4_k_m, q4_k_s, q4_1, q4_0. What the files are and how they compare with their
    source is kept in OUT/export.json.
    """
    from frankenmoe.cli.progress import bars
    from frankenmoe.exporting import check_files, export_gguf, write_report

    asked = [name.strip() for name in (types or "").split(",") if name.strip()]
    with bars() as progress:
        files = export_gguf(
            what,
            out,
            types=asked,
            imatrix=imatrix,
            pad256=pad256,
            threads=threads,
            allow_random=allow_random,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
        wanted = files if check else [file for file in files if check is None and file.bytes < CHECKED_BY_ITSELF]
        checks = (
            check_files(
                what, wanted, texts=texts, threads=threads, trust_remote_code=trust_remote_code, progress=progress
            )
            if wanted
            else []
        )
    write_report(files, checks, what=what)
    if as_json:
        click.echo(json.dumps(_as_data(files, checks), indent=2, ensure_ascii=False))
    else:
        _show(files, checks)


def _as_data(files: Sequence["GgufFile"], checks: Sequence["Checked"]) -> list[dict[str, Any]]:
    found = {check.path: check.to_dict() for check in checks}
    return [file.to_dict() | {"check": found.get(file.path)} for file in files]


def _show(files: Sequence["GgufFile"], checks: Sequence["Checked"]) -> None:
    from rich.table import Table

    from frankenmoe.cli.show import command, console, warn

    table = Table(box=None, pad_edge=False)
    columns = ("type", "GB", "bits/w", "KL", "top-1", "ppl x", "replies", "tokens", "tok/s")
    for name in columns[: len(columns) if checks else 3]:
        table.add_column(name, justify="left" if name == "type" else "right", no_wrap=True)
    by_path = {check.path: check for check in checks}
    for file in files:
        row = [file.type, f"{file.bytes / 1e9:.3f}", f"{file.bits_per_weight:.2f}"]
        found = by_path.get(file.path)
        if found is not None:
            row += [
                f"{found.kl:.1e}",
                f"{found.top1:.1%}",
                f"{found.perplexity_ratio:.4f}",
                f"{found.same_replies}/{found.prompts}",
                f"{found.same_prompts}/{found.prompts}",
                f"{found.tokens_per_second:.1f}",
            ]
        table.add_row(*row)
    console().print(table)
    warn(list(dict.fromkeys(note for file in files for note in file.notes)))
    for check in checks:
        if check.same_prompts < check.prompts:
            warn(
                [f"{check.path.name} splits {check.prompts - check.same_prompts} of {check.prompts} prompts otherwise"]
            )
        if not check.reads_template:
            warn([f"llama.cpp cannot read the chat template in {check.path.name}: give it another when you run it"])
    click.echo(f"in {files[0].path.parent}; next: {command('chat', files[-1].path)}")
