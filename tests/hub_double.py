"""A small Hugging Face Hub on loopback, enough for the real `huggingface_hub` client to push to and load from.

It speaks the client's HTTP with git LFS for large files, not Xet: set HF_HUB_DISABLE_XET=1. `environment` has all that a process
needs to take it for the Hub; the client reads those variables when it is imported, so start a process with them.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

USER, TOKEN = "somebody", "hf_double"
_LARGE = (".safetensors", ".bin", ".pt", ".pth")


@dataclass
class Repo:
    """A repository: its files at the head of main, and the title and the changed paths of every commit, oldest first."""

    private: bool = False
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[tuple[str, list[str]]] = field(default_factory=list)

    @property
    def head(self) -> str:
        return hashlib.sha1(repr(self.commits).encode()).hexdigest()


class HubDouble:
    """What the server knows.

    Attributes:
        repos: by their name, `user/model`.
        requests: method and path of each request, oldest first.
        broken: names of repositories whose commits are answered with error 500.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.large: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.broken: set[str] = set()
        self.lock = threading.Lock()
        self.endpoint = ""

    def environment(self, home: Any) -> dict[str, str]:
        """For a process that shall take this for the Hub, and keep its cache in `home`."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_TOKEN": TOKEN,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }


@contextmanager
def running_hub() -> Iterator[HubDouble]:
    """A Hub that answers until the end of the block."""
    hub = HubDouble()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: HubDouble
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        self._handle()

    do_GET = do_HEAD = do_PUT = do_POST  # noqa: N815 - the names that http.server asks for

    def log_message(self, *args: Any) -> None:
        pass

    def _handle(self) -> None:
        # The body is read before any answer: what is left of it would be taken for the next request.
        body, path = self._body(), unquote(urlsplit(self.path).path)
        with self.hub.lock:
            self.hub.requests.append(f"{self.command} {path}")
            for method, pattern, answer in _ROUTES:
                match = re.fullmatch(pattern, path)
                if method == self.command and match:
                    return answer(self, body, **match.groupdict())
        self._error(404, f"the double does not know {self.command} {path}")

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _send(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, value: Any, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), Content_Type="application/json")

    def _error(self, status: int, message: str, code: str = "", **headers: str) -> None:
        self._send(status, json.dumps({"error": message}).encode(), X_Error_Code=code, X_Error_Message=message, **headers)

    @property
    def _authorised(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _repo(self, name: str, write: bool = False) -> Repo | None:
        """The repository; without one, or the right to it, None, and the error is sent, the same for both as on the Hub."""
        repo = self.hub.repos.get(name)
        if repo is None or (not self._authorised and (write or repo.private)):
            self._error(404, "Repository not found", "RepoNotFound")
            return None
        return repo

    def create(self, body: bytes) -> None:
        if not self._authorised:
            return self._error(401, "Invalid username or password.")
        wanted = json.loads(body)
        name = f"{wanted.get('organization') or USER}/{wanted['name']}"
        known = name in self.hub.repos
        if not known:
            self.hub.repos[name] = Repo(private=wanted.get("visibility") == "private")
        self._json({"url": f"{self.hub.endpoint}/{name}", "name": name}, 409 if known else 200)

    def validate(self, body: bytes) -> None:
        match = re.match(r"---\n(.*?)\n---\n", json.loads(body)["content"], re.DOTALL)
        try:
            metadata = yaml.safe_load(match[1]) if match else None
        except yaml.YAMLError as error:
            metadata = error
        if isinstance(metadata, dict) and all(isinstance(tag, str) for tag in metadata.get("tags", [])):
            return self._json({"errors": [], "warnings": []})
        self._json({"errors": [{"message": f"the metadata is {metadata!r}"}], "warnings": []}, 400)

    def preupload(self, body: bytes, name: str) -> None:
        if self._repo(name, write=True):
            self._json(
                {
                    "files": [
                        {
                            "path": file["path"],
                            "uploadMode": "lfs" if file["path"].endswith(_LARGE) else "regular",
                            "shouldIgnore": False,
                        }
                        for file in json.loads(body)["files"]
                    ]
                }
            )

    def large_files(self, body: bytes, name: str) -> None:
        if self._repo(name, write=True):
            wanted = [(item["oid"], item["size"]) for item in json.loads(body)["objects"]]
            upload = {oid: {"actions": {"upload": {"href": f"{self.hub.endpoint}/large/{oid}"}}} for oid, _ in wanted}
            objects = [{"oid": oid, "size": size, **({} if oid in self.hub.large else upload[oid])} for oid, size in wanted]
            self._json({"transfer": "basic", "objects": objects})

    def put_large(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            return self._error(400, "the content is not what its SHA-256 says")
        self.hub.large[oid] = body
        self._send(200, b"")

    def commit(self, body: bytes, name: str) -> None:
        repo = self._repo(name, write=True)
        if repo is None:
            return
        if name in self.hub.broken:
            return self._error(500, "the double is broken on purpose")
        lines = [json.loads(line) for line in body.splitlines()]
        changed = {}
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "lfsFile" and value["oid"] in self.hub.large:
                changed[value["path"]] = self.hub.large[value["oid"]]
            elif line["key"] == "file" and value["encoding"] == "base64":
                changed[value["path"]] = base64.b64decode(value["content"])
            else:
                return self._error(422, f"the double cannot commit a {line['key']} {value['path']}")
        repo.files |= changed
        repo.commits.append((lines[0]["value"]["summary"], sorted(changed)))
        url = f"{self.hub.endpoint}/{name}/commit/{repo.head}"
        self._json({"commitUrl": url, "commitOid": repo.head, "pullRequestUrl": None})

    def info(self, body: bytes, name: str) -> None:
        if repo := self._repo(name):
            siblings = [{"rfilename": path} for path in repo.files]
            self._json({"id": name, "sha": repo.head, "private": repo.private, "tags": [], "siblings": siblings})

    def tree(self, body: bytes, name: str) -> None:
        if repo := self._repo(name):
            files = repo.files.items()
            self._json([{"type": "file", "path": p, "size": len(c), "oid": hashlib.sha1(c).hexdigest()} for p, c in files])

    def resolve(self, body: bytes, name: str, path: str) -> None:
        repo = self._repo(name)
        if repo is None:
            return
        if path not in repo.files:
            return self._error(404, "Entry not found", "EntryNotFound", X_Repo_Commit=repo.head)
        content = repo.files[path]
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        self._send(200, content, ETag=etag, X_Repo_Commit=repo.head, Content_Type="application/octet-stream")


# There is one branch: the revision is main, or the head of it.
_NAME, _REVISION = r"(?P<name>[^/]+/[^/]+)", "(main|[0-9a-f]{40})"
_ROUTES = [
    ("POST", "/api/repos/create", _Handler.create),
    ("POST", "/api/validate-yaml", _Handler.validate),
    ("POST", f"/api/models/{_NAME}/preupload/{_REVISION}", _Handler.preupload),
    ("POST", rf"/{_NAME}\.git/info/lfs/objects/batch", _Handler.large_files),
    ("PUT", "/large/(?P<oid>[0-9a-f]{64})", _Handler.put_large),
    ("POST", f"/api/models/{_NAME}/commit/{_REVISION}", _Handler.commit),
    ("GET", f"/api/models/{_NAME}(/revision/{_REVISION})?", _Handler.info),
    ("GET", f"/api/models/{_NAME}/tree/{_REVISION}", _Handler.tree),
    ("GET", f"/{_NAME}/resolve/{_REVISION}/(?P<path>.+)", _Handler.resolve),
    ("HEAD", f"/{_NAME}/resolve/{_REVISION}/(?P<path>.+)", _Handler.resolve),
]
