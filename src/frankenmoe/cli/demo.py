"""Prints the demo's results for readers who are new to MoEs."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from statistics import mean

import click
from rich.table import Table

from frankenmoe.cli.chat import show_trace
from frankenmoe.cli.progress import bars
from frankenmoe.cli.show import console, program
from frankenmoe.cli.text import json_text
from frankenmoe.counted import counted
from frankenmoe.demo import kits
from frankenmoe.demo.real import check_available, real_folder
from frankenmoe.demo.run import FITTED, FORCED, PROMPTED, QUESTIONS, RANDOM, TRAINED, Story, tell
from frankenmoe.demo.text import DOMAINS
from frankenmoe.errors import bounded
from frankenmoe.planning.bill import billions


def demo(out: Path, *, real: bool = False, rows: Path | None = None, as_json: bool) -> None:
    """Runs the demo in `out` and prints its results."""
    if real:
        check_available()
    where = real_folder() if real else out / "parents"
    beginning = f"making a base and {len(DOMAINS)} experts in {where} (once), then an MoE of them ..."
    click.echo(bounded(beginning), err=True)
    kit = kits.real(rows=rows) if real else kits.TOY
    with bars() as progress:
        story = tell(out, kit=kit, progress=progress)
    if as_json:
        click.echo(json_text(story.to_dict()))
    else:
        _print(story, out)


def _print(story: Story, out: Path) -> None:
    show = console()
    show.print("\n1. The plan", style="bold")
    made = story.plan
    show.print(
        f"A base and {len(DOMAINS)} fine-tunes of it ({', '.join(DOMAINS)}) become a {made.layers}-layer MoE of "
        f"{counted(made.experts, 'expert')}, {made.recipe.experts_per_token} per token: "
        f"{billions(made.bill.total)} parameters, {billions(made.bill.active)} of them active for each token.",
        highlight=False,
    )
    show.print("\n2. All stages of the recipe, by `frankenmoe run`", style="bold")
    for step in story.steps:
        show.print(f"{step.name:<7} {step.summary}", highlight=False, markup=False)
    for stage, extra in story.lacking.items():
        show.print(f"{stage:<7} skipped: pip install 'frankenmoe[{extra}]'", highlight=False, markup=False)
    show.print("\n3. Held-out loss (nats per token, lower is better)", style="bold")
    show.print(_loss_table(story.losses))
    for line in _reading(story.losses):
        show.print(line, highlight=False)
    right = {name: mean(row.values()) for name, row in story.quiz.items()}
    show.print(
        f"Quiz (choose the right one of four endings): base {right['dense base']:.0%}, MoE {right['MoE']:.0%}.",
        highlight=False,
    )
    if story.tasks:
        show.print(_task_table(story.tasks))
        for line in story.failed:
            show.print(line, style="yellow", highlight=False, markup=False)
        show.print(
            f"{QUESTIONS} questions each, of MMLU one per subject: these show that tasks run. To compare models, ask "
            "all of them (`frankenmoe eval --tasks leaderboard-v1`).",
            highlight=False,
        )
    show.print("\n4. Where tokens go", style="bold")
    shares = ", ".join(f"{domain} {share:.0%}" for domain, share in story.own_share.items())
    show.print(
        f"Share of tokens whose first choice is their own domain's expert: {shares}; chance is 25%.", highlight=False
    )
    show.print(f"\n5. A reply and its experts: {story.prompt!r} continues as", style="bold", highlight=False)
    show.print(story.reply.text.rstrip(), highlight=False, markup=False)
    show_trace(story.reply, tuple(node.name for node in story.plan.nodes), story.tokenizer)
    show.print("\n6. Verification", style="bold")
    for check in story.checks:
        show.print(f"ok  {check.what}: {check.found}", highlight=False)
    show.print(
        f"ok  stock transformers: loads the built MoE; its logits differ by at most {story.stock_difference:.1e}",
        highlight=False,
    )
    show.print("\n7. Results to open", style="bold")
    model = out / "run" / "model"
    for what, file in (
        ("routing page", model / "reports" / "audit.html"),
        ("model card", model / "README.md"),
        ("GGUF files", model / "gguf"),
        ("built MoE", model),
        ("parents", story.parents),
    ):
        if file.exists():
            click.echo(f"  {what + ':':<19} {file}")
    for command in (
        f"chat {out}/recipe.yml --trace --prompt {shlex.quote(story.prompt if story.real else 'Whisk the eggs')}",
        f"plan {out}/recipe.yml",
        f"audit {model}",
    ):
        click.echo(f"  {program()} {command}")
    if not story.real:
        click.echo(f"\nThe same with a real model that writes English, within an hour: {program()} demo --real")


def _loss_table(losses: Mapping[str, Mapping[str, float]]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("", no_wrap=True)
    for domain in (*DOMAINS, "mean"):
        table.add_column(domain, justify="right")
    best = {domain: min(row[domain] for row in losses.values()) for domain in DOMAINS}
    for name, row in losses.items():
        cells = [
            f"[green]{row[domain]:.3f}[/]" if row[domain] == best[domain] else f"{row[domain]:.3f}"
            for domain in DOMAINS
        ]
        table.add_row(name, *cells, f"{mean(row.values()):.3f}")
    return table


def _task_table(tasks: Mapping[str, Mapping[str, float]]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("task", no_wrap=True)
    models = list(next(iter(tasks.values())))
    for name in models:
        table.add_column(name, justify="right")
    for task, row in tasks.items():
        table.add_row(task, *(f"{row[name]:.0%}" if name in row else "failed" for name in models))
    return table


def _reading(losses: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Sentences that explain the table."""
    average = {name: mean(row.values()) for name, row in losses.items()}
    best = TRAINED if TRAINED in average else FITTED
    base, random, prompted, reached, own = (average[name] for name in ("dense base", RANDOM, PROMPTED, best, FORCED))
    parents = [name for name in average if name.startswith("dense") and name != "dense base"]
    dense = min(parents, key=lambda name: average[name])
    return [
        f"Each parent is best on its own text; {dense} has the lowest mean, {average[dense]:.3f}.",
        f"The {best}: {reached:.3f}, {abs(base - reached):.3f} {'better' if reached < base else 'worse'} than the "
        f"dense base. Of the gap between random gates ({random:.3f}) and the own expert forced ({own:.3f}), gates from "
        f"prompts close {_share(random, prompted, own):.0%}, fitted gates {_share(random, average[FITTED], own):.0%}"
        + (f", trained gates {_share(random, average[TRAINED], own):.0%}." if TRAINED in average else "."),
    ]


def _share(worst: float, reached: float, best: float) -> float:
    """The share of the gap between worst and best that is closed."""
    return (worst - reached) / (worst - best)
