"""A stand-in for a model hub: as much of its interface as huggingface_hub's client uses for adapters, in this process.

Files are stored as they come: no file is large enough here for the hub's other storage (LFS, Xet).
"""

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_of_the_tests"
NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
REPOSITORY = r"(?P<name>[^/]+/[^/]+)"


class Hub:
    """The repositories, by name: of each its commits, from a digest to all files."""

    def __init__(self) -> None:
        self.address = ""
        self.repositories: dict[str, dict[str, dict[str, bytes]]] = {}
        self.requests: list[str] = []

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        """The files of a revision.

        Raises:
            LookupError: there is no such repository or revision; its argument is the hub's word for that.
        """
        if name not in self.repositories:
            raise LookupError("RepoNotFound")
        commits = self.repositories[name]
        if revision == "main" and not commits:
            return {}
        revision = list(commits)[-1] if revision == "main" else revision
        if revision not in commits:
            raise LookupError("RevisionNotFound")
        return commits[revision]

    def commit_of(self, name: str, revision: str = "main") -> str:
        commits = list(self.repositories[name])
        return revision if revision in commits else commits[-1] if commits else "0" * 40

    def commit(self, name: str, lines: list[dict[str, Any]]) -> str:
        """Add a commit; its lines are a header and files."""
        files = dict(self.files(name))
        for line in lines:
            if line["key"] == "file":
                assert line["value"]["encoding"] == "base64"
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            else:
                assert line["key"] == "header", line
        text = repr([len(self.repositories[name]), sorted(files.items())])
        digest = hashlib.sha1(text.encode()).hexdigest()
        self.repositories[name][digest] = files
        return digest

    def card(self, name: str) -> dict[str, Any]:
        """The metadata of a repository's README.md."""
        return metadata(self.files(name).get("README.md", b"").decode())


def metadata(card: str) -> dict[str, Any]:
    parts = card.split("---\n", 2)
    return (yaml.safe_load(parts[1]) or {}) if len(parts) == 3 else {}


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        path = self._path()
        if path == "/api/validate-yaml":
            base = metadata(json.loads(body)["content"]).get("base_model")
            wrong = [name for name in ([base] if isinstance(base, str) else base or []) if not NAME.fullmatch(name)]
            errors = [{"message": f'"base_model" with value "{name}" is not valid'} for name in wrong]
            self._answer(400 if errors else 200, {"errors": errors, "warnings": []})
        elif self.headers.get("authorization") != f"Bearer {TOKEN}":
            self._answer(401, {"error": "Invalid username or password."})
        elif path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization'] or 'you'}/{asked['name']}"
            status = 409 if name in self.hub.repositories else 200
            self.hub.repositories.setdefault(name, {})
            self._answer(status, {"url": f"{self.hub.address}/{name}"})
        elif found := re.fullmatch(rf"/api/models/{REPOSITORY}/preupload/main", path):
            paths = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": each, "uploadMode": "regular", "shouldIgnore": False} for each in paths]
            self._answer(200, {"files": modes})
        elif found := re.fullmatch(rf"/api/models/{REPOSITORY}/commit/main", path):
            lines = [json.loads(line) for line in body.splitlines()]
            digest = self.hub.commit(found["name"], lines)
            self._answer(200, {"commitUrl": f"{self.hub.address}/{found['name']}/commit/{digest}", "commitOid": digest})
        else:
            self._answer(404, {"error": f"the stand-in has no {path}"})

    def do_GET(self) -> None:
        path = self._path()
        try:
            if found := re.fullmatch(rf"/{REPOSITORY}/resolve/(?P<revision>[^/]+)/(?P<file>.+)", path):
                files = self.hub.files(found["name"], found["revision"])
                if found["file"] not in files:
                    raise LookupError("EntryNotFound")
                content = files[found["file"]]
                commit = self.hub.commit_of(found["name"], found["revision"])
                self._send(200, content, {"ETag": f'"{_blob(content)}"', "X-Repo-Commit": commit})
            elif found := re.fullmatch(rf"/api/models/{REPOSITORY}(/revision/(?P<revision>[^/]+))?", path):
                name, revision = found["name"], found["revision"] or "main"
                files, card = self.hub.files(name, revision), self.hub.card(name)
                siblings = [{"rfilename": file} for file in files]
                info = {"id": name, "sha": self.hub.commit_of(name, revision), "siblings": siblings, "cardData": card}
                self._answer(200, {**info, "library_name": card.get("library_name"), "tags": card.get("tags", [])})
            elif found := re.fullmatch(rf"/api/models/{REPOSITORY}/tree/(?P<revision>[^/]+)", path):
                files = self.hub.files(found["name"], found["revision"])
                entries = [
                    {"type": "file", "path": file, "size": len(content), "oid": _blob(content)}
                    for file, content in files.items()
                ]
                self._answer(200, entries)
            else:
                self._answer(404, {"error": f"the stand-in has no {path}"})
        except LookupError as error:
            code = error.args[0]
            # As the hub does: who may not see a private repository learns no more than who asks for none.
            self._answer(401 if code == "RepoNotFound" else 404, {"error": code}, {"X-Error-Code": code})

    def do_HEAD(self) -> None:
        self.do_GET()

    def _path(self) -> str:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        return path

    def _answer(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        self._send(status, json.dumps(content).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _blob(content: bytes) -> str:
    """The digest by which git knows a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextmanager
def running_hub() -> Iterator[Hub]:
    """An empty hub that answers on this machine."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
