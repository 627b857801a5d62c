"""The commands and their options; each imports what it needs when it runs, so that `plan` and `--help` stay quick."""

import io
import json
import sys
from pathlib import Path
from typing import Any

import click

from frankenmoe import __version__
from frankenmoe.cli.audit import audit_command
from frankenmoe.cli.card import card_command
from frankenmoe.cli.evaluate import eval_command
from frankenmoe.cli.export import export_command
from frankenmoe.cli.fit import add_expert_command, extract_command, fit_command
from frankenmoe.cli.options import REMOTE, Size, Temperature, example
from frankenmoe.cli.push import push_command
from frankenmoe.cli.run import run_command
from frankenmoe.cli.text import is_unicode, printable
from frankenmoe.cli.train import run_train, setting_options
from frankenmoe.errors import FrankenMoEError

INTERRUPTED = 130  # what a shell expects of a program that Ctrl-C ended
RESUMING = {"build", "train", "eval", "run", "push"}

RECIPE = click.argument("recipe", type=click.Path(path_type=Path))
DTYPE = click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Type to store weights in; default: the recipe's.",
)
JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 80},
    epilog=example("frankenmoe demo\nfrankenmoe plan recipes/raiden-16x3.43b.yml"),
)
@click.version_option(__version__, prog_name="frankenmoe")
def app() -> None:
    """Mixture-of-experts models out of dense checkpoints.

    A recipe names a base, experts and how tokens find them. `plan` says what it costs, `chat` runs it before anything
    is written, `build` writes a standard checkpoint.
    """


@app.command("plan", epilog=example("frankenmoe plan recipes/raiden-16x3.43b.yml --json"))
@RECIPE
@DTYPE
@JSON
@REMOTE
def plan_command(recipe: Path, dtype: str | None, as_json: bool, trust_remote_code: bool) -> None:
    """What RECIPE becomes: format, parameters, memory, warnings.

    Reads configs and headers only, and writes nothing.
    """
    from frankenmoe.cli.show import show_plan
    from frankenmoe.planning import plan
    from frankenmoe.planning.trained import read_routers
    from frankenmoe.recipe import Recipe

    made = plan(Recipe.load(recipe), dtype=dtype, trust_remote_code=trust_remote_code)
    if made.routers_file is not None:
        read_routers(made.routers_file, made.routers)
    if as_json:
        from frankenmoe.planning.forecast import forecast

        rows, reason = forecast(made)
        gguf = {"files": [row.to_dict() for row in rows], "impossible": reason}
        click.echo(json.dumps(made.to_dict() | {"gguf": gguf}, indent=2, ensure_ascii=False))
    else:
        show_plan(made)


@app.command(
    "build", epilog=example("frankenmoe build recipe.yml out/\nfrankenmoe build recipe.yml out-virtual/ --virtual")
)
@click.argument("recipe", metavar="RECIPE|ARTIFACT", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--virtual", is_flag=True, help="Write the recipe, hashes and routers only (megabytes).")
@DTYPE
@click.option("--shard-size", type=Size(), default="4GB", show_default=True, help="Largest size of one weight file.")
@click.option("--allow-identical", is_flag=True, help="Build even where all experts are the same, to train them later.")
@REMOTE
def build_command(
    recipe: Path,
    out: Path,
    virtual: bool,
    dtype: str | None,
    shard_size: int,
    allow_identical: bool,
    trust_remote_code: bool,
) -> None:
    """Make the MoE of RECIPE, or of a virtual ARTIFACT, in the folder OUT.

    Interrupted or killed, the same command goes on where it stopped.
    """
    from frankenmoe.artifact import Artifact, open_artifact
    from frankenmoe.cli.progress import bars
    from frankenmoe.cli.show import show_built, warn
    from frankenmoe.planning import plan
    from frankenmoe.recipe import Recipe

    # planned first: a mistake in the recipe is told before torch has been imported
    read: Recipe | Artifact = open_artifact(recipe) if recipe.is_dir() else Recipe.load(recipe)
    if isinstance(read, Recipe):
        warn(plan(read, dtype=dtype, trust_remote_code=trust_remote_code).warnings)

    from frankenmoe.building import build

    with bars() as progress:
        artifact = build(
            read,
            out,
            virtual=virtual,
            dtype=dtype,
            shard_size=shard_size,
            allow_identical=allow_identical,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    show_built(artifact)


@app.command("verify", epilog=example("frankenmoe verify out/"))
@click.argument("folder", metavar="OUT", type=click.Path(path_type=Path))
@JSON
def verify_command(folder: Path, as_json: bool) -> None:
    """Compare every byte of OUT with its sources.

    Also names, shapes and types against the model class, and finite values. Exit code 2 at the first that differs.
    """
    from frankenmoe.artifact import open_artifact
    from frankenmoe.cli.progress import bars
    from frankenmoe.cli.show import show_checks

    open_artifact(folder)

    from frankenmoe.prove import verify

    with bars() as progress:
        checks = verify(
            folder, on_start=lambda total: progress.start("comparing", total, "B"), on_bytes=progress.advance
        )
    if as_json:
        click.echo(json.dumps({check.what: check.found for check in checks}, indent=2))
    else:
        show_checks(folder, checks)


@app.command("chat", epilog=example('frankenmoe chat recipe.yml --prompt "Once upon a time" --trace'))
@click.argument("what", metavar="OUT|RECIPE|FILE.gguf", type=click.Path(path_type=Path))
@click.option("--prompt", help="Say this, print the reply and end; without it, a conversation.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=200, show_default=True)
@click.option("--temperature", type=Temperature(), default=0.0, show_default=True, help="0 is greedy.")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, help="Of the sampling.")
@click.option("--trace", is_flag=True, help="Show which experts each token went to.")
@click.option("--int8", is_flag=True, help="Round weights to 8 bits in memory: faster, logits a little off.")
@click.option("--json", "as_json", is_flag=True, help="Print reply and trace as JSON (needs --prompt).")
@REMOTE
def chat_command(
    what: Path,
    prompt: str | None,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    trace: bool,
    int8: bool,
    as_json: bool,
    trust_remote_code: bool,
) -> None:
    """Talk to an artifact, to a recipe before anything is built, or to a GGUF file.

    Tokens appear as they are made. With a chat template the model is addressed as an assistant, otherwise it goes on
    from your text.
    """
    if as_json and prompt is None:
        raise click.UsageError("--json needs --prompt")
    if prompt is not None and not is_unicode(prompt):
        raise click.UsageError("--prompt is not UTF-8 text")
    if what.suffix == ".gguf":
        from frankenmoe.cli.ggufchat import chat_gguf

        if int8:
            raise click.UsageError("--int8 needs an artifact or a recipe: a GGUF file is quantized by `export`")
        if trace:
            raise click.UsageError("--trace needs an artifact or a recipe: llama.cpp does not tell who was chosen")
        return chat_gguf(
            what,
            prompt=prompt,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            as_json=as_json,
        )

    from frankenmoe.building import is_recipe

    if is_recipe(what):
        from frankenmoe.cli.show import warn
        from frankenmoe.planning import plan
        from frankenmoe.recipe import Recipe

        warn(plan(Recipe.load(what), trust_remote_code=trust_remote_code).warnings)

    from frankenmoe.cli.chat import Settings, chat

    chat(
        what,
        prompt=prompt,
        settings=Settings(max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, trace=trace, int8=int8),
        as_json=as_json,
        trust_remote_code=trust_remote_code,
    )


@app.command(
    "train",
    epilog=example(
        "frankenmoe train recipe.yml trained/ --data verse=verse.txt\n"
        "frankenmoe train trained/ more/ --what routers,attention,norms --steps 500"
    ),
)
@click.argument("what", metavar="ARTIFACT|RECIPE", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--what", "parts", help="routers, adapters, norms, attention, experts, embeddings; comma between (routers)."
)
@click.option("--data", multiple=True, metavar="NAME=FILE", help="Text of an expert; again for more.")
@click.option("--weights", multiple=True, metavar="NAME=X", help="How often a domain is drawn (1).")
@setting_options
@click.option("--keep-anyway", is_flag=True, help="Write the result even where it is worse.")
@click.option("--shard", is_flag=True, help="Spread weights over a launcher's processes (FSDP2).")
@click.option("--report-to", multiple=True, help="wandb, tensorboard; again for more.")
@DTYPE
@JSON
@REMOTE
def train_command(what: Path, out: Path, **options: Any) -> None:
    """Train the routers of an MoE, and more of it if asked, into OUT.

    Frozen weights stay mapped from their sources. Text held out tells what is best, and that is kept; a run that helps
    nothing writes nothing. Interrupted or killed, the same command goes on to the same losses.
    """
    run_train(what, out, options=options)


@app.command("demo", epilog=example("frankenmoe demo --out demo-out"))
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("demo-out"), show_default=True, help="Where everything goes."
)
@JSON
def demo_command(out: Path, as_json: bool) -> None:
    """The whole story, offline, in two minutes.

    Makes five small parents, then an MoE of them: planned, run before it is written, measured beside its parents,
    traced, built and proved.
    """
    from frankenmoe.cli.demo import demo

    demo(out, as_json=as_json)


app.add_command(audit_command)
app.add_command(export_command)
app.add_command(card_command)
app.add_command(push_command)
app.add_command(run_command)


@app.command("schema", epilog=example("frankenmoe schema > recipe.schema.json"))
def schema_command() -> None:
    """Print the JSON schema of recipes, for editors."""
    from frankenmoe.recipe import schema

    click.echo(json.dumps(schema(), indent=2))


app.add_command(eval_command)
for command in (fit_command, add_expert_command, extract_command):
    app.add_command(command)


def main() -> None:
    """Runs a command; every error a user can act on ends in one sentence, a hint and exit code 2."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal without UTF-8 still gets what it can show
    try:
        app(standalone_mode=False)
    except FrankenMoEError as error:
        click.echo(f"error: {printable(error.message)}", err=True)
        if error.hint:
            click.echo(f"  hint: {printable(error.hint)}", err=True)
        sys.exit(2)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        goes_on = bool(RESUMING & set(sys.argv[1:2]))
        click.echo(f"interrupted; the same command {'goes on from here' if goes_on else 'starts again'}", err=True)
        sys.exit(INTERRUPTED)
    except OSError as error:  # of what we print, say: what sources and artifacts raise has been explained
        where = f" ({printable(str(error.filename))})" if error.filename else ""
        click.echo(f"error: the system says: {error.strerror or error}{where}", err=True)
        click.echo("  hint: check permissions, free space and where the output goes", err=True)
        sys.exit(2)
