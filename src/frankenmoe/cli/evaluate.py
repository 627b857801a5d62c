"""`frankenmoe eval`: its options, tables and verdict."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.table import Table

from frankenmoe.cache import cache_folder
from frankenmoe.charts import ChartError
from frankenmoe.cli.options import EXPERTS_PER_TOKEN, REMOTE, SIZE, example, placed
from frankenmoe.cli.progress import bars
from frankenmoe.cli.settings import given, settings_options
from frankenmoe.cli.show import warn
from frankenmoe.cli.text import cell, json_text, printable
from frankenmoe.data.given import pairs
from frankenmoe.errors import ArtifactError, PlanError, SourceError
from frankenmoe.moe.processes import is_main
from frankenmoe.recipe.sections import EvalSettings
from frankenmoe.recipe.settings import settings_with
from frankenmoe.subject import Subject, open_model

if TYPE_CHECKING:
    from frankenmoe.evaluate.run import Report

MOST_DOMAINS = 5  # columns that fit in 80 characters
SHORT = {
    "arc_challenge": "ARC",
    "hellaswag": "HellaS",
    "mmlu": "MMLU",
    "truthfulqa": "TQA",
    "winogrande": "WinoG",
    "gsm8k": "GSM8K",
}


@click.command(
    "eval",
    epilog=example(
        "frankenmoe eval my-moe --tasks leaderboard-v1 --data-dir rows/ --json scores.json\n"
        "frankenmoe eval recipe.yml --against-parents --plot worth.svg"
    ),
)
@click.argument("models", metavar="ARTIFACT|RECIPE|MODEL...", nargs=-1, required=True)
@settings_options(EvalSettings)
@click.option("--text", "texts", multiple=True, metavar="[NAME=]FILE", help="Text to measure the loss on (repeatable).")
@click.option("--batch-size", default="auto", show_default=True, help="Sequences at once; `auto` depends on memory.")
@click.option("--memory", type=SIZE, help="Memory of one pass; default: a share of the free memory.")
@EXPERTS_PER_TOKEN
@placed
@click.option(
    "--json", "json_file", type=click.Path(path_type=Path), help="Write the report to this file; - for stdout."
)
@click.option("--log-samples", type=click.Path(path_type=Path), help="Folder for every document with its answer.")
@click.option(
    "--plot", "plot_file", type=click.Path(path_type=Path), help="Draw quality against memory (svg, png, pdf)."
)
@click.option("--cache", type=click.Path(path_type=Path), help="Folder for cached answers; default: the user's cache.")
@click.option("--no-cache", is_flag=True, help="Neither read nor write cached answers, routers and backbones.")
@REMOTE
def eval_command(
    models: tuple[str, ...],
    texts: tuple[str, ...],
    batch_size: str,
    memory: int | None,
    experts_per_token: int | None,
    device: str,
    dtype: str | None,
    json_file: Path | None,
    log_samples: Path | None,
    plot_file: Path | None,
    cache: Path | None,
    no_cache: bool,
    trust_remote_code: bool,
    **options: Any,
) -> None:
    """Score models on Open LLM Leaderboard v1 tasks or on text.

    Each model is an artifact, a recipe, a folder or a hub id. Without --tasks, measures the loss on --text or on the
    held-out parts of the experts' data. If killed, the same command continues after the finished documents.
    """
    rows = _rows(batch_size)
    settings = settings_with(EvalSettings(), given(options) | {"texts": _named(texts)})
    _check_out(json_file, log_samples)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    try:
        from frankenmoe.evaluate.run import evaluate
        from frankenmoe.evaluate.score import Scoring
    except ModuleNotFoundError as error:
        raise PlanError(
            f"evaluating needs the library {error.name!r}, which is not installed",
            hint="pip install 'frankenmoe[eval]'",
        ) from error
    from frankenmoe.evaluate.plot import check_plot

    if plot_file is None and settings.against_parents:
        plot_file = json_file.with_suffix(".svg") if json_file and json_file.name != "-" else Path("eval.svg")
    if plot_file is not None:
        check_plot(plot_file)
    store = None if no_cache else cache or cache_folder("scores")
    opened = [
        open_model(model, cache=not no_cache, trust_remote_code=trust_remote_code, experts_per_token=experts_per_token)
        for model in models
    ]
    if experts_per_token is not None and not any(isinstance(each, Subject) for each in opened):
        raise PlanError(
            f"--experts-per-token is for mixtures, found dense models: {', '.join(models)}", hint="leave it out"
        )
    with bars() as progress:
        report = evaluate(
            opened,
            settings=settings,
            dtype=dtype,
            device=device,
            scoring=Scoring(rows=rows, memory=memory, store=store, samples=log_samples),
            progress=progress,
        )
    if is_main():
        _put_out(report, json_file, plot_file)
    if report.errors:
        raise PlanError("; ".join(report.errors), hint="all other tasks were scored; see the report")


def _put_out(report: "Report", json_file: Path | None, plot_file: Path | None) -> None:
    """Prints or writes the report, and draws the plot."""
    from frankenmoe.evaluate.run import draw

    _write(report, json_file)
    if plot_file is not None and any(result.losses or result.outcomes for result in report.results):
        try:
            draw(report, plot_file)
        except ChartError as error:  # the scores are worth more than their picture
            warn([f"{plot_file} was not drawn: {error.message}"])
        else:
            click.echo(f"plot: {plot_file}", err=True)


def _rows(batch_size: str) -> int | None:
    if batch_size == "auto":
        return None
    if not batch_size.isdecimal() or int(batch_size) < 1:
        raise click.BadParameter(f"{batch_size!r} is neither `auto` nor a number from 1", param_hint="--batch-size")
    return int(batch_size)


def _named(texts: tuple[str, ...]) -> dict[str, str]:
    """NAME=FILE texts as name -> file. Without NAME=, the name is that of the file without suffixes."""
    found: dict[str, str] = {}
    for label, file in pairs(texts, flag="--text", unlabelled=True, folder=Path.cwd(), form="NAME=FILE"):
        name = Path(file).name.split(".")[0] if label is None else label
        if not Path(file).is_file():
            raise SourceError(f"text {file} does not exist", hint="write --text NAME=FILE")
        if name in found:
            raise SourceError(f"two texts are named {name!r}", hint="write --text NAME=FILE with different names")
        found[name] = file
    return found


def _check_out(json_file: Path | None, log_samples: Path | None) -> None:
    """Raises SourceError for output paths that cannot be written, before hours of work."""
    if json_file is not None and json_file.name != "-" and not json_file.absolute().parent.is_dir():
        raise SourceError(f"the folder of the report, {json_file.parent}, does not exist", hint="create it first")
    if json_file is not None and json_file.is_dir():
        raise SourceError(f"the report cannot be written to {json_file}, which is a folder", hint="name a file in it")
    if log_samples is not None and log_samples.exists() and not log_samples.is_dir():
        raise SourceError(
            f"samples cannot be written to {log_samples}, which is not a folder", hint="name a folder for --log-samples"
        )


def _write(report: "Report", json_file: Path | None) -> None:
    if json_file is not None and json_file.name == "-":
        click.echo(json_text(report.to_report().to_dict()))
        return
    show(report)
    if json_file is not None:
        try:
            report.to_report().write(json_file)
        except OSError as error:
            raise ArtifactError(
                f"the report cannot be written to {json_file}: {error.strerror}",
                hint="choose another file; the scores are cached, so the command will be fast",
            ) from error
        click.echo(f"report: {json_file}", err=True)


def show(report: "Report") -> None:
    """Prints tables, notes and the verdict."""
    from frankenmoe.cli.show import console

    out = console()
    if any(result.outcomes for result in report.results):
        out.print(_one(report) if len(report.results) == 1 else _several(report))
    if any(result.losses for result in report.results):
        out.print(_losses(report))
    for note in _notes(report):
        out.print(note, style="dim", highlight=False, markup=False)
    for line in report.verdict:
        out.print(printable(line), style="bold" if line is report.verdict[0] else "", highlight=False, markup=False)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value * 100:.2f}"


def _one(report: "Report") -> Table:
    """One model: a row per task."""
    (result,) = report.results
    table = Table(box=None, pad_edge=False, title=cell(result.name), title_justify="left")
    table.add_column("task", overflow="fold")
    for name in ("shots", "documents", "metric", "score", "stderr"):
        table.add_column(name, justify="left" if name == "metric" else "right", no_wrap=True)
    for outcome in result.outcomes.values():
        facts = outcome.to_dict()
        error = outcome.stderr.get(outcome.benchmark.metric)
        table.add_row(
            outcome.benchmark.title,
            str(outcome.benchmark.shots),
            "failed" if outcome.error else str(facts["documents"]),
            outcome.benchmark.metric,
            _percent(outcome.value),
            _percent(error),
        )
    if result.average is not None:
        table.add_row("Avg.", "", "", "", _percent(result.average), "", style="bold")
    return table


def _several(report: "Report") -> Table:
    """Several models: a row per model."""
    table = Table(box=None, pad_edge=False)
    table.add_column("percent", overflow="fold")  # names wrap, so that numbers are not cut
    names = [name for name in SHORT if any(name in result.outcomes for result in report.results)]
    for name in (*names, *(["Avg."] if len(names) == len(SHORT) else [])):
        table.add_column(SHORT.get(name, name), justify="right", no_wrap=True)
    for result in report.results:
        cells = [_percent(result.outcomes[name].value if name in result.outcomes else None) for name in names]
        cells += [_percent(result.average)] if len(names) == len(SHORT) else []
        table.add_row(cell(result.name), *cells, style="bold" if result.kind == "moe" else "")
    return table


def _losses(report: "Report") -> Table:
    """Loss per domain, memory and speed. Bits per byte if tokenizers differ."""
    from frankenmoe.evaluate.domains import GENERAL

    one_tokenizer = len({result.facts["tokenizer_digest"] for result in report.results}) == 1
    domains = list(dict.fromkeys(name for result in report.results for name in result.domains))
    general = any(GENERAL in result.losses for result in report.results)
    shown = domains if len(domains) <= MOST_DOMAINS else []
    table = Table(box=None, pad_edge=False)
    table.add_column("nats per token" if one_tokenizer else "bits per byte", overflow="fold")
    for name in (*shown, "mean", *(["general"] if general else []), "MB", "token/s"):
        table.add_column(cell(name), justify="right", no_wrap=True)
    for result in report.results:
        values = {
            name: losses.mean if one_tokenizer else losses.bits_per_byte for name, losses in result.losses.items()
        }
        mean = f"{sum(values[name] for name in result.domains) / len(result.domains):.3f}" if result.domains else "-"
        cells = [f"{values[name]:.3f}" if name in values else "-" for name in (*shown, *([GENERAL] if general else []))]
        cells.insert(len(shown), mean)
        cost = (f"{result.facts['memory_bytes'] / 1e6:.0f}", f"{result.facts['tokens_per_second']:.0f}")
        table.add_row(cell(result.name), *cells, *cost, style="bold" if result.kind == "moe" else "")
    return table


def _notes(report: "Report") -> list[str]:
    """Notes that a reader needs to interpret the numbers."""
    notes = [f"{name}: not compared, {reason}" for name, reason in report.skipped.items()]
    for result in report.results:
        reason = result.facts["shared_reading"]["reason"]
        if reason:
            notes.append(f"{result.name}: prefixes not shared, or only partly: {reason}")
        for outcome in result.outcomes.values():
            cut, asked = outcome.counts.get("cut_on_the_left", 0), outcome.counts.get("requests", 0)
            if cut and outcome.benchmark.counted:
                lost = outcome.counts.get("question_cut", 0)
                more = f", {lost} of them part of the question" if lost else ""
                notes.append(
                    f"{result.name}, {outcome.benchmark.title}: {cut} of {asked} requests were cut on the left, to the "
                    f"model's {result.facts['max_length']} tokens{more}"
                )
    return notes
