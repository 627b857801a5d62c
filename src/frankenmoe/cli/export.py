"""`frankenmoe export`: its options and its table of files."""

import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from frankenmoe.cli.options import COUNT, EXPERTS_PER_TOKEN, JSON, NO_CACHE, REMOTE, example
from frankenmoe.cli.progress import bars
from frankenmoe.cli.settings import given, settings_options
from frankenmoe.cli.text import cell, json_text
from frankenmoe.counted import counted
from frankenmoe.recipe.sections import ExportSettings
from frankenmoe.recipe.settings import settings_with
from frankenmoe.subject import Subject, open_subject

if TYPE_CHECKING:
    from frankenmoe.export.check import Checked
    from frankenmoe.export.files import GgufFile

PEFT_SETTINGS = {"texts", "check"}  # those that --peft has too


@click.command(
    "export",
    epilog=example(
        "frankenmoe export out/ gguf/ --types q4_k_m,q8_0\nfrankenmoe export recipe.yml gguf/ --imatrix text.txt"
    ),
)
@click.argument("what", metavar="ARTIFACT|RECIPE", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@settings_options(ExportSettings)
@click.option("--peft", "as_peft", is_flag=True, help="Write adapter experts as PEFT LoRAs instead of GGUF files.")
@EXPERTS_PER_TOKEN
@click.option("--threads", type=COUNT, help="CPU threads; default: all cores.")
@NO_CACHE
@JSON
@REMOTE
def export_command(
    what: Path,
    out: Path,
    as_peft: bool,
    experts_per_token: int | None,
    threads: int | None,
    no_cache: bool,
    as_json: bool,
    trust_remote_code: bool,
    **options: Any,
) -> None:
    """Write GGUF files for llama.cpp to the folder OUT.

    Reads an artifact or a recipe directly, without a large file in between. Types: f32, f16, bf16, q8_0, q6_k, q5_k_m,
    q5_k_s, q5_1, q5_0, q4_k_m, q4_k_s, q4_1, q4_0. OUT/export.json lists the files and compares them with the source.

    With --peft: writes the LoRA of every expert, for an MoE of adapters on one base, and compares it with PEFT's Arrow.
    """
    from frankenmoe.export.ollama import modelfile_of, ollama_name
    from frankenmoe.export.run import check_files, export_gguf, token_notes, write_report

    wanted = given(options)
    settings = settings_with(ExportSettings(), wanted)
    subject = open_subject(
        what, cache=not no_cache, trust_remote_code=trust_remote_code, experts_per_token=experts_per_token
    )
    if as_peft:
        foreign = sorted(f"--{name}".replace("_", "-") for name in wanted if name not in PEFT_SETTINGS)
        if foreign or threads:
            raise click.UsageError(f"{', '.join(foreign or ['--threads'])} is for GGUF files, not for --peft")
        return _peft(subject, out, settings, as_json)
    with bars() as progress:
        files = export_gguf(subject, out, settings=settings, threads=threads, progress=progress, resume=True)
        checks = check_files(subject, files, settings=settings, threads=threads, progress=progress)
        notes = token_notes(subject, files, settings=settings)
    files = [replace(file, notes=(*file.notes, *notes)) for file in files]
    write_report(files, checks, what=subject)
    if as_json:
        click.echo(json_text(_as_data(files, checks)))
    else:
        _show(files, checks)
        if settings.ollama:
            file = modelfile_of(files[-1].path)
            click.echo(f"for Ollama: {shlex.join(['ollama', 'create', ollama_name(file), '-f', str(file)])}")


def _peft(subject: Subject, out: Path, settings: ExportSettings, as_json: bool) -> None:
    from rich.table import Table

    from frankenmoe.cli.show import console
    from frankenmoe.export.peft import arrow_code
    from frankenmoe.export.run import export_adapters

    with bars() as progress:
        made, compared = export_adapters(subject, out, settings=settings, progress=progress)
    if as_json:
        click.echo(json_text({**made.to_dict(), "compared": [each.to_dict() for each in compared]}))
        return
    table = Table(box=None, pad_edge=False)
    table.add_column("model", overflow="fold")
    for name in ("KL from the MoE", "same best token", "loss"):
        table.add_column(name, justify="right", no_wrap=True)
    for each in compared:
        table.add_row(cell(each.name), f"{each.kl:.1e}", f"{each.top1:.1%}", f"{each.loss:.3f}")
    if compared:
        console().print(table)
    click.echo(
        f"{counted(len(made.experts), 'LoRA')} of rank {made.rank} in {out}; with PEFT's Arrow:\n{arrow_code(made)}"
    )


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
        if different := check.prompts - check.same_prompts:
            warn([f"{check.path.name} tokenizes {different} of {check.prompts} prompts differently"])
        if check.runs_past:
            ends = ", ".join(map(str, check.runs_past))
            warn([f"in {check.path.name}, a reply goes on after the source's end tokens {ends}"])
        if not check.reads_template:
            warn([f"llama.cpp cannot read the chat template in {check.path.name}; pass another one when you run it"])
    click.echo(f"in {files[0].path.parent}; next: {command('chat', files[-1].path)}")
