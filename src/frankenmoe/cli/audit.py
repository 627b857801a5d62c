"""`frankenmoe audit`: its options, and an audit as text in the terminal."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from frankenmoe.audit.measures import Facts, Measure, compared_in_terminal, in_terminal
from frankenmoe.cli.options import NO_CACHE, REMOTE, example, json_option, placed
from frankenmoe.cli.progress import bars
from frankenmoe.cli.settings import given, settings_options
from frankenmoe.cli.show import console, expert_style
from frankenmoe.cli.text import in_cells, is_unicode, json_safe, printable
from frankenmoe.counted import counted
from frankenmoe.data.given import pairs
from frankenmoe.palette import mark
from frankenmoe.recipe.sections import AuditSettings
from frankenmoe.recipe.settings import settings_with
from frankenmoe.subject import open_subject

STYLES = {"good": "bold green", "mind": "bold yellow", "bad": "bold red", "open": "bold"}
ROOMY = 70  # columns; a terminal this wide shows more measures
BAR = 16  # characters of a load bar in a narrow terminal
TOKENS_SHOWN = 12
TOKEN_WIDTH = 12
WIDEST_STRIP = 26  # layers shown per token


@click.command(
    "audit",
    epilog=example(
        "frankenmoe audit recipe.yml --data maths=maths.txt --data verse=verse.txt\n"
        "frankenmoe audit before/ after/ --out reports/"
    ),
)
@click.argument("first", metavar="ARTIFACT|RECIPE", type=click.Path(path_type=Path))
@click.argument("second", metavar="[ARTIFACT|RECIPE]", required=False, type=click.Path(path_type=Path))
@click.option(
    "--data", metavar="EXPERT=FILE", multiple=True,
    help="Text to route, as file or hub dataset; default: the recipe's data or prompts (repeatable).",
)  # fmt: skip
@settings_options(AuditSettings)
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("reports"), show_default=True,
    help="Folder in which the report gets its own folder.",
)  # fmt: skip
@placed
@NO_CACHE
@json_option("Print the report as JSON.")
@REMOTE
def audit_command(
    first: Path,
    second: Path | None,
    data: tuple[str, ...],
    out: Path,
    device: str,
    dtype: str | None,
    no_cache: bool,
    as_json: bool,
    trust_remote_code: bool,
    **options: Any,
) -> None:
    """Show what the routers of an MoE do, or compare two MoEs.

    Answers six questions, layer by layer: is it an MoE at all, which experts get the tokens, does routing follow the
    domain, is the router well conditioned, would it survive capacity limits and quantization, which experts did a token
    see. Prints the answers and writes a self-contained page (audit.html) and audit.json. Text given without EXPERT= has
    no label.
    """
    from frankenmoe.audit.run import check, look
    from frankenmoe.audit.write import as_text, check_place, write_report
    from frankenmoe.charts import can_draw

    if not can_draw():
        click.secho("warning: the page will have no charts; `pip install 'frankenmoe[audit]'`", fg="yellow", err=True)
    settings = settings_with(AuditSettings(), given(options))
    if settings.prompt is not None and not is_unicode(settings.prompt):
        raise click.UsageError("--prompt is not UTF-8 text")
    check_place(out)  # before anything is computed
    subjects = [
        open_subject(what, cache=not no_cache, trust_remote_code=trust_remote_code)
        for what in (first, second)
        if what is not None
    ]
    names = [expert.name for subject in subjects for expert in subject.recipe.experts]
    labelled = pairs(data, flag="--data", names=names, unlabelled=True, folder=Path.cwd())
    for subject in subjects:
        check(subject, data=labelled)
    with bars() as progress:
        audits = [
            look(subject, data=labelled, settings=settings, device=device, dtype=dtype, progress=progress)
            for subject in subjects
        ]
    folder = write_report(audits, out)
    if as_json:
        click.echo(json_safe(as_text(audits)))
        click.echo(f"page: {printable(str(folder / 'audit.html'))}", err=True)
        return
    show = console()
    for audit in audits:
        show_audit(audit.report, show)
    if len(audits) == 2:
        show_difference(audits[0].report, audits[1].report, show)
    for kind, name in (("page", "audit.html"), ("json", "audit.json")):
        click.echo(f"{kind}: {printable(str(folder / name))}")


def show_audit(report: Facts, show: Console) -> None:
    """Prints one audit: the model, its experts, then each question with its answer."""
    model, subject = report["model"], report["subject"]
    shared = ", one shared expert" if model["shared_expert"] else ""
    place = printable(subject["path"])
    show.print(Text(f"\n{printable(subject['name'])}: {subject['what']} {place}", style="bold", overflow="fold"))
    shape = f"{counted(model['layers'], 'layer')} x {counted(len(model['experts']), 'expert')}"
    show.print(f"{shape}, {model['experts_per_token']} per token{shared}", highlight=False)
    read = ", ".join(f"{part['tokens']:,} of {printable(name)}" for name, part in report["text"].items())
    show.print(f"tokens read: {read}", highlight=False, markup=False)
    legend = Text("experts: ")
    for index, name in enumerate(model["experts"]):
        legend.append(mark(index).digit, style=expert_style(index))
        legend.append(f" {printable(name)}  ")
    show.print(legend)
    outer = [facts for facts in report["routers"] if not facts["path"]]
    for number, answer in enumerate(report["answers"], 1):
        show.print(_title(number, answer))
        show.print(printable(answer["sentence"]), highlight=False, markup=False)
        _details(answer["key"], report, outer, show)


def _title(number: int, answer: Facts) -> Text:
    title = Text(f"\n{number}. {answer['question']} ", style="bold")
    title.append(answer["verdict"], style=STYLES[answer["level"]])
    if answer["number"] is not None:
        from frankenmoe.audit.answers import spelt

        title.append(f"  {spelt(answer['number'], answer['unit'])} ", style="bold")
        title.append(answer["unit"], style="dim")
    return title


def _details(key: str, report: Facts, outer: Sequence[Facts], show: Console) -> None:
    if key == "token":
        _print_tokens(report, show)
        return
    if key == "domain" and outer[0]["domains"] is None:
        return
    if key == "moe" and outer[0]["apart"]["median"] is None:
        return
    routers = report["routers"] if key in ("load", "gate", "survive") else outer
    measures = in_terminal(key, roomy=show.width >= ROOMY)
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("layer", no_wrap=True)
    if key == "load":
        table.add_column("load", no_wrap=True)
    for measure in measures:
        table.add_column(measure.short, justify="right", no_wrap=True)
    width = (
        max(8, min(show.width - 60, 24))
        if show.width >= ROOMY
        else BAR - (6 if report["model"]["nested_routers"] else 0)
    )
    for facts in routers:
        place = f"{facts['layer']}" + (f" in {facts['path']}" if facts["path"] else "")
        bar = [load_bar(facts["load"]["share"], width)] if key == "load" else []
        table.add_row(place, *bar, *(_number(measure, facts) for measure in measures))
    show.print(table)
    if key == "survive":
        for facts in (each for each in routers if each["load"]["dead"] and each["tokens"]):
            inside = f"{facts['path']}." if facts["path"] else ""
            names = ", ".join(report["model"]["paths"][f"{inside}{index}"] for index in facts["load"]["dead"])
            show.print(f"dead in layer {facts['layer']}: {printable(names)}", highlight=False, markup=False)


def load_bar(shares: Sequence[float], width: int) -> Text:
    """A bar of `width` characters: each expert's digit in proportion to its load."""
    bar, done, filled = Text(), 0.0, 0
    for expert, share in enumerate(shares):
        done += share
        until = round(done * width)
        bar.append(mark(expert).digit * (until - filled), style=expert_style(expert))
        filled = until
    return bar


def _print_tokens(report: Facts, show: Console) -> None:
    """Prints the first tokens of a passage: a digit per layer and, in a wide terminal, the last layer's weights."""
    passage = report["passages"][0]
    layers = passage["layers"][:WIDEST_STRIP]
    names = [printable(name) for name in report["model"]["experts"]]
    cut = f", the first {WIDEST_STRIP}" if len(passage["layers"]) > WIDEST_STRIP else ""
    show.print(Text(f"{'token':<{TOKEN_WIDTH}} first expert by layer{cut}", style="dim"))
    for at, token in enumerate(passage["tokens"][:TOKENS_SHOWN]):
        line = Text(f"{in_cells(repr(token)[1:-1], TOKEN_WIDTH)} ")
        for layer in layers:
            first = layer["experts"][at][0]
            line.append(mark(first).digit, style=expert_style(first))
        if show.width >= ROOMY:
            last = layers[-1]
            weights = zip(last["experts"][at], last["weights"][at], strict=True)
            shown = (f"{weight:.2f} {names[expert] if expert >= 0 else 'dropped'}" for expert, weight in weights)
            line.append(f"  layer {last['layer']}: {', '.join(shown)}", style="dim")
            line.truncate(show.width, overflow="ellipsis")
        show.print(line)
    rest = sum(len(each["tokens"]) for each in report["passages"]) - min(TOKENS_SHOWN, len(passage["tokens"]))
    if rest:
        show.print(f"... and {rest:,} more on the page", highlight=False, style="dim")


def show_difference(one: Facts, two: Facts, show: Console) -> None:
    """Prints the measures of both audits, layer by layer."""
    from frankenmoe.audit.compare import OTHER_TEXT, paired, same_text

    measures = compared_in_terminal(roomy=show.width >= ROOMY)
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("layer", no_wrap=True)
    for measure in measures:
        table.add_column(measure.short, justify="right", no_wrap=True)
    for left, right in paired(one, two):
        table.add_row(str(left["layer"]), *(f"{_number(each, left)}>{_number(each, right)}" for each in measures))
    show.print(Text("\nFrom the first to the second", style="bold"))
    if not same_text(one, two):
        show.print(OTHER_TEXT, highlight=False)
    show.print(table)


def _number(measure: Measure, facts: Facts) -> str:
    match measure.read(facts):
        case None:
            return "inf" if measure.infinite else "-"
        case str(text):
            return printable(text)[:14]
        case int(count):
            return f"{count:,}"
        case float(number):
            return f"{number:.1%}" if measure.share else f"{number:.2f}" if number < 100 else f"{number:.0f}"
        case experts:
            return str(len(experts))
