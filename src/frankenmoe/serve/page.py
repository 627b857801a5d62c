"""The page of the server: files that are the same for every model. It knows no model; its scripts ask the server."""

from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}


def routes() -> list[Route]:
    """`/` and every file that the page loads, each under its name. All of them can be read without a key."""
    found = {each.name: each.read_bytes() for each in (files("frankenmoe.serve") / "assets").iterdir()}
    found["/"] = found.pop("page.html")
    return [_route(name, content) for name, content in sorted(found.items())]


def _route(name: str, content: bytes) -> Route:
    kind = TYPES[name[name.rfind(".") :]] if "." in name else TYPES[".html"]
    response = Response(content, media_type=kind, headers=HEADERS)

    async def answer(_: Request) -> Response:
        return response

    return Route(f"/{name.lstrip('/')}", answer, methods=["GET"], include_in_schema=False)
