"""The files of the page: what is sent, under which policy, and what they may not contain."""

import re

import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient

from frankenmoe.serve.page import routes


@pytest.fixture(scope="module")
def client() -> TestClient:
    return TestClient(Starlette(routes=routes()))


def test_every_file_comes_with_the_policy_and_its_type(client: TestClient) -> None:
    types = {"/": "text/html", "/page.css": "text/css", "/page.js": "text/javascript"}
    for path, kind in types.items():
        answer = client.get(path)
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith(kind)
        assert answer.headers["content-security-policy"].startswith("default-src 'none'; script-src 'self';")
        assert "unsafe" not in answer.headers["content-security-policy"]


def test_nothing_comes_from_elsewhere_and_no_text_becomes_html(client: TestClient) -> None:
    for route in routes():
        text = client.get(route.path).text
        assert not re.findall(r"https?://(?!www\.w3\.org)", text), route.path
        assert not re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(", text), route.path


def test_everything_the_page_names_is_there(client: TestClient) -> None:
    html = client.get("/").text
    named = re.findall(r'(?:src|href)="([\w./]+)"', html)
    assert {"page.css", "page.js"} <= set(named)
    modules = [route.path for route in routes() if route.path.endswith(".js")]
    imported = [name for path in modules for name in re.findall(r'from "\./([\w.]+)"', client.get(path).text)]
    for name in (*named, *imported):
        assert client.get(f"/{name}").status_code == 200, name
