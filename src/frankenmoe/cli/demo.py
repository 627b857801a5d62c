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
from frankenmoe.demo.run import Story, tell
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
    show.print("\n2. Held-out loss (nats per token, lower is better)", style="bold")
    show.print(_loss_table(story.losses))
    for line in _reading(story.losses):
        show.print(line, highlight=False)
    show.print("\n3. Where tokens go", style="bold")
    shares = ", ".join(f"{domain} {share:.0%}" for domain, share in story.own_share.items())
    show.print(
        f"Share of tokens whose first choice is their own domain's expert: {shares}; chance is 25%.", highlight=False
    )
    show.print(
        f"\n4. What it says, and which experts saw it: {story.prompt!r} goes on as", style="bold", highlight=False
    )
    show.print(story.reply.text.rstrip(), highlight=False, markup=False)
    show_trace(story.reply, tuple(node.name for node in story.plan.nodes), story.tokenizer)
    show.print("\n5. The proof", style="bold")
    for check in story.checks:
        show.print(f"ok  {check.what}: {check.found}", highlight=False)
    show.print(
        f"ok  stock transformers: loads the built MoE, logits within {story.stock_difference:.1e} of ours",
        highlight=False,
    )
    show.print("\n6. Try it", style="bold")
    for command in (
        f"chat {out}/recipe.yml --trace --prompt 'Whisk the eggs'",
        f"plan {out}/recipe.yml",
        f"verify {out}/moe",
    ):
        click.echo(f"  {program()} {command}")
    click.echo(f"files: {out}/parents (dense), {out}/moe-virtual (recipe and routers), {out}/moe (built)")


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
    base, random, prompt, own = (
        average[name] for name in ("dense base", "MoE, random gates", "MoE, prompt gates", "MoE, own expert forced")
    )
    closed = (random - prompt) / (random - own)
    dense = min(
        (name for name in losses if name.startswith("dense") and name != "dense base"), key=lambda name: average[name]
    )
    return [
        f"Each parent is good at its own text; the best all-round one is {dense} with {average[dense]:.3f}.",
        f"The MoE with prompt gates: {prompt:.3f}, {abs(base - prompt):.3f} "
        f"{'better' if prompt < base else 'worse'} than the dense base. Its routers close {closed:.0%} of the way from "
        f"random gates ({random:.3f}) to every token's own expert ({own:.3f}).",
    ]
