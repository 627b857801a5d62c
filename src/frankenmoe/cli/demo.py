"""Prints the demo's story for somebody who has never seen an MoE; computes nothing."""

import json
from collections.abc import Mapping
from pathlib import Path
from statistics import mean

import click
from rich.table import Table

from frankenmoe.cli.chat import show_trace
from frankenmoe.cli.progress import bars
from frankenmoe.cli.show import billions, console, program
from frankenmoe.demo.run import FITTED, FORCED, PROMPTED, RANDOM, TRAINED, Story, tell
from frankenmoe.demo.text import DOMAINS


def demo(out: Path, *, as_json: bool) -> None:
    """Runs the demo in `out` and prints what it found."""
    click.echo(f"making a base and {len(DOMAINS)} experts in {out}/parents (once), then an MoE of them ...", err=True)
    with bars() as progress:
        story = tell(out, progress=progress)
    if as_json:
        click.echo(json.dumps(story.to_dict(), indent=2))
    else:
        _print(story, out)


def _print(story: Story, out: Path) -> None:
    show = console()
    show.print("\n1. The plan", style="bold")
    made = story.plan
    show.print(
        f"A base and {len(DOMAINS)} fine-tunes of it ({', '.join(DOMAINS)}) become a {made.layers}-layer MoE of "
        f"{made.experts} experts, {made.recipe.experts_per_token} per token: {billions(made.bill.total)} parameters, "
        f"{billions(made.bill.active)} of them active for each token.",
        highlight=False,
    )
    show.print("\n2. Every stage the recipe asks for, by `frankenmoe run`", style="bold")
    for step in story.steps:
        show.print(f"{step.name:<7} {step.said}", highlight=False, markup=False)
    for stage, extra in story.lacking.items():
        show.print(f"{stage:<7} left out: pip install 'frankenmoe[{extra}]'", highlight=False, markup=False)
    show.print("\n3. Held-out loss (nats per token, lower is better)", style="bold")
    show.print(_loss_table(story.losses))
    for line in _reading(story.losses):
        show.print(line, highlight=False)
    right = {name: mean(row.values()) for name, row in story.quiz.items()}
    show.print(
        f"A quiz of its own, which of four endings is right: base {right['dense base']:.0%}, MoE {right['MoE']:.0%}.",
        highlight=False,
    )
    show.print("\n4. Where tokens go", style="bold")
    shares = ", ".join(f"{domain} {share:.0%}" for domain, share in story.own_share.items())
    show.print(
        f"Share of tokens whose first choice is their own domain's expert: {shares}; chance is 25%.", highlight=False
    )
    show.print(
        f"\n5. What it says, and which experts saw it: {story.prompt!r} goes on as", style="bold", highlight=False
    )
    show.print(story.reply.text.rstrip(), highlight=False, markup=False)
    show_trace(story.reply, tuple(node.name for node in story.plan.nodes), story.tokenizer)
    show.print("\n6. The proof", style="bold")
    for check in story.checks:
        show.print(f"ok  {check.what}: {check.found}", highlight=False)
    show.print(
        f"ok  stock transformers: loads the built MoE, logits within {story.stock_difference:.1e} of ours",
        highlight=False,
    )
    show.print("\n7. Look at it", style="bold")
    model = out / "run" / "model"
    for what, file in (
        ("the routing, live", model / "reports" / "audit.html"),
        ("the model card", model / "README.md"),
        ("for llama.cpp", model / "gguf"),
        ("the MoE itself", model),
        ("its parents", out / "parents"),
    ):
        if file.exists():
            click.echo(f"  {what + ':':<19} {file}")
    for command in (
        f"chat {out}/recipe.yml --trace --prompt 'Whisk the eggs'",
        f"plan {out}/recipe.yml",
        f"audit {model}",
    ):
        click.echo(f"  {program()} {command}")


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


def _reading(losses: Mapping[str, Mapping[str, float]]) -> list[str]:
    """The table in words, with numbers taken from it."""
    average = {name: mean(row.values()) for name, row in losses.items()}
    best = TRAINED if TRAINED in average else FITTED
    base, random, prompted, reached, own = (average[name] for name in ("dense base", RANDOM, PROMPTED, best, FORCED))
    parents = [name for name in average if name.startswith("dense") and name != "dense base"]
    dense = min(parents, key=lambda name: average[name])
    return [
        f"Each parent is good at its own text; the best all-round one is {dense} with {average[dense]:.3f}.",
        f"The {best}: {reached:.3f}, {abs(base - reached):.3f} {'better' if reached < base else 'worse'} than the "
        f"dense base. On the way from random gates ({random:.3f}) to every text's own expert ({own:.3f}), gates from "
        f"prompts get {_share(random, prompted, own):.0%} far, fitted ones {_share(random, average[FITTED], own):.0%}"
        + (f", trained ones {_share(random, average[TRAINED], own):.0%}." if TRAINED in average else "."),
    ]


def _share(worst: float, reached: float, best: float) -> float:
    """How much of the way from worst to best was gone; over 1 beyond it."""
    return (worst - reached) / (worst - best)
