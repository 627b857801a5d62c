"""A server that speaks what the page needs and no model: any number of layers, any speed, and faults on demand."""

import asyncio
import json
import random
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from frankenmoe.serve.page import routes

WORDS = (
    "The",
    " router",
    " chose",
    " an",
    " expert",
    ".",
    "\n",
    "Then",
    " the",
    " next",
    " one",
    ",",
    " <b>",
    "é",
    " ",
)


@dataclass
class Speech:
    """What the server says. `bodies` are what it was asked, `said` the layers of each token.

    `faults` are taken one for each request: the text of an error, "gone", or a number of requests that wait.
    """

    experts: tuple[str, ...] = ("prose", "code", "maths", "law")
    layers: int = 6
    words: tuple[str, ...] = WORDS
    tokens: int = 40
    per_second: float = 200
    key: str = ""
    faults: list[str | int] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    said: list[list[dict[str, Any]]] = field(default_factory=list)
    prompts: dict[str, dict[str, list[str]]] | None = None
    others: tuple[str, ...] = ("base",)

    def models(self) -> list[dict[str, Any]]:
        moe = {
            "kind": "moe", "experts": list(self.experts), "layers": self.layers, "experts_per_token": 2,
            "max_experts": len(self.experts), "prompts": self.prompts, "recipe": None,
            "controls": ["experts_per_token", "disable_experts", "expert_bias", "trace"],
        }  # fmt: skip
        dense = moe | {"kind": "dense", "experts": [], "layers": 0, "prompts": None, "controls": []}
        return [_model("moe", moe), *(_model(name, dense) for name in self.others)]


def _model(name: str, facts: dict[str, Any]) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "frankenmoe", "frankenmoe": facts}


def app(speech: Speech) -> Starlette:
    async def health(request: Request) -> Response:
        return _refused(speech, request) or JSONResponse({"status": "ok", "waiting": 0})

    async def models(request: Request) -> Response:
        return _refused(speech, request) or JSONResponse({"object": "list", "data": speech.models()})

    async def refit(request: Request) -> Response:
        speech.prompts = (await request.json())["prompts"]
        return JSONResponse(speech.models()[0])

    async def chat(request: Request) -> Response:
        body = await request.json()
        speech.bodies.append(body)
        fault = speech.faults.pop(0) if speech.faults else None
        if isinstance(fault, str) and fault != "gone":
            return JSONResponse({"error": {"message": fault, "type": "invalid_request_error"}}, status_code=400)
        return StreamingResponse(_stream(speech, body, fault), media_type="text/event-stream")

    api = [
        Route("/health", health),
        Route("/v1/models", models),
        Route("/v1/chat/completions", chat, methods=["POST"]),
        Route("/v1/frankenmoe/refit", refit, methods=["POST"]),
    ]
    return Starlette(routes=[*routes(), *api])


def _refused(speech: Speech, request: Request) -> Response | None:
    if not speech.key or request.headers.get("authorization") == f"Bearer {speech.key}":
        return None
    return JSONResponse({"error": {"message": "wrong key"}}, status_code=401)


async def _stream(speech: Speech, body: dict[str, Any], fault: str | int | None) -> AsyncIterator[str]:
    for before in range(fault if isinstance(fault, int) else 0, 0, -1):
        yield f": queued {before}\n\n"
        await asyncio.sleep(0.3)
    off = set(body.get("disable_experts", ()))
    on = [index for index, name in enumerate(speech.experts) if name not in off]
    chosen = random.Random(repr(sorted(off)))
    count = min(speech.tokens, body["max_tokens"])
    start = time.monotonic()
    for index in range(count):
        await asyncio.sleep(max(0, start + index / speech.per_second - time.monotonic()))
        if fault == "gone" and index == count // 2:
            return
        choice: dict[str, Any] = {"index": 0, "delta": {"content": speech.words[index % len(speech.words)]}}
        choice["finish_reason"] = ("length" if count == body["max_tokens"] else "stop") if index == count - 1 else None
        if body.get("trace"):
            layers = _layers(speech, on, chosen, body)
            speech.said.append(layers)
            choice["trace"] = [{"id": index, "text": choice["delta"]["content"], "layers": layers}]
        yield _event({"choices": [choice]})
    yield _event({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": count}})
    yield "data: [DONE]\n\n"


def _layers(speech: Speech, on: list[int], chosen: random.Random, body: dict[str, Any]) -> list[dict[str, Any]]:
    top = min(body.get("experts_per_token", 2), len(on))
    favourite = chosen.choice(on)
    found = []
    for _ in range(speech.layers):
        rest = chosen.sample([each for each in on if each != favourite], k=min(top, len(on) - 1))
        order = [favourite, *rest] if chosen.random() < 0.7 else [*rest[:1], favourite, *rest[1:]]
        weights = [0.5 ** (k + 1) for k in range(top)]
        weights[-1] += 1 - sum(weights)
        found.append({"experts": order[:top], "weights": weights, "next": (order[top:] or [None])[0]})
    return found


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data)}\n\n"


@contextmanager
def speaking(speech: Speech, *, port: int = 0) -> Iterator[str]:
    """Serves until the end of the block; gives the address."""
    server = uvicorn.Server(uvicorn.Config(app(speech), port=port, log_level="warning", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
