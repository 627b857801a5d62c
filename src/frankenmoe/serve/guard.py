"""Lets through the requests that may come in: with the key, to a name of this machine, from no other site."""

import asyncio
import hmac
from collections.abc import Sequence
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from frankenmoe.serve.errors import LATE, TOO_LARGE, RequestError

LARGEST = 2**20  # bytes of a body
DISCARDED = 2**26  # bytes of a body that is too large, which are read so that its sender reads the answer
LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
PATIENCE = 60.0  # seconds in which a client must send a body, and take what it is sent
GUARDED = ("/v1/", "/health", "/openapi.json")  # paths that need the key


class Guard:
    """Refuses requests before the routes see them.

    With a `key`, every path under GUARDED needs it. `hosts` are the names that a request may have been sent to (None:
    any), which stops pages of other sites whose name points at this machine. `origins` are the other sites whose pages
    may post.
    """

    def __init__(
        self, app: ASGIApp, *, key: str | None, hosts: frozenset[str] | None, origins: Sequence[str] = ()
    ) -> None:
        self._app, self._key, self._hosts, self._origins = app, key, hosts, frozenset(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request that is refused; gives any other one to the app."""
        problem = self._problem(scope) if scope["type"] == "http" else None
        if problem is None:
            await self._app(scope, receive, send)
        else:
            await refused(problem)(scope, receive, send)

    def _problem(self, scope: Scope) -> RequestError | None:
        headers = Headers(scope=scope)
        if self._hosts is not None and _name(headers.get("host", "")) not in self._hosts:
            return RequestError("this name is not one of this server's", status=403, code="host_not_allowed")
        if scope["method"] == "POST" and not self._from_here(headers):
            return RequestError("pages of other sites may not ask this server", status=403, code="origin_not_allowed")
        if self._key is not None and scope["path"].startswith(GUARDED):
            scheme, _, given = headers.get("authorization", "").partition(" ")
            same = hmac.compare_digest(given.strip().encode(), self._key.encode())
            if scheme.lower() != "bearer" or not same:
                return RequestError("the API key is missing or wrong", status=401, code="invalid_api_key")
        return None

    def _from_here(self, headers: Headers) -> bool:
        origin = headers.get("origin")
        return origin is None or origin in self._origins or _place(origin) == headers.get("host", "").lower()


def refused(problem: RequestError) -> JSONResponse:
    """The answer to a request with a problem."""
    extra = {"WWW-Authenticate": "Bearer"} if problem.status == 401 else {}
    return JSONResponse(problem.body(), status_code=problem.status, headers=extra)


def _name(host: str) -> str:
    """The name in a Host header, without a port."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _place(origin: str) -> str:
    """Name and port of an origin."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""


async def body_of(request: Request) -> bytes:
    """The body of a request. Raises RequestError if it is too large or too slow."""
    kept: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(PATIENCE):
            async for part in request.stream():
                size += len(part)
                if size <= LARGEST:
                    kept.append(part)
                elif size > DISCARDED:
                    break
    except TimeoutError:
        raise RequestError(f"the body did not come within {PATIENCE:.0f} seconds", status=LATE) from None
    if size > LARGEST:
        raise RequestError(
            f"the body has more than {LARGEST:,} bytes, the most that is read", status=TOO_LARGE, code="body_too_large"
        )
    return b"".join(kept)
