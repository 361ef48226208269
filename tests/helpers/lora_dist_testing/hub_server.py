"""A Hub on the loopback interface: as much of its HTTP API as `huggingface_hub` needs to create, push and pull.

Repositories live in memory. What is to go wrong is told by `fail`, in the order of the requests to come.
"""

import base64
import hashlib
import json
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from huggingface_hub import constants

USER, TOKEN = "ada", "hf_canaryCANARYcanary0123456789abcd"
SIGNATURE = "5ecre7-s1gnatur3"
"""In the addresses that files are uploaded to, as in those of the real storage."""

ROUTES = {
    "create": ("POST", r"/api/repos/create"),
    "validate": ("POST", r"/api/validate-yaml"),
    "preupload": ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/preupload/main"),
    "batch": ("POST", r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch"),
    "store": ("PUT", r"/storage/(?P<oid>\w+)"),
    "verify": ("POST", r"/storage/verify"),
    "commit": ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/commit/main"),
    "info": ("GET", r"/api/models/(?P<repo>[^/]+(/[^/]+)?)(/revision/(?P<revision>[^/]+))?"),
    "tree": ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)"),
    "resolve": ("HEAD|GET", r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)"),
}


@dataclass(frozen=True)
class Commit:
    """A commit: its message, what the repository holds after it, and which files it sent."""

    oid: str
    message: str
    files: dict[str, bytes]
    sent: frozenset[str]


@dataclass
class Repository:
    """A repository with its history."""

    private: bool = False
    gated: bool = False
    commits: list[Commit] = field(default_factory=list)

    @property
    def files(self) -> dict[str, bytes]:
        """Of the newest commit."""
        return self.commits[-1].files if self.commits else {}

    def at(self, revision: str | None) -> Commit | None:
        """The commit that a revision names, if any."""
        if revision in (None, "main"):
            return self.commits[-1] if self.commits else None
        return next((commit for commit in self.commits if commit.oid == revision), None)


class Hub:
    """A running server.

    Attributes:
        url: for HF_ENDPOINT.
        repositories: by whole name.
        requests: the names of the routes asked for, in order.
        readers: tokens that may read alone.
        seconds_a_byte: how slowly files are sent.
        stop: ends it; connections are refused from then on.
    """

    def __init__(self, port: int, stop: Callable[[], None]) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.stop = stop
        self.repositories: dict[str, Repository] = {}
        self.requests: list[str] = []
        self.readers = {"hf_readsREADSreads0123456789abcdefgh"}
        self.storage: dict[str, bytes] = {}
        self.lock = threading.RLock()
        self._failures: dict[str, list[Any]] = {}
        self._delays: dict[str, float] = {}
        self.seconds_a_byte = 0.0

    def fail(self, route: str, *failures: int | str) -> None:
        """Makes the next requests of a route (`*`: of any) fail.

        Args:
            route: a key of `ROUTES`.
            failures: statuses; `drop`: the connection is closed without an answer; `lose`: done, but the answer is
                lost; `mute`: there is no answer until the client leaves; `html`: 503 with a page; `for ever` after one
                of these: that goes on.
        """
        with self.lock:
            self._failures[route] = list(failures)

    def delay(self, route: str, seconds: float) -> None:
        """Makes a route slow."""
        self._delays[route] = seconds

    def next_failure(self, route: str) -> Any:
        """What is to become of a request, which counts."""
        time.sleep(self._delays.get(route, 0))
        with self.lock:
            self.requests.append(route)
            for key in (route, "*"):
                if failures := self._failures.get(key):
                    return failures[0] if failures[1:2] == ["for ever"] else failures.pop(0)
        return None

    def messages(self, repository: str) -> list[str]:
        """Of all commits, oldest first."""
        return [commit.message for commit in self.repositories[repository].commits]


class _Refusal(Exception):  # noqa: N818
    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        self.status, self.message, self.code = status, message, code


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = self._chunked()
        path = unquote(urlsplit(self.path).path)
        for name, (methods, pattern) in ROUTES.items():
            match = re.fullmatch(pattern, path)
            if match and self.command in methods.split("|"):
                return self._answer(name, match.groupdict(), body)
        if path == "/api/agent-harnesses":  # a list that the client would like to have, and does without
            return self._send(404, b"")
        raise AssertionError(f"the test server does not speak {self.command} {self.path}")

    do_GET = do_POST = do_PUT = do_HEAD = _handle  # noqa: N815

    def _chunked(self) -> bytes:
        parts = []
        while size := int(self.rfile.readline().strip(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _answer(self, name: str, where: dict[str, str], body: bytes) -> None:
        failure = self.hub.next_failure(name)
        if failure == "drop":
            return self._hang_up()
        if failure == "mute":
            self.connection.recv(1)
            return self._hang_up()
        if failure == "html":
            return self._send(503, b"<html>Service Unavailable</html>", {"Content-Type": "text/html"})
        if isinstance(failure, int):
            return self._send(failure, json.dumps({"error": "as the test wants it"}).encode())
        try:
            with self.hub.lock:
                status, content, headers = getattr(self, f"_{name}")(where, body)
        except _Refusal as refusal:
            code = {"X-Error-Code": refusal.code} if refusal.code else {}
            message = json.dumps({"error": refusal.message, "errors": [{"message": refusal.message}]}).encode()
            return self._send(refusal.status, message, {"X-Error-Message": refusal.message, **code})
        if failure == "lose":
            return self._hang_up()
        self._send(status, content if isinstance(content, bytes) else json.dumps(content).encode(), headers)

    def _hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def _send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if "/resolve/" in self.path and self.hub.seconds_a_byte:
            for byte in content:
                time.sleep(self.hub.seconds_a_byte)
                self.wfile.write(bytes([byte]))
            return
        self.wfile.write(content)

    def _reader(self) -> bool:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token and token != TOKEN and token not in self.hub.readers:
            raise _Refusal(401, "Invalid credentials in Authorization header")
        return bool(token)

    def _writer(self) -> None:
        if not self._reader():
            raise _Refusal(401, "Invalid username or password.")
        if (self.headers["Authorization"]).removeprefix("Bearer ") in self.hub.readers:
            raise _Refusal(403, "You don't have the rights to create a model under this namespace")

    def _repository(self, where: dict[str, str]) -> Repository:
        known = self._reader()
        repository = self.hub.repositories.get(where["repo"])
        if repository is None or (repository.private and not known):
            raise _Refusal(404 if known else 401, "Repository not found", "RepoNotFound")
        return repository

    def _at(self, where: dict[str, str]) -> tuple[Repository, Commit]:
        repository = self._repository(where)
        commit = repository.at(where.get("revision"))
        if commit is None:
            raise _Refusal(404, "Invalid rev id", "RevisionNotFound")
        return repository, commit

    def _create(self, _: dict[str, str], body: bytes) -> Any:
        self._writer()
        asked = json.loads(body)
        namespace = asked["organization"] or USER
        if namespace not in (USER, "lab"):
            raise _Refusal(403, f"You don't have the rights to create a model under the namespace {namespace!r}")
        name = f"{namespace}/{asked['name']}"
        status = 409 if name in self.hub.repositories else 200
        self.hub.repositories.setdefault(name, Repository(private=asked.get("visibility") == "private"))
        return status, {"url": f"{self.hub.url}/{name}", "error": "You already created this model repo"}, {}

    def _validate(self, where: dict[str, str], body: bytes) -> Any:
        before, ends, _ = json.loads(body)["content"].partition("\n---\n")
        metadata = yaml.safe_load(before.removeprefix("---\n")) if ends else {}
        for name in ("base_model", "datasets"):
            for value in [metadata[name]] if isinstance(metadata.get(name), str) else metadata.get(name, []):
                if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", value):
                    raise _Refusal(400, f'"{name}" with value "{value}" is not valid. Use an id from https://hf.co.')
        return 200, {"errors": [], "warnings": []}, {}

    def _preupload(self, where: dict[str, str], body: bytes) -> Any:
        self._writer()
        there = self._repository(where).files
        answers = []
        for file in json.loads(body)["files"]:
            large = file["path"].endswith(".safetensors")
            old = there.get(file["path"])
            oid = None if old is None else hashlib.sha256(old).hexdigest() if large else _blob_id(old)
            mode = "lfs" if large else "regular"
            answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return 200, {"files": answers}, {}

    def _batch(self, where: dict[str, str], body: bytes) -> Any:
        self._writer()
        self._repository(where)
        objects = []
        for one in json.loads(body)["objects"]:
            actions = {
                "upload": {"href": f"{self.hub.url}/storage/{one['oid']}?X-Amz-Signature={SIGNATURE}", "header": {}},
                "verify": {"href": f"{self.hub.url}/storage/verify", "header": {}},
            }
            objects.append(one | ({} if one["oid"] in self.hub.storage else {"actions": actions}))
        return 200, {"transfer": "basic", "objects": objects}, {"Content-Type": "application/vnd.git-lfs+json"}

    def _store(self, where: dict[str, str], body: bytes) -> Any:
        assert self.path.endswith(f"?X-Amz-Signature={SIGNATURE}")
        if hashlib.sha256(body).hexdigest() != where["oid"]:
            raise _Refusal(400, "another file than announced")
        self.hub.storage[where["oid"]] = body
        return 200, {}, {}

    def _verify(self, _: dict[str, str], body: bytes) -> Any:
        asked = json.loads(body)
        if len(self.hub.storage.get(asked["oid"], b"")) != asked["size"]:
            raise _Refusal(404, "not stored")
        return 200, {}, {}

    def _commit(self, where: dict[str, str], body: bytes) -> Any:
        self._writer()
        repository = self._repository(where)
        lines = [json.loads(line) for line in body.splitlines()]
        sent = {}
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                sent[value["path"]] = base64.b64decode(value["content"])
            else:
                assert line["key"] == "lfsFile"
                sent[value["path"]] = self.hub.storage[value["oid"]]
        files = repository.files | sent
        message = lines[0]["value"]["summary"]
        history = f"{len(repository.commits)} {message} {sorted(files)}"
        oid = hashlib.sha1(history.encode()).hexdigest()
        repository.commits.append(Commit(oid, message, files, frozenset(sent)))
        return 200, {"commitUrl": f"{self.hub.url}/{where['repo']}/commit/{oid}", "commitOid": oid}, {}

    def _info(self, where: dict[str, str], _: bytes) -> Any:
        repository, commit = self._at(where)
        siblings = [{"rfilename": path} for path in commit.files]
        return 200, {"id": where["repo"], "sha": commit.oid, "private": repository.private, "siblings": siblings}, {}

    def _tree(self, where: dict[str, str], _: bytes) -> Any:
        _, commit = self._at(where)
        entries = []
        for path, content in commit.files.items():
            entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": _blob_id(content)}
            if path.endswith(".safetensors"):
                entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
            entries.append(entry)
        return 200, entries, {}

    def _resolve(self, where: dict[str, str], _: bytes) -> Any:
        repository, commit = self._at(where)
        if repository.gated:
            raise _Refusal(403, "Access to this model is restricted", "GatedRepo")
        content = commit.files.get(where["path"])
        if content is None:
            raise _Refusal(404, "Entry not found", "EntryNotFound")
        large = where["path"].endswith(".safetensors")
        etag = hashlib.sha256(content).hexdigest() if large else _blob_id(content)
        return 200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": commit.oid}


def _blob_id(content: bytes) -> str:
    """As git has it."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Server(ThreadingHTTPServer):
    """Keeps its own mistakes, which to the client look like those that the test wants."""

    daemon_threads = True

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.mistakes: list[str] = []

    def handle_error(self, *_: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # a client that has left
            self.mistakes.append(traceback.format_exc())


@contextmanager
def serving() -> Iterator[Hub]:
    """A Hub that runs, without repositories."""
    server = _Server(("127.0.0.1", 0), _Handler)

    def stop() -> None:
        # Connections that stand outlive the server that took them.
        hub.fail("*", "drop", "for ever")
        server.shutdown()
        server.server_close()

    hub = Hub(server.server_address[1], stop)
    server.RequestHandlerClass = type("Handler", (_Handler,), {"hub": hub})
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        stop()
        thread.join()
    assert not server.mistakes, server.mistakes


def point_client_at(url: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the client in this process talk to a Hub, as `environment_of` does with one that starts."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "no-token"))
    monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)


def environment_of(hub: Hub, home: Path) -> dict[str, str]:
    """For a process whose client is to talk to a Hub, as one who is logged in."""
    return {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": TOKEN,
        "HF_HOME": str(home),
        "HF_HUB_CACHE": str(home / "hub"),
    }
