"""A hub on this machine: the part of its API that up- and downloads by the real huggingface_hub need, without Xet.

It checks what it is sent (hashes, sizes, tokens) as the real one does, and can be told to fail.
"""

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import yaml

TOKEN = "hf_good"
COMMIT = "0" * 40
LFS_ENDINGS = (".safetensors", ".gguf", ".png")


@dataclass
class Hub:
    """What the server holds. `fail` maps a piece of a path to the status it answers there with."""

    url: str = ""
    owners: tuple[str, ...] = ("me",)
    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    commits: list[tuple[str, str, list[str]]] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    fail: dict[str, int] = field(default_factory=dict)
    uploads_left: int | None = None

    def content(self, repo: str) -> dict[str, bytes]:
        return self.repos[repo]


@contextmanager
def running(hub: Hub) -> Iterator[Hub]:
    class Handler(_Handler):
        state = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    state: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._serve("GET")

    def do_HEAD(self) -> None:
        self._serve("HEAD")

    def do_POST(self) -> None:
        self._serve("POST")

    def do_PUT(self) -> None:
        self._serve("PUT")

    def _serve(self, method: str) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.state.requests.append(f"{method} {self.path}")
        for piece, status in self.state.fail.items():
            if piece in self.path:
                return self._answer(status, {"error": f"told to fail with {status}"})
        if method == "PUT":
            return self._receive(body)
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._answer(401, {"error": "Invalid credentials in Authorization header"})
        return self._api(self.path.split("?")[0], body)

    def _api(self, path: str, body: bytes) -> None:
        match path.strip("/").split("/"):
            case ["api", "whoami-v2"]:
                self._answer(200, {"name": "me", "type": "user", "orgs": [], "auth": {"type": "access_token"}})
            case ["api", "validate-yaml"]:
                self._validate(json.loads(body)["content"])
            case ["api", "repos", "create"]:
                self._create(json.loads(body))
            case ["api", "models", owner, name, "preupload", _]:
                self._preupload(f"{owner}/{name}", json.loads(body))
            case ["api", "models", owner, name, "commit", _]:
                self._commit(f"{owner}/{name}", body)
            case ["api", "models", owner, name, "tree", _]:
                self._tree(self.state.repos.get(f"{owner}/{name}", {}))
            case ["api", "models", owner, name, *_]:
                known = f"{owner}/{name}" in self.state.repos
                self._answer(200 if known else 404, {"id": f"{owner}/{name}", "sha": COMMIT, "siblings": []})
            case [owner, name, "info", "lfs", "objects", "batch"]:
                self._batch(json.loads(body))
            case [owner, name, "resolve", _, *parts]:
                self._send(self.state.repos.get(f"{owner}/{name}", {}).get("/".join(parts)))
            case _:
                self._answer(404, {"error": f"no such page: {path}"})

    def _create(self, wanted: dict[str, object]) -> None:
        owner = wanted.get("organization") or "me"
        repo = f"{owner}/{wanted['name']}"
        if owner not in self.state.owners:
            return self._answer(403, {"error": "You don't have the rights to create a model under this namespace"})
        if repo in self.state.repos:
            return self._answer(
                409, {"error": "You already created this model repo", "url": f"{self.state.url}/{repo}"}
            )
        self.state.repos[repo] = {}
        self.state.private[repo] = wanted.get("visibility") == "private" or bool(wanted.get("private"))
        return self._answer(200, {"url": f"{self.state.url}/{repo}"})

    def _validate(self, card: str) -> None:
        head = yaml.safe_load(card.split("---")[1]) if card.startswith("---") else {}
        wrong = [key for key in ("tags", "base_model", "datasets") if not isinstance(head.get(key, []), list)]
        errors = [{"message": f'"{key}" must be an array'} for key in wrong]
        self._answer(400 if errors else 200, {"errors": errors, "warnings": []})

    def _preupload(self, repo: str, wanted: dict[str, list[dict[str, str]]]) -> None:
        if repo.split("/")[0] not in self.state.owners:
            return self._answer(403, {"error": "Forbidden: you must be a member"})
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(LFS_ENDINGS) else "regular",
                "shouldIgnore": False,
                "oid": None,
            }
            for file in wanted["files"]
        ]
        return self._answer(200, {"files": files})

    def _batch(self, wanted: dict[str, list[dict[str, object]]]) -> None:
        rows = []
        for item in wanted["objects"]:
            row: dict[str, object] = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in self.state.objects:
                row["actions"] = {"upload": {"href": f"{self.state.url}/lfs/{item['oid']}", "header": {}}}
            rows.append(row)
        self._answer(200, {"transfer": "basic", "objects": rows}, kind="application/vnd.git-lfs+json")

    def _receive(self, body: bytes) -> None:
        if self.state.uploads_left is not None:
            self.state.uploads_left -= 1
            if self.state.uploads_left < 0:
                return self._answer(400, {"error": "told to stop here"})
        name = self.path.rsplit("/", 1)[1]
        assert hashlib.sha256(body).hexdigest() == name, "the client sent other bytes than it announced"
        self.state.objects[name] = body
        return self._answer(200, {})

    def _commit(self, repo: str, body: bytes) -> None:
        lines = [json.loads(line) for line in body.splitlines()]
        files: dict[str, bytes] = {}
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.state.objects[value["oid"]]
        self.state.repos[repo] |= files
        summary = next(line["value"]["summary"] for line in lines if line["key"] == "header")
        self.state.commits.append((repo, summary, sorted(files)))
        self._answer(200, {"commitUrl": f"{self.state.url}/{repo}/commit/{'1' * 40}", "commitOid": "1" * 40})

    def _tree(self, files: dict[str, bytes]) -> None:
        rows = [
            {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            for path, content in files.items()
        ]
        self._answer(200, rows)

    def _send(self, content: bytes | None) -> None:
        """A file; None is one that is not there."""
        if content is None:
            return self._respond(404, b"", {"X-Error-Code": "EntryNotFound"})
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        return self._respond(200, content, {"ETag": etag, "X-Repo-Commit": COMMIT})

    def _answer(self, status: int, data: object, *, kind: str = "application/json") -> None:
        self._respond(status, json.dumps(data).encode(), {"Content-Type": kind})

    def _respond(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
