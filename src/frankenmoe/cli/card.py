"""`frankenmoe card`: asks for samples where wanted, writes the card, says what is missing; computes nothing."""

import json
from pathlib import Path

import click

from frankenmoe.artifact import open_artifact
from frankenmoe.cli.progress import bars


@click.command("card", epilog='\b\nExample:\n  frankenmoe card my-moe --prompt "Write a haiku about snow"')
@click.argument("folder", metavar="ARTIFACT", type=click.Path(path_type=Path))
@click.option("--repo", metavar="ORG/NAME", help="Where it will be on the hub, for the lines that load it.")
@click.option("--report", "reports", multiple=True, type=click.Path(path_type=Path), help="A report kept elsewhere.")
@click.option("--prompt", "prompts", multiple=True, help="Ask the model this for the card's samples; may repeat.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=120, show_default=True, help="Per sample.")
@click.option("--temperature", type=click.FloatRange(min=0), default=0.0, show_default=True, help="0 is greedy.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the samples.")
@click.option("--overwrite", is_flag=True, help="Replace a README.md that was written or changed by hand.")
@click.option("--json", "as_json", is_flag=True, help="Print the head and what is missing as JSON.")
@click.option("--trust-remote-code", is_flag=True, help="Run Python code that a source brings along. Read it first.")
def card_command(
    folder: Path,
    repo: str | None,
    reports: tuple[Path, ...],
    prompts: tuple[str, ...],
    max_new_tokens: int,
    temperature: float,
    seed: int,
    overwrite: bool,
    as_json: bool,
    trust_remote_code: bool,
) -> None:
    """Write README.md, the model card, into ARTIFACT.

    From the artifact, its sources and the reports in its folder `reports`. What was not measured is not in it, and it
    says so.
    """
    from frankenmoe.publish.card import make_card, write_card

    artifact = open_artifact(folder)
    if prompts:
        from frankenmoe.sampling import sample

        with bars() as progress:
            sample(
                artifact,
                prompts,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                seed=seed,
                trust_remote_code=trust_remote_code,
                progress=progress,
            )
    card = make_card(artifact, repo=repo, reports=reports, trust_remote_code=trust_remote_code)
    file = write_card(artifact, card, overwrite=overwrite)
    if as_json:
        facts = {"file": str(file), "head": card.metadata, "missing": dict(card.missing)}
        click.echo(json.dumps(facts, indent=2, ensure_ascii=False, default=str))
        return
    click.echo(f"card in {file}")
    for what, why in card.missing.items():
        click.echo(f"not in it: {what}: {why}")
