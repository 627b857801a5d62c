"""Serves models with OpenAI's API until it is told to stop.

`transformers serve` is not built upon: it loads by itself whatever model a request names, its chunks and its queue have
no place for routing, traces or a turn in line, and it has no logprobs, no `n` and no cache across turns.
"""

import logging
import re
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import uvicorn

from frankenmoe.errors import PlanError
from frankenmoe.progress import SILENT, Progress
from frankenmoe.serve.app import make_app
from frankenmoe.serve.guard import LOOPBACK
from frankenmoe.serve.line import Line
from frankenmoe.serve.models import Loading, load_models
from frankenmoe.serve.page import routes

ENDING = 10  # seconds in which requests are told that the server stops


@dataclass(frozen=True)
class Address:
    """Where the server listens, and who may ask it: with `key` those who have it, and pages of the sites `origins`."""

    host: str = "127.0.0.1"
    port: int = 8080
    key: str | None = None
    origins: tuple[str, ...] = ()


HERE, USUAL = Address(), Loading()


def serve(
    whats: Sequence[str | Path],
    *,
    address: Address = HERE,
    how: Loading = USUAL,
    seconds: float = 600.0,
    on_ready: Callable[[str], None] = lambda url: None,
    on_warnings: Callable[[Sequence[str]], None] = lambda warnings: None,
    progress: Progress = SILENT,
) -> None:
    """Loads every model and serves them until SIGINT or SIGTERM.

    `on_warnings` gets those of the recipes' plans before anything is loaded, `on_ready` then the address as a URL.

    `seconds` is the most that one request may take. Raises PlanError for an address that cannot be used, and the errors
    of opening and loading a model.
    """
    _check(address)
    with _listening(address) as listener:
        models = load_models(whats, how=how, on_warnings=on_warnings, progress=progress)
        line = Line(seconds=seconds)
        hosts = LOOPBACK if address.key is None else None
        app = make_app(models, line, key=address.key, hosts=hosts, origins=address.origins, page=routes())
        config = uvicorn.Config(
            app, log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=ENDING, ws="none"
        )
        logging.getLogger("uvicorn").setLevel(logging.ERROR)
        server = Server(config, line=line, on_ready=lambda: on_ready(_url(listener)))
        with suppress(KeyboardInterrupt):  # Ctrl-C is how it is ended
            server.run(sockets=[listener])


class Server(uvicorn.Server):
    """uvicorn's server, which tells the requests in the line when it stops."""

    def __init__(self, config: uvicorn.Config, *, line: Line, on_ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._line, self._on_ready = line, on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Starts, then says so."""
        await super().startup(sockets)
        self._on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Ends the work, then waits until its requests have been told."""
        self._line.close()
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A second signal does not wait."""
        self.force_exit = self.should_exit
        super().handle_exit(sig, frame)


def _check(address: Address) -> None:
    """Raises PlanError for an address that would be open to others, a key no program can send, and a bad origin."""
    if address.key is None and address.host not in LOOPBACK:
        raise PlanError(
            f"--host {address.host} can be reached from other machines, expected an API key with it",
            hint="set FRANKENMOE_API_KEY, or use --host 127.0.0.1",
        )
    if address.key is not None and not re.fullmatch(r"[!-~]+", address.key):
        raise PlanError(
            "the API key must be one or more ASCII letters, digits and signs, without spaces",
            hint="make one with `openssl rand -hex 16`",
        )
    for origin in address.origins:
        if not re.fullmatch(r"https?://[^/\s*]+", origin):
            raise PlanError(
                f"--cors must be a site such as https://example.org, found {origin!r}",
                hint="name each site; the path is left out, and there is no wildcard",
            )


def _listening(address: Address) -> socket.socket:
    """A socket on which nobody is answered yet, so that an address in use is reported before a model is loaded."""
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    try:
        name = address.host.encode("idna").decode()
        return socket.create_server((name, address.port), family=family, backlog=2048)
    except (OSError, UnicodeError) as error:
        # Python adds the address to the text of some errors
        why = (
            str(error.strerror).partition(" (while")[0] if isinstance(error, OSError) else "no host can have this name"
        )
        raise PlanError(
            f"cannot listen on {address.host} port {address.port}: {why}",
            hint="choose another --host or --port; port 0 takes a free one",
        ) from error


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
