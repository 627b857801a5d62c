"""The routes of the server. It knows requests and answers; how a model writes is in `running` and `gguf`."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from functools import partial
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Message, Send

from frankenmoe.errors import FrankenMoEError
from frankenmoe.serve.bodies import Asked, Chat, Complete, Refit, read
from frankenmoe.serve.chunks import ChatForm, Form, TextForm
from frankenmoe.serve.describe import described
from frankenmoe.serve.errors import GONE, RequestError, of_error
from frankenmoe.serve.guard import PATIENCE, Guard, body_of, refused
from frankenmoe.serve.line import Job, Line, Ticket, Waiting
from frankenmoe.serve.models import Models

_log = logging.getLogger("frankenmoe.serve")
# what is wrong with a request that no route takes
PROBLEMS: Mapping[int, str] = {
    404: "there is nothing at this path; GET /openapi.json lists what there is",
    405: "this path does not take this method; the Allow header names those that it takes",
}


def make_app(
    models: Models,
    line: Line,
    *,
    key: str | None = None,
    hosts: frozenset[str] | None = None,
    origins: Sequence[str] = (),
    page: Sequence[Route] = (),
) -> Starlette:
    """The server's app: `page` are more routes, the rest is as `Guard` and `Line` say."""
    server = Endpoints(models, line)
    cors = [Middleware(CORSMiddleware, allow_origins=list(origins), allow_methods=["*"], allow_headers=["*"])]
    app = Starlette(
        routes=[
            Route("/v1/models", server.models, methods=["GET"]),
            Route("/v1/models/{name:path}", server.model, methods=["GET"]),
            Route("/v1/chat/completions", partial(server.complete, kind=Chat, form=ChatForm), methods=["POST"]),
            Route("/v1/completions", partial(server.complete, kind=Complete, form=TextForm), methods=["POST"]),
            Route("/v1/frankenmoe/refit", server.refit, methods=["POST"]),
            Route("/health", server.health, methods=["GET"]),
            Route("/openapi.json", server.description, methods=["GET"]),
            *page,
        ],
        middleware=[*(cors if origins else []), Middleware(Guard, key=key, hosts=hosts, origins=origins)],
        exception_handlers={
            RequestError: lambda _, problem: refused(problem),
            FrankenMoEError: lambda _, error: refused(of_error(error)),
            HTTPException: _http_problem,
            ClientDisconnect: lambda *_: Response(status_code=GONE),
            Exception: lambda *_: refused(RequestError("the server failed; its log says why", status=500)),
        },
    )
    app.router.redirect_slashes = False  # a redirect would repeat whatever Host header it was sent
    return app


class Endpoints:
    """What the routes do. A body is read and checked before its request joins the line."""

    def __init__(self, models: Models, line: Line) -> None:
        self._models, self._line = models, line
        self._one = asyncio.Lock()  # tokenizers are not made for several threads

    async def models(self, _: Request) -> Response:
        """Every model that is served."""
        return JSONResponse({"object": "list", "data": [self._models.entry(name) for name in self._models.by_name]})

    async def model(self, request: Request) -> Response:
        """One of them."""
        return JSONResponse(self._models.entry(request.path_params["name"]))

    async def health(self, _: Request) -> Response:
        """Whether the server answers, and how many requests wait."""
        return JSONResponse({"status": "ok", "waiting": self._line.waiting})

    async def description(self, _: Request) -> Response:
        """The API in OpenAPI's form."""
        return JSONResponse(described(list(self._models.by_name)))

    async def complete(self, request: Request, *, kind: type[Asked], form: type[Form]) -> Response:
        """Answers a chat or a text, whole or as a stream."""
        body = read(kind, await body_of(request))
        model = self._models.find(body.model)
        async with self._one:
            job = await run_in_threadpool(model.job, body)
        ticket = self._line.join(job)
        if body.stream:
            return Stream(_events(ticket, form(body)), ticket)
        return await _unless_gone(request, ticket, _whole(ticket, form(body)))

    async def refit(self, request: Request) -> Response:
        """Fits a model's routers again."""
        body = read(Refit, await body_of(request))
        model = self._models.find(body.model)
        prompts = {name: sides.model_dump() for name, sides in body.prompts.items()}
        ticket = self._line.join(Job(model.refit, prompts))

        async def done() -> Response:
            async for _ in ticket.heard():
                pass
            return JSONResponse(self._models.entry(body.model))

        return await _unless_gone(request, ticket, done())


class Stream(StreamingResponse):
    """Server-sent events. A client that hangs up, or does not take them in time, ends the work."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[str], ticket: Ticket) -> None:
        super().__init__(events, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._ticket = ticket

    async def stream_response(self, send: Send) -> None:
        """Sends the events."""

        async def patient(message: Message) -> None:
            async with asyncio.timeout(PATIENCE):
                await send(message)

        try:
            await super().stream_response(patient)
        except TimeoutError:
            _log.warning("a client did not take its answer within %d seconds", PATIENCE)
        finally:
            self._ticket.cancel()


async def _events(ticket: Ticket, form: Form) -> AsyncIterator[str]:
    try:
        async for event in ticket.heard():
            if isinstance(event, Waiting):
                yield f": queued {event.before}\n\n"
                continue
            for chunk in form.chunks(event):
                yield _event(chunk)
    except RequestError as problem:
        yield _event(problem.body())
    else:
        yield "data: [DONE]\n\n"


def _event(data: Any) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"


async def _whole(ticket: Ticket, form: Form) -> Response:
    return JSONResponse(form.answer([event async for event in ticket.heard()]))


async def _unless_gone(request: Request, ticket: Ticket, answer: Any) -> Response:
    """The answer; its work ends early if the client hangs up."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    answering, leaving = asyncio.ensure_future(answer), asyncio.ensure_future(gone())
    try:
        await asyncio.wait((answering, leaving), return_when=asyncio.FIRST_COMPLETED)
        return await answering if answering.done() else Response(status_code=GONE)
    finally:
        ticket.cancel()
        answering.cancel()
        leaving.cancel()


def _http_problem(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    status = error.status_code
    response = refused(RequestError(PROBLEMS.get(status, error.detail), status=status))
    response.headers.update(error.headers or {})
    return response
