"""The commands and their options. A command imports torch only when it runs, so that `plan` and `--help` are fast."""

import io
import json
import os
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any, NoReturn

import click

from frankenmoe import __version__
from frankenmoe.cli.adopt import adopt_command
from frankenmoe.cli.audit import audit_command
from frankenmoe.cli.cache import cache_command
from frankenmoe.cli.card import card_command
from frankenmoe.cli.evaluate import eval_command
from frankenmoe.cli.export import export_command
from frankenmoe.cli.families import families_command
from frankenmoe.cli.fit import add_expert_command, extract_command, fit_command
from frankenmoe.cli.heal import heal_command
from frankenmoe.cli.lora import extract_lora_command
from frankenmoe.cli.options import (
    COUNT,
    DEVICE,
    DTYPE,
    EXPERTS_PER_TOKEN,
    JSON,
    NO_CACHE,
    REMOTE,
    SEED,
    SIZE,
    TEMPERATURE,
    example,
    json_option,
    placed,
)
from frankenmoe.cli.progress import bars
from frankenmoe.cli.push import push_command
from frankenmoe.cli.run import run_command
from frankenmoe.cli.serve import serve_command
from frankenmoe.cli.settings import given, settings_options
from frankenmoe.cli.show import show_built, show_plan, warn
from frankenmoe.cli.smaller import prune_command, remove_expert_command
from frankenmoe.cli.text import is_unicode, json_text, printable, spelled_out
from frankenmoe.cli.train import train_command
from frankenmoe.cli.verify import verify_command
from frankenmoe.errors import FrankenMoEError, FrankenMoEWarning, PlanError, bounded, explained
from frankenmoe.moe.processes import is_main, world
from frankenmoe.planning.kind import kind_of
from frankenmoe.recipe import Recipe
from frankenmoe.recipe.sections import SHARD_SIZE, BuildSettings
from frankenmoe.subject import open_subject

TOGETHER = {"train", "eval", "fit", "heal"}  # commands that several processes of a launcher can share
GRACE = 3  # seconds in which a launcher ends the other processes after the first one failed
INTERRUPTED = 130  # exit code after Ctrl-C, as shells expect it
RESUMING = {"build", "heal", "train", "eval", "run", "push", "remove-expert"}

_python_shows = warnings.showwarning

RECIPE = click.argument("recipe", type=click.Path(path_type=Path))


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 80},
    epilog=example("frankenmoe demo\nfrankenmoe plan recipes/raiden-16x3.43b.yml"),
)
@click.version_option(__version__, prog_name="frankenmoe")
def app() -> None:
    """Make mixture-of-experts models from dense checkpoints.

    A recipe names a base model, experts and a way to route tokens. `plan` shows its size, `chat` runs it without
    writing a model, `build` writes a standard checkpoint.
    """
    asked = click.get_current_context().invoked_subcommand
    if world() > 1 and asked not in TOGETHER:
        raise PlanError(
            f"`{asked}` runs in one process, found {world()} started by a launcher",
            hint=f"run it without torchrun; {' and '.join(sorted(TOGETHER))} use several processes",
        )


@app.command("plan", epilog=example("frankenmoe plan recipes/raiden-16x3.43b.yml --json"))
@RECIPE
@DTYPE
@JSON
@REMOTE
def plan_command(recipe: Path, dtype: str | None, as_json: bool, trust_remote_code: bool) -> None:
    """Show format, parameters, memory and warnings of RECIPE.

    Reads configs and headers only. Writes nothing.
    """
    from frankenmoe.planning import plan
    from frankenmoe.planning.trained import read_routers

    opened = open_subject(recipe).recipe if kind_of(recipe) == "mixture" else Recipe.load(recipe)
    made = plan(opened, dtype=dtype, trust_remote_code=trust_remote_code)
    if made.routers_file is not None:
        read_routers(made.routers_file, made.routers)
    if as_json:
        from frankenmoe.planning.fitting import fit_forecast
        from frankenmoe.planning.forecast import forecast
        from frankenmoe.planning.healing import heal_bytes

        gguf = forecast(made)
        cost = fit_forecast(made, made.recipe.fit_settings)
        heal = {"bytes": heal_bytes(made, made.recipe.heal)} if made.recipe.heal else None
        facts = made.to_dict() | {"gguf": gguf.to_dict(), "fit": cost and cost.to_dict(), "heal": heal}
        if gguf.impossible:
            facts["memory"] |= {"q4_0": None, "q5_0": None}
        click.echo(json_text(facts))
    else:
        show_plan(made)


@app.command(
    "build", epilog=example("frankenmoe build recipe.yml out/\nfrankenmoe build recipe.yml out-virtual/ --virtual")
)
@click.argument("what", metavar="RECIPE|ARTIFACT", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@settings_options(BuildSettings)
@DTYPE
@click.option(
    "--shard-size", type=SIZE, default=SHARD_SIZE, show_default=f"{SHARD_SIZE // 10**9}GB",
    help="Largest size of one weight file.",
)  # fmt: skip
@DEVICE
@NO_CACHE
@REMOTE
def build_command(
    what: Path,
    out: Path,
    dtype: str | None,
    shard_size: int,
    device: str,
    no_cache: bool,
    trust_remote_code: bool,
    **options: Any,
) -> None:
    """Write the MoE of RECIPE, or of a virtual ARTIFACT, to OUT.

    If interrupted or killed, the same command continues where it stopped.
    """
    # the plan comes first, so that mistakes in the recipe are reported before torch is imported
    subject = open_subject(what, dtype=dtype, cache=not no_cache, trust_remote_code=trust_remote_code)
    if subject.artifact is None:
        warn(subject.planned.warnings)

    from frankenmoe.build.run import build

    with bars() as progress:
        artifact = build(subject, out, shard_size=shard_size, device=device, progress=progress, **given(options))
    show_built(artifact)


@app.command("chat", epilog=example('frankenmoe chat recipe.yml --prompt "Once upon a time" --trace'))
@click.argument("what", metavar="ARTIFACT|RECIPE|FILE.gguf", type=click.Path(path_type=Path))
@click.option("--prompt", help="Send this message, print the reply and exit.")
@click.option("--max-new-tokens", type=COUNT, default=200, show_default=True, help="Longest reply, in tokens.")
@click.option(
    "--temperature", type=TEMPERATURE, default=0.0, show_default=True, help="Sampling temperature; 0 is greedy."
)
@click.option("--seed", type=SEED, default=0, show_default=True, help="Seed for sampling.")
@click.option("--trace", is_flag=True, help="Show the experts of each token.")
@click.option("--int8", is_flag=True, help="Round weights to 8 bits in memory: faster, slightly inexact.")
@EXPERTS_PER_TOKEN
@placed
@json_option("Print reply and trace as JSON; needs --prompt.")
@NO_CACHE
@REMOTE
def chat_command(
    what: Path,
    prompt: str | None,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    trace: bool,
    int8: bool,
    experts_per_token: int | None,
    device: str,
    dtype: str | None,
    as_json: bool,
    no_cache: bool,
    trust_remote_code: bool,
) -> None:
    """Chat with an artifact, a recipe or a GGUF file.

    A recipe needs no build. Without --prompt, starts a conversation. Tokens are printed as they are generated. A model
    without a chat template continues your text.
    """
    if as_json and prompt is None:
        raise click.UsageError("--json needs --prompt")
    if prompt is not None and not is_unicode(prompt):
        raise click.UsageError("--prompt is not UTF-8 text")
    if kind_of(what) == "gguf":
        from frankenmoe.cli.ggufchat import chat_gguf

        if int8:
            raise click.UsageError("--int8 needs an artifact or a recipe; `export` quantizes GGUF files")
        if experts_per_token is not None:
            raise click.UsageError(
                "a GGUF file has its number of experts per token; `export --experts-per-token` sets it"
            )
        if device != "auto" or dtype is not None:
            raise click.UsageError("--device and --dtype need an artifact or a recipe; llama.cpp reads GGUF files here")
        if trace:
            raise click.UsageError("--trace needs an artifact or a recipe; llama.cpp does not report experts")
        return chat_gguf(
            what,
            prompt=prompt,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            as_json=as_json,
        )
    subject = open_subject(
        what, cache=not no_cache, trust_remote_code=trust_remote_code, experts_per_token=experts_per_token
    )
    if subject.artifact is None:
        warn(subject.planned.warnings)

    from frankenmoe.cli.chat import Settings, chat

    chat(
        subject,
        prompt=prompt,
        settings=Settings(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            trace=trace,
            int8=int8,
            device=device,
            dtype=dtype,
        ),
        as_json=as_json,
    )


@app.command("demo", epilog=example("frankenmoe demo --out demo-out\nfrankenmoe demo --real"))
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Folder for all results.  [default: demo-out, with --real demo-real]",
)
@click.option("--real", is_flag=True, help="With fine-tunes of a real model (needs the extra `real`), within an hour.")
@click.option(
    "--data-dir",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="With --real: base and MoE also answer a few questions of each leaderboard task, from rows in this folder.",
)
@JSON
def demo_command(out: Path | None, real: bool, data_dir: Path | None, as_json: bool) -> None:
    """Run all stages on five small models, offline, in minutes.

    Makes five small parents and an MoE from them. Plans it, runs it, compares it with its parents, traces tokens,
    builds it and verifies it. With --real the parents are SmolLM2-135M-Instruct and four fine-tunes of its FFNs,
    trained once in about ten minutes and kept in the cache.
    """
    if data_dir is not None and not real:
        raise PlanError(
            "--data-dir is for the tasks of --real: the toys cannot answer them", hint="add --real, or drop --data-dir"
        )
    from frankenmoe.cli.demo import demo

    demo(out or Path("demo-real" if real else "demo-out"), real=real, rows=data_dir, as_json=as_json)


@app.command("schema", epilog=example("frankenmoe schema > recipe.schema.json"))
def schema_command() -> None:
    """Print the JSON schema of recipes, for use in editors."""
    from frankenmoe.recipe import schema

    click.echo(json.dumps(schema(), indent=2))


for command in (
    verify_command,
    fit_command,
    heal_command,
    add_expert_command,
    remove_expert_command,
    prune_command,
    adopt_command,
    extract_command,
    extract_lora_command,
    train_command,
    audit_command,
    eval_command,
    export_command,
    card_command,
    push_command,
    run_command,
    serve_command,
    cache_command,
    families_command,
):
    app.add_command(command)


@contextmanager
def _one_voice() -> Iterator[None]:
    """Only the first of a launcher's processes prints. Another one that fails alone says why, a little later."""
    if is_main():
        yield
        return
    try:
        with open(os.devnull, "w", encoding="utf-8") as silence, redirect_stdout(silence), redirect_stderr(silence):
            yield
    except Exception:
        time.sleep(GRACE)
        raise


def _show_warning(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
    """Shows a Python warning; ours like every other warning of a command, without the line of code."""
    if issubclass(category, FrankenMoEWarning):
        warn([str(message)])
    else:
        _python_shows(message, category, *where, **more)


def main() -> None:
    """Runs a command. Errors are printed as one sentence and a hint; the exit code is then 2."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # for terminals without UTF-8
    warnings.showwarning = _show_warning
    try:
        with _one_voice():
            app(standalone_mode=False)
    except FrankenMoEError as error:
        _refuse(error)
    except click.ClickException as error:
        said = io.StringIO()
        error.show(said)
        click.echo(spelled_out(bounded(said.getvalue().rstrip())), err=True)
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        resumes = bool(RESUMING & set(sys.argv[1:2]))
        click.echo(f"interrupted; the same command {'continues from here' if resumes else 'starts again'}", err=True)
        sys.exit(INTERRUPTED)
    except OSError as error:  # of stdout, for example; those of sources and artifacts are FrankenMoEErrors by now
        _refuse(explained(error))


def _refuse(error: FrankenMoEError) -> NoReturn:
    with suppress(OSError):  # nobody reads it, or its disk is full
        click.echo(f"error: {printable(error.message)}", err=True)
        if error.hint:
            click.echo(f"  hint: {printable(error.hint)}", err=True)
    sys.exit(2)
