"""`frankenmoe train`: its options, and what it prints when it is done."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from frankenmoe.errors import PlanError, RecipeError
from frankenmoe.progress import SILENT

# option -> (setting, type, help); the defaults are those of the recipe's `train`, or its own
SETTINGS: tuple[tuple[str, str, Any, str], ...] = (
    ("--steps", "steps", int, "Optimizer steps (200)."),
    ("--batch", "batch", int, "Blocks per step, over all processes (8)."),
    ("--accumulate", "accumulate", int, "Parts a batch is computed in, to save memory (1)."),
    ("--block", "block", int, "Tokens per block (128)."),
    ("--router-rate", "router_rate", float, "Learning rate of routers (0.01)."),
    ("--rate", "rate", float, "Learning rate of the rest (0.001)."),
    ("--warmup", "warmup", int, "Steps until the rates peak (10)."),
    ("--rank", "rank", int, "Rank of new adapters (16)."),
    ("--train-top-k", "experts_per_token", int, "Experts per token while training."),
    ("--straight-through", "straight_through", bool, "Top-1's weight passes on a gradient."),
    ("--next-token", "next_token", float, "Coefficient of the next-token loss (1)."),
    ("--balance", "balance", float, "Coefficient of load balance, per layer (0)."),
    ("--z", "z", float, "Coefficient of the router z-loss (0)."),
    ("--domain", "domain", float, "Coefficient of: gates name the text's expert (0)."),
    ("--distill", "distill", float, "Coefficient of KL to the text's parent (0)."),
    ("--noise", "noise", float, "Gaussian noise on gate logits (0)."),
    ("--jitter", "jitter", float, "Uniform noise on what routers read (0)."),
    ("--capacity-factor", "capacity_factor", float, "Limit of tokens per expert."),
    ("--guard-every", "guard_every", int, "Steps between looks at held-out text."),
    ("--save-every", "save_every", int, "Steps between checkpoints."),
    ("--seed", "seed", int, "Of text order, adapters and noise (0)."),
)


def setting_options(command: Callable[..., None]) -> Callable[..., None]:
    """Adds an option for every setting."""
    for flag, name, kind, text in reversed(SETTINGS):
        command = click.option(flag, f"set_{name}", type=kind, is_flag=kind is bool, default=None, help=text)(command)
    return command


def run_train(what: Path, out: Path, *, options: dict[str, Any]) -> None:
    """Trains and prints the summary; `options` are click's."""
    data = _pairs(options["data"], flag="--data", recipe=what)
    weights = {name: float(value[0]) for name, value in _pairs(options["weights"], flag="--weights").items()}
    changes = {name.removeprefix("set_"): value for name, value in options.items() if name.startswith("set_")}
    changes |= {"what": options["parts"], "weights": weights or None}
    given = {name: value for name, value in changes.items() if value is not None}

    from frankenmoe.cli.progress import bars

    settings = _settings(what, given)

    try:
        from frankenmoe.training import train
    except ImportError as error:
        raise PlanError(
            f"training needs the library {error.name}, which is not installed", hint="pip install 'frankenmoe[train]'"
        ) from error

    main = os.environ.get("RANK", "0") == "0"
    with bars() as progress:
        found = train(
            what,
            out,
            data=data or None,
            settings=settings,
            keep_anyway=options["keep_anyway"],
            dtype=options["dtype"],
            report_to=options["report_to"],
            shard=options["shard"],
            trust_remote_code=options["trust_remote_code"],
            progress=progress if main else SILENT,
        )
    if not main:
        return
    if options["as_json"]:
        click.echo(json.dumps(found.report, indent=2, ensure_ascii=False))
    else:
        _show(found.report, found.artifact.folder)


def _pairs(texts: tuple[str, ...], *, flag: str, recipe: Path | None = None) -> dict[str, list[str]]:
    """NAME=VALUE, several of one name joined; files are taken from here and not from the recipe's folder."""
    from frankenmoe.data.documents import FILE_ENDINGS

    found: dict[str, list[str]] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise click.UsageError(f"{flag} {text!r} is not NAME=VALUE")
        is_path = recipe is not None and (Path(value).exists() or value.endswith(FILE_ENDINGS))
        found.setdefault(name, []).append(str(Path(value).absolute()) if is_path else value)
    return found


def _settings(what: Path, given: dict[str, Any]) -> Any:
    """The recipe's `train` with what was said on the command line."""
    from pydantic import ValidationError

    from frankenmoe.artifact import open_artifact
    from frankenmoe.recipe import Recipe
    from frankenmoe.recipetrain import Train
    from frankenmoe.refusal import in_words

    if what.is_dir():
        table = open_artifact(what).record["recipe"].get("train", {})
    else:
        own = Recipe.load(what).train
        table = own.to_dict() if own else {}
    try:
        return Train.model_validate(table | given)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        text, hint = in_words(problem)
        place = (*problem["loc"], *problem.get("ctx", {}).get("at", ()))
        raise RecipeError(f"train: {'.'.join(map(str, place))} {text}", hint=hint) from None


def _show(report: Mapping[str, Any], folder: Path) -> None:
    """Held-out loss before and after, per domain, then the load, then what to do next."""
    from rich.table import Table

    from frankenmoe.cli.show import command, console

    losses, means, loads = report["held_out_loss"], report["mean_held_out_loss"], report["largest_load"]
    table = Table(box=None, pad_edge=False)
    table.add_column("held-out loss", no_wrap=True)
    for name in ("before", "kept", "change"):
        table.add_column(name, justify="right")
    kept = "best" if report["improved"] else "after"
    rows = {**{name: (losses["before"][name], losses[kept][name]) for name in losses["before"]}}
    rows["mean"] = (means["before"], means[kept])
    for name, (before, after) in rows.items():
        table.add_row(name, f"{before:.4f}", f"{after:.4f}", f"{after - before:+.4f}")
    table.add_row("largest load of an expert", f"{loads['before']:.0%}", f"{loads[kept]:.0%}", "")
    console().print(table)
    if not report["improved"]:
        click.secho("warning: worse than it began, kept because of --keep-anyway", fg="yellow", err=True)
    elif report["best_step"] != report["steps"]:
        click.echo(f"kept is step {report['best_step']} of {report['steps']}: later ones were not better")
    click.echo(f"{report['parameters']:,} numbers learnt; artifact in {folder}")
    click.echo(f"next: {command('chat', folder)}")
