"""`frankenmoe serve`: its options, and what it says when it is ready."""

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import click
from pydantic import Field

from frankenmoe.cli.options import COUNT, EXPERTS_PER_TOKEN, NO_CACHE, REMOTE, Number, example, placed
from frankenmoe.cli.progress import bars
from frankenmoe.cli.show import warn
from frankenmoe.errors import PlanError
from frankenmoe.planning.kind import kind_of

PORT = Number(Annotated[int, Field(ge=0, le=65535)])
INSTALL = "pip install 'frankenmoe[serve]'"


@click.command("serve", epilog=example("frankenmoe serve recipe.yml\nfrankenmoe serve out/ --beside base/ --port 8000"))
@click.argument("what", metavar="ARTIFACT|RECIPE|FILE.gguf", type=click.Path(path_type=Path))
@click.option(
    "--beside", metavar="MODEL", multiple=True,
    help="Another such model, or a dense one, to compare with (repeatable).",
)  # fmt: skip
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; others need an API key.")
@click.option("--port", type=PORT, default=8080, show_default=True, help="Port; 0 takes a free one.")
@click.option(
    "--api-key", envvar="FRANKENMOE_API_KEY", show_envvar=True,
    help="Key that requests must have. Other users see a command line, so set the variable.",
)  # fmt: skip
@click.option("--max-tokens", type=COUNT, default=2048, show_default=True, help="Longest answer, in tokens.")
@click.option("--timeout", type=COUNT, default=600, show_default=True, help="Longest time for an answer, in seconds.")
@click.option("--cors", metavar="ORIGIN", multiple=True, help="Site whose pages may ask, as https://... (repeatable).")
@click.option("--int8", is_flag=True, help="Round weights to 8 bits in memory: faster, slightly inexact.")
@EXPERTS_PER_TOKEN
@placed
@NO_CACHE
@REMOTE
def serve_command(
    what: Path,
    beside: tuple[str, ...],
    host: str,
    port: int,
    api_key: str | None,
    max_tokens: int,
    timeout: int,
    cors: tuple[str, ...],
    int8: bool,
    experts_per_token: int | None,
    device: str,
    dtype: str | None,
    no_cache: bool,
    trust_remote_code: bool,
) -> None:
    """Serve a model with OpenAI's API and a web page.

    Requests of one model with the same routing are answered at once, others wait in line. Fields beside OpenAI's change
    the routing of a request and tell which experts its tokens got. Ends with Ctrl-C.
    """
    if kind_of(what) == "dense":
        raise PlanError(
            f"{what} is not an artifact, a recipe or a GGUF file, expected one of them",
            hint="check the path; a dense model can be served beside one of these: --beside",
        )
    for_torch = int8 or experts_per_token is not None or device != "auto" or dtype is not None
    if for_torch and {kind_of(what), *map(kind_of, beside)} == {"gguf"}:
        raise click.UsageError(
            "--int8, --experts-per-token, --device and --dtype need an artifact or a recipe; llama.cpp reads GGUF "
            "files here"
        )
    if not (find_spec("starlette") and find_spec("uvicorn")):
        raise PlanError("serving needs Starlette and uvicorn, which are not installed", hint=INSTALL)

    from frankenmoe.serve.models import Loading
    from frankenmoe.serve.run import Address, serve

    def ready(url: str) -> None:
        click.echo(f"serving on {url}")
        click.echo("Ctrl-C ends", err=True)

    with bars() as progress:
        serve(
            [what, *beside],
            address=Address(host, port, api_key, cors),
            how=Loading(
                device=device,
                dtype=dtype,
                int8=int8,
                cache=not no_cache,
                trust_remote_code=trust_remote_code,
                most=max_tokens,
                experts_per_token=experts_per_token,
            ),
            seconds=timeout,
            on_ready=ready,
            on_warnings=warn,
            progress=progress,
        )
