"""`frankenmoe card`: makes samples, writes the model card and lists what is missing in it."""

from pathlib import Path
from typing import Any

import click

from frankenmoe.cli.options import JSON, REMOTE, example
from frankenmoe.cli.progress import bars
from frankenmoe.cli.settings import given, settings_options
from frankenmoe.cli.text import json_text, printable
from frankenmoe.recipe.sections import CardSettings
from frankenmoe.recipe.settings import settings_with
from frankenmoe.subject import open_subject


@click.command("card", epilog=example('frankenmoe card my-moe --prompt "Write a haiku about snow"'))
@click.argument("folder", metavar="ARTIFACT", type=click.Path(path_type=Path))
@settings_options(CardSettings)
@click.option(
    "--report", "reports", multiple=True, type=click.Path(path_type=Path), help="Additional report file (repeatable)."
)
@click.option("--overwrite", is_flag=True, help="Replace a README.md written or changed by hand.")
@JSON
@REMOTE
def card_command(
    folder: Path, reports: tuple[Path, ...], overwrite: bool, as_json: bool, trust_remote_code: bool, **options: Any
) -> None:
    """Write the model card, README.md, into ARTIFACT.

    Its content comes from the artifact, its sources and the reports in ARTIFACT/reports. The card lists what was not
    measured. Options replace settings in the recipe's section `card`.
    """
    from frankenmoe.publish.card import make_card, write_card

    subject = open_subject(folder, trust_remote_code=trust_remote_code)
    changes = given(options)
    settings = settings_with(subject.recipe.card or CardSettings(), changes)
    if "prompts" in changes:
        from frankenmoe.publish.samples import sample

        with bars() as progress:
            sample(subject, settings, progress=progress)
    card = make_card(subject, settings=settings, reports=reports)
    file = write_card(subject, card, overwrite=overwrite)
    if as_json:
        facts = {"file": str(file), "head": card.metadata, "missing": dict(card.missing)}
        click.echo(json_text(facts, default=str))
        return
    click.echo(f"card in {file}")
    for what, why in card.missing.items():
        click.echo(f"missing: {what}: {printable(why)}")
