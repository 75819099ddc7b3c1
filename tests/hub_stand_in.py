"""A stand-in for a Hugging Face hub: the part of its HTTP interface that huggingface_hub uses to
make a repository, commit files to it (large ones by Git LFS), list it and download from it."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

LFS = (".onnx", ".onnx.data", ".sqlite")


@dataclass
class Repository:
    """Commits, the last of which is the branch main; each is all files of the repository."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes]) -> str:
        """Add a commit; its number is one of its files and of when it was made."""
        text = repr((len(self.commits), sorted(files.items())))
        name = hashlib.sha1(text.encode()).hexdigest()
        self.commits[name] = files
        return name

    @property
    def main(self) -> str:
        return next(reversed(self.commits))

    def at(self, revision: str) -> str:
        """The commit of a revision; KeyError if there is none."""
        commit = self.main if revision == "main" else revision
        if commit not in self.commits:
            raise KeyError(revision)
        return commit


class Hub:
    """The server's state."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}  # of LFS, by SHA-256
        self.requests: list[str] = []
        self.url = ""
        self.cut: str | None = None  # a file that is sent only by half
        self.slow = 0.0  # seconds between two pieces of a file

    def new(self, name: str, private: bool = False) -> Repository:
        """A repository with a first commit, as the hub makes it."""
        self.repositories[name] = Repository(private)
        self.repositories[name].commit({".gitattributes": b"*.onnx filter=lfs\n"})
        return self.repositories[name]


class Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        path, body = self.received()
        if path == "/api/repos/create":
            wanted = json.loads(body)
            name = f"{wanted['organization']}/{wanted['name']}"
            there = name in self.hub.repositories
            if not there:
                self.hub.new(name, wanted.get("private", False))
            return self.answer(409 if there else 200, {"url": f"{self.hub.url}/{name}"})
        if path == "/api/validate-yaml":
            good = json.loads(body)["content"].startswith("---\nlicense: ")
            return self.answer(200 if good else 400, {"errors": [], "warnings": []})
        if path.endswith("/info/lfs/objects/batch"):
            return self.lfs_batch(json.loads(body))
        _, _, _, owner, name, verb, _ = path.split("/")
        repository = self.hub.repositories[f"{owner}/{name}"]
        if verb == "preupload":
            return self.upload_modes(repository, json.loads(body))
        return self.commit(repository, body)

    def upload_modes(self, repository: Repository, wanted: Any) -> None:
        there = repository.commits[repository.main]
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(LFS) else "regular",
                "shouldIgnore": False,
                "oid": object_id(file["path"], there[file["path"]])
                if file["path"] in there
                else None,
            }
            for file in wanted["files"]
        ]
        self.answer(200, {"files": files})

    def lfs_batch(self, wanted: Any) -> None:
        objects = [
            {
                "oid": file["oid"],
                "size": file["size"],
                "actions": {"upload": {"href": f"{self.hub.url}/lfs/{file['oid']}"}},
            }
            for file in wanted["objects"]
        ]
        self.answer(200, {"transfer": "basic", "objects": objects})

    def commit(self, repository: Repository, body: bytes) -> None:
        files = dict(repository.commits[repository.main])
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        commit = repository.commit(files)
        self.answer(200, {"commitUrl": f"{self.hub.url}/x/y/commit/{commit}", "commitOid": commit})

    def do_PUT(self) -> None:
        path, body = self.received()
        oid = path.rpartition("/")[2]
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.objects[oid] = body
        self.answer(200, {})

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path, _ = self.received()
        parts = path.removeprefix("/api/models").strip("/").split("/")
        repository = self.hub.repositories.get("/".join(parts[:2]))
        if repository is None:
            return self.answer(404, {}, {"X-Error-Code": "RepoNotFound"})
        try:
            commit = repository.at(parts[3] if len(parts) > 3 else "main")
        except KeyError:
            return self.answer(404, {}, {"X-Error-Code": "RevisionNotFound"})
        files = repository.commits[commit]
        if path.startswith("/api/models"):
            return self.answer(200, described("/".join(parts[:2]), repository, commit))
        name = "/".join(parts[4:])
        if name not in files:
            return self.answer(404, {}, {"X-Error-Code": "EntryNotFound"})
        return self.send_file(name, files[name], commit)

    def send_file(self, name: str, content: bytes, commit: str) -> None:
        self.send_response(200)
        self.send_header("ETag", f'"{object_id(name, content)}"')
        self.send_header("X-Repo-Commit", commit)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.hub.cut == name:
            self.wfile.write(content[: len(content) // 2])
            self.close_connection = True
            return
        step = 1024 if self.hub.slow else len(content) or 1
        for start in range(0, len(content), step):
            self.wfile.write(content[start : start + step])
            time.sleep(self.hub.slow)

    def received(self) -> tuple[str, bytes]:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        return path, self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def answer(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        for name, text in (headers or {}).items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Says nothing."""


def described(name: str, repository: Repository, commit: str) -> dict[str, Any]:
    """What the hub says about a commit."""
    siblings = []
    for path, content in repository.commits[commit].items():
        file: dict[str, Any] = {"rfilename": path, "size": len(content), "blobId": git_id(content)}
        if path.endswith(LFS):
            sha = hashlib.sha256(content).hexdigest()
            file["lfs"] = {"size": len(content), "sha256": sha, "pointerSize": 130}
        siblings.append(file)
    return {"id": name, "sha": commit, "private": repository.private, "siblings": siblings}


def git_id(content: bytes) -> str:
    """The id of a file's object in git."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def object_id(path: str, content: bytes) -> str:
    """What the hub calls a file's content: SHA-256 in LFS, else the id of git."""
    return hashlib.sha256(content).hexdigest() if path.endswith(LFS) else git_id(content)


@contextmanager
def serve() -> Iterator[Hub]:
    """A running hub, on a free port of this machine."""
    hub = Hub()
    handler = type("BoundHandler", (Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
