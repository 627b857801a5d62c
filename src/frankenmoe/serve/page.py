"""The page of the server: files that are the same for every model. It knows no model; its scripts ask the server."""

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from frankenmoe.webpage import assets, json_in_html, marks

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
TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript"}
DISTINCT = 64  # marks that differ
MARKS = b"{{marks}}"  # where page.html takes the marks of experts


def routes() -> list[Route]:
    """`/` and every file that the page loads, each under its name. All of them can be read without a key."""
    found = assets("frankenmoe") | assets("frankenmoe.serve")
    html = found.pop("page.html").replace(MARKS, json_in_html({"marks": marks(DISTINCT)}).encode())
    return [_route("", html, "html"), *(_route(name, text, name.split(".")[-1]) for name, text in found.items())]


def _route(name: str, content: bytes, kind: str) -> Route:
    response = Response(content, media_type=TYPES[kind], headers=HEADERS)

    async def answer(_: Request) -> Response:
        return response

    return Route(f"/{name}", answer, methods=["GET"], include_in_schema=False)
