"""The API in OpenAPI's form, made from the bodies that are accepted."""

from collections.abc import Sequence
from typing import Any

from pydantic.json_schema import models_json_schema

from frankenmoe import __version__
from frankenmoe.serve.bodies import Body, Chat, Complete, Refit

Data = dict[str, Any]
PROBLEMS = {
    "400": "The request is wrong; `param` names the field.",
    "401": "The API key is missing or wrong.",
    "403": "The request came from another site, or was sent to a name that is not this server's.",
    "404": "There is no such model.",
    "413": "The body is too large.",
    "429": "Too many requests wait.",
    "503": "The server is stopping, or a refit was stopped.",
}
SCHEMAS = "#/components/schemas/"
POSTS: dict[str, tuple[type[Body], str]] = {
    "/v1/chat/completions": (Chat, "Answers a conversation, whole or as a stream."),
    "/v1/completions": (Complete, "Continues a text, whole or as a stream."),
    "/v1/frankenmoe/refit": (Refit, "Fits a model's routers again, from other prompts, in memory."),
}
GETS = {
    "/v1/models": "The models, with their experts, prompts and recipes.",
    "/health": "Whether the server answers, and how many requests wait.",
}


def described(names: Sequence[str]) -> Data:
    """The description of all routes but those of the page, with the `names` of the models."""
    _, made = models_json_schema(
        [(kind, "validation") for kind, _ in POSTS.values()], ref_template=f"{SCHEMAS}{{model}}"
    )
    definitions: Data = made["$defs"]
    problem = {"error": {"type": "object", "required": ["message", "type", "param", "code"]}}
    components: Data = definitions | {"Error": {"type": "object", "properties": problem}}
    paths: Data = {path: {"get": {"summary": text, "responses": _answers()}} for path, text in GETS.items()}
    name = {"name": "model", "in": "path", "required": True, "schema": {"enum": list(names)}}
    paths["/v1/models/{model}"] = {"get": {"summary": "One of them.", "parameters": [name], "responses": _answers()}}
    for path, (kind, text) in POSTS.items():
        definitions[kind.__name__]["properties"]["model"]["enum"] = list(names)
        content = {"application/json": {"schema": {"$ref": f"{SCHEMAS}{kind.__name__}"}}}
        post = {"summary": text, "requestBody": {"required": True, "content": content}, "responses": _answers()}
        paths[path] = {"post": post}
    return {
        "openapi": "3.1.0",
        "info": {"title": "frankenmoe", "version": __version__},
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _answers() -> Data:
    problem = {"application/json": {"schema": {"$ref": f"{SCHEMAS}Error"}}}
    found: Data = {status: {"description": text, "content": problem} for status, text in PROBLEMS.items()}
    return {"200": {"description": "The answer."}, **found}
